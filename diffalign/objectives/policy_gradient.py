"""Policy gradients on log-probabilities `log pi_theta(x_s | x_t, c)` of stored actions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Surrogate = Literal["ppo", "clamp"]


def reinforce(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """`-A log pi_theta`, all (B,), A detached: the score-function estimator (DDPO_SF, arXiv 2305.13301, section 4.3)."""
    return -advantage.detach() * log_prob


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip: float, kind: Surrogate = "ppo") -> Tensor:
    """The importance-sampled surrogate on `rho = exp(log_prob - old_log_prob)`, e = clip, all (B,); A and the old one detached.

    `ppo` is `max(-A rho, -A clip(rho, 1 - e, 1 + e))` (arXiv 1707.06347, eq. 7; DDPO_IS, arXiv 2305.13301). `clamp` is
    `-A clip(rho, 1 - e, 1 + e)`: its gradient dies outside the band whatever the sign of A (DPOK's public code; arXiv 2305.16381).
    Raises ValueError for another kind.
    """
    log_ratio, advantage = log_prob - old_log_prob.detach(), advantage.detach()
    rho = log_ratio.detach().exp()
    low, high = 1 - clip, 1 + clip
    match kind:
        case "ppo":  # the max is -A min(rho, 1 + e) where A >= 0, and -A max(rho, 1 - e) elsewhere
            free = torch.where(advantage >= 0, rho <= high, rho >= low)
        case "clamp":
            free = (rho >= low) & (rho <= high)
        case _:
            raise ValueError(f"clipped_surrogate: kind is {kind!r}; give 'ppo' or 'clamp'.")
    # not torch.maximum of the two: where rho overflows, the branch not taken would have the gradient 0 * inf
    return -advantage * torch.where(free, torch.where(free, log_ratio, 0).exp(), rho.clamp(low, high))


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: Tensor, *, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
    """(B,) `KL(N(mean, std^2 I), N(other_mean, std^2 I)) = (mean - other_mean)^2 / (2 std^2)`, in fp32 or better.

    mean and other_mean (B, *latent), std (1,) or (B,) on any device; the mean or the sum over the latent dimensions.
    Raises ValueError where a std is not positive: a deterministic step has no KL.
    """
    if not bool((std > 0).all()):
        raise ValueError("gaussian_kl: a std is not positive; a deterministic step is no action, leave it out.")
    dtype = torch.promote_types(mean.dtype, torch.float32)
    squared = (mean.to(dtype) - other_mean.to(dtype)).reshape(len(mean), -1) ** 2
    return (squared.mean(1) if reduce == "mean" else squared.sum(1)) / (2 * std.to(squared) ** 2)


def denoising_distance(made: Tensor, predicted: Tensor, norm: Literal["l2", "rms"] = "l2") -> Tensor:
    """(B,) `||eps_tilde - eps_theta||`, both (B, *latent), in fp32 or better: DLPO's penalty (arXiv 2405.14632) on a sample's step.

    `l2` is the Euclidean norm, as the paper has it; `rms` divides it by the root of the number of latent dimensions. Its gradient where the
    two are equal is 0. Raises ValueError for another norm.
    """
    if norm not in ("l2", "rms"):
        raise ValueError(f"denoising_distance: norm is {norm!r}; give 'l2' or 'rms'.")
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    difference = (made.to(dtype) - predicted.to(dtype)).reshape(len(made), -1)
    squares = (difference**2).sum(1)
    length = torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)  # the root's slope at 0 is infinite
    return length if norm == "l2" else length / difference.shape[1] ** 0.5
