"""Several processes as one: rows are drawn and numbered as a single process with the whole batch would draw and number them.

A batch of `count * size` rows is dealt in order: process r has the rows from `r * size` to `(r + 1) * size`. Of a round of several batches
each process has its part of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from diffalign.types import Processes, Prompts


class Shared(Generator):
    """The generator of a run in several processes: of one state, which all of them keep in step.

    What is drawn from it plainly is the same in every process; `draw_rows` gives each its own rows of what is drawn for all.
    """

    def __new__(cls, processes: Processes) -> Shared:
        return super().__new__(cls)

    def __init__(self, processes: Processes) -> None:
        self.processes = processes


def draw_rows(n: int, rng: Generator | None, draw: Callable[[int], Tensor]) -> Tensor:
    """(n, ...) random rows of a batch of n: `draw(n)`; of a `Shared` generator this process's part of `draw(n * count)`."""
    if not isinstance(rng, Shared):
        return draw(n)
    start = rng.processes.rank * n
    return draw(n * rng.processes.count)[start : start + n]


def everyone(x: Tensor, processes: Processes, size: int) -> Tensor:
    """(N, ...) of each process, batches of `size` rows, as (count * N, ...) in a single process's order; every process must call."""
    if processes.count == 1:
        return x
    return processes.gather(x).unflatten(0, (processes.count, -1, size)).transpose(0, 1).flatten(0, 2)


def own(x: Tensor, processes: Processes, size: int) -> Tensor:
    """This process's rows of what `everyone` gave."""
    return x.unflatten(0, (-1, processes.count, size))[:, processes.rank].flatten(0, 1)


def held(rows: Tensor, processes: Processes, size: int) -> tuple[Tensor, Tensor]:
    """Of row numbers (M,) of all processes: which of them this process has, bool (M,), and their numbers here."""
    within = rows % (size * processes.count)
    return within // size == processes.rank, rows // (size * processes.count) * size + within % size


def everyones_prompts(prompts: Prompts, processes: Processes, size: int, device: torch.device) -> Prompts:
    """`everyone` of prompts; their pictures on the CPU, their metadata what JSON can hold. The gathers run on `device`."""
    if processes.count == 1:
        return prompts
    metadata = [json.dumps(dict(values)) for values in prompts.metadata or ()]
    pictures = {name: x for name in ("image", "mask") if (x := vars(prompts)[name]) is not None}
    gathered = {name: everyone(x.to(device), processes, size).cpu() for name, x in pictures.items()}
    return Prompts(
        tuple(_everyones_texts(prompts.text, processes, size, device)),
        transcript=None if prompts.transcript is None else tuple(_everyones_texts(prompts.transcript, processes, size, device)),
        sample_rate=prompts.sample_rate,
        metadata=tuple(json.loads(text) for text in _everyones_texts(metadata, processes, size, device)) if metadata else None,
        **gathered,
    )


def _everyones_texts(texts: Sequence[str], processes: Processes, size: int, device: torch.device) -> list[str]:
    """`gather` takes tensors of one shape: texts go as bytes of one width."""
    rows = [text.encode() for text in texts]
    width = int(processes.gather(torch.tensor([max(map(len, rows))], device=device)).max())
    padded = torch.tensor([list(row.ljust(max(width, 1), b"\0")) for row in rows], device=device)
    return [bytes(row).rstrip(b"\0").decode() for row in everyone(padded, processes, size).tolist()]


def of_scores(scores: Tensor, processes: Processes, size: int | None = None) -> dict[str, Tensor | float]:
    """The metrics of scores (N,): their mean and deviation over all processes, every one of which must call."""
    scores = everyone(scores.detach(), processes, len(scores) if size is None else size)
    return {"reward": scores.mean(), "reward_std": scores.std(correction=0)}
