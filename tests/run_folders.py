"""Run folders made by hand, without a training: what a page is drawn of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffalign.data import Prompt, SpokenPrompt
from diffalign.evaluate import PICTURES, sheet
from diffalign.run import Run
from diffalign.sound import write_all

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
CONFIG: dict[str, Any] = {
    "method": {"name": "draft", "k": 1, "inference_steps": 2},
    "reward": {"name": "shapes-clip"},
    "pipeline": "shapes",
    "lora": {"rank": 2},
    "steps": 4,
    "full": False,
    "seed": 0,
    "processes": 1,
}


def make(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    prompts: Sequence[Prompt] = ("a red circle", HOSTILE),
    saved: Sequence[int] = (0, 2, 4),
    side: int = 8,
    rate: int | None = None,
) -> Run:
    """A finished run: rows of all steps, sheets at the steps `saved` (of sounds at `rate`, .wav files too), an evaluation, weights."""
    settings = {**CONFIG, **(config or {})}
    run = Run.create(folder, settings)
    run.write_prompts("train", [*prompts])
    run.write_prompts("heldout", [*prompts])
    for step in range(1, settings["steps"] + 1):
        reward = 0.5 + 0.1 * step
        row = {"step": step, "loss": -reward, "reward": reward, "reward/clear": 1.0 * step, "grad_norm": math.inf if step == 2 else 0.25}
        run.append_metrics({**row, "learning_rate": 1e-4, "reward_queries": 8 * step, "seconds": 1.5 * step, "peak_memory_mb": 100.0})
    shown, rng = ([*prompts] * PICTURES)[:PICTURES], torch.Generator().manual_seed(0)
    for step in saved:
        media = torch.rand((PICTURES, 800) if rate else (PICTURES, 3, side, side), generator=rng)
        path = run.save_picture(f"samples/step-{step:06d}.png", sheet([(f"step {step}", media)], shown, rate))
        if rate:
            write_all(path.with_suffix(""), media, rate)
    both = [(name, torch.rand((PICTURES, 3, side, side), generator=rng)) for name in ("before", "after")]
    run.save_picture("samples/before-after.png", sheet(both, shown))
    table = {"shapes-clip": {"before": 0.5, "after": 0.75, "difference": 0.25, "interval": [0.125, 0.375], "win_rate": 0.9}}
    table["all <b>right</b>"] = {**table["shapes-clip"], "difference": -0.0625, "interval": [-0.5, 0.25]}
    (run.path / "eval.json").write_text(json.dumps({"prompts": 16, "denoising_steps": 2, "seed": 1, "rewards": table}))
    (run.path / "lora").mkdir()
    return run


def add_guard(run: Run, *, fired: bool = False) -> None:
    """Two evaluations of a guard, at steps 0 and 2; at the second one the watched reward may have fired."""
    finding = {"value": 0.8, "reference": 0.8, "reference_step": 0, "difference": 0.0, "interval": [0.0, 0.0], "limit": -0.25}
    fallen = {**finding, "value": 0.3, "difference": -0.5, "interval": [-0.6, -0.4], "failed": True, "within": False, "failures": 2}
    kl = {**finding, "value": 1.5, "interval": None, "limit": None, "failed": False, "within": True, "failures": 0}
    first = {"watched": {**finding, "failed": False, "within": True, "failures": 0}, "kl": {**kl, "value": 0.0}}
    word = {"measure": "watched", "text": "watched fell"} if fired else None
    lines = [
        {"step": 0, "trained": 0.5, "measures": first, "best_step": 0, "fired": None, "seconds": 1.0},
        {"step": 2, "trained": None, "measures": {"watched": fallen, "kl": kl}, "best_step": 0, "fired": word, "seconds": 1.0},
    ]
    (run.path / "guard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def spoken(*words: str) -> list[SpokenPrompt]:
    return [SpokenPrompt(f"woman: {word}", word) for word in words]
