"""How good models are by comparisons of their samples: Bradley-Terry strengths, Gaussian skills, and what to compare next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PRIOR = 10.0  # nats: at odds of 20,000 to 1; against a few dozen comparisons it moves a strength by less than a thousandth


class Strengths(NamedTuple):
    """(M,) log odds, of mean 0, and the ends of their 95% intervals; `exp(values[i] - values[j])` are the odds that i is preferred to j."""

    values: Array
    low: Array
    high: Array


def bradley_terry(wins: Array, prior: float = PRIOR) -> Strengths:
    """The strengths that make `wins` (M, M) most likely: how often i was preferred to j, a tie being half a win for each.

    Maximises `sum_ij wins_ij log sigmoid(theta_i - theta_j) - sum_i theta_i^2 / (2 prior^2)` (Bradley and Terry 1952) by Newton's method.
    The Gaussian prior, of standard deviation `prior` nats, keeps a model finite that has never lost. The intervals are the normal ones of
    the inverse Hessian there. Raises ValueError for what is no square matrix of counts.
    """
    wins = np.asarray(wins, dtype=np.float64)
    size = len(wins)
    if wins.shape != (size, size) or not np.isfinite(wins).all() or (wins < 0).any():
        raise ValueError("wins are an (M, M) matrix of counts.")
    games = wins + wins.T
    np.fill_diagonal(games, 0.0)
    # the data say nothing of the mean of all strengths, which stays 0: what stands for it here keeps the matrix well conditioned
    theta, eye = np.zeros(size), np.eye(size) / prior**2 + 1 / size

    def objective(at: Array) -> float:
        return float(-(wins * np.logaddexp(0, at[None, :] - at[:, None]) * (1 - np.eye(size))).sum() - (at**2).sum() / (2 * prior**2))

    def hessian(at: Array) -> Array:
        """Of minus the objective: a Laplacian of the information of each two models, and the prior."""
        p = 0.5 * (1 + np.tanh((at[:, None] - at[None, :]) / 2))
        information = games * p * (1 - p)
        return np.diag(information.sum(1)) - information + eye

    for _ in range(200):
        p = 0.5 * (1 + np.tanh((theta[:, None] - theta[None, :]) / 2))
        slope = (wins * (1 - np.eye(size)) - games * p).sum(1) - theta / prior**2
        step = np.linalg.solve(hessian(theta), slope)
        share = 1.0
        while objective(theta + share * step) < objective(theta) and share > 1e-6:  # far from the maximum a whole step may overshoot
            share /= 2
        theta = theta + share * step
        if np.abs(step).max(initial=0.0) < 1e-10:
            break
    centre = np.eye(size) - 1 / size
    half = 1.959964 * np.sqrt(np.diag(centre @ np.linalg.inv(hessian(theta)) @ centre))
    values = centre @ theta
    return Strengths(values, values - half, values + half)


class Skill(NamedTuple):
    """A model's skill as a Gaussian."""

    mean: float = 25.0
    deviation: float = 25.0 / 3


BETA = 25.0 / 6  # how much a single comparison scatters about the skills
LEAST = 1e-4  # of a variance that is left after an update


def _pair(one: Skill, other: Skill) -> tuple[float, float, float]:
    """(c, the probability that `one` is preferred, by which share of itself its variance falls) where the two are compared."""
    c = math.sqrt(one.deviation**2 + other.deviation**2 + 2 * BETA**2)
    p = 0.5 * (1 + math.tanh((one.mean - other.mean) / (2 * c)))
    return c, p, (one.deviation / c) ** 3 * p * (1 - p)


def updated(skills: Sequence[Skill], ranks: Sequence[float]) -> list[Skill]:
    """The skills of K models after one ranking of a sample of each: `ranks` (K,), the lowest is the best, equal ones are a tie.

    Algorithm 1 of Weng and Lin (2011), Bradley-Terry with full pairs: a closed form of what K-Sort Arena (arXiv 2408.14468) and other
    arenas do with K-wise comparisons.
    """
    found = list[Skill]()
    for i, own in enumerate(skills):
        shift, fall = 0.0, 0.0
        for q, other in enumerate(skills):
            if q != i:
                c, p, share = _pair(own, other)
                score = 1.0 if ranks[i] < ranks[q] else 0.5 if ranks[i] == ranks[q] else 0.0
                shift += own.deviation**2 / c * (score - p)
                fall += share
        found.append(Skill(own.mean + shift, own.deviation * math.sqrt(max(1 - fall, LEAST))))
    return found


def gain(skills: Sequence[Skill]) -> float:
    """By how much a comparison of these models lowers the sum of their variances. The update of a variance does not look at the outcome,
    so this is known before."""
    total = 0.0
    for i, own in enumerate(skills):
        fall = sum(_pair(own, other)[2] for q, other in enumerate(skills) if q != i)
        total += own.deviation**2 * (1 - max(1 - fall, LEAST))
    return total


class Ranking(NamedTuple):
    """A comparison that was answered: K models, and the rank of the sample of each, the lowest is the best."""

    models: tuple[int, ...]
    ranks: tuple[float, ...]


def skills_of(count: int, rankings: Iterable[Ranking]) -> list[Skill]:
    """The skills of `count` models after the rankings, in their order. Of two samples of one model nothing is learned."""
    skills = [Skill()] * count
    for models, ranks in rankings:
        if len(set(models)) == len(models):
            for model, skill in zip(models, updated([skills[m] for m in models], ranks), strict=True):
                skills[model] = skill
    return skills


def wins_of(count: int, rankings: Iterable[Ranking], weight: float = 1.0) -> Array:
    """(count, count) wins of each model over each other.

    A ranking of K counts as K - 1 comparisons: each of its K (K - 1) / 2 pairs weighs 2 / K, since they are not independent.
    """
    wins = np.zeros((count, count))
    for models, ranks in rankings:
        for i, j in itertools.combinations(range(len(models)), 2):
            if models[i] != models[j]:
                better = 1.0 if ranks[i] < ranks[j] else 0.5 if ranks[i] == ranks[j] else 0.0
                share = weight * 2 / len(models)
                wins[models[i], models[j]] += share * better
                wins[models[j], models[i]] += share * (1 - better)
    return wins
