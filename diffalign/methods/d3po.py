"""D3PO: direct preference optimisation of single denoising steps (Yang et al., CVPR 2024, arXiv 2311.13231)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from diffalign.errors import InputError
from diffalign.objectives.preference import Margin, preference, wins
from diffalign.rounds import best_and_worst, nothing_differs, parts, reference_log_probs, sample_round
from diffalign.sampling import ddim, replay
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward


@dataclass(frozen=True)
class D3PO:
    """`-log sigmoid(beta (log rho_w - log rho_l))` on the same denoising step of two samples, `rho = pi_theta / pi_ref`.

    Of a prompt's samples the best and the worst make the pair, by the reward, which may be a person's judgement. A prompt whose samples
    are worth the same makes none.
    """

    beta: float = 0.1
    """Scale of the margin; log-probabilities are means over the latent dimensions."""
    ratio_clip: float = 0.1
    """rho is cut to 1 plus or minus this, as in the authors' code."""
    loss: Margin = "logistic"
    """f of the margin: logistic (DPO), squared (IPO), hinge (SLiC)."""
    inference_steps: int = 20
    """Denoising steps of a sample."""
    eta: float = 1.0
    """Noise of a step: 1 is ancestral sampling, and 0 has no actions."""
    random_steps: int | None = None
    """Only so many of the first steps are random, and so trained on; the rest are deterministic (MixGRPO). By default all are."""
    batches: int = 4
    """Batches of prompts in a round."""
    samples: int = 2
    """Samples of each prompt in a round."""
    updates: int = 2
    """Optimiser steps over the round's pairs, each on its own share of their transitions."""

    needs: ClassVar[Needs] = Needs()
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 3e-5,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 5.0,
        "batch_size": 8,
        "lora": {"rank": 4},
    }

    def __post_init__(self) -> None:
        for name, least in {"inference_steps": 1, "batches": 1, "samples": 2, "updates": 1}.items():
            if vars(self)[name] < least:
                raise InputError(f"method.{name} is {vars(self)[name]}: give {least} or more.")
        if not 0 < self.eta <= 1:
            raise InputError(f"method.eta is {self.eta}: give a number above 0, up to 1. Without noise there are no actions.")
        if self.random_steps is not None and not 1 <= self.random_steps <= self.inference_steps:
            raise InputError(f"method.random_steps is {self.random_steps}: give 1 to {self.inference_steps} (method.inference_steps).")
        if not self.beta > 0 or not 0 < self.ratio_clip < 1:
            raise InputError(f"method.beta is {self.beta}, method.ratio_clip {self.ratio_clip}: give above 0, and between 0 and 1.")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        kernel = ddim(self.eta)
        shape: dict[str, Any] = {
            "batches": self.batches,
            "samples": self.samples,
            "steps": self.inference_steps,
            "random_steps": self.random_steps,
        }
        round_ = sample_round(policy, reward, batch, context, kernel=kernel, **shape)
        about = {"reward": float(round_.scores.mean()), "reward_std": float(round_.scores.std(correction=0))}
        base = reference_log_probs(policy, round_, kernel)
        won, lost = best_and_worst(round_, self.batches, self.samples)
        about["ties"] = 1 - len(won) / (len(round_) / self.samples)
        if nothing_differs(len(won) * len(round_.steps) // self.updates, base, context):  # each update needs a transition
            return
        every = torch.cartesian_prod(round_.steps, torch.arange(len(won)))
        every = every[torch.randperm(len(every), generator=context.rng)]
        low, high = math.log(1 - self.ratio_clip), math.log(1 + self.ratio_clip)
        half = max(1, round_.size // 2)  # a forward holds both sides
        for share in every.tensor_split(self.updates):
            for part in parts(share[:, 0], share[:, 1], half):
                steps, rows = part.steps.repeat(2), torch.cat([won[part.rows], lost[part.rows]])
                ratio = replay(policy, round_.trajectory, steps, rows, kernel).log_prob - base[steps, rows]
                better, worse = ratio.clamp(low, high).unflatten(0, (2, half))[:, : part.count]
                margin = better - worse
                loss = preference(margin, beta=self.beta, kind=self.loss)
                metrics = {**about, "implicit_accuracy": wins(margin).mean(), "margin": margin.detach().mean()}
                yield Loss(loss.sum() / len(share), metrics, update=part.last)
