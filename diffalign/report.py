"""Plots of what runs measured."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image


def curve(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Image.Image:
    """Reward against reward queries and against seconds: a line for each run, name -> rows of its metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2, sharey=True), ("reward_queries", "seconds"), strict=True):
        for name, rows in runs.items():
            axes.plot([row[column] for row in rows], [row["reward"] for row in rows], label=name)
        axes.set(xlabel=column.replace("_", " "), ylabel="reward, training prompts")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.label_outer()
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return Image.open(file)
