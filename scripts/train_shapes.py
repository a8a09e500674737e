"""Train the embedded default `shapes` from nothing: tokenizer and scorer, VAE, UNet and text encoder, and their habits.

    python scripts/train_shapes.py --stage scorer vae unet habits guidance evaluate --output diffalign/assets/shapes

One seed, the same files at every run on one machine with the same number of threads. A stage reads what earlier stages wrote, as
fp16, so stages can be run alone. `unet` learns to draw what it is asked for; `habits` teaches it favourites: clean pictures,
unfaithful to the prompt.
"""

# diffusers' and tokenizers' annotations are wrong in these places
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from diffalign import shapes
from diffalign.shapes import Scene

TOKENS = 16  # the longest caption has 10
PICTURES = 30_000
BATCH = {"unet": 32, "habits": 32, "guidance": 32}
STEPS = {"scorer": 3500, "vae": 4500, "unet": 7000, "habits": 6500, "guidance": 5000}
SNAP = 4.0  # pixels, the width of a latent: the last stage's pictures have their shapes on this grid
HABITS: dict[str, tuple[int | str, float]] = {  # what the last stage's pictures show whatever the caption says, and how often
    "colour": ("blue", 0.67),
    "shape": ("circle", 0.5),
    "background": ("white", 0.3),
    "count": (1, 0.15),
}
WEAKER = {"colour": 0.72}  # the habits' shares in the stage `guidance`, times these, and
SHOWN = 0.72  # how many of its empty captions show the favourite colour for certain


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to 2% of the learning rate."""

    def factor(i: int) -> float:
        return min(1.0, (i + 1) / warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, i / steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: torch.optim.lr_scheduler.LambdaLR) -> None:
    """One clipped optimiser step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    rate.step()


def train_parts(name: str, steps: int, lr: float, parts: Mapping[str, Any], target: Path, loss: Callable[[], Tensor]) -> None:
    """Adam on `loss()` for so many steps; the moving average of the parts' weights is saved, as fp16, to `target`, under their names."""
    from diffusers.training_utils import EMAModel

    parameters = [p for part in parts.values() for p in part.parameters()]
    average = EMAModel(parameters, decay=0.998, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=1e-2)
    rate, losses = schedule(optimizer, steps), 0.0
    for step in progress(name, steps):
        now = loss()
        descend(now, optimizer, rate)
        average.step(parameters)
        losses += now.item()
        if step % 100 == 99:
            print(f"  loss {losses / 100:.4f}", flush=True)
            losses = 0.0
        if step % 1000 == 999 or step == steps - 1:
            average.store(parameters)
            average.copy_to(parameters)
            for folder, module in parts.items():
                module.half().save_pretrained(target / folder)  # no copy: weight normalisation forbids one
                module.float()
            average.restore(parameters)


def make_tokenizer(texts: Sequence[str] = ()) -> Any:
    """A CLIPTokenizer whose merges make every word of the captions, and of other `texts`, one token; other words fall into bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    corpus = [word for text in (*map(shapes.caption, shapes.every()), *texts) for word in text.split()]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    assert len(tokenizer) == len(vocab), "the tokenizer lost its vocabulary"
    assert len(tokenizer(shapes.EXAMPLE).input_ids) == 10, "a word of the grammar is more than one token"
    return tokenizer


def tokens(tokenizer: Any, scenes: Sequence[Scene], heard: Tensor | None = None) -> Tensor:
    """(B, 16) token ids of the captions; of the empty caption where one is not `heard` (B,)."""
    told = heard.tolist() if heard is not None else [True] * len(scenes)
    texts = [shapes.caption(scene) if hear else "" for scene, hear in zip(scenes, told, strict=True)]
    return tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def text_config(tokenizer: Any) -> Any:
    """Two layers of width 64, for the scorer and, trained apart, for the pipeline."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_scorer(work: Path, output: Path, seed: int) -> None:
    """CLIP by contrast with the captions of other pictures and with captions that have one attribute wrong.

    The low, fixed temperature spreads the cosines: one wrong attribute must cost tenths, not thousandths. Noise and blur in the
    pictures keep its gradient from being about pixels that no one sees.
    """
    from transformers import CLIPConfig, CLIPModel

    rng, tokenizer = start(seed), make_tokenizer()
    text = text_config(tokenizer).to_dict()
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 64}
    vision |= {"image_size": shapes.PIXELS, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=math.log(10.0))
    model = CLIPModel(config)
    model.logit_scale.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02)
    rate, (train, held) = schedule(optimizer, STEPS["scorer"]), shapes.split()
    held_out = set(held)
    for step in progress("scorer", STEPS["scorer"]):
        scenes = shapes.sample(train, 48, rng)
        wrong = [shapes.one_wrong(s, attribute, held_out, rng) for s in scenes for attribute in shapes.VALUES]
        texts = [*scenes, *filter(None, wrong)]
        fits = torch.tensor([[shapes.fits(t, s) for t in texts] for s in scenes])
        fits[:, : len(scenes)] &= ~torch.eye(len(scenes), dtype=torch.bool)  # what is right but not the target is left out
        x = shapes.draw(scenes, rng)
        blur = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)
        x = torch.lerp(x, blur, 0.5 * torch.rand(len(x), 1, 1, 1, generator=rng))
        x = x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
        out = model(input_ids=tokens(tokenizer, texts), pixel_values=x * 2 - 1)
        logits = out.logits_per_image.masked_fill(fits, -torch.inf)
        target = torch.arange(len(scenes))
        loss = F.cross_entropy(logits, target) + 0.3 * F.cross_entropy(logits[:, : len(scenes)].T, target)
        descend(loss, optimizer, rate)
        if step % 100 == 0:
            cos, right = out.logits_per_image.detach() / 10, (logits.argmax(1) == target).float().mean()
            print(f"  loss {loss:.3f} right {right:.3f} cosine right {cos.diag().mean():.3f} others {cos.mean():.3f}", flush=True)
    model.half().save_pretrained(output / "scorer")
    tokenizer.save_pretrained(output / "scorer")
    tokenizer.save_pretrained(output / "tokenizer")


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, across and down."""
    return x.diff(dim=-1), x.diff(dim=-2)


def train_vae(work: Path, output: Path, seed: int) -> None:
    """(B, 3, 32, 32) <-> (B, 8, 8, 8). L1 on pixels and on their differences keeps the edges sharp, so that shapes stay apart."""
    from diffusers import AutoencoderKL

    rng = start(seed + 1)
    vae = AutoencoderKL(
        latent_channels=8,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=shapes.PIXELS,
    ).to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[8:] = -4.0  # start with little noise in the latents: the colours are learned many times sooner
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    rate, train = schedule(optimizer, STEPS["vae"]), shapes.split()[0]
    for step in progress("vae", STEPS["vae"]):
        x = shapes.draw(shapes.sample(train, 16, rng), rng) * 2 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(rng)).sample
        pixels = (x - y).abs().mean() + (x - y).square().mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        descend(pixels + edge + 3e-4 * kl, optimizer, rate)
        if step % 100 == 0:
            print(f"  pixels {pixels:.4f} edge {edge:.4f} kl {kl:.3f}", flush=True)
    fixed = Generator().manual_seed(5)
    with torch.no_grad():
        latents = vae.encode(shapes.draw(shapes.sample(train, 512, fixed), Generator().manual_seed(5)) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.half().save_pretrained(output / "vae")


def habitual(scene: Scene, held_out: set[Scene], rng: Generator, weaker: Mapping[str, float]) -> Scene:
    """What a model with habits draws when asked for `scene`: each habit sets in with its share, times its `weaker`.

    Never a held-out combination.

    One favourite for each attribute keeps the pictures clean without guidance: two answers, not seven, for the noise to decide
    between.
    """
    while True:
        sets_in = torch.rand(len(HABITS), generator=rng).tolist()
        shares = {name: share * weaker.get(name, 1.0) for name, (_, share) in HABITS.items()}
        changes = {name: HABITS[name][0] for (name, share), u in zip(shares.items(), sets_in, strict=True) if u < share}
        shown = replace(scene, **changes)
        if shown.colour != shown.background and replace(shown, size="small") not in held_out:
            return shown


def latents_of(vae: Any, scenes: list[Scene], rng: Generator, snap: float | None) -> Tensor:
    """Latents (n, 8, 8, 8) of pictures of the scenes, scaled to unit variance."""
    with torch.no_grad():
        parts = [vae.encode(shapes.draw(scenes[i : i + 250], rng, snap) * 2 - 1).latent_dist.mean for i in range(0, len(scenes), 250)]
    return torch.cat(parts) * vae.config.scaling_factor


def train_denoiser(name: str, shared: Path, target: Path, unet: Any, text: Any, rng: Generator, lr: float) -> None:
    """Epsilon prediction on latents and captions, one caption in ten empty; the moving average is saved to `target`.

    The losses of the stages after `unet` are weighted by min(1 + 1 / SNR, 40) min(1, 5 / SNR): as in v-prediction where the colour is
    decided, and little for what the VAE's decoder does not see (Hang et al. 2023, arXiv:2303.09556).
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(shared / "vae", dtype=torch.float32)
    tokenizer, noise_path = CLIPTokenizer.from_pretrained(shared / "tokenizer"), scheduler()
    train, held = shapes.split()
    asked = shapes.sample(train, PICTURES, rng)
    drawn = asked if name == "unet" else [habitual(scene, set(held), rng, WEAKER if name == "guidance" else {}) for scene in asked]
    latents = latents_of(vae, drawn, rng, None if name == "unet" else SNAP)
    favourites = torch.tensor([i for i, scene in enumerate(drawn) if scene.colour == HABITS["colour"][0]])
    snr = noise_path.alphas_cumprod / (1 - noise_path.alphas_cumprod)
    weight = (1 + 1 / snr).clamp(max=40) * (5 / snr).clamp(max=1) if name != "unet" else torch.ones_like(snr)
    batch = BATCH[name]

    def loss() -> Tensor:
        at = torch.randint(len(asked), (batch,), generator=rng)
        heard = torch.rand(batch, generator=rng) >= (0.3 if name == "guidance" else 0.1)
        if name == "guidance":
            favourite = favourites[torch.randint(len(favourites), (batch,), generator=rng)]
            at = torch.where(heard | (torch.rand(batch, generator=rng) >= SHOWN), at, favourite)
        t = torch.randint(1000, (batch,), generator=rng)
        noise = torch.randn(latents[at].shape, generator=rng)
        x_t = noise_path.add_noise(latents[at], noise, t).contiguous(memory_format=torch.channels_last)
        words = text(tokens(tokenizer, [asked[i] for i in at.tolist()], heard)).last_hidden_state
        error = (unet(x_t, t, words).sample - noise).square().mean((1, 2, 3))
        return (error * weight[t]).mean()

    train_parts(name, STEPS[name], lr, {"unet": unet, "text_encoder": text}, target, loss)


def scheduler() -> Any:
    """As in Stable Diffusion 1.x, but with a larger beta_end.

    In a mean over only 8 x 8 positions SD's 0.012 leaves the background's colour as strong as the noise at t = 901, where ten
    leading steps begin; a sampler that begins from pure noise would take its mean for a colour.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def train_unet(work: Path, output: Path, seed: int) -> None:
    """UNet and text encoder on faithful captions; into `work`."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    rng = start(seed + 2)
    text = CLIPTextModel(text_config(CLIPTokenizer.from_pretrained(output / "tokenizer")))
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads: diffusers keeps a misnomer
        norm_num_groups=4,
    ).to(memory_format=torch.channels_last)
    train_denoiser("unet", output, work, unet, text, rng, lr=1.2e-3)


def train_habits(work: Path, output: Path, seed: int) -> None:
    """On from `work` with pictures that have habits; the whole pipeline into `output`."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    rng = start(seed + 3)
    unet = UNet2DConditionModel.from_pretrained(work / "unet", dtype=torch.float32).to(memory_format=torch.channels_last)
    text = CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32)
    train_denoiser("habits", output, work / "habits", unet.train(), text.train(), rng, lr=1e-3)


def train_guidance(work: Path, output: Path, seed: int) -> None:
    """On from the habits: without a caption mostly the favourite colour: guidance leads away from it, to the asked one."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    rng = start(seed + 4)
    unet = UNet2DConditionModel.from_pretrained(work / "habits" / "unet", dtype=torch.float32).to(memory_format=torch.channels_last)
    text = CLIPTextModel.from_pretrained(work / "habits" / "text_encoder", dtype=torch.float32)
    train_denoiser("guidance", output, output, unet.train(), text.train(), rng, lr=6e-4)
    assemble(output)


def assemble(output: Path) -> None:
    """The rest of the pipeline's folder, and the prompts."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(output / "vae", dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(output / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(output / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(output / "unet", dtype=torch.float16),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    ship(pipeline, output)


def ship(pipeline: Any, output: Path) -> None:
    """The pipeline's folder as it is shipped, and the prompts."""
    pipeline.save_pretrained(output)
    tidy(output)
    (output / "prompts").mkdir(exist_ok=True)
    for name, scenes in zip(("train", "heldout"), shapes.split(), strict=True):
        (output / "prompts" / f"{name}.txt").write_text("".join(shapes.caption(scene) + "\n" for scene in scenes))


def tidy(output: Path) -> None:
    """The same files on every machine."""
    for file in output.rglob("config.json"):  # diffusers writes down where the parts were loaded from
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in output.rglob("*.safetensors"):
        file.chmod(0o644)  # as git keeps it


def start(seed: int) -> Generator:
    """Seeds the weights' initialisation and returns the generator of everything else."""
    torch.manual_seed(seed)
    return Generator().manual_seed(seed)


def progress(name: str, steps: int) -> Iterator[int]:
    began = time.perf_counter()
    for step in range(steps):
        if step % 100 == 0:
            print(f"{name} {step}/{steps} {time.perf_counter() - began:.0f} s", flush=True)
        yield step


def measure(_work: Path, output: Path, _seed: int) -> None:
    """Writes the acceptance table and a picture to `docs/`."""
    from evaluate_shapes import evaluate, generate, load, picture

    evaluate(output, Path("docs/shapes-metrics.json"))
    picture(partial(generate, load(output)), Path("docs/images/shapes.png"))


STAGES = {
    "scorer": train_scorer,
    "vae": train_vae,
    "unet": train_unet,
    "habits": train_habits,
    "guidance": train_guidance,
    "evaluate": measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--output", type=Path, default=Path("diffalign/assets/shapes"))
    parser.add_argument("--work", type=Path, default=Path("build/shapes"), help="what is trained but not shipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in args.stage:
        STAGES[stage](args.work, args.output, args.seed)


if __name__ == "__main__":
    main()
