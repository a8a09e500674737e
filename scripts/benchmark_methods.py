"""Every method on an embedded model: Markdown tables, docs/benchmarks-methods*.json and three plots. Goes on where it was stopped.

    python scripts/benchmark_methods.py [--methods draft ddpo] [--seeds 0 1 2] [--output runs/benchmark-methods] [--docs docs]
    python scripts/benchmark_methods.py --pipeline shapes-flow | digits      the methods that this embedded model has settings for
    python scripts/benchmark_methods.py --reward shapes-clip --seconds 60 | --queries 2400

As it stands each method trains with the settings that the model brings along for it, on its own reward there: of `shapes` the gradient of
shapes-clip, pairs that it judges, or jpeg-compressibility; of `digits` the likelihood of what is said. The bars, or the script exits with
status 1: at most 120 s of training, the 95% interval of the paired improvement above 0 for every seed on the held-out prompts, of the
reward that is trained on, on `digits` of the word error rate; and of the methods on pairs an implicit accuracy above 0.6 on 512 new pairs
of the held-out prompts.

With `--seconds` or `--queries` all methods that can be trained on the one reward get the same budget: seconds of training (a short probe
says how many optimiser steps that is), or reward queries. Methods on data get pairs that `diffalign pairs` makes with the same reward and
the base model; the queries, network samples and seconds of that are theirs. Each run is a process of its own, and so is its peak memory.

Judged on the held-out prompts (256; of `digits` 108) with 10 denoising steps and the same noise for all methods of a seed; KL and
diversity on the first 64. The plots show the held-out reward at the run's checkpoints, mean over the seeds, between the lowest and the
highest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import diffalign
from diffalign import checkpoint, examples, registry
from diffalign.compare import measure
from diffalign.config import resolve
from diffalign.data import SpokenPrompt, text_of
from diffalign.evaluate import implicit_accuracy, kl_to_base, sample, score
from diffalign.inputs import named_rewards
from diffalign.origin import COSTS
from diffalign.run import Run

AXES = {"queries": "reward_queries", "seconds": "seconds", "kl": "kl_to_base"}
DENOISING_STEPS, MEASURED = 10, 64
MOST_SECONDS, LEAST_ACCURACY, NEW_PAIRS = 120, 0.6, 512
PROBE_STEPS = 8


@dataclass(frozen=True)
class Base:
    """What runs on an embedded model are judged by; `bar` is the reward of the bar, None the one trained on."""

    judges: list[str]
    held_out: int = 256
    bar: str | None = None


SHAPES = Base(["shapes-clip", "shapes-checker", "shapes-all-right", "jpeg-compressibility"])
BASES = {"shapes": SHAPES, "shapes-flow": SHAPES, "digits": Base(["digits-ctc", "digits-wer", "digits-quality"], 108, "digits-wer")}


@dataclass(frozen=True)
class Budget:
    """What every run may take; both None: the preset's optimiser steps."""

    seconds: float | None = None
    queries: int | None = None

    @property
    def name(self) -> str:
        given = {key: value for key, value in vars(self).items() if value is not None}
        return "-".join(f"{key}-{value:g}" for key, value in given.items()) or "preset"


@dataclass(frozen=True)
class Trial:
    """One training: a model, a method, a reward, a seed, and the folder of pairs where the method wants data, with what they took."""

    pipeline: str
    method: str
    reward: str
    seed: int
    folder: Path
    pairs: Path | None = None

    @property
    def base(self) -> Base:
        return BASES[self.pipeline]

    @property
    def data_costs(self) -> dict[str, float]:
        return json.loads((self.pairs / "costs.json").read_text()) if self.pairs else dict.fromkeys(COSTS, 0)


def wants(method: str) -> Any:
    return registry.find("methods", method)[0].needs


def can_train(method: str, reward: str) -> bool:
    """Whether a method can be trained on a reward, on `shapes`: methods on edits have another model."""
    differentiable = registry.find("rewards", reward)[0].differentiable
    return wants(method).data != "edits" and (differentiable or not wants(method).differentiable_reward)


def needs_pairs(method: str) -> bool:
    return wants(method).data is not None and wants(method).data_role == "only"


def methods_of(pipeline: str) -> list[str]:
    """The methods that an embedded model brings settings along for."""
    chosen = yaml.safe_load(registry.MODELS[pipeline].with_suffix(".yaml").read_text())["methods"]
    return [name for name in registry.METHODS if name in chosen]


def make_pairs(
    pipeline: str, folder: Path, reward: str, seed: int, count: int, prompts: Sequence[str | SpokenPrompt] | None = None
) -> Path:
    """Pairs of the base model, of the training prompts where none are given, and costs.json beside them."""
    if not (folder / "costs.json").exists():
        diffalign.make_policy(resolve({"pipeline": pipeline}).settings, train=False)  # imports and files are read by now
        start = time.perf_counter()
        chosen = {"pairs": count, "seed": seed, "sample_steps": DENOISING_STEPS}
        diffalign.make_pairs(pipeline, reward=reward, output=folder, prompts=prompts, **chosen)
        seconds = time.perf_counter() - start
        drawn = sum(len(json.loads(line)["scores"]) for line in (folder / "ranks.jsonl").read_text().splitlines())
        costs = {"reward_queries": drawn, "network_samples": drawn * DENOISING_STEPS, "seconds": seconds}
        (folder / "costs.json").write_text(json.dumps({**dict.fromkeys(COSTS, 0), **costs}) + "\n")
    return folder


def accuracy_on_new_pairs(done: Run, trial: Trial) -> float:
    """The implicit accuracy on pairs of the held-out prompts: ten times as many as a run holds out of its own thousand."""
    assert trial.pairs is not None
    folder = trial.pairs.parents[1] / f"{trial.reward}-held-out-{NEW_PAIRS}" / f"seed-{trial.seed}"
    prompts = [prompt if isinstance(prompt, SpokenPrompt) else text_of(prompt) for prompt in done.read_prompts("heldout")]
    make_pairs(trial.pipeline, folder, trial.reward, 1000 + trial.seed, NEW_PAIRS, prompts)
    given: dict[str, Any] = {"reward": None, "limit": None, "skip": False, "seed": 0, "say": lambda text: None}  # pyright: ignore
    parts = examples.read(str(folder), "pairs", done.policy, **given)
    chosen = {"seed": trial.seed, "batch_size": 64}
    right = sum(len(part) * implicit_accuracy(done.policy, part, **chosen) for part in parts)
    return right / sum(map(len, parts))


def train(trial: Trial, folder: Path, **flags: Any) -> str | None:
    """Train in a process of its own, from the start or from where it was stopped; None, or why it failed."""
    given = {
        "pipeline": trial.pipeline, "method": trial.method, "reward": trial.reward, "seed": trial.seed, "output": folder,
        "sample_steps": DENOISING_STEPS,
        "sample_every": 10**6, "eval_rewards": f"[{','.join(trial.base.judges)}]",
        **({"data": trial.pairs} if trial.pairs else {}), **flags,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in given.items()]
    if (folder / "config.yaml").exists():
        if (folder / "lora").exists():
            return None
        arguments = ["--resume", str(folder)]
    command = [sys.executable, "-m", "diffalign", "train", *arguments]
    process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    return None if process.returncode == 0 else errors[-1] if errors else process.stderr[-500:]


def steps_for(trial: Trial, budget: Budget, probes: Path) -> int | str:
    """Optimiser steps that the budget allows, by a probe where it has to be measured; or why the probe failed."""
    preset = resolve({"method": trial.method, "pipeline": trial.pipeline}).settings.steps
    if budget.seconds is None and (budget.queries is None or trial.pairs):
        return preset
    probe = probes / trial.method
    failed = train(trial, probe, steps=PROBE_STEPS, eval_size=0)
    if failed:
        return failed
    last = Run.open(probe).metrics[-1]
    if budget.seconds is not None:
        return max(1, int((budget.seconds - trial.data_costs["seconds"]) / last["seconds"] * PROBE_STEPS))
    assert budget.queries is not None
    return max(1, int(budget.queries / last["reward_queries"] * PROBE_STEPS))


def run(trial: Trial, budget: Budget, probes: Path, points: int) -> dict[str, Any]:
    """The record of a trial, from its folder where it is there already."""
    about = {"method": trial.method, "reward": trial.reward, "bar": trial.base.bar or trial.reward, "seed": trial.seed}
    if (trial.folder / "benchmark.json").exists():
        return {**about, **json.loads((trial.folder / "benchmark.json").read_text())}
    steps = steps_for(trial, budget, probes)
    if isinstance(steps, str):
        return {**about, "failed": steps}
    print(f"{trial.folder}: {steps} steps", file=sys.stderr, flush=True)
    kept = {"checkpoint_every": math.ceil(steps / points), "keep_checkpoints": points + 2}
    failed = train(trial, trial.folder, steps=steps, eval_size=trial.base.held_out, **kept)
    if failed:
        return {**about, "failed": failed}
    done = Run.open(trial.folder)
    costs = {name: done.metrics[-1][name] + trial.data_costs[name] for name in COSTS}
    record = {**about, "steps": steps, **costs, "data": trial.data_costs, "evaluation": done.evaluation, **measure(done, MEASURED)}
    if trial.pairs:
        record["implicit_accuracy"] = accuracy_on_new_pairs(done, trial)
    record["curve"] = list(curve(done, trial))  # last: it leaves the policy as it was at the last checkpoint
    (trial.folder / "benchmark.json").write_text(json.dumps(record) + "\n")
    return record


@torch.no_grad()
def curve(done: Run, trial: Trial) -> Iterator[dict[str, float]]:
    """Of the base model, the run's checkpoints and its end: `held_out` reward, KL to the base, and the costs so far.

    `kl_to_base` is of ancestral samples of the evaluation's steps; `kl_as_trained` of the samples that a policy-gradient method trains on.
    """
    (reward,), policy, prompts = named_rewards([trial.reward]), done.policy, done.read_prompts("heldout")[: trial.base.held_out]
    chosen = {"steps": DENOISING_STEPS, "seed": trial.seed + 1, "batch_size": done.plan.settings.batch_size, "suffix": done.plan.suffix}
    rows, data, ends = {int(row["step"]): row for row in done.metrics}, trial.data_costs, done.evaluation["rewards"][trial.reward]

    sampler = vars(done.plan.method)

    def point(step: int, held_out: float) -> dict[str, float]:
        found = {**{name: rows[step][name] + data[name] for name in COSTS}, "held_out": held_out}
        found["kl_to_base"] = kl_to_base(policy, prompts[:MEASURED], **chosen)
        if "random_steps" in sampler:
            own = {**chosen, "steps": sampler["inference_steps"], "random_steps": sampler["random_steps"]}
            found["kl_as_trained"] = kl_to_base(policy, prompts[:MEASURED], **own)
        return found

    yield {**data, "held_out": ends["before"], "kl_to_base": 0.0, "kl_as_trained": 0.0}
    parameters = dict(policy.module.named_parameters())
    for folder in sorted((done.path / "checkpoints").iterdir()):
        tree = checkpoint.read(folder)
        if tree["step"] > 0:
            for name, value in tree["parameters"].items():
                parameters[name].copy_(value)
            media = sample(policy, prompts, **chosen)
            yield point(tree["step"], float(score(reward, media, prompts, policy, batch_size=chosen["batch_size"]).mean()))


def check_base(records: Sequence[Mapping[str, Any]], judge: str) -> None:
    """Stop where the runs of a seed were judged on different base models: some were kept from before the model was trained again."""
    for seed in {record["seed"] for record in records}:
        runs = [r for r in records if r["seed"] == seed and "failed" not in r]
        levels = [r["evaluation"]["rewards"][judge]["before"] for r in runs]
        if levels and max(levels) - min(levels) > 1e-3:
            sys.exit(
                f"seed {seed}: the base model scores {min(levels):.4f} to {max(levels):.4f}, so it changed. Start with another --output."
            )


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the lowest and highest where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(records: Sequence[Mapping[str, Any]], reward: str, judges: Sequence[str]) -> Iterator[str]:
    """Markdown of all runs on one reward: the base model, and a row a method, best first."""
    judges = [reward, *(name for name in judges if name != reward)]
    costs = {"reward_queries": "queries", "network_samples": "network samples", "network_calls": "network calls"}
    head = ["method", "steps", *(f"`{name}`" for name in judges), "KL", "diversity", *costs.values(), "seconds", "peak MB"]
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["reward"] == reward and "failed" not in record:
            by_method.setdefault(record["method"], []).append(record)

    def levels(rows: Sequence[Mapping[str, Any]], when: str) -> list[str]:
        of_judges = [spread([row["evaluation"]["rewards"][name][when] for row in rows]) for name in judges]
        kl = "0" if when == "before" else spread([row["kl_to_base"] for row in rows], 2)
        return [*of_judges, kl, spread([row["diversity"][when] for row in rows])]

    def height(rows: Sequence[Mapping[str, Any]]) -> float:
        return statistics.mean(row["evaluation"]["rewards"][reward]["after"] for row in rows)

    yield "| " + " | ".join(head) + " |"
    yield "| --- " * len(head) + "|"
    for rows in list(by_method.values())[:1]:  # the same noise for all methods
        yield "| " + " | ".join(["base model", "-", *levels(rows, "before"), *["-"] * 5]) + " |"
    for method, rows in sorted(by_method.items(), key=lambda item: -height(item[1])):
        cells = [method, f"{statistics.mean(row['steps'] for row in rows):,.0f}", *levels(rows, "after")]
        cells += [f"{statistics.mean(row[name] for row in rows):,.0f}" for name in (*costs, "seconds", "peak_memory_mb")]
        yield "| " + " | ".join(cells) + " |"


def cleared(row: Mapping[str, Any]) -> bool:
    """Whether a run with its method's own settings clears the bars."""
    accuracy = row.get("implicit_accuracy", 1.0)
    above = row["evaluation"]["rewards"][row["bar"]]["interval"][0] > 0
    return above and row["seconds"] - row["data"]["seconds"] <= MOST_SECONDS and accuracy > LEAST_ACCURACY


def bars(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a row for each run."""
    yield "| method | trained on | judged by | seed | before | after | difference [95% interval] | implicit accuracy | training s | bars |"
    yield "| --- " * 10 + "|"
    for row in records:
        level = row["evaluation"]["rewards"][row["bar"]]
        low, high = level["interval"]
        accuracy = f"{row['implicit_accuracy']:.3f}" if "implicit_accuracy" in row else ""
        cells = [row["method"], f"`{row['reward']}`", f"`{row['bar']}`", row["seed"], f"{level['before']:.3f}", f"{level['after']:.3f}"]
        cells += [f"{level['difference']:+.3f} [{low:+.3f}, {high:+.3f}]", accuracy, f"{row['seconds'] - row['data']['seconds']:.0f}"]
        yield "| " + " | ".join(map(str, [*cells, "cleared" if cleared(row) else "MISSED"])) + " |"


def at_equal_reward(records: Sequence[Mapping[str, Any]], to: str = "ddpo") -> Iterator[str]:
    """Markdown: where the policy-gradient methods end, and the KL that the method `to` has where its curve passes the same reward."""
    yield f"| method | seed | gain | KL as trained | {to}'s at the same gain | ratio |"
    yield "| --- " * 6 + "|"
    curves = {
        (r["method"], r["seed"]): [(p["held_out"] - r["curve"][0]["held_out"], p.get("kl_as_trained")) for p in r["curve"]] for r in records
    }
    for (method, seed), points in curves.items():
        (gain, kl), others = points[-1], curves.get((to, seed), [])
        if method == to or kl is None:
            continue
        for (low, before), (high, after) in itertools.pairwise(others):
            if low <= gain <= high:
                other = before + (after - before) * (gain - low) / (high - low)
                yield f"| {method} | {seed} | {gain:+.3f} | {kl:.4f} | {other:.4f} | {kl / other:.2f} |"


def figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    made = Figure(figsize=(5.5 * panels + (1.5 if panels > 1 else 0), 4), layout="constrained")
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def save(made: Any, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(made).print_png(file)


def plot(records: Sequence[Mapping[str, Any]], rewards: Sequence[str], column: str, file: Path) -> None:
    """Held-out reward against a cost: a panel for each reward, a line for each method."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(record["method"] for record in records))
    made, panels = figure(len(rewards))
    for axes, reward in zip(panels, rewards, strict=True):
        for i, name in enumerate(names):
            curves = [r["curve"] for r in records if (r["method"], r["reward"]) == (name, reward) and "failed" not in r]
            steps = list(zip(*curves, strict=False))  # of each checkpoint, a row a seed
            if not steps:
                continue
            x = [statistics.mean(row[column] for row in rows) for rows in steps]
            heights = [[row["held_out"] for row in rows] for rows in steps]
            look = {
                "color": colormaps["tab20"](i % 20),
                "linestyle": ("-", "--")[wants(name).data_role == "only" and bool(wants(name).data)],
            }
            axes.plot(x, [statistics.mean(h) for h in heights], ".", label=name, **look)
            axes.fill_between(x, [min(h) for h in heights], [max(h) for h in heights], color=look["color"], alpha=0.15)
        axes.set(xlabel=column.replace("_", " "), ylabel=f"{reward}, held-out prompts")
        if column == "kl_to_base":
            axes.set_xscale("symlog", linthresh=0.01)
        axes.grid(alpha=0.3)
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    made.legend(lines.values(), map(str, lines), loc="outside right upper", fontsize="small")
    save(made, file)


def portrait(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One method: the held-out reward along its training, a line a seed."""
    made, (axes,) = figure(1)
    for record in records:
        start = record["data"]["seconds"]
        x, heights = [p["seconds"] - start for p in record["curve"]], [p["held_out"] for p in record["curve"]]
        axes.plot(x, heights, ".-", label=f"seed {record['seed']}")
    axes.set(xlabel="seconds of training", ylabel=f"{records[0]['reward']}, held-out prompts", title=records[0]["method"])
    axes.grid(alpha=0.3)
    axes.legend()
    save(made, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", choices=BASES, default="shapes")
    parser.add_argument("--methods", nargs="+", choices=registry.METHODS, metavar="NAME", help="by default those that it has settings for")
    parser.add_argument("--reward", help="train on this, where it can be; by default on each method's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--seconds", type=float, help="of training, data included")
    budgets.add_argument("--queries", type=int, help="reward queries; methods on data spend them on pairs, and take their preset's steps")
    parser.add_argument("--pairs", type=int, help="of the methods on data: 1000; 384 with --seconds, and with --queries half of those")
    parser.add_argument("--points", type=int, default=4, help="held-out evaluations along a run")
    parser.add_argument("--output", type=Path, help="by default runs/benchmark-methods, and of another model than shapes with its name")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of benchmarks-methods.json and images/methods-*.png")
    chosen = parser.parse_args()
    base = BASES[chosen.pipeline]
    if chosen.reward not in (None, *base.judges):
        parser.error(f"--reward is {chosen.reward}; of {chosen.pipeline}: {', '.join(base.judges)}.")
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}  # here and in the runs' processes
    budget = Budget(chosen.seconds, chosen.queries)
    pairs = chosen.pairs or (chosen.queries // 2 if chosen.queries else 384 if chosen.seconds else 1000)
    records = list[dict[str, Any]]()
    name = "methods" if chosen.pipeline == "shapes" else f"methods-{chosen.pipeline}"
    output = chosen.output or Path("runs") / f"benchmark-{name}"
    for seed, method in itertools.product(chosen.seeds, chosen.methods or methods_of(chosen.pipeline)):
        reward = chosen.reward or resolve({"method": method, "pipeline": chosen.pipeline}).reward_name or base.judges[0]
        if can_train(method, reward):
            data = output / "pairs" / f"{reward}-{pairs}" / f"seed-{seed}"
            folder = output / budget.name / reward / method / f"seed-{seed}"
            made = make_pairs(chosen.pipeline, data, reward, seed, pairs) if needs_pairs(method) else None
            trial = Trial(chosen.pipeline, method, reward, seed, folder, made)
            records.append(run(trial, budget, output / "probes" / reward, chosen.points))
    check_base(records, base.judges[0])
    name = name if budget.name == "preset" else f"{name}-{budget.name}"
    done, rewards = [record for record in records if "failed" not in record], list(dict.fromkeys(r["reward"] for r in records))
    chosen.docs.mkdir(parents=True, exist_ok=True)
    about = {"budget": budget.name, "denoising_steps": DENOISING_STEPS, "threads": torch.get_num_threads(), "runs": records}
    (chosen.docs / f"benchmarks-{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    for axis, column in AXES.items():
        plot(records, rewards, column, chosen.docs / "images" / f"{name}-{axis}.png")
    if budget.name == "preset":
        print("\n".join(bars(done)))
        print("\n".join(["", *at_equal_reward(done)]))
        for method in dict.fromkeys(record["method"] for record in done):
            portrait([r for r in done if r["method"] == method], chosen.docs / "images" / name / f"{method}.png")
    for reward in rewards:
        print(f"\n### Trained on `{reward}`, {len(chosen.seeds)} seeds, budget: {budget.name}\n")
        print("\n".join(table(records, reward, base.judges)))
    failed = [record for record in records if "failed" in record]
    for record in failed:
        print(f"FAILED: {record['method']} on {record['reward']}, seed {record['seed']}: {record['failed']}")
    return 1 if failed or (budget.name == "preset" and not all(map(cleared, done))) else 0


if __name__ == "__main__":
    sys.exit(main())
