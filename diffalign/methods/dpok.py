"""DPOK: policy gradients on denoising steps with a value baseline and a KL to the base model (NeurIPS 2023, arXiv 2305.16381)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.checks import above_zero, at_least, zero_or_more
from diffalign.objectives.policy_gradient import clipped_surrogate
from diffalign.rounds import Round, check_first_pass, check_noise, nothing_differs, parts, reference_log_probs, sample_round
from diffalign.sampling import noisy, replay
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward
from diffalign.value import Critic, pooled


@dataclass(frozen=True)
class DPOK:
    """`-w (r - V(x_t, t, c)) rho + beta KL(pi_theta, pi_ref)` on single denoising steps, `rho = pi_theta / pi_old` clipped.

    A round samples `batches` batches, fits V with `value_steps` optimiser steps of its own, and takes `policy_steps` steps, each on
    `forwards` batches of transitions drawn from the round's.
    """

    preset: Literal["paper", "reference"] = "reference"
    """reference (the authors' code): rho cut by a plain clamp, KL as `mean((eps_theta - eps_ref)^2)`. paper: PPO's max, Gaussian KL."""
    inference_steps: int = 50
    """Denoising steps of a sample."""
    eta: float = 1.0
    """Noise of a step: 1 is ancestral sampling, and 0 has no actions. On a flow it is a of Flow-GRPO's SDE."""
    random_steps: int | None = None
    """Only so many of the first steps are random, and so trained on; the rest are deterministic (MixGRPO). By default all are."""
    batches: int = 2
    """Batches of prompts in a round."""
    policy_steps: int = 5
    """Optimiser steps of the policy in a round."""
    forwards: int = 4
    """Batches of transitions in one policy step."""
    value_steps: int = 5
    """Optimiser steps of the value network in a round."""
    value_batch: int = 256
    """Transitions of a value step, of all processes together."""
    value_learning_rate: float = 1e-4
    """Of the value network's AdamW."""
    baseline: Literal["value", "none"] = "value"
    """Subtract V(x_t, t, c) from the reward, or nothing."""
    reward_weight: float = 1000.0
    """w: the authors take 10 for one prompt and 1000 for many."""
    kl_weight: float = 0.1
    """beta: the authors take 0.01 for one prompt and 0.1 for many."""
    kl_mode: Literal["loss", "reward"] = "loss"
    """The KL has a gradient of its own, or is subtracted from the reward of its trajectory, as `log(pi_old / pi_ref)` of all its steps and
    latent dimensions. With preset paper both have the same expected gradient near the base model."""
    clip: float = 1e-4
    """Of the ratio; the log-probabilities are means over the latent dimensions."""

    needs: ClassVar[Needs] = Needs(split_by=("batches", "forwards"))
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-5,
        "max_grad_norm": 0.1,
        "guidance_scale": 7.5,
        "batch_size": 8,
        "lora": {"rank": 4},
    }

    def __post_init__(self) -> None:
        at_least(self, inference_steps=1, batches=1, policy_steps=1, forwards=1, value_steps=1, value_batch=1)
        check_noise(self)
        above_zero(self, "clip", "reward_weight", "value_learning_rate")
        zero_or_more(self, "kl_weight")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        kernel = noisy(policy.path, self.eta)
        round_ = sample_round(
            policy,
            reward,
            batch,
            context,
            batches=self.batches,
            samples=1,
            steps=self.inference_steps,
            kernel=kernel,
            random_steps=self.random_steps,
        )
        about = round_.metrics()
        everyones = round_.everyone(round_.scores)
        first = context.memory.setdefault("first_score", float(everyones[0]))  # a round may be one sample
        nothing_differs(int((everyones != first).sum()), context)
        returns = round_.scores
        if self.kl_mode == "reward" and self.kl_weight > 0:
            ratio = (round_.trajectory.log_probs - reference_log_probs(policy, round_, kernel))[round_.steps]
            # the gradient of `now.log_prob` has 1 / D already, as that of the KL in the loss: the reward takes the density's own ratio
            dimensions = round_.trajectory.final[0].numel()
            returns = returns - self.kl_weight / self.reward_weight * dimensions * ratio.sum(0)
            about["kl"] = float(context.processes.gather(ratio.mean()[None]).mean())
        values = self._fit(round_, returns, context, about) if self.baseline == "value" else torch.zeros_like(round_.trajectory.log_probs)
        every = torch.cartesian_prod(round_.steps, torch.arange(round_.total))
        for update in range(self.policy_steps):
            wanted = self.forwards * round_.size * context.processes.count
            share = round_.share(*every[torch.randperm(len(every), generator=context.rng)[:wanted]].unbind(1))
            if len(share.rows) == 0:
                yield round_.nothing()
            for part in parts(share.steps, share.rows, round_.size):
                now = replay(policy, round_.trajectory, part.steps, part.rows, kernel)
                log_prob, old = now.log_prob[: part.count], round_.old_log_probs(part)
                change = (log_prob - old).detach()
                if update == 0:
                    check_first_pass(change, self.clip)
                steps, rows = part.steps.to(values.device), part.rows.to(values.device)
                advantage = (returns[rows] - values[steps, rows])[: part.count]
                kind = "clamp" if self.preset == "reference" else "ppo"
                loss = self.reward_weight * clipped_surrogate(log_prob, old, advantage, clip=self.clip, kind=kind)
                metrics = {**about, "clip_fraction": ((change.exp() - 1).abs() > self.clip).float().mean()}
                if self.kl_mode == "loss" and self.kl_weight > 0:
                    with torch.no_grad(), policy.reference():
                        base = replay(policy, round_.trajectory, part.steps, part.rows, kernel)
                    gaussian = self.preset == "paper"
                    kl = now.action.kl(base.action) if gaussian else ((now.noise - base.noise) ** 2).flatten(1).mean(1)
                    kl = kl[: part.count]
                    loss, metrics["kl"] = loss + self.kl_weight * kl, kl.detach().mean()
                yield Loss(loss.sum() / share.total, metrics, update=part.last)

    def _fit(self, round_: Round, returns: Tensor, context: Context, about: dict[str, float]) -> Tensor:
        """(T, N) values of the round's states, after the value network's steps on them."""
        states, words = round_.trajectory.states, pooled(round_.trajectory.condition)
        times = (round_.trajectory.schedule.now.t / 1000).to(states.device, torch.float32)
        critic = Critic(states[0], words, self.value_learning_rate, context.memory.get("value"))
        critic.rescale(round_.everyone(returns))
        about["value_loss"] = 0.0
        for _ in range(self.value_steps):
            steps = round_.steps[torch.randint(len(round_.steps), (self.value_batch,), generator=context.rng)]
            share = round_.share(steps, torch.randint(round_.total, (self.value_batch,), generator=context.rng))
            i, b = share.steps.to(states.device), share.rows.to(states.device)
            fitted = critic.fit(states[i, b], times[i], words[b], returns[b], share.total, context.processes)
            about["value_loss"] += fitted / self.value_steps
        context.memory["value"] = critic.state()
        return torch.stack([critic(x, t.expand(len(x)), words) for x, t in zip(states[:-1], times, strict=True)])
