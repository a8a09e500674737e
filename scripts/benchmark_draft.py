"""Reproduce the README's claim: `diffalign train --method draft` raises held-out rewards, seeds 0, 1 and 2. Prints a Markdown table.

    python scripts/benchmark_draft.py [--seeds 0 1 2] [--output runs/benchmark-draft] [--method draft]

The bars that it must clear, or it exits with status 1: at most 60 s of training; a paired improvement of shapes-clip of at least 0.15
with its 95% interval above 0.10 on 256 held-out prompts; the checker's all-right rate at least doubled.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import diffalign
from diffalign.cli import main as diffalign_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-draft"))
    parser.add_argument("--method", default="draft")
    chosen = parser.parse_args()
    print("| seed | training s | `shapes-clip` before | after | difference [95% interval] | win rate | all right before | after | bars |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    passed = True
    for seed in chosen.seeds:
        folder = chosen.output / f"seed-{seed}"
        status = diffalign_main(["train", "--method", chosen.method, "--seed", str(seed), "--output", str(folder)])
        if status:
            return status
        run = diffalign.load(folder)
        clip, right = run.evaluation["rewards"]["shapes-clip"], run.evaluation["rewards"]["shapes-all-right"]
        low, high = clip["interval"]
        seconds = run.metrics[-1]["seconds"]
        good = seconds <= 60 and clip["difference"] >= 0.15 and low > 0.10 and right["after"] >= 2 * right["before"]
        passed &= good
        print(
            f"| {seed} | {seconds:.0f} | {clip['before']:.3f} | {clip['after']:.3f} | {clip['difference']:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"| {clip['win_rate']:.2f} | {right['before']:.3f} | {right['after']:.3f} | {'cleared' if good else 'MISSED'} |",
            flush=True,
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
