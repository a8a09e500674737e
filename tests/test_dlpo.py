"""DLPO: the reward less the denoising error of the own sample, on DDPO's loop, worked through by hand on diffusion and on a flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import denoising_step, gradient, total, value
from torch import Tensor
from toy import Network, Toy, a_context, diffusion, flow, move, nearness

from diffalign import registry
from diffalign.errors import InputError
from diffalign.methods.ddpo import DDPO
from diffalign.objectives.policy_gradient import denoising_distance
from diffalign.rounds import sample_round
from diffalign.sampling import noisy
from diffalign.types import Prompts

T = 4
PROMPTS = Prompts(("0", "0.5", "-1"))
SHAPE: dict[str, Any] = {"batches": 1, "samples": 4}


def dlpo(**fields: Any) -> DDPO:
    return DDPO(**{**registry.find("methods", "dlpo")[1], "inference_steps": T, **SHAPE, **fields})


def terms(policy: Toy, norm: str = "l2") -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (N,), and of the T random steps distances and log-probabilities (T, N), with their graphs: the formulas of the paper."""
    kernel = noisy(policy.path, 1.0)
    round_ = sample_round(policy, nearness, PROMPTS, a_context(PROMPTS), steps=T, kernel=kernel, **SHAPE)
    trajectory, distances, log_probs = round_.trajectory, list[Tensor](), list[Tensor]()
    for i in range(T):
        now, x_t = trajectory.schedule.now[i], trajectory.states[i]
        epsilon = policy.module(x_t, now, trajectory.condition.tensors["context"])
        made = (x_t - float(now.alpha) * trajectory.final) / float(now.sigma)
        distances.append(((made - epsilon) ** 2).sum(1) ** 0.5 / (2**0.5 if norm == "rms" else 1))
        log_probs.append(denoising_step(policy.module, trajectory, i).log_prob(trajectory.states[i + 1]).mean(1))
    return round_.scores, torch.stack(distances), torch.stack(log_probs)


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_the_gradient_is_the_papers(norm: str):
    """`-(alpha r - beta ||eps_tilde - eps_theta||) grad log pi` over all transitions, the bracket without a gradient."""
    policy = move(Toy(diffusion(), Network()))
    rewards, distances, log_probs = terms(policy, norm)
    want = -((0.5 * rewards - 2.0 * distances.detach()) * log_probs).mean()
    ours = list(dlpo(reward_weight=0.5, denoising_weight=2.0, denoising_norm=norm).losses(policy, nearness, PROMPTS, a_context(PROMPTS)))
    assert value(ours) == pytest.approx(float(want.detach()), rel=1e-9)
    torch.testing.assert_close(total(ours, policy), gradient(want, policy), rtol=1e-9, atol=1e-10)
    logged = torch.stack([torch.as_tensor(loss.metrics["denoising_distance"]) for loss in ours]).mean()
    assert float(logged) == pytest.approx(float(distances.detach().mean()), rel=1e-6)


def test_the_distance_may_be_a_loss_of_its_own():
    policy = move(Toy(diffusion(), Network()))
    rewards, distances, log_probs = terms(policy)
    want = (-rewards * log_probs + distances).mean()
    ours = list(dlpo(denoising_mode="loss").losses(policy, nearness, PROMPTS, a_context(PROMPTS)))
    torch.testing.assert_close(total(ours, policy), gradient(want, policy), rtol=1e-9, atol=1e-10)


def test_without_the_reward_only_the_distance_is_left():
    """The paper's ablation OnlyDL; and with no distance it is DDPO's score function on raw rewards."""
    policy = move(Toy(diffusion(), Network()))
    for left_out in ("reward_weight", "denoising_weight"):
        rewards, distances, log_probs = terms(policy)
        gain = -distances.detach() if left_out == "reward_weight" else rewards
        ours = list(dlpo(**{left_out: 0.0}).losses(policy, nearness, PROMPTS, a_context(PROMPTS)))
        torch.testing.assert_close(total(ours, policy), gradient(-(gain * log_probs).mean(), policy), rtol=1e-9, atol=1e-10)


def test_on_a_flow_the_noise_is_the_velocity_s():
    """`x_t + (1 - t) v` against `(x_t - (1 - t) x_0) / t`, on the only random step."""
    policy = move(Toy(flow(shift=1.0), Network()))
    method, context = dlpo(random_steps=1, eta=0.7), a_context(PROMPTS)
    round_ = sample_round(policy, nearness, PROMPTS, a_context(PROMPTS), steps=T, kernel=noisy(policy.path, 0.7), random_steps=1, **SHAPE)
    states, t = round_.trajectory.states, float(round_.trajectory.schedule.now.sigma[0])
    velocity = policy.module(states[0], round_.trajectory.schedule.now[0], round_.trajectory.condition.tensors["context"])
    want = ((states[0] + (1 - t) * velocity - (states[0] - (1 - t) * states[-1]) / t) ** 2).sum(1) ** 0.5
    logged = [float(loss.metrics["denoising_distance"]) for loss in method.losses(policy, nearness, PROMPTS, context)]
    assert sum(logged) / len(logged) == pytest.approx(float(want.detach().mean()), rel=1e-9)


def test_the_distance_of_what_is_equal_has_no_gradient():
    made, believed = torch.ones(2, 3), torch.tensor([[1.0, 1, 1], [1, 3, 1]])
    assert denoising_distance(made, believed).tolist() == [0, 2]
    assert denoising_distance(made, believed.requires_grad_(True)).sum().backward() is None
    assert believed.grad is not None
    assert believed.grad[0].tolist() == [0, 0, 0], "no NaN where nothing differs"


def test_what_makes_no_sense_is_an_error():
    with pytest.raises(InputError, match=r"reward_weight is 0.* or method.denoising_weight"):
        dlpo(reward_weight=0.0, denoising_weight=0.0)
    with pytest.raises(ValueError, match="give 'l2' or 'rms'"):
        denoising_distance(torch.ones(1, 1), torch.ones(1, 1), "l1")  # pyright: ignore[reportArgumentType]


def test_the_row_is_the_paper_s():
    method = dlpo()
    assert (method.estimator, method.advantage, method.reward_weight, method.denoising_weight) == ("sf", "none", 1.0, 1.0)
    assert (method.updates, method.denoising_mode, method.denoising_norm) == (1, "reward", "l2")
