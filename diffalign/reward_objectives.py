"""What a reward is trained to do, on judged pictures: order pairs, or tell ratings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign import agreement
from diffalign.errors import InputError
from diffalign.judged import Judged
from diffalign.objectives.preference import preference
from diffalign.objectives.regression import rating_error

Rate = Callable[[Sequence[Judged], int], Tensor]  # (B, K) outputs for the picture of that number of each judgement


@dataclass(frozen=True)
class BradleyTerry:
    """`-log sigmoid(r(x_w, c) - r(x_l, c))` (survey arXiv 2409.11564, eq. 5), for a picture x_w that was preferred to x_l with c."""

    label_smoothing: float = 0.0

    def loss(self, rate: Rate, batch: Sequence[Judged]) -> tuple[Tensor, Tensor]:
        """(B,) losses and the (B, 1) margins they are of."""
        margin = rate(batch, 0)[:, 0] - rate(batch, 1)[:, 0]
        return preference(margin, beta=1.0, label_smoothing=self.label_smoothing), margin[:, None]

    def measure(self, found: Tensor, batch: Sequence[Judged]) -> dict[str, float]:
        return {"accuracy": float(agreement.right(found[:, 0].double().numpy()).mean())}

    def report(self, found: Tensor, batch: Sequence[Judged], seed: int) -> dict[str, Any]:
        accuracy = agreement.accuracy(found[:, 0].double().numpy(), [each.asked for each in batch], seed)
        return {"accuracy": accuracy.value, "interval": [accuracy.low, accuracy.high]}


@dataclass(frozen=True)
class Ratings:
    """Squared error of each aspect (survey, 3.1.2), in units of the training ratings' deviation around their mean."""

    aspects: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def targets(self, batch: Sequence[Judged]) -> Tensor:
        """(B, K) standardised ratings, NaN where an aspect was not rated."""
        given = torch.tensor([[dict(each.ratings).get(name, math.nan) for name in self.aspects] for each in batch])
        return (given - torch.tensor(self.mean)) / torch.tensor(self.std)

    def loss(self, rate: Rate, batch: Sequence[Judged]) -> tuple[Tensor, Tensor]:
        """(B,) losses and the (B, K) outputs they are of."""
        found = rate(batch, 0)
        return rating_error(found, self.targets(batch).to(found.device)), found

    def measure(self, found: Tensor, batch: Sequence[Judged]) -> dict[str, float]:
        return {f"spearman_{name}": agreement.spearman(*columns) for name, columns in self._columns(found, batch)}

    def report(self, found: Tensor, batch: Sequence[Judged], seed: int) -> dict[str, Any]:
        found_by = {name: agreement.spearman(*columns) for name, columns in self._columns(found, batch)}
        return {"spearman": {name: value if math.isfinite(value) else None for name, value in found_by.items()}}

    def _columns(self, found: Tensor, batch: Sequence[Judged]) -> Iterator[tuple[str, tuple[Any, Any]]]:
        wanted = self.targets(batch)
        for k, name in enumerate(self.aspects):
            given = wanted[:, k].isfinite()
            yield name, (found[given, k].double().numpy(), wanted[given, k].double().numpy())


Objective = BradleyTerry | Ratings


def ratings_of(train: Sequence[Judged], aspects: Sequence[str]) -> Ratings:
    """The objective of these aspects, standardised over the training data; raises InputError for one whose ratings are all the same."""
    columns = [torch.tensor([dict(each.ratings)[name] for each in train if name in dict(each.ratings)]).double() for name in aspects]
    for name, column in zip(aspects, columns, strict=True):
        if len(column) < 2 or not column.std(correction=0) > 0:
            raise InputError(
                f"The training data rates '{name}' the same everywhere ({len(column)} ratings): there is nothing to learn. "
                "Leave the aspect out, with --aspects, or give ratings that differ."
            )
    return Ratings(tuple(aspects), tuple(float(c.mean()) for c in columns), tuple(float(c.std(correction=0)) for c in columns))
