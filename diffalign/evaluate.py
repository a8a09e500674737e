"""Held-out evaluation: the same prompts and the same noise for the base model and the trained one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from diffalign.contract import CheckedReward
from diffalign.sampling import ddim, rollout
from diffalign.types import Policy, Prompts


@torch.no_grad()
def sample(policy: Policy, prompts: Sequence[str], *, steps: int, seed: int, batch_size: int) -> Tensor:
    """Media of the prompts, deterministic given `seed`: (B, 3, H, W) in [0, 1], on the CPU.

    All the noise is drawn first, so that it does not depend on the batch size.
    """
    wanted = Prompts(tuple(prompts))
    condition = policy.encode(wanted)
    noise = policy.prior(condition, Generator().manual_seed(seed))
    parts: list[Tensor] = []
    for i in range(0, len(wanted), batch_size):
        part = slice(i, i + batch_size)
        final = rollout(policy, condition[part], steps=steps, kernel=ddim(0.0), start=noise[part]).final
        parts.append(policy.decode(final).cpu())
    return torch.cat(parts)


def bootstrap(differences: NDArray[np.float64], seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """The 95% percentile interval of the mean of paired differences (n,)."""
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@torch.no_grad()
def score(reward: CheckedReward, media: Tensor, prompts: Sequence[str], *, batch_size: int, device: torch.device) -> NDArray[np.float64]:
    """(B,) scores of media that lie on the CPU, computed on `device` in batches."""
    parts = [
        reward(media[i : i + batch_size].to(device), Prompts(tuple(prompts[i : i + batch_size])))
        for i in range(0, len(prompts), batch_size)
    ]
    return torch.cat(parts).double().cpu().numpy()


def compare(before: NDArray[np.float64], after: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """Means, the paired difference with its 95% interval, and how often the trained model wins (a tie counts half)."""
    difference = after - before
    low, high = bootstrap(difference, seed)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": float(difference.mean()),
        "interval": [low, high],
        "win_rate": float(((difference > 0) + 0.5 * (difference == 0)).mean()),
    }


def evaluate(
    policy: Policy, rewards: Sequence[CheckedReward], prompts: Sequence[str], *, steps: int, seed: int, batch_size: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """`(results, media before, media after)` on held-out prompts; results hold one comparison for each reward, by name."""
    after = sample(policy, prompts, steps=steps, seed=seed, batch_size=batch_size)
    with policy.reference():
        before = sample(policy, prompts, steps=steps, seed=seed, batch_size=batch_size)
    device = next(policy.module.parameters()).device

    def scores(reward: CheckedReward, media: Tensor) -> NDArray[np.float64]:
        return score(reward, media, prompts, batch_size=batch_size, device=device)

    table = {reward.name: compare(scores(reward, before), scores(reward, after), seed) for reward in rewards}
    return {"prompts": len(prompts), "denoising_steps": steps, "seed": seed, "rewards": table}, before, after
