"""Policy gradients on a verdict that has no gradient, over four prompts (DPOK's setting): does the model learn what is asked?

    python scripts/benchmark_few_prompts.py [--methods ddpo dpok prdp d3po] [--seeds 0 1 2] [--output runs/benchmark-few-prompts]

Each method trains with its settings for `shapes`, but on shapes-checker, the programme's share of what is right in a picture, on these four
prompts, and for as many optimiser steps as below. Judged on 64 samples of each prompt with noise that the training never saw, 10 denoising
steps. Prints a Markdown table. The bars, or it exits with status 1: at most 20 minutes of training, and for every seed the 95% interval of
the paired improvement above 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import diffalign
from diffalign.cli import main as diffalign_main

PROMPTS = [
    "a small red square on a green background",
    "two large yellow triangles on a purple background",
    "three small orange circles on a black background",
    "a large green cross on a white background",
]
SAMPLES, REWARD, MOST_SECONDS = 64, "shapes-checker", 1200
STEPS = {"ddpo": 60, "d3po": 60, "dpok": 100, "prdp": 100}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-few-prompts"))
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (chosen.output / "evaluation.txt").write_text("\n".join(prompt for prompt in PROMPTS for _ in range(SAMPLES)) + "\n")
    print("| method | seed | training s | queries | checker before | after | difference [95% interval] | all right before | after | bars |")
    print("| --- " * 10 + "|")
    passed = True
    for method in chosen.methods:
        for seed in chosen.seeds:
            folder = chosen.output / f"{method}-{seed}"
            if not (folder / "eval.json").exists():
                status = diffalign_main([
                    "train", "--method", method, "--reward", REWARD, "--eval-rewards", "shapes-all-right", "--steps", str(STEPS[method]),
                    "--prompts", str(chosen.output / "prompts.txt"), "--eval-prompts", str(chosen.output / "evaluation.txt"),
                    "--sample-steps", "10", "--seed", str(seed), "--output", str(folder),
                ])  # fmt: skip
                if status:
                    return status
            run = diffalign.load(folder)
            share, right = (run.evaluation["rewards"][name] for name in (REWARD, "shapes-all-right"))
            (low, high), last = share["interval"], run.metrics[-1]
            good = last["seconds"] <= MOST_SECONDS and low > 0 and run.evaluation["prompts"] == SAMPLES * len(PROMPTS)
            passed &= good
            cells = [method, seed, f"{last['seconds']:.0f}", f"{last['reward_queries']:,.0f}"]
            cells += [f"{share['before']:.3f}", f"{share['after']:.3f}", f"{share['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"]
            cells += [f"{right['before']:.3f}", f"{right['after']:.3f}", "cleared" if good else "MISSED"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
