"""What the tests of the methods share: formulas written out on the toy, and who was given what."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from toy import Toy

from diffalign.sampling import Gaussian, ddim, denoising_error
from diffalign.types import Condition, Level, Loss, Trajectory


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


def tilted_mean(policy: Toy, steps: int, gain: Tensor) -> Tensor:
    """Where the mean of `Exact` lies at the optimum of `E[gain . x_0] - KL(path, path of the base)`, over all means.

    Moving the mean by d moves that of each step by `c_t d`, and x_0 by `sum P_t c_t d`, P_t being what of a step arrives there; all of it
    is linear and the same at every state. So the KL is `sum c_t^2 d^2 / (2 std_t^2)`, and the optimum
    `d = gain sum P_t c_t / sum (c_t / std_t)^2`. With many steps that is the data's `std^2 gain`: the base times `exp(gain . x_0)`.
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
