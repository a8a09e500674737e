"""`report.html`: a page of a run, or of several, in one file that asks no network. What cannot be read is said in it."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from diffalign.charts import Traced, charts
from diffalign.checkpoint import whole
from diffalign.console import evaluated, say
from diffalign.contract import short_name
from diffalign.errors import InputError
from diffalign.exhibits import of_evaluation, through_training
from diffalign.flags import flat
from diffalign.guard import closing
from diffalign.guarding import guard_outcome, guard_rows
from diffalign.origin import COSTS, Origin, evaluation_of, origin_of, reached
from diffalign.rerun import commands
from diffalign.run import Run

NAME = "report.html"
FOLDER = Path(__file__).parent / "assets" / "report"
T = TypeVar("T")


def write_report(run: Run) -> Path:
    """Write the run's report.html; the file. Raises InputError where it cannot be written."""
    return _write(run.path / NAME, "run.html", of_run(run))


def leave_report(run: Run) -> None:
    """`write_report` for a training, which nothing may fail that a page needs: where it fails, one line says so."""
    try:
        write_report(Run(run.path))  # as the folder is now: a run remembers the settings that it was opened with
    except Exception as error:
        say(f"{run.path / NAME} was not written ({' '.join(str(error).split())[:200]}). Write it again: diffalign report {run.path}")


@contextmanager
def reported(run: Run, main: bool) -> Iterator[None]:
    """Leave a report when the block ends, also where it fails or is stopped; but not where a second Ctrl-C wants it to end at once."""
    try:
        yield
    except Exception:
        if main:
            leave_report(run)
        raise
    if main:
        leave_report(run)


def write_comparison(compared: Mapping[str, Any], file: Path) -> Path:
    """Write the page of what `diffalign.compare_runs` returned; the file. Raises InputError where it cannot be written."""
    return _write(file, "compare.html", of_runs(compared))


def of_run(run: Run) -> dict[str, Any]:
    """What the page of a run says, as plain values: each section that could be read, and `troubles`, a line for each that could not."""
    troubles = list[str]()

    def read(what: str, section: Callable[[], T], otherwise: T) -> T:
        try:
            return section()
        except Exception as error:  # files from any hand: whatever is wrong with one costs its section, and no other
            troubles.append(f"{what} cannot be shown: {' '.join(str(error).split())[:300] or type(error).__name__}")
            return otherwise

    config = read("The settings", lambda: run.config, dict[str, Any]())
    rows = read("What the run logged", lambda: _rows(run.metrics), list[dict[str, Any]]())
    guard = read("What the guard found", lambda: _guard_table(guard_rows(run.path)), list[dict[str, Any]]())
    measured = (run.path / "eval.json").is_file()
    origin = read("What was trained on what", lambda: origin_of(config), Origin(()))
    traced = Traced(run.path.resolve().name, origin.method, origin.of, rows, guard)
    return {
        "name": run.path.resolve().name,
        "state": read("How far the run is", lambda: _state(run, config, rows, guard), {"text": "unknown", "kind": "unknown"}),
        "method": origin.method,
        "of": "" if origin.parts else origin.of,
        "merged": read("What was merged", lambda: _merged(config), None),
        "pipeline": str(config.get("pipeline") or ""),
        "facts": read("The costs", lambda: _facts(rows), list[tuple[str, str]]()),
        "held_out": read("The held-out table", lambda: _evaluation(evaluation_of(run)) if measured else None, None),
        "sheet": read("The evaluation's pictures", lambda: of_evaluation(run), None),
        "exhibition": read("Pictures through the training", lambda: through_training(run), None),
        "charts": read("The curves", lambda: charts([traced]), charts([])),
        "guard": guard,
        "guard_closing": read("What came of the guard", lambda: _closing(run), None) if guard else None,
        "commands": read("How to run it again", lambda: commands(run, config), list[tuple[str, str]]()),
        "settings": read("The settings' table", lambda: _settings(config), dict[str, str]()),
        "versions": read("The versions", lambda: {k: str(v) for k, v in dict(config.get("versions") or {}).items()}, dict[str, str]()),
        "yaml": yaml.safe_dump(config, sort_keys=False) if config else "",
        "troubles": troubles,
    }


def of_runs(compared: Mapping[str, Any]) -> dict[str, Any]:
    """What the page of several finished runs says: the records of `compare_runs`, their curves and in what their settings differ."""
    records = compared["runs"]
    runs = [Run.open(record["path"]) for record in records]
    traced = [
        Traced(record["run"], record["method"], record["of"], _rows(run.metrics), _guard_table(guard_rows(run.path)))
        for record, run in zip(records, runs, strict=True)
    ]
    settings = [
        {**_settings({**run.config, **({"merged": record["of"]} if run.merged else {})}), **_prefixed(run.config.get("versions") or {})}
        for run, record in zip(runs, records, strict=True)
    ]
    keys = dict.fromkeys(key for own in settings for key in own)
    differ = {key: values for key in keys if len(set(values := [own.get(key, "") for own in settings])) > 1}
    shared = {key for key in keys if all(key in own for own in settings)}  # of another method, or an older version, are the others
    evaluations = [_rewards(record) for record in records]
    names = dict.fromkeys(row["name"] for rows in evaluations for row in rows)
    table = [(name, [(i, row) for i, rows in enumerate(evaluations) for row in rows if row["name"] == name]) for name in names]
    return {
        "records": records,
        "notes": compared["notes"],
        "charts": charts(traced),
        "held_out": [(name, _placed(rows)) for name, rows in table],
        "differ": {key: values for key, values in differ.items() if key in shared},
        "lacking": {key: values for key, values in differ.items() if key not in shared},
        "alike": sum(1 for key in keys if key not in differ),
        "measured": any("kl_to_base" in record for record in records),
    }


def _rewards(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The held-out rows of a record; none where it was not evaluated."""
    try:
        return _evaluation(record["evaluation"])["rewards"] if record["evaluation"] else []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{record['path']}/eval.json is damaged. Write it again: diffalign eval {record['path']}") from error


def _rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    if not all(isinstance(row, dict) for row in rows):
        raise InputError("a line of metrics.jsonl is no object.")
    return [*rows]


def _state(run: Run, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], guard: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    found = reached(run, config, rows, guard)
    return {"text": found.text, "kind": found.kind}


def _merged(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a merged run is the sum of, and how."""
    merged = config.get("merged")
    if not merged:
        return None
    how = {"extrapolate": "extrapolated by {:g} (ExPO), folded into the weights", "rank": "cut to rank {}", "lost": "which loses {:.2%}"}
    return {
        "parts": [(Path(part["run"]).name, part["run"], f"{part['weight']:+g}") for part in merged["runs"]],
        "methods": ", ".join(map(short_name, merged.get("methods", ()))),
        "rewards": ", ".join(map(short_name, merged.get("rewards", ()))),
        "how": ", ".join(text.format(merged[key]) for key, text in how.items() if key in merged),
    }


def _facts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What all steps took, where the run logged it."""
    last = rows[-1] if rows else {}
    shown = ("reward_queries", "network_samples", "seconds", "peak_memory_mb")
    return [(COSTS[key], f"{last[key]:,.0f}") for key in shown if last.get(key)]


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of eval.json, with a row for each reward; `prompts` of a row is how many it is of."""
    count, pairs = int(evaluation["prompts"]), evaluation.get("pairs")
    numbers = ("before", "after", "difference", "win_rate")
    rows = [
        {
            "name": name,
            **{key: float(row[key]) for key in numbers},
            "interval": [float(end) for end in row["interval"]],
            "prompts": int(row.get("prompts", count)),
        }
        for name, row in evaluation["rewards"].items()
    ]
    return {
        "prompts": count,
        "said": evaluated(evaluation),
        "seen": int(evaluation.get("trained_on") or 0),
        "denoising_steps": evaluation.get("denoising_steps"),
        "pairs": pairs
        and {"count": int(pairs["count"]), "accuracy": float(pairs["implicit_accuracy"]), "seen": bool(pairs.get("trained_on"))},
        "rewards": [{**row, "drawn": _drawn(row, _extent([row]))} for row in rows],
    }


def _placed(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of one reward in several runs, drawn on one scale."""
    extent = _extent([row for _, row in rows])
    return [(run, {**row, "drawn": _drawn(row, extent)}) for run, row in rows]


def _extent(rows: Sequence[Mapping[str, Any]]) -> float:
    return max((abs(value) for row in rows for value in (*row["interval"], row["difference"]) if math.isfinite(value)), default=0.0) or 1.0


def _drawn(row: Mapping[str, Any], extent: float) -> dict[str, float | bool] | None:
    """Where difference and interval stand on a line 100 wide with zero in its middle; None for what is not finite.

    `off_zero`: zero lies outside of the interval.
    """
    low, high = row["interval"]
    places = {name: round(50 + 46 * value / extent, 2) for name, value in {"low": low, "high": high, "at": row["difference"]}.items()}
    return {**places, "off_zero": low > 0 or high < 0} if all(map(math.isfinite, places.values())) else None


def _guard_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations of a guard as guard.jsonl has them, with what a page shows of each."""
    return [
        {
            "step": int(row["step"]),
            "trained": row["trained"],
            "fired": row["fired"] and str(row["fired"]["measure"]),
            "best": row["best_step"] == row["step"],
            "measures": {
                name: {key: found[key] for key in ("value", "reference", "difference", "interval", "limit", "failed", "within", "failures")}
                for name, found in row["measures"].items()
            },
        }
        for row in rows
    ]


def _closing(run: Run) -> str | None:
    outcome = guard_outcome(run)
    return closing(outcome) if outcome else None


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: _said(value) for name, value in flat(config).items() if name != "versions"}


def _prefixed(versions: Mapping[str, Any]) -> dict[str, str]:
    return {f"version of {name}": str(value) for name, value in versions.items()}


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _write(file: Path, template: str, values: Mapping[str, Any]) -> Path:
    text = _render(template, values)
    try:
        with whole(file) as draft:
            draft.write_bytes(text.encode("utf-8", "replace"))  # JSON can spell half a character
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): make room, or mend its folder.") from error
    return file


def _render(template: str, values: Mapping[str, Any]) -> str:
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    made = {"version": importlib.metadata.version("diffalign"), "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    policy = f"default-src 'none'; img-src data:; media-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    return _environment().get_template(template).render(**values, **made, style=style, script=script, policy=policy)


def _digest(text: str) -> str:
    """What a Content-Security-Policy allows a script by: no other one runs, whatever a prompt or a setting may hold."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
