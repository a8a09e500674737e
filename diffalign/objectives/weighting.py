"""Rewards as weights of a supervised loss on samples."""

from __future__ import annotations

import torch
from torch import Tensor


def exponential_weights(scores: Tensor, *, beta: float, cap: float | None = None) -> Tensor:
    """(B,) `exp(r / beta)` of the scores (B,), scaled to mean 1 over the B, then cut at `cap`; detached.

    RWR (arXiv 2305.13301, section 4.2) and HIVE (arXiv 2303.09618). The cut weights are not scaled again: their mean may be below 1,
    and no weight is above `cap`.
    """
    weights = len(scores) * torch.softmax(scores.detach() / beta, 0)  # softmax subtracts the largest: no overflow
    return weights if cap is None else weights.clamp(max=cap)


def effective_sample_size(weights: Tensor) -> Tensor:
    """`(sum w)^2 / sum w^2` of the weights (B,), 0 or more and not all 0: a scalar from 1 (one sample has it all) to B (all equal)."""
    return weights.sum() ** 2 / (weights**2).sum()
