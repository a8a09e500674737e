"""Plots of what runs measured."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Line:
    """A run in a plot: its name, the rows of its metrics.jsonl, and where it ended: its KL to the base model and held-out reward."""

    name: str
    rows: Sequence[Mapping[str, float]]
    end: tuple[float, float] | None = None


def curve(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Image.Image:
    """Reward against reward queries and against seconds: a line for each run, name -> rows of its metrics.jsonl."""
    return reward_curves({"reward": [Line(name, rows) for name, rows in runs.items()]})


def reward_curves(rewards: Mapping[str, Sequence[Line]]) -> Image.Image:
    """A row of plots for each reward: of its runs, training reward against queries and seconds, and held-out reward against KL."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ended = any(line.end for lines in rewards.values() for line in lines)
    figure = Figure(figsize=(9 + 3 * ended, 3.2 * len(rewards)), layout="constrained")
    panels = figure.subplots(len(rewards), 2 + ended, sharex="col", sharey="row", squeeze=False)
    for (reward, lines), row in zip(rewards.items(), panels, strict=True):
        for axes, column in zip(row, ("reward_queries", "seconds"), strict=False):
            for line in lines:
                known = [values for values in line.rows if "reward" in values]  # methods on data log none
                axes.plot([values[column] for values in known], [values["reward"] for values in known], label=line.name)
            axes.set(xlabel=column.replace("_", " "), ylabel=f"{reward}, training prompts")
        for line in lines if ended else ():
            row[2].plot(*([value] for value in line.end or (None, None)), "o", label=line.name)
            row[2].set(xlabel="KL to the base model, nats per latent dimension", ylabel=f"{reward}, held-out prompts")
        for axes in row:
            axes.grid(alpha=0.3)
        row[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return Image.open(file)
