"""DDPO: policy gradients on the denoising steps of the policy's own samples (Black et al., ICLR 2024, arXiv 2305.13301)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from diffalign.advantages import Kind, advantages
from diffalign.checks import above_zero, at_least, check, zero_or_more
from diffalign.errors import InputError
from diffalign.noise import RectifiedFlow, noise_between
from diffalign.objectives.policy_gradient import clipped_surrogate, denoising_distance, reinforce
from diffalign.rounds import Part, Round, check_first_pass, check_noise, greedy_scores, nothing_differs, parts, sample_round, shares
from diffalign.sampling import Replay, SDENoise, noisy, replay
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
    """Noise of a step: 1 is ancestral sampling, and 0 has no actions. On a flow it is a of Flow-GRPO's SDE."""
    noise: SDENoise = "rising"
    """On a flow: rising, `sigma_t = eta sqrt(t / (1 - t))` (Flow-GRPO), or constant, `sigma_t = eta` (DanceGRPO)."""
    random_steps: int | None = None
    """Only so many of the first steps are random, and so trained on; the rest are deterministic (MixGRPO). By default all are."""
    window: Literal["first", "drawn"] = "first"
    """drawn: the random_steps begin at a step drawn for each round, and lie in window_range (Flow-GRPO-Fast)."""
    window_range: tuple[int, int] | None = None
    """drawn: the steps, counted from 0, that windows lie in, from the first number to before the second; by default the first half."""
    same_noise: bool = False
    """All samples of a prompt in a round start from one x_T (DanceGRPO)."""
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
    """per_prompt: running statistics of each prompt; global: of the round; group, loo: among a prompt's samples; group_global: as group,
    over the round's deviation (Flow-GRPO); greedy: ReMax; none: the reward as it is (DLPO)."""
    advantage_clip: float = 5.0
    """Advantages are cut to plus or minus this; not those of kind none."""
    buffer: int = 32
    """per_prompt: the last scores of a prompt that are kept."""
    least: int = 16
    """per_prompt: a prompt with fewer scores has the round's statistics."""
    fraction: float = 1.0
    """Share of each sample's denoising steps that is trained on."""
    kl_weight: float = 0.0
    """Weight of `KL(pi_theta, pi_ref)` a step; 0 leaves it out."""
    reward_weight: float = 1.0
    """alpha: advantages are times this."""
    denoising_weight: float = 0.0
    """beta of DLPO: weight of how far the predicted noise is from the one that takes the sample to x_t; 0 leaves it out."""
    denoising_mode: Literal["reward", "loss"] = "reward"
    """The distance has no gradient and is subtracted from its step's advantage (DLPO), or is a loss of its own."""
    denoising_norm: Literal["l2", "rms"] = "l2"
    """The distance is the Euclidean norm over the latent dimensions (DLPO), or their root mean square, which has no size."""
    kl_unit: Literal["step", "time"] = "step"
    """On a flow: step, the KL of a step; time, `mean((mu_theta - mu_ref)^2) / (2 sigma_t^2)`, `|dt|` times that (Flow-GRPO's code)."""

    needs: ClassVar[Needs] = Needs(split_by=("batches",))
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 3e-4,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 5.0,
        "batch_size": 8,
        "lora": {"rank": 4},
    }

    def __post_init__(self) -> None:
        at_least(self, inference_steps=1, batches=1, samples=1, updates=1, inner_epochs=1, buffer=1)
        check_noise(self)
        above_zero(self, "clip")
        check(self, "advantage_clip", self.advantage_clip > 0, "a number above 0")
        check(self, "least", 1 <= self.least <= self.buffer, f"1 to {self.buffer} (method.buffer)")
        check(self, "fraction", 0 < self.fraction <= 1, "a share above 0, up to 1")
        zero_or_more(self, "kl_weight", "reward_weight", "denoising_weight")
        check(self, "reward_weight", self.reward_weight + self.denoising_weight > 0, "a number above 0, or method.denoising_weight")
        if self.advantage in ("group", "group_global", "loo") and self.samples < 2:
            raise InputError(f"method.advantage {self.advantage} compares samples of one prompt: give method.samples 2 or more.")
        if self.window == "drawn" and self.random_steps is None:
            raise InputError("method.window drawn draws where the random steps begin: give method.random_steps, how many they are.")
        if self.window_range is not None:
            if self.window != "drawn" or self.random_steps is None:
                raise InputError("method.window_range is where a drawn window may lie: give method.window drawn, or drop it.")
            first, end = self.window_range
            fits = first >= 0 and first + self.random_steps <= end <= self.inference_steps
            most = f"two steps from 0 to {self.inference_steps}, {self.random_steps} (method.random_steps) or more apart"
            check(self, "window_range", fits, most)
        if self.estimator == "sf" and self.updates * self.inner_epochs > 1:
            raise InputError("method.estimator sf takes one optimiser step a round: give method.updates 1 and method.inner_epochs 1.")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        kernel, lengths = noisy(policy.path, self.eta, self.noise), self._lengths(policy)
        round_ = sample_round(
            policy,
            reward,
            batch,
            context,
            batches=self.batches,
            samples=self.samples,
            steps=self.inference_steps,
            kernel=kernel,
            random_steps=self._window(policy, context.rng),
            same_noise=self.same_noise,
        )
        greedy = greedy_scores(policy, reward, round_, self.inference_steps) if self.advantage == "greedy" else None
        gains = advantages(
            self.advantage,
            round_.scores,
            round_.prompts.keys,
            context,
            size=round_.size,
            greedy=greedy,
            clip=self.advantage_clip,
            buffer=self.buffer,
            least=self.least,
        )
        about = round_.metrics()
        if nothing_differs(int(round_.everyone(gains).count_nonzero()), context) and self.kl_weight == self.denoising_weight == 0:
            return
        stale = False
        for _ in range(self.inner_epochs):
            for share in shares(round_, self.updates, self.fraction, context.rng):
                if len(share.rows) == 0:
                    yield round_.nothing()
                for part in parts(share.steps, share.rows, round_.size):
                    now = replay(policy, round_.trajectory, part.steps, part.rows, kernel)
                    log_prob, old = now.log_prob[: part.count], round_.old_log_probs(part)
                    change = (log_prob - old).detach()
                    if not stale:
                        check_first_pass(change, self.clip)
                    advantage = self.reward_weight * gains[part.rows[: part.count].to(gains.device)]
                    distance = self._distance(round_, part, now) if self.denoising_weight > 0 else None
                    if distance is not None and self.denoising_mode == "reward":
                        advantage = advantage - self.denoising_weight * distance.detach()
                    if self.estimator == "is":
                        loss = clipped_surrogate(log_prob, old, advantage, clip=self.clip)
                    else:
                        loss = reinforce(log_prob, advantage)
                    clipped = ((change.exp() - 1).abs() > self.clip).float().mean()
                    metrics = {**about, "clip_fraction": clipped, "policy_kl": (change**2).mean() / 2}
                    if distance is not None:
                        metrics["denoising_distance"] = distance.detach().mean()
                        loss = loss + self.denoising_weight * distance if self.denoising_mode == "loss" else loss
                    if self.kl_weight > 0:
                        with torch.no_grad(), policy.reference():
                            base = replay(policy, round_.trajectory, part.steps, part.rows, kernel)
                        kl = now.action.kl(base.action)[: part.count] * lengths[part.steps[: part.count]].to(log_prob)
                        loss, metrics["kl"] = loss + self.kl_weight * kl, kl.detach().mean()
                    yield Loss(loss.sum() / share.total, metrics, update=part.last)
                stale = True

    def _distance(self, round_: Round, part: Part, now: Replay) -> Tensor:
        """(count,) `||eps_tilde - eps_theta(x_t, t, c)||`, eps_tilde the noise that takes the sample's x_0 to x_t."""
        steps, rows = part.steps[: part.count], part.rows[: part.count]
        states, where = round_.trajectory.states, round_.trajectory.states.device
        made = noise_between(
            round_.trajectory.final[rows.to(where)], states[steps.to(where), rows.to(where)], round_.trajectory.schedule.now[steps]
        )
        return denoising_distance(made, now.noise[: part.count], self.denoising_norm)

    def _lengths(self, policy: Policy) -> Tensor:
        """(T,) what the KL of each step is multiplied with."""
        if self.kl_unit == "step":
            return torch.ones(self.inference_steps)
        if not isinstance(policy.path, RectifiedFlow):
            raise InputError("method.kl_unit time is for flows, and this is a diffusion model: give --method.kl-unit step.")
        schedule = policy.path.schedule(self.inference_steps)
        return schedule.now.sigma - schedule.then.sigma

    def _window(self, policy: Policy, rng: Generator) -> int | range | None:
        """The steps of a round that are random. A drawn window leaves out steps to sigma 0, which are no actions."""
        if self.window == "first" or self.random_steps is None:
            return self.random_steps
        first, end = self.window_range or (0, self.inference_steps // 2)
        actions = int((policy.path.schedule(self.inference_steps).then.sigma > 0).sum())
        begins = max(0, min(end, actions) - self.random_steps - first) + 1
        begin = first + int(torch.randint(begins, (), generator=rng))
        return range(begin, begin + self.random_steps)
