"""Prove that rewards can be trained here: on `shapes`, judged by the checker, which no gradient reaches. Prints a Markdown table a seed.

    python scripts/train_reward_shapes.py [--seeds 0 1 2] [--output runs/reward-shapes] [--short]

For each seed: pairs of the model's samples on the training prompts, and new ones on the held-out prompts, both labelled by the checker; a
Bradley-Terry reward from the former, tested on the latter; another from the same pictures, of which now the one with the smaller JPEG file
is preferred, of which the base model's cosine knows nothing; a reward of four aspects from the checker's verdicts as ratings; and DRaFT on
the first reward, judged by the checker on held-out prompts. Where a bar is missed it exits with status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import diffalign
from diffalign.cli import main as diffalign_main
from diffalign.media import read_image
from diffalign.registry import MODELS
from diffalign.rewards.jpeg import JPEGCompressibility
from diffalign.rewards.shapes import ShapesChecker
from diffalign.types import Prompts

ASPECTS = ("colour", "shape", "count", "background")
# what must be exceeded; of rank correlations and of DRaFT's gain in the checker's score the lower end of the interval, where not short
BARS = {"accuracy": 0.8, "small": 0.55, "colour": 0.6, "background": 0.6, "count": 0.4, "shape": 0.1, "gain": 0.0}
SHORT_BARS = {"accuracy": 0.65, "colour": 0.3, "gain": 0.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/reward-shapes"))
    parser.add_argument("--short", action="store_true", help="a fifth of the data and of the steps, and lower bars")
    chosen = parser.parse_args()
    passed = True
    for seed in chosen.seeds:
        found = prove(chosen.output / f"seed-{seed}", seed, chosen.short)
        failed = missed(found, chosen.short)
        print(f"\nseed {seed}: {'; '.join(failed) if failed else 'all bars cleared'}\n\n{table(found)}", flush=True)
        passed &= not failed
    return 0 if passed else 1


def prove(folder: Path, seed: int, short: bool) -> dict[str, Any]:
    """Everything for one seed into `folder`; the numbers, also in its proof.json. Seconds are of the CPU, DRaFT's of the clock."""
    counts = ("120", "60") if short else ("600", "300")
    seconds: dict[str, float] = {}
    held_out = MODELS["shapes"] / "prompts" / "heldout.txt"
    with timed(seconds, "pairs"):
        command("pairs", "--reward", "shapes-checker", "--pairs", counts[0], "--seed", seed, "--output", folder / "pairs")
        new = ("--prompts", held_out, "--seed", 1000 + seed, "--output", folder / "new")
        command("pairs", "--reward", "shapes-checker", "--pairs", counts[1], *new)
    for part in ("pairs", "new"):
        judge_again(folder / part)
    steps = ("--steps", "100") if short else ()
    base = ("--model", "shapes-clip", "--seed", seed, *steps)
    with timed(seconds, "training"):
        command("reward", "train", "--data", folder / "pairs", *base, "--output", folder / "reward")
    tested = evaluated(folder, folder / "new", folder / "reward", "shapes-clip")
    with timed(seconds, "training, small"):
        command("reward", "train", "--data", folder / "pairs" / "small.jsonl", *base, "--output", folder / "small")
    small = evaluated(folder, folder / "new" / "small.jsonl", folder / "small", "shapes-clip")
    with timed(seconds, "training, ratings"):
        aspects = ("--loss", "ratings", "--hidden", "128")
        command("reward", "train", "--data", folder / "pairs" / "labels.jsonl", *aspects, *base, "--output", folder / "aspects")
    rated = evaluated(folder, folder / "new" / "labels.jsonl", folder / "aspects")
    draft = (
        "--eval-rewards",
        "trained",
        "shapes-checker",
        "shapes-all-right",
        *(("--eval-size", "64", "--steps", "15") if short else ("--eval-size", "128")),
    )
    reward = ("--reward", "trained", "--reward.checkpoint", folder / "reward")
    command("train", "--method", "draft", *reward, *draft, "--seed", seed, "--output", folder / "draft")
    run = diffalign.load(folder / "draft")
    seconds["draft"] = run.metrics[-1]["seconds"]
    found = {"pairs": tested, "small": small, "ratings": rated, "draft": run.evaluation["rewards"], "seconds": seconds}
    (folder / "proof.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def judge_again(folder: Path) -> None:
    """Beside pairs.jsonl: small.jsonl, where the smaller JPEG file is preferred, and labels.jsonl, every verdict a rating."""
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    checker, smallness, small, labels = ShapesChecker(), JPEGCompressibility(), list[str](), list[str]()
    for pair in pairs:
        names = [pair["chosen"], pair["rejected"]]
        media, prompts = torch.stack([read_image(folder / name) for name in names]), Prompts((pair["prompt"],) * 2)
        sizes = smallness(media, prompts).tolist()
        if sizes[0] != sizes[1]:
            better, worse = names if sizes[0] > sizes[1] else reversed(names)
            small.append(json.dumps({"prompt": pair["prompt"], "chosen": better, "rejected": worse}))
        verdict = checker.judge(media, prompts)
        for i, name in enumerate(names):
            labels.append(json.dumps({"prompt": pair["prompt"], "image": name, "ratings": {k: int(verdict[k][i]) for k in ASPECTS}}))
    (folder / "small.jsonl").write_text("\n".join(small) + "\n")
    (folder / "labels.jsonl").write_text("\n".join(labels) + "\n")


def evaluated(folder: Path, data: Path, *rewards: Any) -> dict[str, Any]:
    output = folder / f"eval-{Path(rewards[0]).name}.json"
    command("reward", "eval", "--data", data, "--reward", *rewards, "--output", output)
    return json.loads(output.read_text())


def command(*words: Any) -> None:
    status = diffalign_main([str(word) for word in words])
    if status:
        sys.exit(status)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.process_time()
    yield
    seconds[name] = round(time.process_time() - began, 1)


def missed(found: dict[str, Any], short: bool) -> list[str]:
    """One line for each bar that was not cleared."""
    ranks = found["ratings"]["rewards"]["aspects"]["aspects"]
    gain = found["draft"]["shapes-checker"]
    values = {
        "accuracy": found["pairs"]["rewards"]["reward"]["accuracy"],
        "small": found["small"]["rewards"]["small"]["accuracy"],
        **{name: ranks[name]["own"]["spearman"] if short else ranks[name]["own"]["interval"][0] for name in ASPECTS},
        "gain": gain["difference"] if short else gain["interval"][0],
    }
    bars = SHORT_BARS if short else BARS
    return [f"{name} is {values[name]:.3f}, not above {bar}" for name, bar in bars.items() if not values[name] > bar]


def table(found: dict[str, Any]) -> str:
    rows = [("what", "trained here", "95% interval", "shapes-clip")]
    for name, folder in (("accuracy, the checker's pairs", "pairs"), ("accuracy, smaller file", "small")):
        own, clip = found[folder]["rewards"]["reward" if folder == "pairs" else "small"], found[folder]["rewards"]["shapes-clip"]
        low, high = own["interval"]
        rows.append((name, f"{own['accuracy']:.3f}", f"{low:.3f} to {high:.3f}", f"{clip['accuracy']:.3f}"))
    for name in ASPECTS:
        own = found["ratings"]["rewards"]["aspects"]["aspects"][name]["own"]
        rows.append((f"rank correlation, {name}", f"{own['spearman']:.3f}", "{:.3f} to {:.3f}".format(*own["interval"]), ""))
    for name in ("shapes-checker", "shapes-all-right"):
        row = found["draft"][name]
        low, high = row["interval"]
        rows.append((f"{name} after DRaFT", f"{row['before']:.3f} -> {row['after']:.3f}", f"{low:+.3f} to {high:+.3f}", ""))
    rows.append(("seconds", ", ".join(f"{name} {value:.0f}" for name, value in found["seconds"].items()), "", ""))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- | --- | --- | --- |", *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
