"""DDPO: policy gradients on the denoising steps of the policy's own samples (Black et al., ICLR 2024, arXiv 2305.13301)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from diffalign.advantages import Kind, advantages
from diffalign.errors import InputError
from diffalign.objectives.policy_gradient import clipped_surrogate, reinforce
from diffalign.rounds import check_first_pass, greedy_scores, parts, sample_round, shares
from diffalign.sampling import ddim, replay
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward


@dataclass(frozen=True)
class DDPO:
    """`max(-A rho, -A clip(rho, 1 - e, 1 + e))` on single denoising steps, `rho = pi_theta(x_s | x_t, c) / pi_old(x_s | x_t, c)`.

    A round samples `batches x samples` rollouts of the batch size, scores them, and takes `updates x inner_epochs` optimiser steps on
    their transitions, in forwards of the batch size over samples and timesteps alike.
    """

    estimator: Literal["is", "sf"] = "is"
    """is: importance-sampled and clipped, for several updates a round. sf: score function, `-A log pi_theta`."""
    inference_steps: int = 50
    """Denoising steps of a sample."""
    eta: float = 1.0
    """Noise of a step: 1 is ancestral sampling, and 0 has no actions."""
    random_steps: int | None = None
    """Only so many of the first steps are random, and so trained on; the rest are deterministic (MixGRPO). By default all are."""
    batches: int = 32
    """Batches of prompts in a round."""
    samples: int = 1
    """Samples of each prompt in a round."""
    updates: int = 2
    """Optimiser steps over the round's samples, each on its own share of them."""
    inner_epochs: int = 1
    """Passes over the round's samples."""
    clip: float = 1e-4
    """e of the clipped ratio; the log-probabilities are means over the latent dimensions."""
    advantage: Kind = "per_prompt"
    """per_prompt: running statistics of each prompt; global: of the round; group, loo: among a prompt's samples; greedy: ReMax."""
    advantage_clip: float = 5.0
    """Advantages are cut to plus or minus this."""
    fraction: float = 1.0
    """Share of each sample's denoising steps that is trained on."""
    kl_weight: float = 0.0
    """Weight of `KL(pi_theta, pi_ref)` a step; 0 leaves it out."""

    needs: ClassVar[Needs] = Needs()
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 3e-4,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 5.0,
        "batch_size": 8,
        "lora": {"rank": 4},
    }

    def __post_init__(self) -> None:
        for name in ("inference_steps", "batches", "samples", "updates", "inner_epochs"):
            if vars(self)[name] < 1:
                raise InputError(f"method.{name} is {vars(self)[name]}: give 1 or more.")
        if not 0 < self.eta <= 1:
            raise InputError(f"method.eta is {self.eta}: give a number above 0, up to 1. Without noise there are no actions.")
        if self.random_steps is not None and not 1 <= self.random_steps <= self.inference_steps:
            raise InputError(f"method.random_steps is {self.random_steps}: give 1 to {self.inference_steps} (method.inference_steps).")
        if self.clip <= 0 or self.advantage_clip <= 0 or self.kl_weight < 0:
            raise InputError("method.clip and method.advantage_clip must be above 0, and method.kl_weight 0 or more.")
        if not 0 < self.fraction <= 1:
            raise InputError(f"method.fraction is {self.fraction}: give a share above 0, up to 1.")
        if self.advantage in ("group", "loo") and self.samples < 2:
            raise InputError(f"method.advantage {self.advantage} compares samples of one prompt: give method.samples 2 or more.")
        if self.estimator == "sf" and self.updates * self.inner_epochs > 1:
            raise InputError("method.estimator sf takes one optimiser step a round: give method.updates 1 and method.inner_epochs 1.")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        kernel = ddim(self.eta)
        shape: dict[str, Any] = {
            "batches": self.batches,
            "samples": self.samples,
            "steps": self.inference_steps,
            "random_steps": self.random_steps,
        }
        round_ = sample_round(policy, reward, batch, context, kernel=kernel, **shape)
        greedy = greedy_scores(policy, reward, round_, self.inference_steps) if self.advantage == "greedy" else None
        gains = advantages(self.advantage, round_.scores, round_.prompts.text, context, greedy=greedy, clip=self.advantage_clip)
        about = {"reward": float(round_.scores.mean()), "reward_std": float(round_.scores.std(correction=0))}
        stale = False
        for _ in range(self.inner_epochs):
            for steps, rows in shares(round_, self.updates, self.fraction, context.rng):
                for part in parts(steps, rows, round_.size):
                    now = replay(policy, round_.trajectory, part.steps, part.rows, kernel)
                    log_prob, old = now.log_prob[: part.count], round_.old_log_probs(part)
                    change = (log_prob - old).detach()
                    if not stale:
                        check_first_pass(change, self.clip)
                    advantage = gains[part.rows[: part.count].to(gains.device)]
                    if self.estimator == "is":
                        loss = clipped_surrogate(log_prob, old, advantage, clip=self.clip)
                    else:
                        loss = reinforce(log_prob, advantage)
                    clipped = ((change.exp() - 1).abs() > self.clip).float().mean()
                    metrics = {**about, "clip_fraction": clipped, "policy_kl": (change**2).mean() / 2}
                    if self.kl_weight > 0:
                        with torch.no_grad(), policy.reference():
                            base = replay(policy, round_.trajectory, part.steps, part.rows, kernel)
                        kl = now.action.kl(base.action)[: part.count]
                        loss, metrics["kl"] = loss + self.kl_weight * kl, kl.detach().mean()
                    yield Loss(loss.sum() / len(steps), metrics, update=part.last)
                stale = True
