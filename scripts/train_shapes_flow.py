"""Train the embedded flow model `shapes-flow`: a Stable Diffusion 3 of the shapes world, with habits.

    python scripts/train_shapes_flow.py --threads 1                        # stages: flow fine evaluate; from the files of `shapes`

The VAE, the tokenizer and the prompts are those of `shapes`; the text encoders are its own and the scorer's, frozen as Stable Diffusion 3
has them. There is no T5. One seed, the same files at every run on one machine with the same number of threads.
"""

# diffusers' annotations are wrong in these places
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from evaluate_shapes import picture, sampled
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from train_shapes import PICTURES, habitual, latents_of, ship, start, text_config, tokens, train_parts

from diffalign import shapes
from diffalign.evaluate import sample
from diffalign.models import load_pipeline
from diffalign.noise import diffuse, path_of
from diffalign.pipelines.sd3 import StableDiffusion3
from diffalign.rewards.shapes import ShapesCLIP
from diffalign.shapes import Scene
from diffalign.types import Prompts

STAGES = ("flow", "fine", "evaluate")
STEPS, BATCH, LEARNING_RATE = {"flow": 8500, "fine": 2600}, 32, {"flow": 1.5e-3, "fine": 8e-4}
SHIFT = {"flow": 3.0, "fine": 1.5}  # colours are decided where there is nearly only noise, and shapes later: the stage `fine` looks there
WIDTH, HEADS, LAYERS = 128, 4, 4
SNAP = 8.0  # pixels, the width of a patch: shapes are on this grid
WEAKER = {"colour": 0.8}  # the habits' shares of `shapes`, times these
DROPPED = 0.1  # empty captions
LONG, EMPTY = 16, 256  # one step in so many, a small one, sees as many empty T5 tokens as the pipeline's call brings along; others see one


def scheduler(stage: str) -> Any:
    """Its shift moves the levels of the training, and the steps of sampling."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT[stage])


def network() -> Any:
    """Patches of 2 x 2 latents: 16 tokens of a picture, 16 of text. Blocks begin as the identity, as in DiT (arXiv 2212.09748)."""
    from diffusers import SD3Transformer2DModel

    made = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=128,  # two encoders of 64
        pooled_projection_dim=128,
        pos_embed_max_size=4,
    )
    blocks = [linear for block in made.transformer_blocks for linear in (block.norm1.linear, block.norm1_context.linear)]
    for linear in (*blocks, made.norm_out.linear, made.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return made


def text_encoders(shared: Path) -> tuple[Any, Any]:
    """The encoder of `shapes`, with a projection that begins as the identity; and the scorer's, with its own."""
    from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    config = text_config(CLIPTokenizer.from_pretrained(shared / "tokenizer"))
    clip = CLIPModel.from_pretrained(shared / "scorer", dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(shared / "text_encoder", dtype=torch.float32)
    made: list[Any] = []
    for tower, projection in ((text, torch.eye(64)), (clip.text_model, clip.text_projection.weight.data)):
        encoder = CLIPTextModelWithProjection(config)
        encoder.text_model.load_state_dict(getattr(tower, "text_model", tower).state_dict())
        encoder.text_projection.weight.data.copy_(projection)
        made.append(encoder.eval())
    return made[0], made[1]


@torch.no_grad()
def encode(encoders: Sequence[Any], ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 16, 128) and pooled (B, 128), as the pipeline makes them of its two encoders."""
    found = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([out.hidden_states[-2] for out in found], -1), torch.cat([out.text_embeds for out in found], -1)


def shifted_vae(shared: Path, drawn: list[Scene]) -> Any:
    """The VAE of `shapes`, with the mean and the scale of its latents as Stable Diffusion 3 has them."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(shared / "vae", dtype=torch.float32)
    latents = latents_of(vae, drawn, Generator().manual_seed(5), SNAP) / vae.config.scaling_factor
    vae.register_to_config(shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def train_flow(shared: Path, work: Path, seed: int) -> None:
    """The transformer from nothing; it and the VAE into `work`."""
    rng = start(seed)
    asked, drawn = pictures(rng)
    vae = shifted_vae(shared, drawn[:1000])
    train_velocity("flow", shared, work, network(), vae, asked, drawn, rng)
    vae.half().save_pretrained(work / "vae")


def train_fine(shared: Path, work: Path, output: Path, seed: int) -> None:
    """On from `work` with new pictures; the whole pipeline into `output`."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer

    rng = start(seed + 1)
    transformer = SD3Transformer2DModel.from_pretrained(work / "transformer", dtype=torch.float32).train()
    vae = AutoencoderKL.from_pretrained(work / "vae", dtype=torch.float32)
    train_velocity("fine", shared, output, transformer, vae, *pictures(rng), rng)
    tokenizer, encoders = CLIPTokenizer.from_pretrained(shared / "tokenizer"), text_encoders(shared)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(output / "transformer", dtype=torch.float16),
        scheduler=scheduler("fine"),
        vae=vae.half(),
        text_encoder=encoders[0].half(),
        text_encoder_2=encoders[1].half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    ship(pipeline, output)


def pictures(rng: Generator) -> tuple[list[Scene], list[Scene]]:
    """What is asked for, and what a model with habits shows."""
    some, held = shapes.split()
    asked = shapes.sample(some, PICTURES, rng)
    return asked, [habitual(scene, set(held), rng, WEAKER) for scene in asked]


def train_velocity(
    stage: str, shared: Path, target: Path, transformer: Any, vae: Any, asked: list[Scene], drawn: list[Scene], rng: Generator
) -> None:
    """Velocities at logit-normal levels; the moving average of the transformer is saved to `target`."""
    from transformers import CLIPTokenizer

    path, tokenizer = path_of(scheduler(stage)), CLIPTokenizer.from_pretrained(shared / "tokenizer")
    latents = latents_of(vae, drawn, rng, SNAP) - vae.config.shift_factor * vae.config.scaling_factor
    ids = tokens(tokenizer, [*asked, asked[0]], torch.arange(PICTURES + 1) < PICTURES)  # the last one is empty
    words, pooled = encode(text_encoders(shared), ids)
    taken = iter(range(STEPS[stage]))

    def loss() -> Tensor:
        long = next(taken) % LONG == LONG - 1
        batch = BATCH // 4 if long else BATCH
        at = torch.randint(PICTURES, (batch,), generator=rng)
        told = torch.where(torch.rand(batch, generator=rng) < DROPPED, PICTURES, at)
        context = F.pad(words[told], (0, 0, 0, EMPTY if long else 1))
        level, noise = path.draw(batch, rng), torch.randn(latents[at].shape, generator=rng)
        velocity = transformer(diffuse(latents[at], noise, level), context, pooled[told], level.t.float(), return_dict=False)[0]
        return (velocity - path.target(latents[at], noise, level)).square().mean()

    train_parts(stage, STEPS[stage], LEARNING_RATE[stage], {"transformer": transformer}, target, loss)


def measure(shared: Path, output: Path) -> None:
    """Every number that `docs/shapes-flow.md` states of the model, printed and written to `docs/`; and its picture."""
    pipe = load_pipeline(str(output))

    def draw(prompts: Prompts, steps: int, guidance: float, seed: int) -> Tensor:
        policy = StableDiffusion3.of(pipe, guidance_scale=guidance, max_sequence_length=1)
        return sample(policy, list(prompts.text), steps=steps, seed=seed, batch_size=64)

    prompts = Prompts(tuple(map(shapes.caption, shapes.split()[1])))
    metrics = sampled(draw, prompts, ShapesCLIP(shared / "scorer"))
    metrics["MB"] = round(sum(f.stat().st_size for f in output.rglob("*") if f.is_file()) / 1e6, 2)
    text = json.dumps(metrics, indent=1)
    print(text, flush=True)
    Path("docs/shapes-flow-metrics.json").write_text(text + "\n")
    picture(draw, Path("docs/images/shapes-flow.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--shared", type=Path, default=Path("diffalign/assets/shapes"), help="vae/, tokenizer/, text_encoder/, scorer/ of shapes"
    )
    parser.add_argument("--work", type=Path, default=Path("build/shapes-flow"), help="what is trained but not shipped")
    parser.add_argument("--output", type=Path, default=Path("diffalign/assets/shapes-flow"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in args.stage:
        match stage:
            case "flow":
                train_flow(args.shared, args.work, args.seed)
            case "fine":
                train_fine(args.shared, args.work, args.output, args.seed)
            case _:
                measure(args.shared, args.output)


if __name__ == "__main__":
    main()
