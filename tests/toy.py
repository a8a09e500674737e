"""A policy on two numbers, in float64: data whose optimal denoiser is known, and a network too small to wait for."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Normal

from diffalign.contract import reward
from diffalign.noise import RectifiedFlow, VariancePreserving, draw_noise, spread
from diffalign.sampling import Gaussian, ddim, denoising_error
from diffalign.types import Condition, Context, Level, Loss, Modality, NoisePath, Processes, Prompts, Trajectory

R = TypeVar("R")


def diffusion(**scheduler: Any) -> VariancePreserving:
    """SD 1.5's path; `scheduler` overrides its configuration."""
    from diffusers import DDIMScheduler

    sd = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}
    return VariancePreserving(DDIMScheduler(**{**sd, "steps_offset": 1, **scheduler}))


def flow(mu: float | None = None, **scheduler: Any) -> RectifiedFlow:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return RectifiedFlow(FlowMatchEulerDiscreteScheduler(**scheduler), mu)


class Exact(nn.Module):
    """The optimal network for data `N(mean + context, std^2)`: with `x_t ~ N(alpha m, alpha^2 std^2 + sigma^2)`,

    `E[x_0 | x_t] = m + alpha std^2 / var_t (x_t - alpha m)` and `E[noise | x_t] = sigma / var_t (x_t - alpha m)`.
    """

    def __init__(self, path: NoisePath, mean: tuple[float, float] = (1.5, -0.5), std: float = 0.5) -> None:
        super().__init__()
        self.path = path
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x_t: Tensor, at: Level, context: Tensor) -> Tensor:
        alpha, sigma, variance = spread(at.alpha, x_t), spread(at.sigma, x_t), (2 * self.log_std).exp()
        mean = self.mean + context
        score = (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)
        return self.path.target(mean + alpha * variance * score, sigma * score, at)


class Network(nn.Module):
    """A multilayer perceptron of (x_t, t, context): nothing is known of it but its derivatives."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)).double()

    def forward(self, x_t: Tensor, at: Level, context: Tensor) -> Tensor:
        t = (at.t / 1000).expand(len(x_t))[:, None]
        return self.layers(torch.cat([x_t, t, context], 1))


@dataclass
class Toy:
    """States and media (B, 2); a prompt is a number, the shift of the data's mean: `Prompts(["0", "0.5"])`; an empty one is 0."""

    path: NoisePath
    module: nn.Module
    base: nn.Module = field(init=False)
    graphs: list[bool] = field(default_factory=list[bool])  # of each network call, whether it was recorded

    def __post_init__(self) -> None:
        self.base = copy.deepcopy(self.module).requires_grad_(False)

    @property
    def modality(self) -> Modality:
        return "image"

    @property
    def weights(self) -> list[Tensor]:
        return [*self.module.parameters()]

    def encode(self, prompts: Prompts) -> Condition:
        return Condition({"context": torch.tensor([[float(text or 0)] for text in prompts.text], dtype=torch.float64)})

    def prior(self, condition: Condition, rng: Generator | None = None) -> Tensor:
        return draw_noise((len(condition), 2), condition.tensors["context"], rng)

    def predict(self, x_t: Tensor, at: Level, condition: Condition) -> Tensor:
        self.graphs.append(torch.is_grad_enabled())
        return self.module(x_t, at, condition.tensors["context"])

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0

    def embed(self, media: Tensor) -> Tensor:
        return media

    @contextmanager
    def reference(self) -> Iterator[None]:
        trained, self.module = self.module, self.base
        try:
            yield
        finally:
            self.module = trained

    def save(self, folder: Path) -> None:
        torch.save(self.module.state_dict(), folder / "toy.pt")


# --- what the tests of the methods share ---

GOAL = torch.tensor([0.0, 1.0], dtype=torch.float64)


@reward(differentiable=True)
def nearness(media: Tensor, prompts: Prompts) -> Tensor:
    return -((media - GOAL) ** 2).sum(1)


def a_context(prompts: Prompts, seed: int = 0, **fields: Any) -> Context:
    """With a stream of the same prompts without end."""
    return Context(Generator().manual_seed(seed), more=lambda: prompts, **fields)


@torch.no_grad()
def move(policy: Toy, scale: float = 0.1, seed: int = 0) -> Toy:
    """The policy after its weights moved by chance, away from the base."""
    rng = Generator().manual_seed(seed)
    for w in policy.weights:
        w.add_(scale * torch.randn(w.shape, generator=rng, dtype=w.dtype))
    return policy


def gradient(loss: Tensor, policy: Toy) -> Tensor:
    """(P,) with respect to all weights, one after another."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.weights, materialize_grads=True)])


def total(losses: Sequence[Loss], policy: Toy) -> Tensor:
    """The gradient that an optimiser step would see."""
    return torch.stack([gradient(loss.value, policy) for loss in losses]).sum(0)


def value(losses: Sequence[Loss]) -> float:
    return sum(float(loss.value.detach()) for loss in losses)


@torch.no_grad()
def descend(policy: Toy, slope: Tensor, rate: float) -> None:
    """A step of gradient descent, without an optimiser."""
    for w, g in zip(policy.weights, slope.split([w.numel() for w in policy.weights]), strict=True):
        w.sub_(rate * g.view_as(w))


class Update(NamedTuple):
    """What an optimiser step saw: its gradient, the sum of its losses, and the mean of each metric."""

    slope: Tensor
    value: float
    metrics: dict[str, float]


def follow(losses: Iterable[Loss], policy: Toy, rate: float) -> list[Update]:
    """Gradient descent down a method's losses, as the loop goes: each is asked for after the step before was taken."""
    updates, parts = list[Update](), list[tuple[Tensor, float, Mapping[str, Any]]]()
    for loss in losses:
        parts.append((gradient(loss.value, policy), float(loss.value.detach()), loss.metrics))
        if loss.update:
            slopes, values, metrics = zip(*parts, strict=True)
            means = {name: sum(float(m[name]) for m in metrics) / len(metrics) for name in metrics[0]}
            updates.append(Update(torch.stack(slopes).sum(0), sum(values), means))
            descend(policy, updates[-1].slope, rate)
            parts.clear()
    assert not parts, "the last loss completes an update"
    return updates


def denoising_step(module: nn.Module, trajectory: Trajectory, i: int, eta: float = 1.0) -> Normal:
    """Step i of a trajectory as the DDIM paper writes it (arXiv 2010.02502, eq. 12 and 16), for a network that predicts epsilon."""
    now, then = trajectory.schedule.now[i], trajectory.schedule.then[i]
    a, a_s, x = float(now.alpha) ** 2, float(then.alpha) ** 2, trajectory.states[i]
    epsilon = module(x, now, trajectory.condition.tensors["context"])
    x_0 = (x - (1 - a) ** 0.5 * epsilon) / a**0.5
    std = eta * ((1 - a_s) / (1 - a) * (1 - a / a_s)) ** 0.5
    return Normal(a_s**0.5 * x_0 + (1 - a_s - std**2) ** 0.5 * epsilon, std)


def log_probs_by_hand(module: nn.Module, trajectory: Trajectory) -> Tensor:
    """(T, N) of the states that were reached, mean over the two dimensions."""
    steps = range(len(trajectory.log_probs))
    return torch.stack([denoising_step(module, trajectory, i).log_prob(trajectory.states[i + 1]).mean(1) for i in steps])


class Call(NamedTuple):
    x_t: Tensor
    t: Tensor
    context: Tensor
    reference: bool


def record(policy: Toy) -> list[Call]:
    """What the network is given from now on."""
    calls, inner = list[Call](), policy.predict

    def predict(x_t: Tensor, at: Level, condition: Condition) -> Tensor:
        calls.append(Call(x_t.detach(), at.t.expand(len(x_t)), condition.tensors["context"], policy.module is policy.base))
        return inner(x_t, at, condition)

    policy.predict = predict
    return calls


@dataclass
class Side:
    """One of `count` threads that stand for processes: all of them gather, or the barrier breaks."""

    rank: int
    count: int
    barrier: Barrier
    parts: dict[int, Tensor]

    def gather(self, x: Tensor) -> Tensor:
        self.parts[self.rank] = x
        self.barrier.wait()
        whole = torch.cat([self.parts[rank] for rank in range(self.count)])
        self.barrier.wait()
        return whole


def in_processes(work: Callable[[Processes], R], count: int = 2) -> list[R]:
    """What `work` returns in each of `count` processes."""
    barrier, parts = Barrier(count, timeout=20), dict[int, Tensor]()
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda rank: work(Side(rank, count, barrier, parts)), range(count)))


def tilted_mean(policy: Toy, steps: int, gain: Tensor) -> Tensor:
    """Where the mean of `Exact` lies at the optimum of `E[gain . x_0] - KL(path, path of the base)`, over all means.

    Moving the mean by d moves that of each step by `c_t d` and x_0 by `sum P_t c_t d`, with P_t what of a step arrives at x_0, all linear and
    the same at every state: the KL is `sum c_t^2 d^2 / (2 std_t^2)`, and the optimum `d = gain sum P_t c_t / sum (c_t / std_t)^2`. In the
    limit of many steps that is `std^2 gain` of the data: the base's distribution times `exp(gain . x_0)`.
    """
    base, schedule = policy.base, policy.path.schedule(steps)
    zero, nothing = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def mean(i: int, x: Tensor, context: Tensor) -> Gaussian:
        now, then = schedule.now[i], schedule.then[i]
        return ddim(1.0)(*policy.path.split(base(x, now, context), x, now), now, then)

    arrives, moved, cost = 1.0, 0.0, 0.0
    for i in reversed(range(steps)):
        at = mean(i, zero, nothing)
        to_mean, to_state = (float((mean(i, *where).mean - at.mean)[0, 0]) for where in ((zero, nothing + 1), (zero + 1, nothing)))
        moved += arrives * to_mean
        cost += (to_mean / float(at.std)) ** 2 if at.random else 0.0
        arrives *= to_state
    return base.get_parameter("mean") + gain * moved / cost


class _Held:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def most_saved(losses: Iterable[Loss], policy: Toy) -> int:
    """Bytes that graphs held at the worst moment, while a method's losses were gone down one by one."""
    now, most = 0, 0

    def pack(x: Tensor) -> _Held:
        nonlocal now, most
        held = _Held(x)
        weakref.finalize(held, release, x.nbytes)
        now += x.nbytes
        most = max(most, now)
        return held

    def release(size: int) -> None:
        nonlocal now
        now -= size

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.x):
        for loss in losses:
            gradient(loss.value, policy)
            del loss
    assert now == 0, "nothing is held when all is done"
    return most


class Noised(NamedTuple):
    """What a method gave `denoising_error`."""

    x_0: Tensor
    noise: Tensor
    at: Level
    context: Tensor
    reference: bool

    def error(self, module: nn.Module) -> Tensor:
        """(B,) by hand, for a network that predicts epsilon."""
        x_t = self.at.alpha[:, None] * self.x_0 + self.at.sigma[:, None] * self.noise
        return ((self.noise - module(x_t, self.at, self.context)) ** 2).mean(1)


def record_noised(monkeypatch: Any, *modules: str) -> list[Noised]:
    """Every call of `denoising_error` from now on, where it is used under these modules' names."""
    calls = list[Noised]()

    def spy(policy: Toy, x_0: Tensor, noise: Tensor, at: Level, condition: Condition) -> Tensor:
        assert condition.null is None, "the network is trained without guidance"
        calls.append(Noised(x_0, noise, at, condition.tensors["context"], policy.module is policy.base))
        return denoising_error(policy, x_0, noise, at, condition)

    for module in modules:
        monkeypatch.setattr(f"{module}.denoising_error", spy)
    return calls
