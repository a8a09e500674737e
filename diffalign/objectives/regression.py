"""Regression of log-ratios on rewards: under a KL penalty the optimum has `log(pi / pi_ref)(x, c) = r(x, c) / beta + const(c)`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def reward_difference(log_ratio_difference: Tensor, reward_difference: Tensor, *, beta: float) -> Tensor:
    """(B,) `(dlogratio - dr / beta)^2` for B pairs of samples of one prompt each: PRDP (arXiv 2402.08714; survey eq. 33).

    dlogratio is `log(pi_theta / pi_ref)` of the first sample's whole trajectory minus the second's, dr their rewards' difference.
    """
    return (log_ratio_difference - reward_difference / beta) ** 2


class Proximal(NamedTuple):
    """`loss` (..., k(k-1)/2), the pairs in the order (0, 1), (0, 2), ..., (k-2, k-1); `coefficient` (..., T, k), detached."""

    loss: Tensor
    coefficient: Tensor


def proximal_reward_difference(log_ratio: Tensor, old_log_ratio: Tensor, scores: Tensor, *, beta: float, clip: float) -> Proximal:
    """PRDP with proximal updates (arXiv 2402.08714) on all pairs i < j of the k samples of a prompt, over T steps.

    `max(u^2, v^2)`, `u_ij = sum_t (l_ti - l_tj) - (r_i - r_j) / beta`, and v the same with each `l = log(pi_theta / pi_ref)` clamped
    to within `clip` of its value under the old policy. log_ratio and old_log_ratio (..., T, k), scores (..., k).

    `coefficient` is the derivative of `loss.mean(-1)`, summed over the leading dimensions, with respect to log_ratio. It needs no graph,
    so the steps can be backpropagated one by one: `(coefficient[t] * log_ratio_t).sum().backward()`. It is autograd's, where u^2 and
    v^2 tie too: half of each branch. Raises ValueError where k < 2: there is no pair.
    """
    k = scores.shape[-1]
    if k < 2:
        raise ValueError("proximal_reward_difference: one sample of a prompt makes no pair; give two or more.")
    drift = (log_ratio - old_log_ratio).detach()
    inside = drift.abs() <= clip
    # not old + clamped drift: that is log_ratio only up to rounding, and would break ties by it
    clamped = torch.where(inside, log_ratio, old_log_ratio.detach() + drift.clamp(-clip, clip))
    u, v = (_differences(x.sum(-2) - scores / beta) for x in (log_ratio, clamped))
    first, second = torch.triu_indices(k, k, 1, device=scores.device)
    loss = torch.maximum(u**2, v**2)[..., first, second]

    u, v = u.detach(), v.detach()
    share = torch.where(u**2 == v**2, 0.5, (u**2 > v**2).to(u.dtype))
    # u and v are antisymmetric in (i, j): the row sum collects a sample's pairs with their signs
    through_u, through_v = (2 * share * u).sum(-1), (2 * (1 - share) * v).sum(-1)
    coefficient = (through_u.unsqueeze(-2) + inside * through_v.unsqueeze(-2)) / (k * (k - 1) / 2)
    return Proximal(loss, coefficient)


def _differences(x: Tensor) -> Tensor:
    """(..., k) -> (..., k, k): x_i - x_j."""
    return x.unsqueeze(-1) - x.unsqueeze(-2)


def rating_error(predicted: Tensor, rating: Tensor) -> Tensor:
    """(B,) mean over the aspects of `(predicted - rating)^2`, each (B, K): absolute ratings of several aspects (survey, 3.1.2).

    A rating that is NaN was not given and counts for nothing; where a row has none, its error is 0.
    """
    given = rating.isfinite()
    error = torch.where(given, predicted - torch.where(given, rating, 0), 0) ** 2
    return error.sum(-1) / given.sum(-1).clamp(min=1)
