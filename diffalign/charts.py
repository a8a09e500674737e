"""What a run measured as charts: plain values that a page draws, a bounded number of points a line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

POINTS = 400  # of a line: more than a chart on a page has pixels for
AXES = {"step": "optimiser steps", "reward_queries": "reward queries", "seconds": "seconds"}
NOTES = {
    "reward": "mean score of the batch, on training prompts",
    "reward_std": "standard deviation of the batch's scores",
    "loss": "what the optimiser minimises",
    "grad_norm": "norm of the gradient, before clipping",
    "kl": "KL to the base model, in the unit of the method's page",
    "learning_rate": "of the optimiser",
    "skipped": "1 where gradients overflowed and the step changed nothing",
    "network_calls": "forwards of the network so far",
    "network_samples": "rows of those forwards so far",
    "device_seconds": "seconds of all processes so far",
    "peak_memory_mb": "highest so far, in MB",
}
COSTS = ("learning_rate", "network_calls", "network_samples", "device_seconds", "peak_memory_mb", "skipped")
FIRST = ("reward", "reward_std", "kl", "grad_norm", "loss")


@dataclass(frozen=True)
class Traced:
    """What a run wrote while it trained: the rows of metrics.jsonl and of guard.jsonl. `reward` is the name of what it was trained on."""

    name: str
    method: str
    reward: str
    rows: Sequence[Mapping[str, Any]]
    guard: Sequence[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])


def charts(runs: Sequence[Traced]) -> dict[str, Any]:
    """`{"axes", "names", "tracks", "charts"}`, as assets/report/page.js draws them; a track has the places of points on each axis.

    A line has up to `POINTS` points: of more steps each point is the mean of as many as it takes (`every`), without what is not finite. A
    chart has a line for each run that logged its column; scores of different rewards, or losses of different methods, share none.
    """
    tracks: list[dict[str, Any]] = []
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for number, run in enumerate(runs):
        every = max(1, math.ceil(len(run.rows) / POINTS))
        parts = [run.rows[i : i + every] for i in range(0, len(run.rows), every)]
        tracks.append({"every": every, "x": {axis: [_rounded(part[-1].get(axis)) for part in parts] for axis in AXES}})
        for column in dict.fromkeys(key for row in run.rows for key in row if key not in AXES):
            line = {"run": number, "track": len(tracks) - 1, "y": [_mean(row.get(column) for row in part) for part in parts]}
            _chart(found, "costs" if column in COSTS else "training", column, run, NOTES.get(column, ""))["lines"].append(line)
        if run.guard:
            tracks.append(_guard_track(run))
            for measure in dict.fromkeys(name for row in run.guard for name in row["measures"]):
                held = [row["measures"].get(measure, {}) for row in run.guard]
                chart = _chart(found, "held out", measure, None, _about(measure))
                chart["lines"].append(_guard_line(number, len(tracks) - 1, held))
            if any(row.get("trained") is not None for row in run.guard):
                line = {"run": number, "track": len(tracks) - 1, "y": [_rounded(row.get("trained")) for row in run.guard], "dots": True}
                _chart(found, "held out", "reward", run, "the trained reward, on the guard's held-out samples")["lines"].append(line)
    shown = [chart for chart in found.values() if any(y is not None for line in chart["lines"] for y in line["y"])]
    known = [axis for axis in AXES if any(x for track in tracks for x in track["x"][axis])]  # methods on data ask no reward
    return {
        "axes": [{"key": axis, "label": AXES[axis]} for axis in known or ["step"]],
        "names": [run.name for run in runs],
        "tracks": tracks,
        "charts": sorted(shown, key=_place),
    }


def _chart(found: dict[tuple[str, str, str], dict[str, Any]], group: str, column: str, run: Traced | None, note: str) -> dict[str, Any]:
    """The chart of a column, made where there is none yet; `of` is what its scale depends on."""
    of = "" if run is None else run.reward if column.startswith("reward") else run.method if column in ("loss", "kl") else ""
    return found.setdefault((group, column, of), {"group": group, "title": column, "of": of, "note": note, "lines": []})


def _place(chart: Mapping[str, Any]) -> tuple[int, int]:
    """Held-out measures beside the reward, costs last; the rest as it was logged."""
    title = chart["title"]
    first = FIRST.index(title) if title in FIRST else 1 if title.startswith("reward/") else len(FIRST)
    return ("training", "held out", "costs").index(chart["group"]), first


def _guard_track(run: Traced) -> dict[str, Any]:
    """Where the guard's evaluations stand: where the row of that step does, and that of step 0 at 0."""
    rows = {row.get("step"): row for row in run.rows} | {0: dict.fromkeys(AXES, 0)}
    return {"every": 1, "x": {axis: [_rounded(rows.get(row["step"], {}).get(axis)) for row in run.guard] for axis in AXES}}


def _guard_line(run: int, track: int, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A measure's values, the interval of its difference around its reference, and how far it may go from there."""
    low, high, limit = list[float | None](), list[float | None](), list[float | None]()
    for finding in found:
        start, ends = finding.get("reference"), finding.get("interval") or (None, None)
        low.append(_rounded(None if ends[0] is None else start + ends[0]))
        high.append(_rounded(None if ends[1] is None else start + ends[1]))
        limit.append(_rounded(None if finding.get("limit") is None else start + finding["limit"]))
    values = [_rounded(finding.get("value")) for finding in found]
    return {"run": run, "track": track, "y": values, "low": low, "high": high, "limit": limit, "dots": True}


def _about(measure: str) -> str:
    known = {
        "diversity": "how much two samples of a prompt differ",
        "kl": "KL to the base model, nats per latent dimension, summed over a sample's steps",
    }
    return known.get(measure, "watched by the guard, never trained on")


def _mean(values: Iterable[Any]) -> float | None:
    finite = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return _rounded(sum(finite) / len(finite)) if finite else None


def _rounded(value: Any) -> float | None:
    """Six digits, which is more than a chart shows; None for what is no finite number."""
    return float(f"{value:.6g}") if isinstance(value, int | float) and math.isfinite(value) else None
