"""A policy on two numbers, in float64: data whose optimal denoiser is known, and a network too small to wait for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from diffalign.noise import RectifiedFlow, VariancePreserving, draw_noise, spread
from diffalign.types import Condition, Level, Modality, NoisePath, Prompts


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
    """States and media (B, 2); a prompt is a number, the shift of the data's mean: `Prompts(["0", "0.5"])`."""

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
        return Condition({"context": torch.tensor([[float(text)] for text in prompts.text], dtype=torch.float64)})

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
