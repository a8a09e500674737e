"""What a person sees while a run works: a progress bar, or on a plain log one line now and then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from diffalign.loop import Row

console = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line for the person, on standard error, from the first process alone; results go to standard output, with `show`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        console.print(message, markup=False, soft_wrap=True)


def show(table: Table) -> None:
    """A result, on standard output; 200 columns wide where that is no terminal."""
    out = Console(highlight=False)
    (out if out.is_terminal else Console(highlight=False, width=200)).print(table)


def say_notes(policy: Any) -> None:
    """What a policy does otherwise than its pipeline, where its adapter says something of that."""
    for note in vars(policy).get("notes", ()):
        say(note)


def watch(rows: Iterable[Row], done: int, steps: int, shown: bool = True) -> Iterator[Row]:
    """Pass the rows on, showing step, reward and the time that is left."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    if not shown:
        yield from rows
        return
    every = max(1, steps // 10)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps, completed=done, metrics="")
        for row in rows:
            text = "  ".join(f"{name} {row.metrics[name]:.4g}" for name in ("reward", "loss", "grad_norm") if name in row.metrics)
            progress.update(task, completed=row.step, metrics=text)
            if not console.is_terminal and (row.step % every == 0 or row.step == steps):
                say(f"step {row.step}/{steps}  {text}  {row.metrics['seconds']:.1f} s")
            yield row


def evaluated(evaluation: Mapping[str, Any]) -> str:
    """What an evaluation is of: `64 held-out prompts`, or how many of them the run was trained on; and how many samples of each."""
    count, seen, draws = evaluation["prompts"], evaluation.get("trained_on") or 0, evaluation.get("draws", 1)
    drawn = f", {draws} samples of each" if draws > 1 else ""
    if not seen:
        return f"{count} held-out prompts{drawn}"
    return f"{count} training prompts{drawn}" if seen >= count else f"{count} prompts, {seen} of them trained on{drawn}"


def comparison(evaluation: Mapping[str, Any]) -> Table:
    """The held-out table of an evaluation."""
    table = Table(title=f"{evaluated(evaluation)}, same noise", title_justify="left")
    for column in ("reward", "before", "after", "difference", "95% interval", "win rate"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for name, row in evaluation["rewards"].items():
        low, high = row["interval"]
        table.add_row(
            name, f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['difference']:+.3f}", f"[{low:+.3f}, {high:+.3f}]",
            f"{row['win_rate']:.2f}",
        )  # fmt: skip
    return table


def runs_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Runs side by side: the records of `diffalign.compare`."""
    table = Table(title="Held out: before -> after, difference [95% interval], same noise", title_justify="left")
    for column in ("run", "method", "trained on"):
        table.add_column(column, overflow="fold")
    table.add_column("held out", no_wrap=True)
    for column in ("steps", "KL", "diversity", "queries", "network samples", "seconds", "peak MB"):
        table.add_column(column, justify="right")
    guarded = any(record.get("guard") for record in records)
    if guarded:
        table.add_column("guard", overflow="fold")
    for record in records:
        diversity = record.get("diversity")
        table.add_row(
            *(escape(record[name]) for name in ("run", "method")),
            escape(record["of"] or "-"),
            "\n".join(_held_out(record["evaluation"])) if record["evaluation"] else "not evaluated",
            f"{record['steps']:,}",
            f"{record['kl_to_base']:.3g}" if "kl_to_base" in record else "-",
            f"{diversity['before']:.3f} -> {diversity['after']:.3f}" if diversity else "-",
            *(f"{record[name]:,}" if record[name] is not None else "-" for name in ("reward_queries", "network_samples")),
            *(f"{record[name]:,.0f}" if record[name] is not None else "-" for name in ("seconds", "peak_memory_mb")),
            *([_guard(record.get("guard"))] if guarded else []),
        )
    return table


def _guard(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return "-"
    fired = outcome["fired"]
    return f"ended it at step {outcome['step']}: {escape(fired['measure'])}" if fired else f"silent, {outcome['evaluations']} evaluations"


def _held_out(evaluation: Mapping[str, Any]) -> Iterator[str]:
    for name, row in evaluation["rewards"].items():
        low, high = row["interval"]
        yield f"{escape(name)} {row['before']:.3f} -> {row['after']:.3f}, {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
