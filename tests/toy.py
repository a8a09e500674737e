"""A policy on two numbers, in float64: data whose optimal denoiser is known, and a network too small to wait for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier, Lock
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from diffalign.contract import reward
from diffalign.noise import RectifiedFlow, VariancePreserving, draw_noise, spread
from diffalign.types import Condition, Context, Level, Modality, NoisePath, Processes, Prompts

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


SEEDING = Lock()


class Network(nn.Module):
    """A multilayer perceptron of (x_t, t, context): nothing is known of it but its derivatives."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        with SEEDING, torch.random.fork_rng():  # of all threads there is one generator
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
    barrier, parts = Barrier(count, timeout=60), dict[int, Tensor]()

    def process(rank: int) -> R:
        try:
            return work(Side(rank, count, barrier, parts))
        except BaseException:
            barrier.abort()  # the others would wait for it
            raise

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(process, range(count)))
