"""DRaFT: the loss is the reward, and its gradient goes through the last steps only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from toy import Exact, Network, Toy, diffusion

from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.methods.draft import DRaFT
from diffalign.noise import diffuse
from diffalign.sampling import ddim, rollout
from diffalign.types import Context, Loss, Prompts

T = 5
PROMPTS = Prompts(("0", "0.5", "-1"))
GOAL = torch.tensor([0.0, 1.0], dtype=torch.float64)


@reward(differentiable=True)
def nearness(media: Tensor, prompts: Prompts) -> Tensor:
    return -((media - GOAL) ** 2).sum(1)


def losses(policy: Toy, seed: int = 0, **fields: Any) -> list[Loss]:
    context = Context(Generator().manual_seed(seed))
    return list(DRaFT(inference_steps=T, **fields).losses(policy, nearness, PROMPTS, context))


def a_toy(prediction: str = "epsilon") -> Toy:
    return Toy(diffusion(prediction_type=prediction), Network())


def samples(policy: Toy, rng: Generator, k: int = 0):
    return rollout(policy, policy.encode(PROMPTS), steps=T, kernel=ddim(0.0), grad_steps=k, rng=rng)


@pytest.mark.parametrize("k", [1, 2, T])
def test_the_loss_is_minus_the_mean_reward(k: int):
    (loss,) = losses(a_toy(), k=k)
    scores = nearness(samples(a_toy(), Generator().manual_seed(0)).final, PROMPTS)
    assert torch.equal(loss.value, -scores.mean())
    assert loss.update
    assert loss.metrics == {"reward": scores.mean(), "reward_std": scores.std(correction=0)}
    assert losses(a_toy(), seed=1, k=k)[0].value != loss.value


@pytest.mark.parametrize("k", [1, 2, T])
def test_the_gradient_goes_through_the_last_k_steps(k: int):
    """By the chain rule from the end: `x_s = alpha_s (x_t - sigma_t eps) / alpha_t + sigma_s eps`, dr/dx_0 = -2 (x_0 - goal)."""
    policy = a_toy()
    trajectory = samples(policy, Generator().manual_seed(0))
    context, (now, then) = trajectory.condition.tensors["context"], trajectory.schedule
    want = [torch.zeros_like(w) for w in policy.weights]
    to_state = 2 * (trajectory.final - GOAL) / len(PROMPTS)
    for i in reversed(range(T - k, T)):
        x = trajectory.states[i].detach().requires_grad_()
        epsilon = policy.module(x, now[i], context)
        to_epsilon = to_state * float(then.sigma[i] - then.alpha[i] * now.sigma[i] / now.alpha[i])
        through, *to_weights = torch.autograd.grad(epsilon, [x, *policy.weights], to_epsilon)
        want = [w + g for w, g in zip(want, to_weights, strict=True)]
        to_state = to_state * float(then.alpha[i] / now.alpha[i]) + through
    (loss,) = losses(policy, k=k)
    for ours, by_hand in zip(torch.autograd.grad(loss.value, policy.weights), want, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2])
def test_draft_lv_averages_over_the_sample_and_its_noised_copies(n: int):
    policy = a_toy()
    out = losses(policy, n=n)
    assert [loss.update for loss in out] == [False] * n + [True]

    rng = Generator().manual_seed(0)
    trajectory = samples(policy, rng)
    at, then = trajectory.schedule.now[-1], trajectory.schedule.then[-1]
    terms = [nearness(trajectory.final, PROMPTS).mean()]
    gradients = [torch.autograd.grad(nearness(samples(policy, Generator().manual_seed(0), 1).final, PROMPTS).mean(), policy.weights)]
    for _ in range(n):
        x_t = diffuse(trajectory.final, torch.randn(3, 2, generator=rng, dtype=torch.float64), at)
        epsilon = policy.module(x_t, at, trajectory.condition.tensors["context"])
        x_0 = (x_t - at.sigma * epsilon) / at.alpha
        terms.append(nearness(then.alpha * x_0 + then.sigma * epsilon, PROMPTS).mean())
        gradients.append(torch.autograd.grad(terms[-1], policy.weights))
    for loss, term, gradient in zip(out, terms, gradients, strict=True):
        torch.testing.assert_close(loss.value, -term.detach() / (n + 1), check_dtype=False)
        for ours, want in zip(torch.autograd.grad(loss.value, policy.weights), gradient, strict=True):
            torch.testing.assert_close(ours, -want / (n + 1))
    torch.testing.assert_close(sum(float(loss.value.detach()) for loss in out), -sum(float(term.detach()) for term in terms) / (n + 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_reference_term_is_the_squared_distance_of_the_epsilons(prediction: str):
    """On the last state the network saw; for a v-prediction, epsilon is `alpha v + sigma x_t`."""
    policy = a_toy(prediction)
    (loss,), (plain,) = losses(policy, reference_weight=3.0), losses(policy)
    assert loss.metrics["drift"] == 0
    assert torch.equal(loss.value, plain.value)

    with torch.no_grad():
        for w in policy.weights:
            w.add_(0.1 * torch.randn_like(w))
    (loss,), (plain,) = losses(policy, reference_weight=3.0), losses(policy)
    trajectory = samples(policy, Generator().manual_seed(0))
    x_t, at = trajectory.states[-2], trajectory.schedule.now[-1]
    trained, base = (m(x_t, at, trajectory.condition.tensors["context"]) for m in (policy.module, policy.base))
    drift = ((trained - base) ** 2).mean() * (float(at.alpha) ** 2 if prediction == "v_prediction" else 1)
    assert drift > 1e-4
    torch.testing.assert_close(loss.metrics["drift"], drift.detach())
    torch.testing.assert_close(loss.value, plain.value + 3 * drift)
    term = torch.autograd.grad(loss.value - plain.value, policy.weights)
    for ours, want in zip(term, torch.autograd.grad(3 * drift, policy.weights), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fields", [{"k": 1}, {"k": 3}, {"n": 2}, {"k": T}, {"reference_weight": 1e-3}], ids=str)
def test_it_raises_the_reward(fields: dict[str, Any]):
    policy = Toy(diffusion(), Exact(diffusion()))
    optimiser = torch.optim.Adam([policy.module.get_parameter("mean")], lr=0.1)
    rewards = list[float]()
    for step in range(50):
        optimiser.zero_grad()
        for loss in losses(policy, seed=step, **fields):
            loss.value.backward()
            rewards.append(float(loss.metrics.get("reward", rewards[-1] if rewards else 0)))
            if loss.update:
                optimiser.step()
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 2
    assert (policy.module.get_parameter("mean") - GOAL).norm() < 0.6, "the data's mean has gone to where the reward is highest"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"k": 0}, "method.k is 0: give 1 to 50"),
        ({"k": 9, "inference_steps": 8}, "method.k is 9: give 1 to 8"),
        ({"inference_steps": 0}, "method.inference_steps is 0: give 1 or more"),
        ({"n": -1}, "method.n is -1: give 0 or more"),
        ({"n": 2, "k": 2}, r"method.k is 2: give 1: DRaFT-LV \(method.n 2\) goes through the last step alone"),
        ({"reference_weight": -0.1}, "method.reference_weight is -0.1: give 0 or more"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        DRaFT(**fields)


def test_it_says_what_it_needs():
    assert DRaFT.needs.differentiable_reward
    assert DRaFT() == DRaFT(k=1, n=0, inference_steps=50)
