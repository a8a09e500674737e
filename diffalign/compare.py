"""`diffalign compare`: finished runs side by side, by what they reached and what it took."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.console import say
from diffalign.contract import short_name
from diffalign.errors import InputError
from diffalign.evaluate import diversity, kl_to_base
from diffalign.guard import closing
from diffalign.guarding import guard_outcome
from diffalign.origin import COSTS, check_finished, evaluation_of, origin_of
from diffalign.pages import write_comparison
from diffalign.report import Line, reward_curves
from diffalign.run import Run

SAMPLES = 4  # of each prompt, for the diversity


def compare_runs(runs: Sequence[str | Path | Run], limit: int = 32) -> dict[str, Any]:
    """`{"runs": [a record each], "notes": [what makes them hard to compare]}`; see `summary` and `measure`.

    KL and diversity are measured here, on the first `limit` held-out prompts of each run; 0 leaves them out, and loads no model.
    Raises InputError for a folder that is no run, and for a run that is unfinished or damaged, before a model is loaded.
    """
    if limit < 0:
        raise InputError(f"--limit is {limit}: give 1 or more prompts, or 0 to leave KL and diversity out.")
    opened = list({run.path.resolve(): run for run in (r if isinstance(r, Run) else Run.open(r) for r in runs)}.values())
    if not opened:
        raise InputError("There are no runs to compare: give their folders, such as runs/draft-1 runs/ddpo-1.")
    for run in opened:
        check_finished(run)
    top = os.path.commonpath([run.path.resolve().parent for run in opened])
    records = [{"run": os.path.relpath(run.path.resolve(), top), **summary(run)} for run in opened]
    for run, record in zip(opened, records, strict=True):
        if limit:
            say(f"Measuring {record['run']}")
            record |= measure(run, limit)
    return {"runs": records, "notes": notes(opened, records)}


def summary(run: Run) -> dict[str, Any]:
    """What a finished run's folder says: what made it of what (`of`, in words; `reward` and `data`, None where it was not trained on
    one), its evaluation and its guard (None where it has none), and its costs."""
    plan, last, origin = run.plan, (run.metrics or [{}])[-1], origin_of(run.config)
    return {
        "path": str(run.path),
        "pipeline": plan.settings.pipeline,
        "revision": plan.settings.revision,
        "method": origin.method,
        "of": origin.of,
        "reward": short_name(origin.reward) if origin.reward else None,
        "data": origin.data,
        "steps": int(last.get("step", 0)),
        "seed": plan.settings.seed,
        "evaluation": evaluation_of(run) if (run.path / "eval.json").is_file() else None,
        "guard": guard_outcome(run),
        **{name: last.get(name) for name in COSTS},
    }


def measure(run: Run, limit: int) -> dict[str, Any]:
    """The KL to the base model, and the diversity before and after, on the run's first `limit` held-out prompts."""
    plan, policy, prompts = run.plan, run.policy, run.read_prompts("heldout")[:limit]
    chosen: dict[str, Any] = {"steps": plan.sample_steps, "seed": plan.settings.seed + 1, "batch_size": plan.settings.batch_size}
    with policy.reference():
        before = diversity(policy, prompts, samples=SAMPLES, **chosen)
    return {
        "measured": {"prompts": len(prompts), "samples": SAMPLES, "denoising_steps": chosen["steps"], "seed": chosen["seed"]},
        "kl_to_base": kl_to_base(policy, prompts, suffix=plan.suffix, **chosen),
        "diversity": {"before": before, "after": diversity(policy, prompts, samples=SAMPLES, suffix=plan.suffix, **chosen)},
    }


def notes(runs: Sequence[Run], records: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each thing that is not the same in all runs and has to be, for their levels to be compared."""
    unknown = [record for record in records if not record["evaluation"]]
    found = [f"{record['run']} has no held-out evaluation: diffalign eval {record['path']}" for record in unknown]
    found += [f"{record['run']}: {closing(record['guard'])}" for record in records if record["guard"]]
    found += [
        f"{record['run']} was trained on {seen} of the {record['evaluation']['prompts']} prompts of its evaluation."
        for record in records
        if record["evaluation"] and (seen := record["evaluation"].get("trained_on"))
    ]
    if len({(record["pipeline"], record["revision"]) for record in records}) > 1:
        found.append("The base models differ: KL, diversity and rewards are each against the run's own.")
    if len({tuple(run.read_prompts("heldout")) for run in runs}) > 1:
        found.append("The held-out prompts differ: compare the differences, not the levels.")
    evaluations = [record["evaluation"] for record in records if record["evaluation"]]
    for key, what in (("prompts", "numbers of held-out prompts"), ("denoising_steps", "numbers of denoising steps")):
        if len({evaluation.get(key) for evaluation in evaluations}) > 1:
            found.append(f"The runs were evaluated with different {what}: compare the differences, not the levels.")
    return found


def write(compared: dict[str, Any], folder: Path) -> list[Path]:
    """Write compare.json, compare.png and compare.html; the files. Raises InputError where the folder cannot be written."""
    lines: dict[str, list[Line]] = {}
    trained = {record["reward"] for record in compared["runs"]}
    for record in compared["runs"]:
        scores = (record["evaluation"] or {}).get("rewards", {})
        own = [record["reward"] or record["data"]] if record["reward"] or record["data"] else [name for name in scores if name in trained]
        for reward in own or [record["method"]]:  # what was merged stands beside all that others were trained on
            held_out = scores.get(reward)
            end = (record["kl_to_base"], held_out["after"]) if held_out and "kl_to_base" in record else None
            lines.setdefault(reward, []).append(Line(record["run"], Run.open(record["path"]).metrics, end))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compare.json").write_text(json.dumps(compared, indent=2) + "\n")
        reward_curves(lines).save(folder / "compare.png")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another --output.") from error
    return [folder / "compare.json", folder / "compare.png", write_comparison(compared, folder / "compare.html")]
