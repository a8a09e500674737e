"""One reverse step as an action distribution, and the only sampling loop.

Every kernel is `(x_0, noise, now, then) -> Gaussian`: what the network believes at `now`, and where the step lands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from diffalign.errors import InputError
from diffalign.noise import RectifiedFlow, diffuse, draw_noise, spread
from diffalign.objectives.policy_gradient import gaussian_kl
from diffalign.shards import draw_rows
from diffalign.types import Condition, DroppingPolicy, Examples, Level, NoisePath, Policy, Prompts, Schedule, Trajectory

Reduce = Literal["mean", "sum"]
SDENoise = Literal["rising", "constant"]


@dataclass(frozen=True)
class Gaussian:
    """`N(mean, std^2 I)`: mean (B, *latent), std float64 of shape (1,) or (B,), on the CPU. A row of std 0 is deterministic."""

    mean: Tensor
    std: Tensor

    @property
    def random(self) -> bool:
        """Whether the step is an action at all, in one row at least."""
        return bool((self.std > 0).any())

    def at(self, z: Tensor | None) -> Tensor:
        """The sample (B, *latent) of standard noise z; the mean where z is None."""
        return self.mean if z is None else self.mean + spread(self.std, self.mean) * z

    def log_prob(self, x: Tensor, reduce: Reduce = "mean") -> Tensor:
        """(B,) log-density of x in fp32 or better, averaged over the latent dimensions, as every reference implementation has it.

        `sum` gives the log-density itself. A deterministic row has none: 0, with no gradient.
        """
        if not self.random:
            return torch.zeros(len(x), device=x.device, dtype=_at_least_float32(x))
        x, mean = x.to(_at_least_float32(x)), self.mean.to(_at_least_float32(x))
        std = self._positive_std(x)
        return self._only_random(_reduce(-((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi), reduce))

    def kl(self, other: Gaussian, reduce: Reduce = "mean") -> Tensor:
        """(B,) `KL(self, other)` for two Gaussians of the same std, `(mu - mu')^2 / (2 std^2)`; 0 for a deterministic row."""
        if not torch.equal(self.std, other.std):
            raise ValueError("kl: the two steps have different std; they come from different kernels or levels.")
        if not self.random:
            return torch.zeros(len(self.mean), device=self.mean.device, dtype=_at_least_float32(self.mean))
        std = torch.where(self.std > 0, self.std, 1)
        return self._only_random(gaussian_kl(self.mean, other.mean, std, reduce=reduce))

    def _positive_std(self, like: Tensor) -> Tensor:
        return spread(torch.where(self.std > 0, self.std, 1), like)

    def _only_random(self, values: Tensor) -> Tensor:
        return torch.where((self.std > 0).to(values.device), values, 0)


Kernel = Callable[[Tensor, Tensor, Level, Level], Gaussian]


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _reduce(x: Tensor, reduce: Reduce) -> Tensor:
    flat = x.reshape(len(x), -1)
    return flat.mean(1) if reduce == "mean" else flat.sum(1)


def ddim(eta: float = 0.0) -> Kernel:
    """DDIM (arXiv 2010.02502, eq. 12 and 16) for diffusion and flow alike; eta 0 is deterministic, 1 ancestral sampling.

    `std = eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)`, from t to s.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}: give a number from 0 (deterministic) to 1 (ancestral).")

    def kernel(x_0: Tensor, noise: Tensor, now: Level, then: Level) -> Gaussian:
        ratio = now.alpha * then.sigma / (then.alpha * now.sigma)
        std = eta * then.sigma * (1 - ratio**2).clamp(min=0).sqrt()
        left = (then.sigma**2 - std**2).clamp(min=0).sqrt()
        return Gaussian(spread(then.alpha, x_0) * x_0 + spread(left, x_0) * noise, std)

    return kernel


def flow_sde(a: float = 0.7, *, noise: SDENoise = "rising", last: bool = True) -> Kernel:
    """The SDE of Flow-GRPO (arXiv 2505.05470, eq. 9) on a rectified flow; a = 0 is the Euler step of the ODE.

    `x_s = x_t + [v + sigma^2 / (2 t) (x_t + (1 - t) v)] dt + sigma sqrt(-dt) z`. `rising`: `sigma = a sqrt(t / (1 - t))`, and at t = 1,
    `1 - t` is taken at s, as in the authors' code. `constant`: `sigma = a` (DanceGRPO, arXiv 2505.07818). With `x_t + (1 - t) v = noise`
    the mean is `(1 - s) x_0 + (s + sigma^2 dt / (2 t)) noise`. Without `last` the step to s = 0 is the ODE's.
    """
    if not a >= 0:
        raise InputError(f"a is {a}: give 0 (the ODE) or more.")

    def kernel(x_0: Tensor, noise_t: Tensor, now: Level, then: Level) -> Gaussian:
        if any(((level.alpha + level.sigma - 1).abs() > 1e-6).any() for level in (now, then)):
            raise InputError("flow_sde steps along a rectified flow (alpha + sigma = 1), and this is a diffusion path: use ddim(eta).")
        t, dt = now.sigma, then.sigma - now.sigma
        rest = torch.where(t >= 1, then.alpha, now.alpha)
        variance = a**2 * (t / rest if noise == "rising" else torch.ones_like(t))
        if not last:
            variance = torch.where(then.sigma > 0, variance, 0)
        toward_noise = then.sigma + variance * dt / (2 * t)
        return Gaussian(spread(then.alpha, x_0) * x_0 + spread(toward_noise, x_0) * noise_t, (variance * -dt).sqrt())

    return kernel


def noisy(path: NoisePath, eta: float, noise: SDENoise = "rising") -> Kernel:
    """The steps of a policy gradient on `path`: `ddim(eta)` on diffusion, Flow-GRPO's SDE with a = eta on a rectified flow.

    On both 0 is the deterministic step, and the step to sigma 0 is always that: it is no action. `noise` is of the SDE.
    """
    return flow_sde(eta, noise=noise, last=False) if isinstance(path, RectifiedFlow) else ddim(eta)


def transition(policy: Policy, x_t: Tensor, now: Level, then: Level, condition: Condition, kernel: Kernel) -> Gaussian:
    """The policy `pi(x_s | x_t, c)`: one network call, made into the distribution of the next state."""
    x_0, noise = policy.path.split(policy.predict(x_t, now, condition), x_t, now)
    return kernel(x_0, noise, now, then)


def rollout(
    policy: Policy,
    condition: Condition,
    *,
    steps: int,
    kernel: Kernel,
    random_steps: int | range | None = None,
    grad_steps: int = 0,
    until: int | None = None,
    start: Tensor | None = None,
    rng: Generator | None = None,
    checkpointing: bool = True,
) -> Trajectory:
    """Sample from noise to x_0, with a graph through the last `grad_steps` steps and none before.

    Outside the first `random_steps`, or outside that range of steps, they are deterministic, `ddim(0)`, whatever the kernel (MixGRPO,
    arXiv 2507.21802).
    `until` stops after so many of the `steps` (ReFL). `start` (B, *latent) replaces the prior's draw. `checkpointing` keeps of each step
    with a graph, but of the last, only its state, and runs the network again in the backward pass: however many `grad_steps` there are,
    memory holds the graph of one; by default it is on.
    """
    schedule = policy.path.schedule(steps)
    until = steps if until is None else until
    if not 1 <= until <= steps:
        raise InputError(f"until is {until}: give a step from 1 to {steps}.")
    if not 0 <= grad_steps <= until:
        raise InputError(f"A gradient through {grad_steps} steps was asked for, in a rollout of {until}: give 0 to {until}.")
    window = random_steps if isinstance(random_steps, range) else range(steps if random_steps is None else random_steps)

    x = start = policy.prior(condition, rng) if start is None else start
    states, log_probs, actions = [x], list[Tensor](), list[bool]()
    for i in range(until):
        now, then = schedule.now[i], schedule.then[i]
        chosen = kernel if i in window else ddim(0.0)
        # drawn out here: a checkpointed step runs twice, and would draw twice
        z = draw_noise(start.shape, start, rng) if _is_random(chosen, now, then) else None

        def step(x: Tensor, now: Level = now, then: Level = then, z: Tensor | None = z, kernel: Kernel = chosen) -> tuple[Tensor, Tensor]:
            action = transition(policy, x, now, then, condition, kernel)
            x_next = action.at(z)
            return x_next, action.log_prob(x_next)

        with torch.set_grad_enabled(i >= until - grad_steps):
            if torch.is_grad_enabled() and checkpointing and i < until - 1:  # the last one's graph is needed at once
                x, log_prob = cast(tuple[Tensor, Tensor], checkpoint(step, x, use_reentrant=False))
            else:
                x, log_prob = step(x)
        states.append(x)
        log_probs.append(log_prob)
        actions.append(z is not None)
    taken = Schedule(schedule.now[:until], schedule.then[:until])
    return Trajectory(torch.stack(states), torch.stack(log_probs), torch.tensor(actions), taken, condition)


def _is_random(kernel: Kernel, now: Level, then: Level) -> bool:
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    return kernel(nothing, nothing, now, then).random


def denoising_error(policy: Policy, x_0: Tensor, noise: Tensor, at: Level, condition: Condition) -> Tensor:
    """(B,) `mean((target - prediction)^2)` over the latent dimensions at levels `at` (B,), in the path's own parametrisation.

    The loss that diffusion and flow models are trained with, per sample.
    """
    prediction = policy.predict(diffuse(x_0, noise, at), at, condition)
    return _reduce((prediction - policy.path.target(x_0, noise, at)) ** 2, "mean")


class Replay(NamedTuple):
    """A policy's view of transitions that were taken: its distribution of the next state, that state, and the epsilon it predicts."""

    action: Gaussian
    x_s: Tensor  # (M, *latent)
    noise: Tensor  # (M, *latent), guided

    @property
    def log_prob(self) -> Tensor:
        """(M,) log-probability of the next state, mean over the latent dimensions."""
        return self.action.log_prob(self.x_s)


def replay(policy: Policy, trajectory: Trajectory, steps: Tensor, rows: Tensor, kernel: Kernel) -> Replay:
    """The policy at transitions (step, row) of a trajectory, both (M,) int64: one network call over samples and timesteps alike."""
    device = trajectory.states.device
    i, b = steps.to(device), rows.to(device)
    x_t, now, then = trajectory.states[i, b], trajectory.schedule.now[steps], trajectory.schedule.then[steps]
    x_0, noise = policy.path.split(policy.predict(x_t, now, trajectory.condition[rows]), x_t, now)
    return Replay(kernel(x_0, noise, now, then), trajectory.states[i + 1, b], noise)


def without_some_text(policy: Policy, prompts: Prompts, share: float, rng: Generator) -> Condition:
    """The condition of prompts of which a random `share` is empty, without guidance: what keeps guidance working in training.

    Where the unconditional branch is another than that of an empty text, that one (see `DroppingPolicy`).
    """
    draws = draw_rows(len(prompts), rng, lambda n: torch.rand(n, generator=rng))
    if isinstance(policy, DroppingPolicy) and policy.dropped is not None:
        rows = torch.tensor([float(u) < share for u in draws])
        return Condition(policy.dropped(policy.encode(prompts).tensors, rows))
    texts = tuple("" if float(u) < share else text for text, u in zip(prompts.text, draws, strict=True))
    said = prompts.transcript
    if said is not None:  # with the text goes what is said: the unconditional branch has neither
        said = tuple("" if float(u) < share else words for words, u in zip(said, draws, strict=True))
    return policy.encode(replace(prompts, text=texts, transcript=said)).unguided()


def paired_errors(
    policy: Policy, pairs: Examples, rng: Generator, drop_text: float, reference: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Denoising errors (B,) of the chosen and the rejected samples, and the base model's, which are None without `reference`.

    Both samples of a pair share noise and level, and go through the network in one call.
    """
    assert pairs.rejected is not None
    condition = without_some_text(policy, pairs.prompts, drop_text, rng)
    at, noise = policy.path.draw(len(pairs), rng), draw_noise(pairs.x_0.shape, pairs.x_0, rng)
    twice = torch.arange(len(pairs)).repeat(2)
    both = torch.cat([pairs.x_0, pairs.rejected]), torch.cat([noise, noise]), at[twice], condition[twice]
    base = None, None
    if reference:
        with torch.no_grad(), policy.reference():
            base = denoising_error(policy, *both).chunk(2)
    won, lost = denoising_error(policy, *both).chunk(2)
    return won, lost, base[0], base[1]
