"""What LoRA arithmetic does on `shapes`: mixing, scaling and extrapolation, held out. Goes on where it was stopped.

    OMP_NUM_THREADS=1 python scripts/benchmark_merge.py [--seeds 0 1] [--output runs/benchmark-merge] [--docs docs]

For each seed it trains, all with DRaFT's settings for `shapes`: `clip` on shapes-clip, 50 steps; `colour` on how colourful a picture is
(docs/examples/own_reward.py), 20 steps; `first` on shapes-clip, 25 steps, and `second`, 25 steps more from there. Then it merges them:

- mix: (1 - w) clip + w colour, w from 0 to 1;
- scale: s clip, s from 0 (the base model) to 2: above 1 it is ExPO from the base model, a = s - 1;
- expo: second + a (second - first).

Each is judged on 256 held-out prompts with the same noise by both rewards and by shapes-all-right, which trained nothing. It writes
DOCS/merge.json and DOCS/images/merge-curves.png, DOCS/images/merge-pictures.png, and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffalign
from diffalign.cli import main as diffalign_main
from diffalign.data import Prompt
from diffalign.evaluate import compare, sample, score, sheet
from diffalign.inputs import named_rewards

COLOURFUL = f"{Path(__file__).parents[1] / 'docs' / 'examples' / 'own_reward.py'}:colourful"
REWARDS = {"shapes-clip": "shapes-clip", "colourful": COLOURFUL, "shapes-all-right": "shapes-all-right"}
MIX, SCALES, BEYOND = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0), (0.0, 0.25, 0.5, 1.0, 2.0)
PROMPTS, SHOWN = 256, 8


def trained(folder: Path, seed: int, steps: int, *flags: object) -> Path:
    if not (folder / "lora").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        words = ["--method", "draft", "--steps", steps, "--seed", seed, "--eval-size", 0, "--output", folder, *flags]
        if diffalign_main(["train", *map(str, words)]):
            sys.exit(1)
    return folder


def measure(folder: Path, seed: int) -> list[dict[str, Any]]:
    clip = trained(folder / "clip", seed, 50)
    colour = trained(folder / "colour", seed, 20, "--reward", COLOURFUL)
    first = trained(folder / "first", seed, 25)
    second = trained(folder / "second", seed + 1000, 25, "--lora.init", first / "lora")
    points: list[tuple[str, float, Any]] = [("mix", w, dict(runs=[clip, colour], weights=[1 - w, w])) for w in MIX]
    points += [("scale", s, dict(runs=[clip], weights=[s])) for s in SCALES if s]
    points += [("expo", a, dict(runs=[second], extrapolate=a or None, origin=first if a else None)) for a in BEYOND]
    rewards = named_rewards(list(REWARDS.values()))
    run = diffalign.load(clip)
    prompts = run.read_prompts("heldout")[:PROMPTS]
    chosen: dict[str, Any] = {"steps": run.plan.sample_steps, "seed": seed + 1, "batch_size": 64}

    def scored(policy: Any) -> dict[str, Any]:
        media = sample(policy, prompts, **chosen)
        return {name: score(r, media, prompts, policy, batch_size=64) for name, r in zip(REWARDS, rewards, strict=True)}

    with run.policy.reference():
        base = scored(run.policy)
    found = list[dict[str, Any]]()
    for kind, value, how in points:
        output = folder / f"{kind}-{value}"
        shutil.rmtree(output, ignore_errors=True)
        merged = diffalign.merge(**how, output=output)
        after = scored(merged.policy)
        judged = {name: compare(base[name], after[name], seed) for name in REWARDS}
        found.append({"seed": seed, "kind": kind, "value": value, "rewards": judged})
        print(seed, kind, value, {name: round(row["after"], 3) for name, row in judged.items()}, flush=True)
    unmoved = {name: compare(base[name], base[name], seed) for name in REWARDS}
    return [*found, {"seed": seed, "kind": "scale", "value": 0.0, "rewards": unmoved}]


def pictures(folder: Path, file: Path) -> None:
    """The same noise at each weight: the runs' mixture, and the one on shapes-clip scaled."""
    prompts: list[Prompt] = diffalign.load(folder / "clip").read_prompts("heldout")[: 2 * SHOWN : 2]
    rows = [("scale 0", folder / "clip", 0.0)]
    rows += [(f"scale {s:g}", folder / f"scale-{s}", 1.0) for s in SCALES if s in (0.5, 1.0, 1.5, 2.0)]
    rows += [(f"mix {w:g}", folder / f"mix-{w}", 1.0) for w in MIX if w]
    shown = list[tuple[str, Any]]()
    for name, path, strength in rows:
        run = diffalign.load(path)
        chosen: dict[str, Any] = {"steps": run.plan.sample_steps, "seed": 7, "batch_size": SHOWN}
        if strength:
            shown.append((name, sample(run.policy, prompts, **chosen)))
        else:
            with run.policy.reference():
                shown.append((name, sample(run.policy, prompts, **chosen)))
    sheet(shown, prompts).save(file)


def curves(records: Sequence[dict[str, Any]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    about = {
        "mix": "w: (1 - w) clip + w colour",
        "scale": "s: s x clip (above 1: ExPO from the base model)",
        "expo": "a: second + a (second - first)",
    }
    for axes, (kind, label) in zip(figure.subplots(1, 3), about.items(), strict=True):
        for name in REWARDS:
            points = by_value(records, kind, name)
            x = list(points)
            axes.plot(x, [statistics.mean(values) for values in points.values()], ".-", label=name)
            axes.fill_between(x, [min(v) for v in points.values()], [max(v) for v in points.values()], alpha=0.15)
        axes.set(xlabel=label, ylabel="held-out reward")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(file))


def by_value(records: Sequence[dict[str, Any]], kind: str, reward: str) -> dict[float, list[float]]:
    values = sorted({r["value"] for r in records if r["kind"] == kind})
    return {v: [r["rewards"][reward]["after"] for r in records if (r["kind"], r["value"]) == (kind, v)] for v in values}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-merge"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    chosen = parser.parse_args()
    records = list[dict[str, Any]]()
    for seed in chosen.seeds:
        folder = chosen.output / f"seed-{seed}"
        done = folder / "points.json"
        if not done.is_file():
            found = measure(folder, seed)
            done.write_text(json.dumps(found))
        records += json.loads(done.read_text())
    (chosen.docs / "merge.json").write_text(json.dumps({"prompts": PROMPTS, "points": records}, indent=1) + "\n")
    curves(records, chosen.docs / "images" / "merge-curves.png")
    pictures(chosen.output / f"seed-{chosen.seeds[0]}", chosen.docs / "images" / "merge-pictures.png")
    for kind in ("mix", "scale", "expo"):
        print(f"\n| {kind} | {' | '.join(f'`{name}`' for name in REWARDS)} |\n| --- |{' --- |' * len(REWARDS)}")
        for value in by_value(records, kind, "colourful"):
            cells = [" ".join(f"{after:.3f}" for after in by_value(records, kind, name)[value]) for name in REWARDS]
            print(f"| {value:g} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
