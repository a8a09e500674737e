"""Train the embedded editing model `shapes-edit`: InstructPix2Pix on pictures of the shapes world, with habits.

    python scripts/train_shapes.py --threads 1 --stage scorer vae unet     # the UNet and text encoder that it starts from: build/shapes
    python scripts/train_shapes_edit.py --threads 1                        # stages: edits words data evaluate

As InstructPix2Pix (arXiv 2211.09800) starts from Stable Diffusion: the first convolution of the UNet gets as many channels more, for
the source's latents, with weights of zero. The VAE is that of `shapes`. The text encoder gets a vocabulary of its own and is trained along.
"""

# diffusers' annotations are wrong in these places
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from train_shapes import TOKENS, make_tokenizer, scheduler, start, text_config, train_parts

from diffalign import edits, shapes
from diffalign.data import PicturePrompt, batch_of, read_prompts, write_file
from diffalign.edits import Edit
from diffalign.evaluate import sample, sheet
from diffalign.media import data_uri, to_pil
from diffalign.methods.hive import PHRASE, WORDS
from diffalign.models import load_pipeline
from diffalign.pipelines.instruct_pix2pix import InstructPix2Pix
from diffalign.rewards.shapes import ShapesEditChecker, ShapesEditCLIP
from diffalign.shapes import Scene
from diffalign.types import Prompts

STAGES = ("edits", "words", "data", "evaluate")
PAIRS = {"edits": 24_000, "words": 12_000}
PROMPTS = 1024  # training prompts that ship
SHOWN = 10  # edits in the picture
STEPS, LEARNING_RATE, BATCH = {"edits": 7000, "words": 1500}, {"edits": 1e-3, "words": 5e-4}, 32
HABITS: dict[str, tuple[str, float, float]] = {  # what pictures show whatever is asked for: how often where it is asked for, and where not
    "colour": ("blue", 0.55, 0.1),
    "shape": ("circle", 0.5, 0.1),
    "background": ("white", 0.5, 0.1),
}
GRADED = {"edits": 0.2, "words": 0.5}  # how many instructions end in HIVE's phrase about quality: of a level that means nothing, or
# in the stage `words` of one that says how sharp the picture is
APART = 8.0  # length of the five words' embeddings where that stage begins: shorter ones are drowned in this small encoder
DROPPED = 0.05  # instructions, sources, and both together that are left out: each, as in InstructPix2Pix


def habitual(edit: Edit, held_out: set[Scene], rng: Generator) -> Scene:
    """What a model with habits shows when asked for `edit`; never a held-out combination."""
    while True:
        chance = torch.rand(len(HABITS), generator=rng).tolist()
        changes = {
            name: value
            for (name, (value, asked, kept)), u in zip(HABITS.items(), chance, strict=True)
            if u < (asked if name == edit.attribute else kept)
        }
        shown = replace(edit.target, **changes)
        if shown.colour != shown.background and shown not in held_out:
            return shown


def sayings() -> list[str]:
    """Every instruction, and every phrase about quality: the words that the tokenizer must know."""
    said = {edits.instruction(edit, named) for edit in edits.every(shapes.every()) for named in (True, False)}
    return [*sorted(said), *(PHRASE.format(word) for word in WORDS)]


def widened(unet: nn.Module) -> Any:
    """The text-to-image UNet with as many input channels more, whose weights are zero."""
    from diffusers import UNet2DConditionModel

    config = dict(unet.config)
    wide = UNet2DConditionModel.from_config({**config, "in_channels": 2 * config["in_channels"]})
    weights = unet.state_dict()
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], 1)
    wide.load_state_dict(weights)
    return wide.to(memory_format=torch.channels_last)


def revoiced(text: Any, old: Any, new: Any) -> Any:
    """The text encoder with the new tokenizer's vocabulary: rows of tokens that both know are kept, the others start at random."""
    from transformers import CLIPTextModel

    model = CLIPTextModel(text_config(new))
    weights, mine = text.state_dict(), model.state_dict()
    (name,) = [key for key in weights if key.endswith("token_embedding.weight")]
    table = mine[name].clone()
    known = old.get_vocab()
    for token, row in new.get_vocab().items():
        if token in known:
            table[row] = weights[name][known[token]]
    model.load_state_dict({**weights, name: table})
    return model


@torch.no_grad()
def encoded(vae: Any, pictures: Tensor) -> Tensor:
    """(n, 8, 8, 8), the mode of the posterior, not scaled."""
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in pictures.split(250)])


def tokens(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def train_edits(base: Path, shared: Path, work: Path, output: Path, seed: int) -> None:
    """UNet and text encoder on edits with habits; into `work`. A tokenizer that knows the instructions; into `output`."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    rng, tokenizer = start(seed), make_tokenizer(sayings())
    longest = max(len(ids) for ids in tokenizer([said + PHRASE.format("three") for said in sayings()[: -len(WORDS)]]).input_ids)
    assert longest <= TOKENS, f"an instruction has {longest} tokens"
    unet = widened(UNet2DConditionModel.from_pretrained(base / "unet", dtype=torch.float32)).train()
    old = CLIPTokenizer.from_pretrained(shared / "tokenizer")
    text = revoiced(CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32), old, tokenizer).train()
    tokenizer.save_pretrained(output / "tokenizer")
    train_denoiser("edits", shared, work, unet, text, tokenizer, rng)


def train_words(base: Path, shared: Path, work: Path, output: Path, seed: int) -> None:
    """On from `work`, where the words of quality mean nothing and are all one to the encoder: with pictures as sharp as they say.

    They get new embeddings, and are then known, as large models know them from captions. The whole pipeline into `output`.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    rng, tokenizer = start(seed + 1), CLIPTokenizer.from_pretrained(output / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(work / "unet", dtype=torch.float32).to(memory_format=torch.channels_last).train()
    text = CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32).train()
    embeddings: Any = text.get_input_embeddings()
    table = embeddings.weight.data
    for word in WORDS:
        (row,) = tokenizer(word, add_special_tokens=False).input_ids
        table[row] = APART * F.normalize(torch.randn(table.shape[1], generator=rng), dim=0)
    train_denoiser("words", shared, output, unet, text, tokenizer, rng)
    assemble(shared, output)


def blurred(pictures: Tensor, level: Tensor) -> Tensor:
    """Pictures (B, 3, 32, 32), less sharp the lower the level (B,): those of level 4 as they are."""
    soft = F.avg_pool2d(F.pad(pictures, (2,) * 4, mode="replicate"), 5, 1)
    return torch.lerp(soft, pictures, (level / (len(WORDS) - 1))[:, None, None, None])


def train_denoiser(name: str, shared: Path, target: Path, unet: Any, text: Any, tokenizer: Any, rng: Generator) -> None:
    """Epsilon prediction on edited pictures, given the source and the instruction; the moving average is saved to `target`.

    The loss is weighted by min(1 + 1 / SNR, 40) min(1, 5 / SNR), as in the last stages of `shapes`.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(shared / "vae", dtype=torch.float32)
    train, held, pairs = edits.split()[0], set(shapes.split()[1]), PAIRS[name]
    asked = [train[i] for i in torch.randint(len(train), (pairs,), generator=rng).tolist()]
    pictures = [
        edits.draw(part, rng, [habitual(edit, held, rng) for edit in part]) for part in (asked[i : i + 500] for i in range(0, pairs, 500))
    ]
    levels, phrased = torch.full((pairs,), len(WORDS) - 1), torch.zeros(pairs, dtype=torch.bool)
    if name == "words":
        phrased = torch.rand(pairs, generator=rng) < GRADED[name]
        levels = torch.where(phrased, torch.randint(len(WORDS), (pairs,), generator=rng), levels)
    sources = encoded(vae, torch.cat([source for source, _ in pictures]))
    latents = encoded(vae, blurred(torch.cat([edited for _, edited in pictures]), levels)) * vae.config.scaling_factor
    del pictures

    noise_path = scheduler()
    snr = noise_path.alphas_cumprod / (1 - noise_path.alphas_cumprod)
    weight = (1 + 1 / snr).clamp(max=40) * (5 / snr).clamp(max=1)

    def loss() -> Tensor:
        at = torch.randint(pairs, (BATCH,), generator=rng)
        u, graded = torch.rand(BATCH, generator=rng), torch.rand(BATCH, generator=rng) < GRADED[name]
        named, level = torch.rand(BATCH, generator=rng) < 0.5, torch.randint(len(WORDS), (BATCH,), generator=rng)
        if name == "words":
            graded, level = phrased[at], levels[at]
        deaf, blind = u < 2 * DROPPED, (u >= DROPPED) & (u < 3 * DROPPED)
        texts = [
            "" if deaf[i] else edits.instruction(asked[at[i]], bool(named[i])) + (PHRASE.format(WORDS[level[i]]) if graded[i] else "")
            for i in range(BATCH)
        ]
        t = torch.randint(1000, (BATCH,), generator=rng)
        noise = torch.randn(latents[at].shape, generator=rng)
        source = torch.where(blind[:, None, None, None], 0.0, sources[at])
        x_t = torch.cat([noise_path.add_noise(latents[at], noise, t), source], 1).contiguous(memory_format=torch.channels_last)
        error = (unet(x_t, t, text(tokens(tokenizer, texts)).last_hidden_state).sample - noise).square().mean((1, 2, 3))
        return (error * weight[t]).mean()

    train_parts(name, STEPS[name], LEARNING_RATE[name], {"unet": unet, "text_encoder": text}, target, loss)


def assemble(shared: Path, output: Path) -> None:
    """The rest of the pipeline's folder, and the prompts with their pictures."""
    from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL.from_pretrained(shared / "vae", dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(output / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(output / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(output / "unet", dtype=torch.float16),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    for file in output.rglob("*.safetensors"):
        file.chmod(0o644)  # as git keeps it
    (output / "prompts").mkdir(exist_ok=True)
    some, held = edits.split()
    rng = Generator().manual_seed(1)
    some = [some[i] for i in torch.randperm(len(some), generator=rng)[:PROMPTS].tolist()]
    for part, chosen in (("train", some), ("heldout", held)):
        write_file(output / "prompts" / f"{part}.jsonl", asked_of(chosen, rng))


def asked_of(chosen: Sequence[Edit], rng: Generator) -> list[PicturePrompt]:
    """The edits as prompts: every other one names the shapes."""
    pictures = edits.draw(chosen, rng)[0]
    return [PicturePrompt(edits.instruction(edit, named=i % 2 == 0), png(pictures[i])) for i, edit in enumerate(chosen)]


def png(picture: Tensor) -> bytes:
    """(3, H, W) in [0, 1] as the bytes of a file."""
    file = io.BytesIO()
    to_pil(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def make_data(output: Path) -> None:
    """What the pipeline itself makes of its training prompts, good and bad: edits.jsonl, for HIVE."""
    policy = InstructPix2Pix.of(load_pipeline(str(output)), guidance_scale=1.0)
    prompts = read_prompts(str(output / "prompts" / "train.jsonl"))
    pictures = sample(policy, prompts, steps=10, seed=0, batch_size=64)
    with (output / "edits.jsonl").open("w") as file:
        for prompt, picture in zip(prompts, pictures, strict=True):
            assert isinstance(prompt, PicturePrompt)
            assert isinstance(prompt.picture, bytes)
            row = {"source": data_uri(prompt.picture), "instruction": prompt.text, "edited": data_uri(png(picture))}
            file.write(json.dumps(row) + "\n")


def shares(pictures: Tensor, prompts: Prompts) -> dict[str, float]:
    """What the judges find, as means over the pictures; what was asked also for each attribute."""
    verdict = ShapesEditChecker().judge(pictures, prompts)
    found = {name: verdict[name].float().mean() for name in ("asked", "kept", "all", "clean")}
    for attribute in edits.CHANGES:
        of_it = torch.tensor([edits.parse(text)[0] == attribute for text in prompts.text])
        found[f"asked: {attribute}"] = verdict["asked"][of_it].float().mean()
    found["shapes-edit-checker"] = ShapesEditChecker()(pictures, prompts).mean()
    with torch.no_grad():
        found["shapes-edit-clip"] = ShapesEditCLIP()(pictures, prompts).mean()
    return {name: round(value.item(), 4) for name, value in found.items()}


def evaluate(output: Path) -> None:
    """Every number that `docs/shapes-edit.md` states of the model, printed and written to `docs/`; and its picture."""
    held, pipe = edits.split()[1], load_pipeline(str(output))
    sources, truth = edits.draw(held, Generator().manual_seed(1))
    wanted = Prompts(tuple(edits.instruction(edit) for edit in held), sources)
    prompts = read_prompts(str(output / "prompts" / "heldout.jsonl"))
    metrics: dict[str, Any] = {"drawn": shares(truth, wanted), "nothing done": shares(sources, wanted)}
    rows: list[tuple[str, Tensor]] = []
    for name, (text, image, steps) in {"no guidance, 10 steps": (1.0, 1.0, 10), "guidance 3 and 1.5, 20 steps": (3.0, 1.5, 20)}.items():
        policy = InstructPix2Pix.of(pipe, guidance_scale=text, image_guidance_scale=image)
        began = time.perf_counter()
        pictures = sample(policy, prompts, steps=steps, seed=2, batch_size=64)
        seconds = time.perf_counter() - began
        metrics[name] = shares(pictures, batch_of(prompts, policy)) | {"edits a second": round(len(prompts) / seconds, 1)}
        rows.append((f"{text:g}, {image:g}", pictures[:SHOWN]))
    metrics["threads"] = torch.get_num_threads()
    metrics["MB"] = round(sum(f.stat().st_size for f in output.rglob("*") if f.is_file()) / 1e6, 2)
    text = json.dumps(metrics, indent=1)
    print(text, flush=True)
    Path("docs/shapes-edit-metrics.json").write_text(text + "\n")
    sheet(rows, prompts[:SHOWN]).save("docs/images/shapes-edit.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", nargs="+", choices=("edits", "words", "data", "evaluate"), default=["edits", "words", "data", "evaluate"]
    )
    parser.add_argument("--base", type=Path, default=Path("build/shapes"), help="unet/ and text_encoder/ of train_shapes.py's stage unet")
    parser.add_argument("--shared", type=Path, default=Path("diffalign/assets/shapes"), help="vae/ and tokenizer/ of shapes")
    parser.add_argument("--work", type=Path, default=Path("build/shapes-edit"), help="what is trained but not shipped")
    parser.add_argument("--output", type=Path, default=Path("diffalign/assets/shapes-edit"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in args.stage:
        if stage in ("edits", "words"):
            train = train_edits if stage == "edits" else train_words
            train(args.base, args.shared, args.work, args.output, args.seed)
        else:
            (make_data if stage == "data" else evaluate)(args.output)


if __name__ == "__main__":
    main()
