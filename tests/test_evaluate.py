"""Paired comparison: numbers worked out by hand, and the same noise for both models."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Generator, Tensor
from toy import Exact, Toy, diffusion, flow

from diffalign.contract import CheckedReward, reward
from diffalign.evaluate import bootstrap, compare, diversity, evaluate, kl_to_base, pairwise_distance, sample
from diffalign.lora import LoRA
from diffalign.noise import RectifiedFlow
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.types import NoisePath, Prompts


def test_compare_by_hand() -> None:
    result = compare(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 4.0, 2.0]), seed=0)
    assert result["before"] == 1.5
    assert result["after"] == 2.0
    assert result["difference"] == 0.5
    assert result["win_rate"] == (1 + 0.5 + 1 + 0) / 4


def test_the_interval_is_that_of_the_normal_limit() -> None:
    differences = np.random.default_rng(0).normal(0.3, 2.0, 4000)
    low, high = bootstrap(differences, seed=1)
    half = 1.96 * differences.std() / np.sqrt(len(differences))
    assert low == pytest.approx(differences.mean() - half, abs=0.004)
    assert high == pytest.approx(differences.mean() + half, abs=0.004)
    assert bootstrap(np.full(9, 0.25), seed=0) == (0.25, 0.25)


def test_noise_depends_on_the_seed_alone() -> None:
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=2.0)
    policy.adapt(LoRA(rank=2))
    prompts = ["a dog", "a cat", "a cow"]
    together = sample(policy, prompts, steps=2, seed=3, batch_size=3)
    assert torch.allclose(together, sample(policy, prompts, steps=2, seed=3, batch_size=1), atol=1e-5)
    assert not torch.allclose(together, sample(policy, prompts, steps=2, seed=4, batch_size=3), atol=1e-3)
    with policy.reference():
        assert torch.equal(together, sample(policy, prompts, steps=2, seed=3, batch_size=3)), "a new LoRA is the base"


def test_the_draws_of_a_prompt_are_one_difference() -> None:
    """The interval is over prompts: a prompt's scores are averaged over its samples first."""
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=2.0)
    policy.adapt(LoRA(rank=2))
    with torch.no_grad():
        for name, weight in policy.module.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    prompts = ["a dog", "a cat", "a cow"]
    chosen: dict[str, Any] = {"steps": 2, "seed": 3, "batch_size": 4}

    @reward(differentiable=True)
    def light(images: Tensor, prompts: Prompts) -> Tensor:
        return images.mean((1, 2, 3))

    rewards = [CheckedReward(light, "light")]
    found, *first = evaluate(policy, rewards, prompts, draws=2, **chosen)
    after = sample(policy, prompts * 2, **chosen)
    with policy.reference():
        before = sample(policy, prompts * 2, **chosen)
    assert (found["prompts"], found["draws"]) == (3, 2)
    assert all(torch.allclose(shown, media[:3], atol=1e-5) for shown, media in zip(first, (before, after), strict=True))
    means = [media.mean((1, 2, 3)).double().reshape(2, 3).mean(0).numpy() for media in (before, after)]
    by_hand = compare(*means, seed=3)
    for key in ("before", "after", "difference", "interval"):
        assert found["rewards"]["light"][key] == pytest.approx(by_hand[key], abs=1e-7)
    assert not torch.allclose(after[:3], after[3:], atol=1e-3), "each draw has noise of its own"


def moved(path: NoisePath, shift: float) -> Toy:
    """An optimal network for data of deviation 0.5, whose mean has moved by `shift` in both dimensions since the base model."""
    policy = Toy(path, Exact(path, std=0.5))
    with torch.no_grad():
        policy.module.mean += shift  # pyright: ignore[reportOperatorIssue]
    return policy


@pytest.mark.parametrize("path", [diffusion(), diffusion(set_alpha_to_one=True), flow()], ids=["sd", "last step certain", "flow"])
def test_the_kl_of_a_moved_mean(path: NoisePath) -> None:
    """With `var_t = alpha^2 std^2 + sigma^2` a shift d moves `x_0` by `d sigma^2 / var_t` and the noise by `-d alpha sigma / var_t`."""
    d, expected = 0.3, 0.0
    schedule = path.schedule(5)
    for now, then in zip(*(zip(lv.alpha.tolist(), lv.sigma.tolist(), strict=True) for lv in schedule), strict=True):
        (a, s), (a_next, s_next) = now, then
        variance = a**2 * 0.25 + s**2
        if isinstance(path, RectifiedFlow):  # the SDE of Flow-GRPO with a = 1; the step to data is the ODE's
            rate = s / (a if s < 1 else a_next) if s_next > 0 else 0.0
            std, of_noise = math.sqrt(rate * (s - s_next)), s_next - rate * (s - s_next) / (2 * s)
        else:
            std = s_next * math.sqrt(max(0.0, 1 - (a * s_next / (a_next * s)) ** 2))
            of_noise = math.sqrt(max(0.0, s_next**2 - std**2))
        step = a_next * d * s**2 / variance - of_noise * d * a * s / variance
        expected += step**2 / (2 * std**2) if std > 0 else 0.0
    policy, prompts = moved(path, d), ["0", "0.5", "-2"]
    found = kl_to_base(policy, prompts, steps=5, seed=0, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01
    with policy.reference():
        assert kl_to_base(policy, prompts, steps=5, seed=0, batch_size=2) == 0


def test_a_suffix_moves_the_policy_but_not_the_base() -> None:
    """Prompts of the toy are numbers, and a number is the data's mean: the suffix 1 moves the mean 0.1 to 0.11."""
    path = diffusion()
    found = kl_to_base(moved(path, 0.0), ["0.1"], steps=4, seed=0, batch_size=1, suffix="1")
    assert found == pytest.approx(kl_to_base(moved(path, 0.01), ["0.1"], steps=4, seed=0, batch_size=1), rel=1e-6)


def test_distances_by_hand() -> None:
    pictures = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 3.0]]])
    expected = torch.tensor([(5 + 0 + 5) / 3, (0 + 2 + 2) / 3]) / 2**0.5
    assert torch.allclose(pairwise_distance(pictures), expected)
    assert torch.allclose(pairwise_distance(pictures[..., None, None].expand(2, 3, 2, 4, 4)), expected), "the size of a picture is nothing"


def test_the_diversity_of_a_known_sampler() -> None:
    """One DDIM step of the optimal network is affine: two samples lie as far apart as their noise, times its slope."""
    path = diffusion()
    policy, prompts = moved(path, 0.3), ["0", "1"]
    (now, then) = path.schedule(1)
    a, s, a_next, s_next = (float(x) for x in (now.alpha, now.sigma, then.alpha, then.sigma))
    slope = (a_next * a * 0.25 + s_next * s) / (a**2 * 0.25 + s**2)
    noise = policy.prior(policy.encode(Prompts(("0",) * 3 + ("1",) * 3)), Generator().manual_seed(4))
    pairs = [*itertools.combinations(noise[:3], 2), *itertools.combinations(noise[3:], 2)]
    apart = sum(float(((x - y) ** 2).mean().sqrt()) for x, y in pairs) / len(pairs)
    assert diversity(policy, prompts, samples=3, steps=1, seed=4, batch_size=4) == pytest.approx(slope * apart, rel=1e-6)
