"""DRaFT-K and DRaFT-LV: the reward's gradient through the last sampling steps (Clark et al., ICLR 2024, arXiv 2309.17400)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.checks import at_least, check, zero_or_more
from diffalign.noise import diffuse, draw_noise
from diffalign.sampling import ddim, rollout, transition
from diffalign.shards import of_scores
from diffalign.types import Condition, Context, Loss, Needs, Policy, Prompts, Reward, Trajectory


@dataclass(frozen=True)
class DRaFT:
    """`-r(x_0, c)`, differentiated through the last K of the deterministic DDIM steps.

    DRaFT-LV (Algorithm 1 of the paper): K = 1, averaged over the sample and n copies of it, noised again to the last level.
    """

    k: int = 1
    """Sampling steps, counted from the end, that the gradient goes through."""
    n: int = 0
    """DRaFT-LV: noised copies of the sample that join the average (the paper: 2); needs k = 1."""
    inference_steps: int = 50
    """Denoising steps of a sample."""
    checkpointing: bool = True
    """With k above 1, run the network again in the backward pass instead of keeping its activations: memory flat in k."""
    reference_weight: float = 0.0
    """Weight of `mean((eps_theta - eps_ref)^2)` on the last step's network output (DRaFT+); 0 leaves it out."""

    needs: ClassVar[Needs] = Needs(differentiable_reward=True, split_by=("accumulate",), in_step=True)
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 4e-4,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "guidance_scale": 7.5,
        "lora": {"rank": 8},
    }

    def __post_init__(self) -> None:
        at_least(self, inference_steps=1, n=0)
        most = self.inference_steps
        check(self, "k", 1 <= self.k <= most, f"1 to {most}, the denoising steps (method.inference_steps)")
        check(self, "k", self.n == 0 or self.k == 1, f"1: DRaFT-LV (method.n {self.n}) goes through the last step alone")
        zero_or_more(self, "reference_weight")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        condition = policy.encode(batch)
        kernel, share = ddim(0.0), 1 / (1 + self.n)
        trajectory = rollout(
            policy,
            condition,
            steps=self.inference_steps,
            kernel=kernel,
            grad_steps=self.k,
            rng=context.rng,
            checkpointing=self.checkpointing,
        )
        scores = reward(policy.decode(trajectory.final), batch)
        loss = -share * scores.mean()
        metrics: dict[str, Tensor | float] = of_scores(scores, context.processes)
        if self.reference_weight > 0:
            drift = _drift(policy, trajectory, condition).mean()
            loss = loss + self.reference_weight * drift
            metrics["drift"] = drift.detach()
        yield Loss(loss, metrics, update=self.n == 0)

        last = trajectory.schedule.now[-1:], trajectory.schedule.then[-1:]
        x_0 = trajectory.final.detach()
        for copy in range(self.n):
            x_t = diffuse(x_0, draw_noise(x_0.shape, x_0, context.rng), last[0])
            action = transition(policy, x_t, *last, condition, kernel)
            scores = reward(policy.decode(action.mean), batch)
            yield Loss(-share * scores.mean(), {"reward_noised": scores.mean().detach()}, update=copy == self.n - 1)


def _drift(policy: Policy, trajectory: Trajectory, condition: Condition) -> Tensor:
    """(B,) squared distance of the guided epsilon to the base model's, on the last state the network saw."""
    at, x_t = trajectory.schedule.now[-1:], trajectory.states[-2].detach()
    epsilon = policy.path.split(policy.predict(x_t, at, condition), x_t, at)[1]
    with torch.no_grad(), policy.reference():
        base = policy.path.split(policy.predict(x_t, at, condition), x_t, at)[1]
    return ((epsilon - base) ** 2).flatten(1).mean(1)
