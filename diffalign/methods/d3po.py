"""D3PO: direct preference optimisation of single denoising steps (Yang et al., CVPR 2024, arXiv 2311.13231)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from diffalign.checks import above_zero, at_least, check
from diffalign.errors import InputError
from diffalign.objectives.preference import Margin, preference, wins
from diffalign.rounds import Round, best_and_worst, check_noise, nothing_differs, parts, reference_log_probs, sample_round, stored_round
from diffalign.sampling import noisy, replay
from diffalign.types import Context, Examples, Loss, Needs, Policy, Prompts, Reward


@dataclass(frozen=True)
class D3PO:
    """`-log sigmoid(beta (log rho_w - log rho_l))` on the same denoising step of two samples, `rho = pi_theta / pi_ref`.

    Of a prompt's samples the best and the worst make the pair, by the reward. A prompt whose samples are worth the same makes none.
    With data nothing is sampled: the pairs are stored trajectories that people have judged (`diffalign pairs --trajectories`), with the
    denoising steps and the eta that they were made with.
    """

    beta: float = 0.1
    """Scale of the margin; log-probabilities are means over the latent dimensions."""
    ratio_clip: float = 0.1
    """rho is cut to 1 plus or minus this, as in the authors' code."""
    loss: Margin = "logistic"
    """f of the margin: logistic (or dpo), squared (ipo), hinge (slic)."""
    inference_steps: int = 20
    """Denoising steps of a sample."""
    eta: float = 1.0
    """Noise of a step: 1 is ancestral sampling, and 0 has no actions. On a flow it is a of Flow-GRPO's SDE."""
    random_steps: int | None = None
    """Only so many of the first steps are random, and so trained on; the rest are deterministic (MixGRPO). By default all are."""
    batches: int = 4
    """Batches of prompts in a round."""
    samples: int = 2
    """Samples of each prompt in a round."""
    updates: int = 2
    """Optimiser steps over the round's pairs, each on its own share of their transitions."""

    needs: ClassVar[Needs] = Needs(data="trajectories", data_role="instead", split_by=("batches",))
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 3e-5,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 5.0,
        "batch_size": 8,
        "lora": {"rank": 4},
    }

    def __post_init__(self) -> None:
        at_least(self, inference_steps=1, batches=1, samples=2, updates=1)
        check_noise(self)
        above_zero(self, "beta")
        check(self, "ratio_clip", 0 < self.ratio_clip < 1, "a number between 0 and 1")

    def losses(self, policy: Policy, reward: Reward | None, batch: Prompts | Examples, context: Context) -> Iterator[Loss]:
        if isinstance(batch, Examples):
            round_, eta = stored_round(policy, context.batches(batch, self.batches), self.random_steps, context.processes)
            self._check_updates(self.batches * len(batch) * len(round_.steps), context)
            samples, about = 2, dict[str, float]()
        else:
            assert reward is not None
            round_, eta, samples = self._sample(policy, reward, batch, context), self.eta, self.samples
            about = round_.metrics()
        kernel = noisy(policy.path, eta)
        base = reference_log_probs(policy, round_, kernel)
        won, lost = best_and_worst(round_, self.batches, samples)
        about["ties"] = 1 - len(won) / (round_.total / samples)
        if nothing_differs(len(won) * len(round_.steps), context, wanted=self.updates):
            return
        every = torch.cartesian_prod(round_.steps, torch.arange(len(won)))
        every = every[torch.randperm(len(every), generator=context.rng)]
        low, high = math.log(1 - self.ratio_clip), math.log(1 + self.ratio_clip)
        half = max(1, round_.size // 2)  # a forward holds both sides
        for chosen in every.tensor_split(self.updates):
            # both samples of a prompt are in one process
            better, worse = (round_.share(chosen[:, 0], side[chosen[:, 1]]) for side in (won, lost))
            if len(better.rows) == 0:
                yield round_.nothing()
            for part in parts(better.steps, torch.arange(len(better.rows)), half):
                steps, rows = part.steps.repeat(2), torch.cat([better.rows[part.rows], worse.rows[part.rows]])
                ratio = replay(policy, round_.trajectory, steps, rows, kernel).log_prob - base[steps, rows]
                liked, disliked = ratio.clamp(low, high).unflatten(0, (2, half))[:, : part.count]
                margin = liked - disliked
                loss = preference(margin, beta=self.beta, kind=self.loss)
                metrics = {**about, "implicit_accuracy": wins(margin).mean(), "margin": margin.detach().mean()}
                yield Loss(loss.sum() / better.total, metrics, update=part.last)

    def _sample(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Round:
        self._check_updates(self.batches * len(batch) * (self.random_steps or self.inference_steps), context)  # before anything is sampled
        return sample_round(
            policy,
            reward,
            batch,
            context,
            batches=self.batches,
            samples=self.samples,
            steps=self.inference_steps,
            kernel=noisy(policy.path, self.eta),
            random_steps=self.random_steps,
        )

    def _check_updates(self, each: int, context: Context) -> None:
        most = each * context.processes.count
        if self.updates > most:
            raise InputError(
                f"{self.updates} optimiser steps cannot share the {most} transitions that the pairs of a round have at most: lower "
                "method.updates, or raise batch_size or method.batches."
            )
