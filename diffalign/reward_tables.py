"""What a person sees of a test of rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The tables of what `reward_eval.evaluate_rewards` has found."""
    kind, tests = ("pairs" if "pairs" in results else "ratings"), results["rewards"]
    title = f"{results['data']}: {results[kind]:,} {kind} of {results['prompts']:,} prompts"
    title += "" if results["split"] == "all" else f", {results['split']}"
    found = [_accuracies(tests, title), _reliability(tests)] if kind == "pairs" else [_correlations(tests, title)]
    return [*found, *([_taus(results["agreement"])] if results["agreement"] else [])]


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _accuracies(tests: Mapping[str, Any], title: str) -> Table:
    table = _table(title, ("reward",), ("accuracy", "95% interval", "ties", "calibration error", "scale"))
    for name, test in tests.items():
        low, high = test["interval"]
        calibration = f"{test['calibration_error']:.3f}", f"{test['scale']:.3g}"
        table.add_row(escape(name), f"{test['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{test['ties']:,}", *calibration)
    return table


def _reliability(tests: Mapping[str, Any]) -> Table:
    """A row a bin of confidence, a column a reward."""
    title = "Of the pairs that a reward orders with this confidence, the share that is right (pairs)"
    table = _table(title, ("confidence",), tuple(map(escape, tests)))
    edges = sorted({(row["low"], row["high"]) for test in tests.values() for row in test["reliability"]})
    for low, high in edges:
        cells = [next((row for row in test["reliability"] if row["low"] == low), None) for test in tests.values()]
        table.add_row(f"{low:.2f} to {high:.2f}", *("" if c is None else f"{c['accuracy']:.2f} ({c['pairs']:,})" for c in cells))
    return table


def _correlations(tests: Mapping[str, Any], title: str) -> Table:
    table = _table(title, ("reward", "aspect", "of"), ("rank correlation", "95% interval"))
    for name, test in tests.items():
        for aspect, columns in test["aspects"].items():
            for of, found in columns.items():
                low, high = found["interval"]
                interval = "-" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"
                what = "the reward" if of == "reward" else "its own rating of it"
                table.add_row(escape(name), escape(aspect), what, _number(found["spearman"]), interval)
    return table


def _taus(agreement: Mapping[str, Any]) -> Table:
    table = _table("Kendall's tau-b of two rewards within prompts", ("reward", "and"), ("tau-b", "prompts"))
    for first, row in agreement.items():
        for second, found in row.items():
            table.add_row(escape(first), escape(second), _number(found["kendall_tau_b"]), f"{found['prompts']:,}")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
