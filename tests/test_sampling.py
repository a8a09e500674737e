"""Reverse steps as distributions, and the rollout: its numbers, its gradient, its memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Independent, Normal, kl_divergence
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Exact, Network, Toy, diffusion, flow

from diffalign.errors import InputError
from diffalign.sampling import Gaussian, Kernel, ddim, flow_sde, noisy, rollout, transition
from diffalign.types import Level, Prompts, Trajectory

T = 6
PROMPTS = Prompts(("0", "0.5", "-1"))
KERNELS = [("diffusion", ddim(0.0)), ("diffusion", ddim(1.0)), ("flow", flow_sde(0.7)), ("flow", ddim(0.5))]
NAMES = ["ddim0", "ddim1", "flow_sde", "flow ddim0.5"]


def a_toy(kind: str = "diffusion", width: int = 16) -> Toy:
    return Toy(diffusion() if kind == "diffusion" else flow(shift=3.0), Network(width))


def levels(*sigmas: float) -> Level:
    """On a rectified flow."""
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return Level(sigma * 1000, 1 - sigma, sigma)


def run(policy: Toy, kernel: Kernel, seed: int = 0, **options: Any) -> Trajectory:
    options = {"rng": Generator().manual_seed(seed), **options}
    return rollout(policy, policy.encode(PROMPTS), steps=T, kernel=kernel, **options)


# --- the Gaussian ---


@pytest.mark.parametrize("std", [[0.3], [0.3, 2.0]], ids=["one std", "a std for each row"])
def test_gaussian_is_torchs(std: list[float]):
    mean, other, x, z = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    scale = torch.tensor(std, dtype=torch.float64)
    ours, theirs = Gaussian(mean, scale), Independent(Normal(mean, scale.reshape(-1, 1, 1).expand_as(mean)), 2)
    moved = Independent(Normal(other, scale.reshape(-1, 1, 1).expand_as(mean)), 2)
    torch.testing.assert_close(ours.at(z), mean + scale.reshape(-1, 1, 1) * z)
    torch.testing.assert_close(ours.log_prob(x, reduce="sum"), theirs.log_prob(x))
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x) / 15)
    torch.testing.assert_close(ours.kl(Gaussian(other, scale), reduce="sum"), kl_divergence(theirs, moved))
    torch.testing.assert_close(ours.kl(Gaussian(other, scale)), kl_divergence(theirs, moved) / 15)


def test_statistics_are_fp32_where_the_mean_is_half():
    mean, x, std = torch.randn(2, 8).bfloat16(), torch.randn(2, 8).bfloat16(), torch.tensor([0.5], dtype=torch.float64)
    assert torch.equal(Gaussian(mean, std).log_prob(x), Gaussian(mean.float(), std).log_prob(x.float()))
    assert Gaussian(mean, std).kl(Gaussian(x, std)).dtype == torch.float32


def test_a_deterministic_row_is_no_action():
    mean, x = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    nothing = Gaussian(mean, torch.zeros(1, dtype=torch.float64))
    assert not nothing.random
    assert nothing.at(None) is mean
    for value in (nothing.log_prob(x), nothing.kl(Gaussian(x, nothing.std))):
        assert value.tolist() == [0, 0, 0]
        assert not value.requires_grad

    std = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    some = Gaussian(mean, std)
    assert some.random
    for value, row in (
        (some.log_prob(x), lambda i: Gaussian(mean[i], std[i]).log_prob(x[i])),
        (some.kl(Gaussian(x, std)), lambda i: Gaussian(mean[i], std[i]).kl(Gaussian(x[i], std[i]))),
    ):
        assert value[1] == 0
        assert torch.equal(value[[0, 2]], torch.cat([row([0]), row([2])]))
        gradient = torch.autograd.grad(value.sum(), mean)[0]
        assert gradient.isfinite().all()
        assert [bool(row.any()) for row in gradient] == [True, False, True]


def test_kl_of_different_std_raises():
    mean = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="different std"):
        Gaussian(mean, torch.tensor([0.5])).kl(Gaussian(mean, torch.tensor([0.6])))


# --- the kernels ---


def test_ddim_is_the_formula_in_alpha_bar():
    now_bar, then_bar, eta = 0.3, 0.6, 0.5
    now, then = (Level(*(torch.tensor([v], dtype=torch.float64) for v in (0, a**0.5, (1 - a) ** 0.5))) for a in (now_bar, then_bar))
    x_0, noise = torch.randn(2, 3, 2, dtype=torch.float64)
    action = ddim(eta)(x_0, noise, now, then)
    sigma = eta * math.sqrt((1 - then_bar) / (1 - now_bar)) * math.sqrt(1 - now_bar / then_bar)
    assert float(action.std) == pytest.approx(sigma, rel=1e-12)
    torch.testing.assert_close(action.mean, math.sqrt(then_bar) * x_0 + math.sqrt(1 - then_bar - sigma**2) * noise)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.95), (0.9, 0.8), (0.5, 0.25), (0.1, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("a", [0.0, 0.7, 1.0])
def test_flow_sde_is_flow_grpos_formula(t: float, s: float, a: float):
    x_t, v = torch.randn(2, 4, 3, dtype=torch.float64)
    now, then, dt = levels(t), levels(s), s - t
    action = flow_sde(a)(x_t - t * v, x_t + (1 - t) * v, now, then)
    sigma = a * math.sqrt(t / (1 - (t if t < 1 else s)))  # the authors' guard
    torch.testing.assert_close(action.mean, x_t + (v + sigma**2 / (2 * t) * (x_t + (1 - t) * v)) * dt)
    assert float(action.std) == pytest.approx(sigma * math.sqrt(-dt), abs=1e-12)
    assert action.random == (a > 0)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.95), (0.9, 0.8), (0.1, 0.0)])
def test_constant_noise_is_dancegrpos_step(t: float, s: float):
    """`flow_step` of its authors, with the score of the sample that is predicted."""
    eta, (x_t, v) = 0.3, torch.randn(2, 4, 3, dtype=torch.float64)
    action = flow_sde(eta, noise="constant")(x_t - t * v, x_t + (1 - t) * v, levels(t), levels(s))
    score = -(x_t - (x_t - t * v) * (1 - t)) / t**2
    torch.testing.assert_close(action.mean, x_t + (s - t) * v - 0.5 * eta**2 * score * (s - t))
    assert float(action.std) == pytest.approx(eta * math.sqrt(t - s), rel=1e-12)


def test_the_steps_of_a_policy_gradient_are_of_the_path():
    x_0, noise = torch.randn(2, 3, 2, dtype=torch.float64)
    for path, own in ((diffusion(), ddim(0.7)), (flow(shift=3.0), flow_sde(0.7))):
        schedule, kernel = path.schedule(T), noisy(path, 0.7)
        for i in range(T - 1):
            ours, theirs = (k(x_0, noise, schedule.now[i], schedule.then[i]) for k in (kernel, own))
            assert torch.equal(ours.mean, theirs.mean)
            assert torch.equal(ours.std, theirs.std)
            assert ours.random
    schedule, at = flow(shift=3.0).schedule(T), torch.tensor([0, T - 1, 1])
    kernel = noisy(flow(shift=3.0), 0.7)
    last = kernel(x_0, noise, schedule.now[T - 1], schedule.then[T - 1])
    assert not last.random, "the step to sigma 0 is no action"
    assert torch.equal(last.mean, x_0)
    rows = kernel(x_0, noise, schedule.now[at], schedule.then[at])
    assert [bool(std > 0) for std in rows.std] == [True, False, True], "also where each row has a level of its own"
    assert torch.equal(rows.mean[1], x_0[1])


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("diffusion", ddim(0)),
        ("diffusion", ddim(1)),
        ("flow", ddim(0)),
        ("flow", ddim(0.7)),
        ("flow", ddim(1)),
        ("flow", flow_sde(0.7)),
        ("flow", flow_sde(1.0, last=False)),
        ("flow", flow_sde(0.3, noise="constant")),
        ("flow", flow_sde(1.0, noise="constant")),
    ],
    ids=["ddim0", "ddim1", "flow ddim0", "flow ddim0.7", "flow ddim1", "flow_sde", "not last", "constant 0.3", "constant 1"],
)
def test_small_steps_keep_the_marginals(kind: str, kernel: Kernel):
    """With the optimal network for `N(m, 0.5^2)`, x_t stays `N(alpha m, alpha^2 0.5^2 + sigma^2)` on all its way."""
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    path = diffusion(**zero_snr, set_alpha_to_one=True) if kind == "diffusion" else flow()  # the prior is the path's own end
    policy, steps, n = Toy(path, Exact(path, mean=(1.5, -0.5), std=0.5)), 250, 8000
    trajectory = rollout(policy, policy.encode(Prompts(("0.25",) * n)), steps=steps, kernel=kernel, rng=Generator().manual_seed(0))
    for i in (steps // 2, steps - steps // 10, steps):
        at = trajectory.schedule.then[i - 1]
        alpha, std = float(at.alpha), float((at.alpha**2 * 0.25 + at.sigma**2).sqrt())
        x = trajectory.states[i]
        error = std / n**0.5
        assert (x.mean(0) - alpha * torch.tensor([1.75, -0.25])).abs().max() < 4 * error + 0.005, i
        assert (x.std(0) - std).abs().max() < 4 * error / 2**0.5 + 0.02 * std, i


# --- the rollout ---


@pytest.mark.parametrize(("kind", "kernel"), KERNELS, ids=NAMES)
def test_log_probabilities_are_of_the_steps_taken_and_replay_bit_for_bit(kind: str, kernel: Kernel):
    policy = a_toy(kind)
    trajectory = run(policy, kernel)
    assert trajectory.states.shape == (T + 1, 3, 2)
    assert trajectory.log_probs.shape == (T, 3)
    for i in range(T):
        now, then = trajectory.schedule.now[i], trajectory.schedule.then[i]
        action = transition(policy, trajectory.states[i], now, then, trajectory.condition, kernel)
        assert torch.equal(action.log_prob(trajectory.states[i + 1]), trajectory.log_probs[i])
        assert action.random == bool(trajectory.actions[i])
        if action.random:
            expected = Normal(action.mean, float(action.std)).log_prob(trajectory.states[i + 1]).mean(1)
            torch.testing.assert_close(trajectory.log_probs[i], expected)
        else:
            assert torch.equal(action.mean, trajectory.states[i + 1])
    # rows at levels of their own, the deterministic last step among them
    at = torch.tensor([0, T - 1, 2])
    now, then = trajectory.schedule.now[at], trajectory.schedule.then[at]
    action = transition(policy, trajectory.states[at, range(3)], now, then, trajectory.condition, kernel)
    assert torch.equal(action.log_prob(trajectory.states[at + 1, range(3)]), trajectory.log_probs[at, range(3)])


@pytest.mark.parametrize("to_one", [True, False])
def test_the_step_to_sigma_0_is_no_action(to_one: bool):
    policy = Toy(diffusion(set_alpha_to_one=to_one), Network())
    trajectory = run(policy, ddim(1.0))
    assert trajectory.actions.tolist() == [True] * (T - 1) + [not to_one]
    assert (trajectory.log_probs[-1] == 0).all().item() == to_one
    assert trajectory.log_probs.isfinite().all()


@pytest.mark.parametrize("grad_steps", [0, 1, 2, T])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_is_alive_on_exactly_the_last_steps(grad_steps: int, checkpointing: bool):
    policy = a_toy()
    start = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    trajectory = run(policy, ddim(0.0), start=start, grad_steps=grad_steps, checkpointing=checkpointing)
    assert policy.graphs == [False] * (T - grad_steps) + [True] * grad_steps
    to_start, *to_weights = torch.autograd.grad(trajectory.final.sum(), [start, *policy.weights], materialize_grads=True)
    assert bool(to_start.any()) == (grad_steps == T)
    assert all(bool(g.any()) == (grad_steps > 0) for g in to_weights)
    assert torch.equal(trajectory.states, run(a_toy(), ddim(0.0), start=start).states), "the graph changes no number"


@pytest.mark.parametrize(("kind", "kernel"), KERNELS, ids=NAMES)
@pytest.mark.parametrize("k", [1, 2, T])
def test_truncated_gradient_is_finite_differences_behind_a_frozen_prefix(kind: str, kernel: Kernel, k: int):
    policy = a_toy(kind)
    trajectory = run(policy, kernel, grad_steps=k)
    condition, weight = trajectory.condition, torch.randn(3, 2, dtype=torch.float64)
    gradient = torch.autograd.grad((weight * trajectory.final**2).sum(), policy.weights)
    steps = [(trajectory.schedule.now[i], trajectory.schedule.then[i]) for i in range(T)]
    states = trajectory.states.detach()
    with torch.no_grad():
        actions = [transition(policy, states[i], *steps[i], condition, kernel) for i in range(T)]
        zs = [(states[i + 1] - a.mean) / a.std if a.random else None for i, a in enumerate(actions)]

        def reward() -> Tensor:
            x = states[T - k]
            for i in range(T - k, T):
                x = transition(policy, x, *steps[i], condition, kernel).at(zs[i])
            return (weight * x**2).sum()

        for _ in range(3):
            direction = [torch.randn_like(w) for w in policy.weights]
            values = list[Tensor]()
            for h in (1e-5, -2e-5):
                torch._foreach_add_(policy.weights, direction, alpha=h)
                values.append(reward())
            torch._foreach_add_(policy.weights, direction, alpha=1e-5)
            slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
            assert float(values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_until_stops_early():
    whole, policy = run(a_toy(), ddim(1.0)), a_toy()
    part = run(policy, ddim(1.0), until=4, grad_steps=1)
    assert policy.graphs == [False, False, False, True]
    assert torch.equal(part.states, whole.states[:5])
    assert torch.equal(part.final, whole.states[4])
    assert torch.equal(part.schedule.then.t, whole.schedule.then.t[:4])
    assert len(part.actions) == 4


def test_the_run_owns_every_draw():
    before = torch.get_rng_state()
    same, again, other = (run(a_toy(), ddim(1.0), seed).states for seed in (0, 0, 1))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("kind", "kernel"), KERNELS, ids=NAMES)
@pytest.mark.parametrize("k", [1, 2, T])
def test_checkpointing_changes_no_gradient(kind: str, kernel: Kernel, k: int):
    gradients = list[tuple[Tensor, ...]]()
    for checkpointing in (False, True):
        policy, rng = a_toy(kind), Generator().manual_seed(0)
        trajectory = run(policy, kernel, grad_steps=k, checkpointing=checkpointing, rng=rng)
        gradients.append((*torch.autograd.grad((trajectory.final**3).sum(), policy.weights), rng.get_state()))
        assert len(policy.graphs) == T + (k - 1) * checkpointing, "each step with a graph but the last runs once more in the backward pass"
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed), "nor does the backward pass draw from the run's generator"


class Kept(TorchDispatchMode):
    """The storages that operations made, and whether something still holds them."""

    def __init__(self) -> None:
        self.made = dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.mark.parametrize(("kind", "kernel"), KERNELS, ids=NAMES)
def test_memory_is_flat_in_the_steps_with_a_graph(kind: str, kernel: Kernel):
    def kept(k: int, checkpointing: bool) -> int:
        policy = a_toy(kind, width=256)
        with Kept() as storages:
            trajectory = run(policy, kernel, grad_steps=k, checkpointing=checkpointing)
        assert trajectory.final.requires_grad
        return storages.bytes()

    stored = 8 * (2 * 3 * 2 + 3 + 2 * 3)  # float64, of each step: its state and the noise it drew, its log-probability, its two levels
    activations = 8 * (2 * 3 * 256)
    assert kept(T, True) - kept(1, True) <= (T - 1) * stored
    assert kept(T, False) - kept(2, False) >= (T - 2) * activations, "the measure sees what a plain graph keeps"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ddim(2), "eta is 2: give a number from 0 .* to 1"),
        (lambda: ddim(-0.1), "eta is -0.1"),
        (lambda: flow_sde(-1), "a is -1: give 0 .* or more"),
        (
            lambda: flow_sde()(torch.zeros(1, 2), torch.zeros(1, 2), *(x[:1] for x in diffusion().schedule(4))),
            "flow_sde .* a diffusion path",
        ),
        (lambda: run(a_toy(), ddim(), grad_steps=T + 1), f"through {T + 1} steps .* of {T}: give 0 to {T}"),
        (lambda: run(a_toy(), ddim(), grad_steps=-1), "through -1 steps"),
        (lambda: run(a_toy(), ddim(), grad_steps=4, until=3), "through 4 steps .* of 3: give 0 to 3"),
        (lambda: run(a_toy(), ddim(), until=0), f"until is 0: give a step from 1 to {T}"),
        (lambda: run(a_toy(), ddim(), until=T + 1), f"until is {T + 1}"),
    ],
)
def test_errors_name_the_mend(call: Any, says: str):
    with pytest.raises(InputError, match=says):
        call()


@pytest.mark.parametrize("random_steps", [1, 3])
def test_after_the_random_steps_the_rest_is_deterministic(random_steps: int):
    policy = Toy(diffusion(), Network())
    condition = policy.encode(PROMPTS)
    whole = rollout(policy, condition, steps=5, kernel=ddim(1.0), random_steps=random_steps, rng=Generator().manual_seed(0))
    assert whole.actions.tolist() == [i < random_steps for i in range(5)]
    free = rollout(policy, condition, steps=5, kernel=ddim(1.0), rng=Generator().manual_seed(0))
    assert torch.equal(whole.states[: random_steps + 1], free.states[: random_steps + 1]), "the same noise, until then"
    for i in range(random_steps, 5):
        step = transition(policy, whole.states[i], whole.schedule.now[i], whole.schedule.then[i], condition, ddim(0.0))
        assert torch.equal(whole.states[i + 1], step.mean)
