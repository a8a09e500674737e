"""PRDP: regression of log-ratios on reward differences (Deng et al., CVPR 2024, arXiv 2402.08714). No public code exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.checks import above_zero, at_least
from diffalign.objectives.regression import proximal_reward_difference
from diffalign.rounds import check_first_pass, check_noise, log_probs, nothing_differs, parts, reference_log_probs, sample_round
from diffalign.sampling import noisy, replay
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward


@dataclass(frozen=True)
class PRDP:
    """`(sum_t [log rho_t(1) - log rho_t(2)] - (r(1) - r(2)) / beta)^2`, `rho = pi_theta / pi_ref`, on pairs of samples of one prompt.

    All pairs of a prompt's `samples` count. Each log-ratio may move by `clip` from its value under the policy that sampled, and the
    worse of the clipped and the free loss is what goes down. The sum over the steps needs no graph over them: one pass without a graph
    gives the residuals, and a second one goes back through the steps in forwards of the batch size.
    """

    beta: float = 0.1
    """Weight of the KL in the optimum, `pi ~ pi_ref exp(D r / beta)` on D latent dimensions: log-ratios are means over them."""
    inference_steps: int = 50
    """Denoising steps of a sample."""
    eta: float = 1.0
    """Noise of a step: 1 is ancestral sampling, and 0 has no actions. On a flow it is a of Flow-GRPO's SDE."""
    random_steps: int | None = None
    """Only so many of the first steps are random, and so trained on; the rest are deterministic (MixGRPO). By default all are."""
    batches: int = 1
    """Batches of prompts in a round."""
    samples: int = 8
    """Samples of each prompt in a round."""
    updates: int = 4
    """Optimiser steps on a round, each on all of it."""
    clip: float = 1e-4
    """How far a step's log-ratio may move in a round; the log-probabilities are means over the latent dimensions."""

    needs: ClassVar[Needs] = Needs(split_by=("batches",))
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 7.5,
        "batch_size": 8,
        "lora": {"rank": 4},
    }

    def __post_init__(self) -> None:
        at_least(self, inference_steps=1, batches=1, samples=2, updates=1)
        check_noise(self)
        above_zero(self, "beta", "clip")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        kernel = noisy(policy.path, self.eta)
        round_ = sample_round(
            policy,
            reward,
            batch,
            context,
            batches=self.batches,
            samples=self.samples,
            steps=self.inference_steps,
            kernel=kernel,
            random_steps=self.random_steps,
        )
        about = round_.metrics()
        scores = round_.everyone(round_.scores).unflatten(0, (self.batches, self.samples, -1))
        nothing_differs(
            int((scores != scores[:, :1]).sum()), context
        )  # such a round still holds the policy at its base, until they are many
        base = reference_log_probs(policy, round_, kernel)
        old = torch.where(round_.trajectory.actions[:, None].to(base.device), round_.trajectory.log_probs, 0) - base
        every = torch.cartesian_prod(round_.steps, torch.arange(len(round_)))
        for update in range(self.updates):
            # before the first update the policy is the one that sampled: its log-probabilities are known
            ratio = old if update == 0 else log_probs(policy, round_, kernel) - base
            value, coefficient = self._residuals(ratio, old, round_.scores)
            metrics = {**about, "regression": value, "log_ratio": float(ratio.sum(0).mean())}
            for part in parts(every[:, 0], every[:, 1], round_.size):
                log_prob = replay(policy, round_.trajectory, part.steps, part.rows, kernel).log_prob[: part.count]
                if update == 0:
                    check_first_pass((log_prob - round_.old_log_probs(part)).detach(), self.clip)
                c = coefficient[part.steps, part.rows][: part.count]
                # its gradient is the regression's; its value is shown as it is, spread over the parts
                surrogate = (c * (log_prob - log_prob.detach())).sum() + value * part.count / len(every)
                yield Loss(surrogate, metrics, update=part.last)

    def _residuals(self, ratio: Tensor, old: Tensor, scores: Tensor) -> tuple[float, Tensor]:
        """The mean loss over the pairs of all prompts, and its derivative (T, N) with respect to the log-ratios.

        The rounds' rows are ordered batch of prompts, sample, prompt.
        """
        shape = (self.batches, self.samples, -1)

        def grouped(x: Tensor) -> Tensor:  # (..., N) -> (batches * prompts, ..., samples)
            x = x.unflatten(-1, shape).movedim((-3, -1), (0, 1))
            return x.flatten(0, 1)

        loss, coefficient = proximal_reward_difference(grouped(ratio), grouped(old), grouped(scores), beta=self.beta, clip=self.clip)
        groups = len(loss)
        back = coefficient.unflatten(0, (self.batches, -1)).movedim((0, 1), (-3, -1)).flatten(-3)
        return float(loss.mean()), back / groups
