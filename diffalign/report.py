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
            known = [row for row in rows if "reward" in row]  # a method of one's own may log other things
            axes.plot([row[column] for row in known], [row["reward"] for row in known], label=name)
        axes.set(xlabel=column.replace("_", " "), ylabel="reward, training prompts")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.label_outer()
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return Image.open(file)
