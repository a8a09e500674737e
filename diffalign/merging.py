"""`diffalign merge`: the LoRAs of several runs of one model, added up with weights, as a run of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffalign import low_rank, registry
from diffalign.checkpoint import occupied, whole_by_one
from diffalign.console import say
from diffalign.errors import InputError
from diffalign.flags import parameters
from diffalign.low_rank import Update
from diffalign.origin import CALLED, EXPO, origin_of
from diffalign.run import Run, versions
from diffalign.settings import LIVE

SAMPLING = ("guidance_scale", "audio_seconds", "max_sequence_length")  # beside CALLED, what makes a run's samples what they are


def merge(
    runs: Sequence[str | Path | Run],
    weights: Sequence[float] | None = None,
    *,
    output: str | Path,
    extrapolate: float | None = None,
    origin: str | Path | Run | None = None,
    rank: int | None = None,
) -> Run:
    """A new run whose update of the base model is `sum_i weights_i update_i`, exactly: its LoRA has the sum of the runs' ranks.

    `weights` are any finite numbers, not all 0; a single run's is 1 by default. With `extrapolate`, a above 0, it goes on from where they
    lead, `theta_1 + a (theta_1 - theta_0)` (ExPO, arXiv 2404.16792): theta_1 is their sum, theta_0 the base model, or the run `origin`.
    `rank` cuts the update of each layer to its nearest of that rank, and what is lost is said.

    The new run samples and evaluates as the first one, on its held-out prompts that none of them was trained on. Raises InputError, before
    anything is written, for an `output` that exists, runs of different models or layers, runs without a LoRA, and numbers that are none.
    """
    output = Path(output).expanduser()
    shares = _weights(len(runs), weights)
    if extrapolate is not None and not 0 < extrapolate < math.inf:
        raise InputError(f"--extrapolate is {extrapolate}: give a number above 0, such as 0.5. Less of a LoRA is --weights 0.5.")
    if origin is not None and extrapolate is None:
        raise InputError("--from is where --extrapolate goes on from: give --extrapolate A too.")
    if rank is not None and rank < 1:
        raise InputError(f"--rank is {rank}: give 1 or more.")
    if occupied(output):
        raise InputError(f"{output} exists already, and a run is never overwritten: choose another --output.")
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    beyond = extrapolate or 0.0
    terms = [(run, (1 + beyond) * share) for run, share in zip(opened, shares, strict=True)]
    if origin is not None:
        terms.append((origin if isinstance(origin, Run) else Run.open(origin), -beyond))
    if not any(weight for _, weight in terms):
        raise InputError("--weights are all 0, which leaves the base model: give others.")
    _check_bases([run for run, _ in terms])
    update, lost = _sum([(run, weight, _read(run)) for run, weight in terms], rank)
    return _write(output, terms, update, {"extrapolate": extrapolate, "rank": rank, "lost": lost})


def _weights(count: int, weights: Sequence[float] | None) -> Sequence[float]:
    if count == 0:
        raise InputError("There are no runs to merge: give their folders, such as runs/clip runs/colour.")
    if weights is None and count == 1:
        return [1.0]
    if weights is None:
        raise InputError(f"{count} runs need a weight each: --weights {' '.join([f'{1 / count:.2g}'] * count)} is their mean.")
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} runs: give --weights one for each, in their order.")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"--weights {' '.join(f'{weight:g}' for weight in weights)}: give finite numbers.")
    return weights


def _check_bases(runs: Sequence[Run]) -> None:
    """Raise InputError where a run has no LoRA, or theirs are not of one model; nothing heavy is loaded."""
    for run in runs:
        if run.plan.settings.full:
            raise InputError(f"{run.path} trained all weights, and has no LoRA to merge.")
    bases = {(run.plan.settings.pipeline, run.plan.settings.revision, run.plan.settings.tiny): run for run in runs}
    if len(bases) > 1:
        told = [
            f"{run.path} of {pipeline}{f' ({revision})' * bool(revision)}{', a dry run' * tiny}"
            for (pipeline, revision, tiny), run in bases.items()
        ]
        raise InputError(f"LoRAs of different models do not add up: {'; '.join(told)}. Give runs of one --pipeline and --revision.")
    if next(iter(bases))[0] == LIVE and len(runs) > 1:
        say("The runs were made from live pipeline objects: whether these were one model is not known, only that their layers are alike.")

    commits = {_commit([run])["base_commit"]: run for run in runs if _commit([run])}
    if len(commits) > 1:
        told = [f"{run.path} at commit {commit[:12]}" for commit, run in commits.items()]
        raise InputError(
            f"LoRAs of different commits of {next(iter(bases))[0]} do not add up: {'; '.join(told)}. Give runs of one --revision."
        )
    if commits and (silent := [str(run.path) for run in runs if not _commit([run])]):
        say(f"The commit of {next(iter(bases))[0]} is not known of {', '.join(silent)}: others are of {next(iter(commits))[:12]}.")


def _commit(runs: Sequence[Run]) -> dict[str, str]:
    """The commit of the base model as `versions` has it, where it is known of all runs, and the same."""
    found = {(run.config.get("versions") or {}).get("base_commit") for run in runs}
    commit = found.pop()
    return {"base_commit": commit} if commit and not found else {}


def _made(runs: Sequence[Run], how: Mapping[str, Any]) -> dict[str, list[str]]:
    """What made the runs, and what they were trained on: said here, since their folders may go."""
    origins = [origin_of(run.config) for run in runs]
    methods = [name for origin in origins for name in origin.methods] + [EXPO] * (how["extrapolate"] is not None)
    rewards = [name for origin in origins for name in origin.judges]
    return {"methods": list(dict.fromkeys(methods)), "rewards": list(dict.fromkeys(rewards))}


def _read(run: Run) -> Update:
    folder = run.lora_folder
    try:
        return low_rank.read(folder)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} is damaged ({error}). Write it again: diffalign train --resume {run.path}") from error


def _sum(terms: Sequence[tuple[Run, float, Update]], rank: int | None) -> tuple[Update, float | None]:
    """The sum, and where it was cut to `rank` the share of its squared norm that is lost."""
    first, _, one = terms[0]
    for run, _, other in terms[1:]:
        _check_layers(first, one, run, other)
    parts = [(weight, update) for _, weight, update in terms if weight != 0]
    layers = {name: low_rank.add([(weight, update.layers[name]) for weight, update in parts]) for name in one.layers}
    if rank is None or rank >= max(factors.rank for factors in layers.values()):
        return replace(one, layers=layers), None
    cut = {name: low_rank.truncate(factors, rank) for name, factors in layers.items()}
    error, norm = sum(found[1] for found in cut.values()), sum(found[2] for found in cut.values())
    return replace(one, layers={name: found[0] for name, found in cut.items()}), error / norm if norm else 0.0


def _check_layers(first: Run, one: Update, run: Run, other: Update) -> None:
    def few(names: set[str]) -> str:
        shown = sorted(names)
        return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")

    if one.component != other.component:
        raise InputError(f"LoRAs of different networks do not add up: {first.path} adapts {one.component}, {run.path} {other.component}.")
    ours, theirs = set(one.layers), set(other.layers)
    alone = [f"{owner.path} alone adapts {few(names)}" for owner, names in ((first, ours - theirs), (run, theirs - ours)) if names]
    if alone:
        raise InputError(f"The LoRAs adapt different layers: {'; '.join(alone)}. Give runs of the same --lora.target_modules.")
    sizes = {
        n
        for n in ours
        if one.layers[n].down.shape[1:] != other.layers[n].down.shape[1:] or len(one.layers[n].up) != len(other.layers[n].up)
    }
    if sizes:
        raise InputError(f"{first.path} and {run.path} are of different models: {few(sizes)} differ in size. Give runs of one model.")


def _write(output: Path, terms: Sequence[tuple[Run, float]], update: Update, how: Mapping[str, Any]) -> Run:
    first, runs = terms[0][0], [run for run, _ in terms]
    named = [(run.path.resolve().name, weight) for run, weight in terms]
    held, dropped = _held_out(runs)
    judges, left = _judges(runs)
    told = {key: value for key, value in how.items() if value is not None}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_by_one(output) as draft:
            # names in the header, which is handed on with the weights; in config.yaml, which stays here, folders
            rank = low_rank.write(draft / "lora", update, {"runs": named, **told})
            kept = {k: v for k, v in first.config.items() if k not in ("guard", "processes", "versions", "merged", "lora", "eval_rewards")}
            merged = {"runs": [{"run": str(run.path.resolve()), "weight": weight} for run, weight in terms], **told, **_made(runs, how)}
            shape = {"rank": rank, "alpha": float(rank), "target_modules": first.config["lora"]["target_modules"], "init": None}
            new = Run(draft)
            new.write_config({"merged": merged, **kept, "eval_rewards": judges, "lora": shape, "versions": versions() | _commit(runs)})
            new.write_prompts("train", list(dict.fromkeys(prompt for run in runs for prompt in run.read_prompts("train"))))
            new.write_prompts("heldout", held)
            (draft / "samples").mkdir()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output} cannot be written ({error}): choose another --output.") from error
    say(f"Merged {' '.join(f'{weight:+g} {name}' for name, weight in named)}: {len(update.layers)} layers of rank {rank}. Into {output}")
    for line in _notes(runs, how["lost"], len(held), dropped, left):
        say(line)
    return Run(output)


def _notes(runs: Sequence[Run], lost: float | None, held: int, dropped: int, left: Sequence[str]) -> Iterator[str]:
    first = runs[0]
    if lost is not None:
        yield f"The cut to that rank loses {lost:.2%} of the update's squared norm."
    for run in runs[1:]:
        ours, theirs = (
            {n: vars(r.plan.settings)[n] for n in (*CALLED, *SAMPLING)} | {"sample_steps": r.plan.sample_steps} for r in (first, run)
        )
        if other := [f"{name} {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]:
            yield f"{run.path} was sampled with {', '.join(other)}: here it is as {first.path} has it."
        if run.plan.suffix != first.plan.suffix:
            yield f"{run.path} adds '{run.plan.suffix}' to its prompts: here it is '{first.plan.suffix}', as {first.path} has it."
    if dropped:
        yield f"Left out of {held + dropped} held-out prompts: {dropped} that another of the runs was trained on."
    if left:
        yield f"Not among the rewards of its evaluation, since their names alone do not say what they are: {', '.join(left)}."


def _held_out(runs: Sequence[Run]) -> tuple[list[Any], int]:
    """The first run's held-out prompts that none of the others was trained on, and how many those are not; all, where none are left."""
    held = runs[0].read_prompts("heldout")
    seen = {prompt for run in runs[1:] for prompt in run.read_prompts("train")}
    kept = [prompt for prompt in held if prompt not in seen]
    if set(held) <= set(runs[0].read_prompts("train")) or not kept:
        if seen & set(held):
            say("The runs were trained on all of the first one's held-out prompts: the evaluation has no others. Give it some: --prompts.")
        return held, 0
    return kept, len(held) - len(kept)


def _judges(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """What the new run is evaluated with beside the first run's reward: by name, the rewards that the runs were trained on or evaluated
    with; and those of which a name does not tell all, or nothing any more."""
    names, left = list(runs[0].config.get("eval_rewards") or []), list[str]()
    for run in runs[1:]:
        name = run.config["reward"]["name"]
        if name is not None and _told_by_name(run.config["reward"]):
            names.append(name)
        elif name is not None:
            left.append(f"{name} of {run.path}")
        names += run.config.get("eval_rewards") or []
    return list(dict.fromkeys(names)), left


def _told_by_name(reward: Mapping[str, Any]) -> bool:
    """Whether the reward is there, and its fields are those that its name stands for."""
    if reward["name"] == LIVE:
        return False
    try:
        found, preset = registry.find("rewards", reward["name"])
    except InputError:
        return False
    usual = {key: default for key, (_, default, _) in parameters(found).items()} | preset
    return all(str(reward.get(key, value)) == str(value) for key, value in usual.items())
