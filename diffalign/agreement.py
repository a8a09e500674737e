"""How far scores agree with judgements and with each other: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def right(margins: Array) -> Array:
    """(n,) 1 where the better one of a pair scores higher (margin above 0), 0 where lower, 1/2 where both score the same."""
    return (np.sign(margins) + 1) / 2


def interval_over(groups: Sequence[Any], statistic: Callable[[NDArray[np.int64]], float], seed: int, resamples: int) -> tuple[float, float]:
    """The 95% percentile interval of `statistic(indices)` where groups, not rows, are drawn with replacement: rows of a group (a prompt)
    depend on each other. `groups` names the group of each of n rows. Both ends are NaN where no resample has the statistic.
    """
    rows, rng = _by_group(groups), np.random.default_rng(seed)
    return _percentiles([statistic(np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])) for _ in range(resamples)])


def _by_group(groups: Sequence[Any]) -> list[NDArray[np.int64]]:
    """The indices of each group's rows."""
    names = _numbered(groups)
    return np.split(np.argsort(names, kind="stable"), np.cumsum(np.bincount(names))[:-1])


def _numbered(groups: Sequence[Any]) -> NDArray[np.int64]:
    """(n,) the number of each row's group; an array of texts would make each as long as the longest."""
    numbers = {group: number for number, group in enumerate(sorted(set(groups)))}
    return np.array([numbers[group] for group in groups], dtype=np.int64)


def _percentiles(found: Sequence[float]) -> tuple[float, float]:
    values = np.asarray(found)[np.isfinite(found)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


class Accuracy(NamedTuple):
    value: float
    low: float
    high: float


def accuracy(margins: Array, prompts: Sequence[Any], seed: int = 0, resamples: int = 2_000) -> Accuracy:
    """The share of n pairs that are ordered right, a tie counting half, with a 95% bootstrap interval over the pairs' `prompts`."""
    scores, names = right(margins), _numbered(prompts)
    sums, counts = np.bincount(names, scores), np.bincount(names)  # as `interval_over`, without the rows: there may be a million
    rng, found = np.random.default_rng(seed), list[float]()
    for _ in range(resamples):
        drawn = rng.integers(0, len(sums), len(sums))
        found.append(float(sums[drawn].sum() / counts[drawn].sum()))
    return Accuracy(float(scores.mean()), *_percentiles(found))


def fitted_scale(margins: Array) -> float:
    """The s >= 0 that maximises `sum log sigmoid(s m)` over the margins (n,): how surely a difference in scores means a preference.

    0 where the scores are no better than chance. Where every pair is right there is no maximum: then s is 50 / mean |m|, at which the
    mean margin is as good as certain.
    """
    size = float(np.abs(margins).mean())
    if size == 0 or margins.sum() <= 0:
        return 0.0
    unit = margins / size

    def slope(s: float) -> float:
        return float((unit * _sigmoid(-s * unit)).sum())

    low, high = 0.0, 50.0
    if slope(high) > 0:
        return high / size
    for _ in range(60):  # the slope falls in s
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2 / size


class Bin(NamedTuple):
    """Pairs whose confidence lies in [low, high): how many, their mean confidence, and the share that is ordered right."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


def reliability(margins: Array, scale: float, bins: int = 10) -> tuple[list[Bin], float]:
    """The reliability table of n pairs, and the expected calibration error `sum_b n_b / n |accuracy_b - confidence_b|`.

    The confidence of a pair is `sigmoid(scale |m|)` in [0.5, 1], how sure the reward is of its order. The bins are of one width; empty ones
    are left out.
    """
    confidence, scores = _sigmoid(scale * np.abs(margins)), right(margins)
    edges = np.linspace(0.5, 1, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    table = [
        Bin(float(edges[b]), float(edges[b + 1]), int(own.sum()), float(confidence[own].mean()), float(scores[own].mean()))
        for b in range(bins)
        if (own := which == b).any()
    ]
    return table, sum(row.pairs / len(margins) * abs(row.accuracy - row.confidence) for row in table)


def kendall_tau_b(x: Array, y: Array) -> float:
    """Kendall's tau-b of two scores of n things, ties corrected, in [-1, 1]; NaN where either is constant."""
    first, second = (np.sign(values[:, None] - values[None, :]) for values in (x, y))
    size = float(np.sqrt(np.abs(first).sum() * np.abs(second).sum()))
    return float((first * second).sum()) / size if size else float("nan")


def tau_within(x: Array, y: Array, prompts: Sequence[Any]) -> tuple[float, int]:
    """The mean of tau-b over the prompts whose things both scores tell apart, and how many those are; NaN and 0 where there are none."""
    found = [kendall_tau_b(x[own], y[own]) for own in _by_group(prompts)]
    known = [tau for tau in found if np.isfinite(tau)]
    return (float(np.mean(known)), len(known)) if known else (float("nan"), 0)


def spearman(x: Array, y: Array) -> float:
    """Spearman's rank correlation of two scores of n things, ties with their mean rank; NaN where either is constant."""
    first, second = _ranks(x), _ranks(y)
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size else float("nan")


def _ranks(x: Array) -> Array:
    _, at, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[at]


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def cohen_kappa(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Cohen's kappa (1960) of two raters' categories of n things, in [-1, 1]; NaN where chance alone would make them always agree."""
    names = sorted(set(one) | set(other))
    first, second = ([names.index(each) for each in categories] for categories in (one, other))
    shares = [np.bincount(own, minlength=len(names)) / max(1, len(own)) for own in (first, second)]
    observed, expected = float(np.mean(np.equal(first, second))) if names else float("nan"), float((shares[0] * shares[1]).sum())
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def fleiss_kappa(counts: Array) -> float:
    """Fleiss' kappa (1971): `counts[i, j]` raters put thing i into category j; NaN where all of them are in one category.

    Things may have different numbers of raters, two or more: the agreement of each is the share of its pairs of raters that agree.
    """
    raters = counts.sum(1)
    observed = float(np.mean((counts * (counts - 1)).sum(1) / (raters * (raters - 1))))
    expected = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")
