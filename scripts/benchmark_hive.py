"""Reproduce the README's claim: `diffalign train --method hive --pipeline shapes-edit` raises held-out rewards, seeds 0, 1 and 2.

    python scripts/benchmark_hive.py [--seeds 0 1 2] [--output runs/benchmark-hive] [--variant weighted]

Prints a Markdown table. The bars that it must clear, or it exits with status 1: at most 120 s of training, and the 95% interval of the
paired improvement of shapes-edit-checker above 0 on 256 held-out edits.
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
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-hive"))
    parser.add_argument("--variant", default="weighted", choices=["weighted", "conditional"])
    chosen = parser.parse_args()
    print("| seed | training s | checker before | after | difference [95% interval] | win rate | all right before | after | bars |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    passed = True
    for seed in chosen.seeds:
        folder = chosen.output / f"{chosen.variant}-{seed}"
        command = ["train", "--method", "hive", "--pipeline", "shapes-edit", "--method.variant", chosen.variant]
        status = diffalign_main([*command, "--seed", str(seed), "--output", str(folder)])
        if status:
            return status
        run = diffalign.load(folder)
        share, right = (run.evaluation["rewards"][name] for name in ("shapes-edit-checker", "shapes-edit-all-right"))
        (low, high), seconds = share["interval"], run.metrics[-1]["seconds"]
        good = seconds <= 120 and low > 0 and run.evaluation["prompts"] == 256
        passed &= good
        print(
            f"| {seed} | {seconds:.0f} | {share['before']:.3f} | {share['after']:.3f} "
            f"| {share['difference']:+.3f} [{low:+.3f}, {high:+.3f}] | {share['win_rate']:.2f} "
            f"| {right['before']:.3f} | {right['after']:.3f} | {'cleared' if good else 'MISSED'} |",
            flush=True,
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
