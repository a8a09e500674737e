"""The tables of docs/which-method.md, from what scripts/benchmark_methods.py measured and left in docs/benchmarks-methods*.json.

    python scripts/method_tables.py             writes them into the page, between its two marks

Means over the seeds. A gain is the mean of the paired differences on the held-out prompts, beside it the lowest lower end and the highest
upper end of the seeds' 95% intervals.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "which-method.md"
BEGIN, END = "<!-- written by scripts/method_tables.py: begin -->", "<!-- end -->"
NOT_SHAPES = ["digits-wer"]  # the independent judge of a model that draws no shapes
COSTS = ("reward_queries", "network_samples", "seconds", "peak_memory_mb")
SHARED = {"raft": "rwr", "draft-lv": "draft", "flow-grpo-fast": "flow-grpo", "dance-grpo": "flow-grpo"}  # pages of several names
PLACES = {  # where the rows of the seeds stand
    "benchmarks-methods": "benchmarks.md#the-methods",
    "benchmarks-methods-seconds-30": "benchmarks.md#equal-budgets",
    "benchmarks-methods-digits": "benchmarks.md#speech-on-digits",
    "benchmarks-methods-shapes-flow": "shapes-flow.md#what-methods-do-with-it",
}


def rows_of(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The runs of each (reward, method), a seed each."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        if "failed" not in run:
            found.setdefault((run["reward"], run["method"]), []).append(run)
    return found


def gain(runs: Sequence[Mapping[str, Any]], reward: str) -> str:
    """`+0.127 [+0.063, +0.206]`: see above."""
    found = [run["evaluation"]["rewards"][reward] for run in runs]
    low, high = min(f["interval"][0] for f in found), max(f["interval"][1] for f in found)
    return f"{statistics.mean(f['difference'] for f in found):+.3f} [{low:+.3f}, {high:+.3f}]"


def table(runs: Sequence[Mapping[str, Any]], section: str = "") -> Iterator[str]:
    """Markdown: a row for each method, by reward, the highest gain first; its name leads to the `section` of its page."""
    judged = runs[0]["evaluation"]["rewards"]
    judge = next(name for name in ["shapes-all-right", *NOT_SHAPES] if name in judged)
    yield f"| method | trained on | gain | gain of `{judge}` | queries | network samples | seconds | peak MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    rewards = list(dict.fromkeys(run["reward"] for run in runs))
    groups = rows_of(runs)

    def height(of: tuple[str, str]) -> tuple[int, float]:
        reward, _ = of
        return rewards.index(reward), -statistics.mean(run["evaluation"]["rewards"][reward]["difference"] for run in groups[of])

    for reward, method in sorted(groups, key=height):
        found = groups[reward, method]
        costs = [f"{statistics.mean(run[name] for run in found):,.0f}" for name in COSTS]
        yield f"| {linked(method, section)} | `{reward}` | {gain(found, reward)} | {gain(found, judge)} | {' | '.join(costs)} |"


def linked(method: str, section: str) -> str:
    """The name, leading to its page."""
    return f"[`{method}`](methods/{SHARED.get(method, method)}.md{section})"


def tables(docs: Path = DOCS) -> Iterator[str]:
    """Markdown: the measurements, the equal budget first."""
    files = sorted(docs.glob("benchmarks-methods*.json"), key=lambda file: ("seconds" not in file.stem, file.stem))
    if not files:
        raise SystemExit(f"{docs} holds no benchmarks-methods*.json: scripts/benchmark_methods.py writes them.")
    for file in files:
        about = json.loads(file.read_text(encoding="utf-8"))
        runs = about["runs"]
        model = file.stem.removeprefix("benchmarks-methods").removesuffix(f"-{about['budget']}").strip("-") or "shapes"
        seeds = ", ".join(map(str, sorted({run["seed"] for run in runs})))
        kind, _, amount = about["budget"].partition("-")
        budget = f"{amount} {kind} each" if amount else "each with its own settings"
        place = PLACES.get(file.stem, "benchmarks.md")
        held = runs[0]["evaluation"]["prompts"]
        yield f"### On `{model}`, {budget}\n"
        yield f"Seeds {seeds}; {held} held-out prompts; {about['threads']} thread. [Every seed, and all columns]({place}).\n"
        yield from table(runs, "#on-shapes" if (model, about["budget"]) == ("shapes", "preset") else "")
        yield ""


def written(text: str) -> str:
    """The page with its tables as they are now."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE} lacks one of its marks: {BEGIN} and {END}.")
    made = "\n".join(tables())
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def main() -> int:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
