"""A value network V(x_t, t, c) on latents, as a baseline for policy gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from diffalign.types import Condition, Processes


class Value(nn.Module):
    """A perceptron of x_t, the mean of the condition's first tensor over its tokens, and t / T: (B,) expected rewards.

    Rewards are regressed in units of their own mean and deviation, so the learning rate does not depend on the reward's scale.
    """

    def __init__(self, latent: int, context: int, width: int = 256) -> None:
        super().__init__()
        sizes = [latent + context + 1, width, width, 1]
        # not initialised by torch, which would draw from its global generator
        layers: list[Any] = [nn.utils.skip_init(nn.Linear, a, b) for a, b in itertools.pairwise(sizes)]
        draws = Generator().manual_seed(0)  # every process begins with the same weights
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=draws) / math.sqrt(layer.weight.shape[1]))
                layer.bias.zero_()
            layers[-1].weight.zero_()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        h = torch.cat([x_t.flatten(1).float(), context, t[:, None]], 1)
        for layer in self.layers[:-1]:
            h = torch.nn.functional.silu(layer(h))
        return self.layers[-1](h)[:, 0]


def pooled(condition: Condition) -> Tensor:
    """(B, width) mean over the tokens of the condition's first tensor."""
    first = next(iter(condition.tensors.values())).float()
    return first.flatten(1, -2).mean(1) if first.ndim > 2 else first


class Critic:
    """A value network with its optimiser, made anew from the context's memory each round, and put back into it."""

    def __init__(self, x: Tensor, context: Tensor, learning_rate: float, saved: Mapping[str, Any] | None) -> None:
        self.network = Value(x[0].numel(), context.shape[1]).to(x.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=learning_rate)
        self.mean, self.std, self.seen = 0.0, 1.0, saved is not None
        if saved is not None:
            self.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.mean, self.std = saved["mean"], saved["std"]

    def rescale(self, returns: Tensor) -> None:
        """Take the returns (N,) of all processes into the running mean and deviation, with weight 0.1; the first ones wholly."""
        mean, std = float(returns.float().mean()), float(returns.float().std(correction=0))
        weight = 0.1 if self.seen else 1.0
        self.mean += weight * (mean - self.mean)
        self.std = max(self.std + weight * (std - self.std), 1e-6)
        self.seen = True

    def state(self) -> dict[str, Any]:
        return {
            "network": dict(self.network.state_dict()), "optimizer": self.optimizer.state_dict(), "mean": self.mean, "std": self.std,
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """(B,) values, in the reward's own units."""
        return self.network(x, t, context) * self.std + self.mean

    def fit(self, x: Tensor, t: Tensor, context: Tensor, target: Tensor, total: float, processes: Processes) -> float:
        """One step towards targets (B,) of all processes, which have `total` on average.

        The mean squared error, in units of the reward's variance. Every process must call, with or without targets of its own.
        """
        error = (self.network(x, t, context) - (target.float() - self.mean) / self.std).square().sum() / total
        self.optimizer.zero_grad()
        error.backward()
        for p in self.network.parameters():
            assert p.grad is not None
            p.grad = processes.gather(p.grad[None]).mean(0)
        self.optimizer.step()
        return float(processes.gather(error.detach()[None]).mean())
