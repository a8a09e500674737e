"""Paired comparison: numbers worked out by hand, and the same noise for both models."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from diffalign.evaluate import bootstrap, compare, sample
from diffalign.lora import LoRA
from diffalign.pipelines.stable_diffusion import StableDiffusion


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
