"""PRDP: the gradient in parts is the whole formula's, memory does not grow with the steps, and the end is the tilted distribution."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from by_hand import descend, follow, gradient, log_probs_by_hand, most_saved, tilted_mean
from torch import Tensor
from toy import Exact, Network, Toy, a_context, diffusion, move, nearness

from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.methods.prdp import PRDP
from diffalign.rounds import Round, sample_round
from diffalign.sampling import ddim
from diffalign.types import Context, Prompts

T = 4
PROMPTS = Prompts(("0", "0.5", "-1"))
OTHERS = Prompts(("2", "1", "-2"))


def a_toy(**scheduler: Any) -> Toy:
    return move(Toy(diffusion(**scheduler), Network()))


def prdp(**fields: Any) -> PRDP:
    return PRDP(**{"inference_steps": T, "batches": 2, "samples": 3, "updates": 1, **fields})


def a_stream() -> Context:
    """The second batch of a round is of other prompts."""
    return a_context(OTHERS)


def the_formula(policy: Toy, stored: Round, old: Tensor, beta: float, clip: float) -> tuple[Tensor, Tensor]:
    """The mean over all pairs of `max(u^2, v^2)` with one graph over all steps, and the (T, N) log-ratios."""
    with torch.no_grad():
        base = log_probs_by_hand(policy.base, stored.trajectory)
    ratio = log_probs_by_hand(policy.module, stored.trajectory) - base
    cut = ratio.clamp(old - clip, old + clip)
    free, cut, r = (x.unflatten(-1, (2, 3, 3)) for x in (ratio.sum(0), cut.sum(0), stored.scores))  # batch, sample, prompt
    terms = [
        torch.maximum(*((x[b, i, p] - x[b, j, p] - (r[b, i, p] - r[b, j, p]) / beta) ** 2 for x in (free, cut)))
        for b in range(2)
        for p in range(3)
        for i, j in combinations(range(3), 2)
    ]
    assert len(terms) == 18
    return torch.stack(terms).mean(), ratio.detach()


@pytest.mark.parametrize(("clip", "rate"), [(0.02, 1e-5), (0.02, 2e-4), (0.3, 1e-3)])
def test_the_gradient_in_parts_is_the_whole_formulas(clip: float, rate: float):
    """In the first update nothing is cut; before the next ones the policy has gone far, and some of the log-ratios are."""
    beta, policy = 5.0, a_toy()
    stored = sample_round(policy, nearness, PROMPTS, a_stream(), batches=2, samples=3, steps=T, kernel=ddim(1.0))
    old = the_formula(policy, stored, torch.zeros(T, 18), beta, clip)[1]
    assert old.abs().max() > 0.01, "the policy is not the base"
    by_hand, drifts, uncut = list[tuple[Tensor, float, float]](), list[Tensor](), list[Tensor]()
    for _ in range(3):
        loss, ratio = the_formula(policy, stored, old, beta, clip)
        by_hand.append((gradient(loss, policy), float(loss.detach()), float(ratio.sum(0).mean())))
        drifts.append((ratio - old).abs())
        uncut.append(gradient(the_formula(policy, stored, old, beta, 1e9)[0], policy))
        descend(policy, by_hand[-1][0], rate)
    assert drifts[0].max() == 0
    assert 0.1 < float((drifts[1] > clip).double().mean()) < 0.9
    assert (uncut[0] - by_hand[0][0]).abs().max() < 1e-9
    assert (uncut[1] - by_hand[1][0]).norm() > 0.01 * uncut[1].norm(), "the cut pairs are the worse ones here and there"

    policy = a_toy()
    method = prdp(beta=beta, clip=clip, updates=3)
    updates = follow(method.losses(policy, nearness, PROMPTS, a_stream()), policy, rate)
    for ours, (slope, value, log_ratio) in zip(updates, by_hand, strict=True):
        torch.testing.assert_close(ours.slope, slope, rtol=1e-9, atol=1e-9 * float(slope.abs().max()))
        assert ours.value == pytest.approx(value, rel=1e-9)
        assert ours.metrics["regression"] == pytest.approx(value, rel=1e-9)
        assert ours.metrics["log_ratio"] == pytest.approx(log_ratio, rel=1e-6)


def test_a_step_without_noise_is_left_out():
    policy = a_toy(set_alpha_to_one=True)
    ours = list(prdp(beta=5.0).losses(policy, nearness, PROMPTS, a_stream()))
    assert len(ours) == (T - 1) * 18 / 3
    assert all(gradient(loss.value, policy).isfinite().all() for loss in ours)


def test_memory_does_not_grow_with_the_steps():
    """What graphs hold at any time, in bytes: that of one forward, whatever the number of steps."""

    def most(steps: int) -> int:
        policy = Toy(diffusion(), Network(width=64))
        return most_saved(prdp(inference_steps=steps).losses(policy, nearness, PROMPTS, a_stream()), policy)

    assert most(4) == most(8) == most(16)
    assert most(4) > 8 * 3 * 64, "the measure sees the activations of a forward"


def test_old_log_probabilities_come_from_sampling():
    policy = a_toy()

    @reward(differentiable=False)
    def meddler(media: Tensor, prompts: Prompts) -> Tensor:
        move(policy, 1e-3)
        return nearness(media, prompts)

    with pytest.raises(InputError, match="ratio of the first pass"):
        list(prdp().losses(policy, meddler, PROMPTS, a_stream()))


@pytest.mark.parametrize("updates", [1, 3])
def test_it_takes_as_many_optimiser_steps_as_it_says(updates: int):
    ours = list(prdp(updates=updates).losses(a_toy(), nearness, PROMPTS, a_stream()))
    assert [loss.update for loss in ours] == ([False] * (T * 18 // 3 - 1) + [True]) * updates


def test_it_lands_at_the_tilted_distribution():
    """With a linear reward `gain . x_0` the optimum is the base times `exp(D r / beta)`, D = 2; see `tilted_mean`.

    The log-ratios that the formula regresses on r / beta are means over the D dimensions: those of the densities are D times as large.
    """
    path, gain, prompts = diffusion(), torch.tensor([1.0, -1.0], dtype=torch.float64), Prompts(("0",) * 32)
    policy = Toy(path, Exact(path, mean=(1.0, 1.0), std=0.05))
    mean, along = policy.module.get_parameter("mean"), reward(differentiable=False)(lambda media, prompts: media @ gain)
    method = PRDP(inference_steps=T, samples=4, updates=2, clip=10.0, beta=0.02)
    want, context, passed = tilted_mean(policy, T, 2 / 0.02 * gain), a_context(prompts), list[Tensor]()
    assert (want - mean).abs().min() > 0.1
    optimiser = torch.optim.Adam([mean], lr=0.02)
    while len(passed) < 60:
        for loss in method.losses(policy, along, prompts, context):
            loss.value.backward()
            if loss.update:
                optimiser.step()
                optimiser.zero_grad()
                passed.append(mean.detach().clone())
    assert (torch.stack(passed[20:]).mean(0) - want).abs().max() < 0.03


def test_the_tilted_mean_is_the_continuous_one_in_many_steps():
    """Data `N(m, s^2)` times `exp(gain . x)` is `N(m + s^2 gain, s^2)`."""
    path = diffusion(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    policy = Toy(path, Exact(path, mean=(1.0, 1.0), std=0.5))
    shift = tilted_mean(policy, 1000, torch.tensor([1.0, -2.0], dtype=torch.float64)) - 1
    torch.testing.assert_close(shift, 0.25 * torch.tensor([1.0, -2.0], dtype=torch.float64), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inference_steps": 0}, "method.inference_steps is 0: give 1 or more"),
        ({"batches": 0}, "method.batches is 0"),
        ({"samples": 1}, "method.samples is 1: give 2 or more"),
        ({"updates": 0}, "method.updates is 0"),
        ({"eta": 0.0}, "method.eta is 0.0: .* Without noise there are no actions"),
        ({"eta": float("inf")}, "method.eta is inf"),
        ({"random_steps": 0}, "method.random_steps is 0: give 1 to 4"),
        ({"random_steps": T + 1}, "method.random_steps is 5"),
        ({"beta": 0.0}, "method.beta is 0.0: give a number above 0"),
        ({"clip": -1e-4}, "method.clip is -0.0001"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        prdp(**fields)


def test_a_constant_reward_ends_in_an_error():
    constant, context = reward(differentiable=False)(lambda media, prompts: torch.ones(len(media))), a_stream()
    for _ in range(9):
        assert list(prdp().losses(a_toy(), constant, PROMPTS, context)), "log-ratios that differ are pulled together"
    with pytest.raises(InputError, match=r"In 10 rounds on end no two samples .* Is it constant"):
        list(prdp().losses(a_toy(), constant, PROMPTS, context))
