"""RWR and RAFT: the denoising loss on the policy's own samples, weighted by the reward, or on the best of n.

RWR for diffusion: Lee et al. 2023, arXiv 2302.12192, and DDPO's baseline (arXiv 2305.13301, section 4.2). RAFT: arXiv 2304.06767.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from diffalign.advantages import advantages
from diffalign.checks import above_zero, at_least, check, share
from diffalign.noise import draw_noise
from diffalign.objectives.weighting import effective_sample_size, exponential_weights
from diffalign.rounds import best_and_worst, nothing_differs, sample_round
from diffalign.sampling import ddim, denoising_error, without_some_text
from diffalign.shards import draw_rows, everyones_prompts
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward


@dataclass(frozen=True)
class RWR:
    """`w mean((target - prediction)^2)` on own samples, forward-noised; `w = exp(A / beta)` with mean 1, or the best of n alone.

    A is the reward minus the mean of the prompt's samples, over their deviation. The network is trained without guidance.
    """

    weighting: Literal["exponential", "best"] = "exponential"
    """exponential: RWR. best: RAFT, each prompt's best sample with weight 1."""
    beta: float = 1.0
    """Temperature of the weights, in deviations of a prompt's rewards."""
    cap: float = 20.0
    """No weight is above this many times the mean."""
    inference_steps: int = 50
    """Denoising steps of a sample."""
    eta: float = 1.0
    """Noise of a sampling step: 1 is ancestral sampling, 0 deterministic."""
    batches: int = 4
    """Batches of prompts in a round."""
    samples: int = 4
    """Samples of each prompt in a round."""
    updates: int = 8
    """Optimiser steps on a round."""
    forwards: int = 1
    """Batches of samples, drawn from the round's by chance, in one optimiser step."""
    drop_text: float = 0.1
    """Share of samples that are trained with an empty prompt, for guidance."""

    needs: ClassVar[Needs] = Needs(split_by=("batches", "forwards"), in_step=True)
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 5.0,
        "batch_size": 8,
        "lora": {"rank": 4},
    }

    def __post_init__(self) -> None:
        at_least(self, inference_steps=1, batches=1, samples=2, updates=1, forwards=1)
        check(self, "eta", 0 <= self.eta <= 1, "a number from 0 to 1")
        above_zero(self, "beta")
        check(self, "cap", self.cap >= 1, "1 or more")
        share(self, "drop_text")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        round_ = sample_round(
            policy,
            reward,
            batch,
            context,
            batches=self.batches,
            samples=self.samples,
            steps=self.inference_steps,
            kernel=ddim(self.eta),
            keep="final",
        )
        about = round_.metrics()
        if self.weighting == "best":
            usable, _ = best_and_worst(round_, self.batches, self.samples)
            weights = torch.ones(round_.total, device=round_.scores.device)
        else:
            gains = advantages("group", round_.scores, round_.prompts.keys, context, size=round_.size, clip=float("inf"))
            weights = exponential_weights(round_.everyone(gains), beta=self.beta, cap=self.cap)
            about["effective_sample_size"] = float(effective_sample_size(weights)) / len(weights)
            usable = torch.arange(round_.total) if bool(round_.everyone(gains).any()) else torch.arange(0)
        if nothing_differs(len(usable), context):
            return
        # A forward draws of the whole round, so every process has all its samples: only x_0 of each, no trajectories.
        x_0 = round_.everyone(round_.trajectory.final)
        prompts = everyones_prompts(round_.prompts, context.processes, round_.size, x_0.device)
        for _ in range(self.updates):
            for forward in range(self.forwards):
                rows = usable[draw_rows(round_.size, context.rng, lambda n: torch.randint(len(usable), (n,), generator=context.rng))]
                condition = without_some_text(policy, prompts[rows], self.drop_text, context.rng)
                x = x_0[rows.to(x_0.device)]
                error = denoising_error(policy, x, draw_noise(x.shape, x, context.rng), policy.path.draw(len(x), context.rng), condition)
                loss = (weights[rows.to(weights.device)].to(error) * error).mean() / self.forwards
                yield Loss(loss, {**about, "denoising_error": error.detach().mean()}, update=forward == self.forwards - 1)
