"""Objectives: numbers worked out by hand, identities, and gradients in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Normal, kl_divergence

from diffalign.objectives.policy_gradient import Surrogate, clipped_surrogate, gaussian_kl, reinforce
from diffalign.objectives.preference import Margin, denoising_margin, kto, mapo, preference
from diffalign.objectives.regression import proximal_reward_difference, reward_difference
from diffalign.objectives.weighting import effective_sample_size, exponential_weights

LN2 = math.log(2)
MARGINS: list[Margin] = ["logistic", "squared", "hinge"]


def f64(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def leaf(*values: Any) -> Tensor:
    return f64(*values).requires_grad_()


def slope(function: Callable[[Tensor], Tensor], *at: float) -> list[float]:
    """The derivative of each value of a (B,) -> (B,) function."""
    x = leaf(*at)
    return torch.autograd.grad(function(x).sum(), x)[0].tolist()


def near(values: Tensor, *expected: float) -> None:
    torch.testing.assert_close(values, f64(*expected), check_dtype=False)


# --- policy gradient ---


def test_reinforce():
    log_prob, advantage = leaf(-0.5, -2.0), leaf(2.0, -3.0)
    loss = reinforce(log_prob, advantage)
    assert loss.tolist() == [1.0, -6.0]  # -2 * -0.5, 3 * -2
    assert torch.autograd.grad(loss.sum(), [log_prob, advantage], allow_unused=True)[1] is None
    assert slope(lambda x: reinforce(x, f64(2, -3)), -0.5, -2) == [-2, 3]


# rho, A, then by hand with e = 0.1: the loss, and its derivative with respect to log_prob (-A rho where rho is free, else 0)
SURROGATES: list[tuple[Surrogate, list[tuple[float, float, float, float]]]] = [
    (
        "ppo",
        [
            (1.0, 2.0, -2.0, -2.0),
            (1.05, 2.0, -2.1, -2.1),  # in the band
            (1.3, 2.0, -2.2, 0.0),  # good, and likelier already: max(-2.6, -2.2)
            (0.7, 2.0, -1.4, -1.4),  # good, but less likely: max(-1.4, -1.8)
            (1.3, -2.0, 2.6, 2.6),  # bad, and likelier: max(2.6, 2.2)
            (0.7, -2.0, 1.8, 0.0),  # bad, and less likely already: max(1.4, 1.8)
            (1.3, 0.0, 0.0, 0.0),
        ],
    ),
    (
        "clamp",
        [
            (1.0, 2.0, -2.0, -2.0),
            (1.05, -2.0, 2.1, 2.1),
            (1.3, 2.0, -2.2, 0.0),
            (0.7, 2.0, -1.8, 0.0),  # where ppo would mend it
            (1.3, -2.0, 2.2, 0.0),
            (0.7, -2.0, 1.8, 0.0),
        ],
    ),
]


@pytest.mark.parametrize(("kind", "table"), SURROGATES, ids=["ppo", "clamp"])
def test_clipped_surrogate_by_hand(kind: Surrogate, table: list[tuple[float, float, float, float]]):
    rho, advantage, loss, gradient = f64(*table).T
    old = torch.linspace(-3, 2, len(rho), dtype=torch.float64).requires_grad_()
    advantage = advantage.requires_grad_()
    log_prob = (old.detach() + rho.log()).requires_grad_()
    ours = clipped_surrogate(log_prob, old, advantage, clip=0.1, kind=kind)
    torch.testing.assert_close(ours, loss)
    gradients = torch.autograd.grad(ours.sum(), [log_prob, old, advantage], allow_unused=True)
    torch.testing.assert_close(gradients[0], gradient)
    assert gradients[1:] == (None, None)


def test_ppo_is_the_maximum_of_the_two_branches():
    log_prob, old, advantage = torch.randn(3, 500, generator=Generator().manual_seed(0), dtype=torch.float64)
    log_prob.requires_grad_()
    rho = (log_prob - old).exp()
    want = torch.maximum(-advantage * rho, -advantage * rho.clamp(0.8, 1.2))
    ours = clipped_surrogate(log_prob, old, advantage, clip=0.2)
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), log_prob)[0] for loss in (ours, want)))


@pytest.mark.parametrize("kind", ["ppo", "clamp"])
def test_the_first_gradient_is_reinforces(kind: Surrogate):
    log_prob, advantage = torch.randn(2, 20, generator=Generator().manual_seed(0))
    ours = slope(lambda x: clipped_surrogate(x, x, advantage, clip=1e-4, kind=kind), *log_prob.tolist())
    assert ours == slope(lambda x: reinforce(x, advantage), *log_prob.tolist())


@pytest.mark.parametrize("kind", ["ppo", "clamp"])
def test_a_ratio_that_overflows_leaves_no_nan_behind(kind: Surrogate):
    log_prob = torch.tensor([200.0, -200.0, 200.0], requires_grad=True)  # exp(200) is inf in fp32
    loss = clipped_surrogate(log_prob, torch.zeros(3), torch.tensor([1.0, -1.0, 0.0]), clip=0.1, kind=kind)
    assert loss.tolist() == pytest.approx([-1.1, 0.9, 0.0])
    assert torch.autograd.grad(loss.sum(), log_prob)[0].tolist() == [0, 0, 0]


def test_gaussian_kl_is_torchs():
    mean, other = torch.randn(2, 2, 3, 5, generator=Generator().manual_seed(0), dtype=torch.float64)
    for std in (f64(0.3), f64(0.3, 2.0)):
        spread = std.reshape(-1, 1, 1)
        want = kl_divergence(Normal(mean, spread), Normal(other, spread)).flatten(1)
        torch.testing.assert_close(gaussian_kl(mean, other, std), want.mean(1))
        torch.testing.assert_close(gaussian_kl(mean, other, std, reduce="sum"), want.sum(1))


def test_gaussian_kl_by_hand():
    mean, other = torch.tensor([[1.0, 3.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    # squared distances 1 + 4 and 0 + 1; over 2 * 0.5^2 = 0.5 and 2 * 1^2 = 2
    near(gaussian_kl(mean, other, f64(0.5, 1), reduce="sum"), 10, 0.5)
    near(gaussian_kl(mean, other, f64(0.5)), 5, 1)
    assert gaussian_kl(mean.bfloat16(), other.bfloat16(), f64(0.5)).dtype == torch.float32
    for std in (f64(0), f64(0.5, 0), f64(-1), f64(math.nan)):
        with pytest.raises(ValueError, match="not positive"):
            gaussian_kl(mean, other, std)


# --- preference ---


def test_preference_by_hand():
    margin = f64(0, 1, -1)
    # beta m = 0, 2, -2; log(1 + exp(-x))
    near(preference(margin, beta=2), LN2, math.log1p(math.exp(-2)), math.log1p(math.exp(2)))
    near(preference(margin, beta=2, kind="squared"), 0.0625, 0.5625, 1.5625)  # (m - 1/4)^2
    near(preference(margin, beta=2, kind="hinge"), 1, 0, 3)  # max(0, 1 - 2m)


def test_an_offset_is_what_the_better_sample_must_be_ahead_by():
    margin, offset = f64(1, 1, 1), f64(0, 2, 3)
    # beta m - o = 2, 0, -1
    near(preference(margin, beta=2, offset=offset), math.log1p(math.exp(-2)), LN2, math.log1p(math.e))
    near(preference(margin, beta=2, kind="squared", offset=offset), 0.5625, 1.5625, 5.0625)  # (0.75, -1.25, -2.25) squared
    near(preference(margin, beta=2, kind="hinge", offset=offset), 0, 1, 2)
    near(preference(margin, beta=2, offset=2.0), LN2, LN2, LN2)


@pytest.mark.parametrize(
    ("kind", "derivative"),
    [
        ("logistic", lambda m: -2 / (1 + math.exp(2 * m - 0.5))),  # -beta sigmoid(o - beta m)
        ("squared", lambda m: 2 * (m - 0.75)),  # o + 1/(2 beta) = 0.75
        ("hinge", lambda m: -2.0 if 2 * m - 0.5 < 1 else 0.0),
    ],
)
def test_the_slope_of_a_preference(kind: Margin, derivative: Callable[[float], float]):
    margins = [-3.0, -0.1, 0.0, 0.2, 2.0]
    assert slope(lambda m: preference(m, beta=2, kind=kind, offset=0.5), *margins) == pytest.approx([derivative(m) for m in margins])


def test_label_smoothing_by_hand():
    # a margin of 1 has beta m - o = 1, and with the label turned round -2 - 1 = -3
    smooth = preference(f64(1), beta=2, offset=1.0, label_smoothing=0.1)
    near(smooth, 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.exp(3)))
    near(preference(f64(1), beta=2, kind="squared", label_smoothing=0.1), 0.9 * 0.5625 + 0.1 * 1.5625)
    near(preference(f64(1), beta=2, kind="hinge", label_smoothing=0.1), 0.3)  # 0.9 * 0 + 0.1 * 3
    # the minimum of the smoothed logistic: sigmoid(beta m) = 1 - e
    assert slope(lambda m: preference(m, beta=2, label_smoothing=0.1), math.log(9) / 2) == pytest.approx([0], abs=1e-12)


@pytest.mark.parametrize("kind", MARGINS)
def test_half_smoothed_labels_say_nothing(kind: Margin):
    margin = f64(0.3, 1.7)
    halves = [preference(m, beta=1.5, kind=kind, offset=0.4, label_smoothing=0.5) for m in (margin, -margin)]
    assert torch.equal(*halves)
    assert not torch.equal(*(preference(m, beta=1.5, kind=kind, offset=0.4, label_smoothing=0.4) for m in (margin, -margin)))


@pytest.mark.parametrize("kind", MARGINS)
def test_preferences_are_finite_far_out(kind: Margin):
    margin = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = preference(margin, beta=2500, kind=kind, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0] < 0  # where all is wrong, the gradient has not died


def test_denoising_margin_by_hand():
    w, l, w_ref, l_ref = f64(0.2, 0.9), f64(0.5, 0.4), f64(0.3, 0.5), f64(0.4, 0.6)  # noqa: E741
    near(denoising_margin(w, l, w_ref, l_ref), 0.2, -0.6)  # (0.5 - 0.4) - (0.2 - 0.3); (0.4 - 0.6) - (0.9 - 0.5)
    near(denoising_margin(w, l), 0.3, -0.5)
    near(preference(denoising_margin(w, l, w, l), beta=2500), LN2, LN2)  # at the reference: where Diffusion-DPO starts
    for references in ({"reference_w": w}, {"reference_l": l}):
        with pytest.raises(ValueError, match="both references"):
            denoising_margin(w, l, **references)


def test_diffusion_dpos_first_gradient():
    """`-log sigmoid(-(beta / 2) [...])` at the reference: beta / 4 towards the better sample, beta / 4 away from the worse."""
    w, l = leaf(0.2, 0.9), leaf(0.5, 0.4)  # noqa: E741
    loss = preference(denoising_margin(w, l, w.detach(), l.detach()), beta=5000 / 2)
    assert [g.tolist() for g in torch.autograd.grad(loss.sum(), [w, l])] == [[1250, 1250], [-1250, -1250]]


def test_kto_by_hand():
    gain, desirable, baseline = f64(0.5, 0.5, 0.1, 0.1), torch.tensor([True, False, True, False]), leaf(0.1)
    # beta (g - z) = 2 * 0.4 and 0: sigmoid(-0.8), sigmoid(0.8), and 1/2 where g = z
    low = 1 / (1 + math.exp(0.8))
    loss = kto(gain, desirable, baseline, beta=2)
    near(loss, low, 1 - low, 0.5, 0.5)
    assert not loss.requires_grad  # z is the batch's, no gradient goes into it
    near(kto(gain, desirable, baseline[0], beta=2, desirable_weight=3, undesirable_weight=0.5), 3 * low, (1 - low) / 2, 1.5, 0.25)
    # -+ w beta sigmoid(x) (1 - sigmoid(x)): at g = z, beta / 4
    slopes = slope(lambda g: kto(g, desirable, baseline, beta=2), 0.5, 0.5, 0.1, 0.1)
    assert slopes == pytest.approx([-2 * low * (1 - low), 2 * low * (1 - low), -0.5, 0.5])


def test_kto_is_finite_far_out():
    gain = torch.tensor([1e3, -1e3, 1e3, -1e3], requires_grad=True)
    loss = kto(gain, torch.tensor([True, True, False, False]), torch.zeros(1), beta=1000)
    assert loss.tolist() == [0, 1, 1, 0]
    assert torch.autograd.grad(loss.sum(), gain)[0].tolist() == [0, 0, 0, 0]


def test_mapo_by_hand():
    # s e = 1 and 2: f = 1 / (e - 1) and 2 / (e^2 - 1)
    better, worse = 1 / (math.e - 1), 2 / (math.e**2 - 1)
    ahead = 3 * (better - worse)
    loss = mapo(f64(2, 4), f64(4, 2), s=0.5, scale=3, beta=0.1)
    near(loss, 2 + 0.1 * math.log1p(math.exp(-ahead)), 4 + 0.1 * math.log1p(math.exp(ahead)))
    near(mapo(f64(0, 0.7), f64(0, 0.7)), 0.1 * LN2, 0.7 + 0.1 * LN2)  # equal errors, 0 among them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapos_gradient_is_right_at_and_around_zero(dtype: torch.dtype):
    """With the worse sample's error 0 and scale small, dloss/de_w = 1 - beta scale s f'(s e_w) sigmoid(...), f'(0) = -1/2."""
    errors = torch.tensor([0.0, 1e-30, 1e-8, 1e-5, 1e-3, 0.0199, 0.0201, 1.0, 30.0, 500.0], dtype=dtype, requires_grad=True)
    loss = mapo(errors, torch.zeros_like(errors), beta=1.0, s=0.5, scale=2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), errors)
    for e, value, ours in zip(errors.tolist(), loss.tolist(), gradient.tolist(), strict=True):
        x = e / 2
        f = x * math.exp(-x) / -math.expm1(-x) if x else 1.0
        by_hand = (math.expm1(x) - x * math.exp(x)) / math.expm1(x) ** 2 if x > 0.05 else -1 / 2 + x / 6 - x**3 / 180
        step = 1 / (1 + math.exp(2 * (f - 1)))
        assert value == pytest.approx(e + math.log1p(math.exp(-2 * (f - 1))), rel=1e-5 if dtype == torch.float32 else 1e-12)
        assert ours == pytest.approx(1 - by_hand * step, rel=1e-5 if dtype == torch.float32 else 1e-9)


def test_mapo_goes_the_right_way():
    better, worse = leaf(0.2, 0.5), leaf(0.4, 0.3)
    to_better, to_worse = torch.autograd.grad(mapo(better, worse, scale=10).sum(), [better, worse])
    assert (to_better > 1).all()  # more than the denoising term's own 1
    assert (to_worse < 0).all()


# --- regression ---


def test_reward_difference_by_hand():
    near(reward_difference(f64(0.5, -1), f64(1, 1), beta=2), 0, 2.25)  # (0.5 - 0.5)^2, (-1 - 0.5)^2
    assert slope(lambda x: reward_difference(x, f64(1, 1), beta=2), 0.5, -1) == [0, -3]


# Two steps, two samples, and clip 1/8: the first sample's first entry is cut from 0.5 to 0.375; the second's last is on the band's edge.
# The ratios' sums are 0.75 and -0.125, 0.875 apart; cut, 0.625 and -0.125, 0.75 apart. All in eighths, so that a tie is a tie.
LOG_RATIO = f64([0.5, 0.125], [0.25, -0.25])
OLD = f64([0.25, 0.125], [0.25, -0.125])


@pytest.mark.parametrize(
    ("reward", "loss", "coefficient"),
    [
        (1.0, 0.375**2, [[0.75, -0.75], [0.75, -0.75]]),  # u = 0.875 - 1/2, v = 0.75 - 1/2: 2u to all
        (3.0, 0.75**2, [[0.0, 1.5], [-1.5, 1.5]]),  # u = 0.875 - 3/2, v = 0.75 - 3/2 = -0.75: 2v, and nothing to the cut entry
        (1.625, 0.0625**2, [[0.0625, 0.0], [0.0, 0.0]]),  # u = 0.0625 = -v: u + v = 0, and u alone to the cut entry
    ],
    ids=["uncut", "cut", "tie"],
)
def test_proximal_reward_difference_by_hand(reward: float, loss: float, coefficient: list[list[float]]):
    ours = proximal_reward_difference(LOG_RATIO, OLD, f64(reward, 0), beta=2, clip=0.125)
    assert ours.loss.tolist() == [loss]
    assert ours.coefficient.tolist() == coefficient


def by_autograd(log_ratio: Tensor, old: Tensor, scores: Tensor, beta: float, clip: float) -> tuple[Tensor, Tensor]:
    """One group's (pairs,) losses, written out pair by pair, and the gradient of their mean."""
    log_ratio = log_ratio.detach().requires_grad_()
    cut = log_ratio.clamp(old - clip, old + clip)
    losses = [
        torch.maximum(*((x[:, i].sum() - x[:, j].sum() - (scores[i] - scores[j]) / beta) ** 2 for x in (log_ratio, cut)))
        for i, j in combinations(range(len(scores)), 2)
    ]
    loss = torch.stack(losses)
    return loss.detach(), torch.autograd.grad(loss.mean(), log_ratio)[0]


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.1, 1.0], ids=["first pass", "few cut", "some cut", "most cut"])
@pytest.mark.parametrize("k", [2, 3, 6])
def test_the_coefficient_is_autograds(k: int, scale: float):
    rng = Generator().manual_seed(k)
    old, drift = torch.randn(2, 7, 4, k, generator=rng, dtype=torch.float64)
    scores = torch.randn(7, k, generator=rng, dtype=torch.float64)
    log_ratio, cut = old + scale * drift, (scale * drift).abs() > 0.1
    assert cut.any() == (scale > 0)
    assert not cut.all()
    log_ratio.requires_grad_()
    ours = proximal_reward_difference(log_ratio, old, scores, beta=0.7, clip=0.1)
    for group in range(7):
        loss, gradient = by_autograd(log_ratio[group], old[group], scores[group], 0.7, 0.1)
        torch.testing.assert_close(ours.loss[group].detach(), loss)
        torch.testing.assert_close(ours.coefficient[group], gradient)

    assert not ours.coefficient.requires_grad
    (whole,) = torch.autograd.grad(ours.loss.mean(-1).sum(), log_ratio)
    stepwise = torch.zeros_like(log_ratio)
    for t in range(4):
        stepwise += torch.autograd.grad((ours.coefficient[:, t] * log_ratio[:, t]).sum(), log_ratio)[0]
    torch.testing.assert_close(whole, ours.coefficient)
    assert torch.equal(stepwise, ours.coefficient)


def test_ties_with_cut_entries_are_autograds():
    for reward in (1.0, 1.625, 3.0):
        ours = proximal_reward_difference(LOG_RATIO, OLD, f64(reward, 0), beta=2, clip=0.125)
        loss, gradient = by_autograd(LOG_RATIO, OLD, f64(reward, 0), 2, 0.125)
        assert torch.equal(ours.loss, loss)
        assert torch.equal(ours.coefficient, gradient)


def test_a_single_sample_makes_no_pair():
    with pytest.raises(ValueError, match="no pair"):
        proximal_reward_difference(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(1), beta=1, clip=0.1)


# --- weighting ---


def test_exponential_weights_by_hand():
    scores = leaf(0, 2 * LN2, 2 * math.log(5))  # exp(r / 2) is 1, 2, 5, and their mean 8/3
    weights = exponential_weights(scores, beta=2)
    near(weights, 0.375, 0.75, 1.875)
    assert not weights.requires_grad
    near(exponential_weights(scores, beta=2, cap=1.5), 0.375, 0.75, 1.5)  # the others are not scaled up again
    near(exponential_weights(torch.tensor([3.0, 3.0]), beta=0.1), 1, 1)
    assert exponential_weights(torch.tensor([1e4, 1e4 - 1, 0.0]), beta=1e-3).tolist() == [3, 0, 0]  # exp(1e7) is no number


def test_effective_sample_size_by_hand():
    assert effective_sample_size(f64(1, 1, 1, 1)) == 4
    assert effective_sample_size(f64(0, 0, 7)) == 1
    near(effective_sample_size(f64(1, 3)).reshape(1), 1.6)  # 4^2 / (1 + 9)
    near(effective_sample_size(f64(10, 30)).reshape(1), 1.6)


# --- all of them ---


@pytest.mark.parametrize(
    "call",
    [
        lambda x: clipped_surrogate(x, x, x, clip=0.1, kind="trpo"),  # pyright: ignore[reportArgumentType]
        lambda x: preference(x, beta=1, kind="exponential"),  # pyright: ignore[reportArgumentType]
    ],
    ids=["clipped_surrogate", "preference"],
)
def test_an_unknown_kind_raises(call: Callable[[Tensor], Tensor]):
    with pytest.raises(ValueError, match="give '"):
        call(torch.zeros(2))
