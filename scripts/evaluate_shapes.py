"""Measure the shipped `shapes` files on the 512 held-out prompts; also `train_shapes.py --stage evaluate`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from diffalign import shapes
from diffalign.rewards.shapes import ShapesChecker, ShapesCLIP
from diffalign.types import Prompts

SHARES = ("colour", "shape", "count", "background", "size", "all", "clean")

Draw = Callable[[Prompts, int, float, int], Tensor]  # (prompts, steps, guidance, seed): pictures
NOISES = 4  # each prompt is drawn from so many: a share of 512 pictures has a standard error of 0.015


def load(folder: Path) -> Any:
    """The pipeline in fp32, silent."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline


def generate(pipeline: Any, prompts: Prompts, steps: int, guidance: float, seed: int, batch: int = 64) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1], by plain DDIM with eta 0."""
    rng = Generator().manual_seed(seed)
    made = [
        pipeline(
            list(prompts.text[i : i + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=rng,
            output_type="pt",
            height=shapes.PIXELS,
            width=shapes.PIXELS,
        ).images
        for i in range(0, len(prompts), batch)
    ]
    return torch.cat(made)


def reconstruct(pipeline: Any, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1], through the VAE and back."""
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures * 2 - 1).latent_dist.mean
        return (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def shares(pictures: Tensor, prompts: Prompts, scorer: ShapesCLIP) -> dict[str, float]:
    """What share of the pictures the checker finds right, and the scorer's mean."""
    verdict = ShapesChecker().judge(pictures, prompts)
    with torch.no_grad():
        cosine = scorer(pictures, prompts).mean().item()
    return {name: round(verdict[name].float().mean().item(), 4) for name in SHARES} | {"shapes-clip": round(cosine, 4)}


def ranks(pictures: Tensor, scenes: list[shapes.Scene], scorer: ShapesCLIP) -> dict[str, float]:
    """Share of pictures whose right caption scores above every caption that has just this attribute wrong."""
    found: dict[str, float] = {}
    right = scorer(pictures, Prompts(tuple(map(shapes.caption, scenes))))
    for attribute, values in shapes.VALUES.items():
        wins = torch.ones(len(scenes), dtype=torch.bool)
        for shift in range(1, len(values)):
            others = [values[(values.index(getattr(s, attribute)) + shift) % len(values)] for s in scenes]
            wrong = [replace(s, **{attribute: other}) for s, other in zip(scenes, others, strict=True)]
            valid = torch.tensor([s.colour != s.background for s in wrong])
            wins &= (right > scorer(pictures, Prompts(tuple(map(shapes.caption, wrong))))) | ~valid
        found[attribute] = round(wins.float().mean().item(), 4)
    return found


def sampled(draw: Draw, prompts: Prompts, scorer: ShapesCLIP) -> dict[str, Any]:
    """The shares of what a model draws, over several noises, with guidance and without; and how fast."""
    metrics, seconds = dict[str, Any](), 0.0
    for guidance, steps in ((4.0, 20), (1.0, 10)):
        began = time.perf_counter()
        found = [shares(draw(prompts, steps, guidance, seed), prompts, scorer) for seed in range(NOISES)]
        seconds = time.perf_counter() - began
        metrics[f"guidance {guidance:g}, {steps} steps"] = {
            name: {"mean": round(sum(d[name] for d in found) / NOISES, 4), "least": min(d[name] for d in found)} for name in found[0]
        }
    metrics["noises"] = NOISES
    metrics["samples a second, guidance 1, 10 steps"] = round(NOISES * len(prompts) / seconds, 1)
    metrics["threads"] = torch.get_num_threads()
    return metrics


def evaluate(folder: Path, report: Path | None = None) -> dict[str, Any]:
    """Every number that `docs/shapes.md` states; printed, and written to `report`."""
    pipeline, scorer, scenes = load(folder), ShapesCLIP(folder / "scorer"), shapes.split()[1]
    prompts = Prompts(tuple(map(shapes.caption, scenes)))
    truth = shapes.draw(scenes, Generator().manual_seed(1))
    metrics: dict[str, Any] = {
        "drawn": shares(truth, prompts, scorer),
        "reconstructed": shares(reconstruct(pipeline, truth), prompts, scorer),
    }
    metrics |= sampled(partial(generate, pipeline), prompts, scorer)
    metrics["scorer ranks right"] = ranks(truth, scenes, scorer)
    metrics["MB"] = round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 2)
    text = json.dumps(metrics, indent=1)
    print(text, flush=True)
    if report:
        report.write_text(text + "\n")
    return metrics


def picture(draw: Draw, path: Path, columns: int = 8) -> None:
    """A grid: prompts, what they mean, and what a model draws at guidance 1 and 4."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scenes = shapes.split()[1][:: 512 // columns][:columns]
    prompts = Prompts(tuple(map(shapes.caption, scenes)))
    rows = {
        "drawn": shapes.draw(scenes, Generator().manual_seed(1)),
        "guidance 1, 10 steps": draw(prompts, 10, 1.0, 2),
        "guidance 4, 20 steps": draw(prompts, 20, 4.0, 2),
    }
    figure, axes = pyplot.subplots(len(rows), columns, figsize=(1.25 * columns, 1.35 * len(rows)), layout="constrained")
    for i, (name, images) in enumerate(rows.items()):
        for j in range(columns):
            axes[i, j].imshow(images[j].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes[i, j].set(xticks=[], yticks=[])
            if i == 0:
                axes[i, j].set_title(textwrap.fill(prompts.text[j], 18), fontsize=6)
        axes[i, 0].set_ylabel(name, fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate(Path(shapes.__file__).parent / "assets" / "shapes")
