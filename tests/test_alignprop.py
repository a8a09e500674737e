"""AlignProp: how K is drawn, a gradient that is DRaFT's, and memory that is flat in K."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import tiny
import torch
from by_hand import gradient, value
from test_sampling import Kept
from torch import Generator
from toy import Network, Toy, a_context, diffusion, nearness

from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.methods.alignprop import AlignProp
from diffalign.methods.draft import DRaFT
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.types import Context, Loss, Prompts

T = 6
PROMPTS = Prompts(("0", "0.5", "-1"))


def a_toy() -> Toy:
    return Toy(diffusion(), Network())


def losses(policy: Toy, context: Context | None = None, **fields: Any) -> list[Loss]:
    method = AlignProp(**{"inference_steps": T, **fields})
    return list(method.losses(policy, nearness, PROMPTS, context or a_context(PROMPTS)))


def draws(count: int, **fields: Any) -> list[int]:
    method, rng = AlignProp(**fields), Generator().manual_seed(0)
    return [method._draw(rng) for _ in range(count)]


def chi_square(seen: list[int], expected: dict[int, float]) -> float:
    """Pearson's statistic of draws against the counts that are expected."""
    assert set(seen) <= set(expected)
    return sum((seen.count(k) - n) ** 2 / n for k, n in expected.items())


def test_k_is_uniform_over_all_steps():
    statistic = chi_square(draws(4000, truncation="uniform", inference_steps=10), {k: 400 for k in range(1, 11)})
    assert 1 < statistic < 21.7, "99 % of a chi-square with 9 degrees of freedom is below"


def test_k_is_a_gaussian_around_a_sixth_of_the_steps():
    """T minus a Gaussian around 0.84 T with deviation 0.1 T, rounded, and at least 1: for T = 50, 8 with deviation 5."""

    def below(x: float) -> float:
        return (1 + math.erf((x - 8) / 5 / math.sqrt(2))) / 2

    seen = draws(5000, truncation="gaussian", inference_steps=50)
    assert min(seen) == 1
    assert max(seen) <= 50
    chance = {1: below(1.5), **{k: below(k + 0.5) - below(k - 0.5) for k in range(2, 18)}, 18: 1 - below(17.5)}
    statistic = chi_square([min(k, 18) for k in seen], {k: 5000 * p for k, p in chance.items()})
    assert 2 < statistic < 33.4, "99 % of a chi-square with 17 degrees of freedom is below"


@pytest.mark.parametrize("steps", [1, 2])
def test_k_of_a_short_rollout_is_within_it(steps: int):
    assert set(draws(200, truncation="gaussian", inference_steps=steps)) <= set(range(1, steps + 1))
    assert set(draws(200, truncation="uniform", inference_steps=steps)) == set(range(1, steps + 1))


@pytest.mark.parametrize("truncation", ["uniform", "gaussian", "fixed"])
def test_the_gradient_is_drafts_with_the_same_k(truncation: Literal["uniform", "gaussian", "fixed"]):
    seen = set[int]()
    for seed in range(6):
        policy, rng = a_toy(), Generator().manual_seed(seed)
        method = AlignProp(truncation=truncation, k=2, inference_steps=T)
        k = method._draw(rng)
        (theirs,) = DRaFT(k=k, inference_steps=T).losses(policy, nearness, PROMPTS, Context(rng))
        (ours,) = losses(policy, a_context(PROMPTS, seed), truncation=truncation, k=2)
        assert ours.metrics["k"] == k
        assert ours.update
        assert torch.equal(ours.value, theirs.value)
        assert ours.metrics["reward"] == theirs.metrics["reward"]
        torch.testing.assert_close(gradient(ours.value, policy), gradient(theirs.value, policy), rtol=1e-12, atol=1e-14)
        seen.add(k)
    assert (len(seen) > 1) == (truncation != "fixed")


@pytest.mark.parametrize("k", [1, 3, T])
def test_the_gradient_goes_through_the_last_k_steps(k: int):
    policy = a_toy()
    losses(policy, truncation="fixed", k=k)
    assert policy.graphs == [False] * (T - k) + [True] * k


def test_the_target_loss_by_hand():
    """`0.01 |r - 10|`: below 10 the gradient is -0.01 that of the reward, above it 0.01."""
    for shift, sign in ((0.0, -1), (1e4, 1)):
        high = reward(differentiable=True)(lambda media, prompts, shift=shift: nearness(media, prompts) + shift)
        policy = a_toy()
        (ours,) = AlignProp(truncation="fixed", k=2, inference_steps=T, loss="target").losses(policy, high, PROMPTS, a_context(PROMPTS))
        (plain,) = losses(policy, truncation="fixed", k=2)
        assert value([ours]) == pytest.approx(0.01 * abs(-value([plain]) + shift - 10))
        torch.testing.assert_close(gradient(ours.value, policy), -sign * 0.01 * gradient(plain.value, policy), rtol=1e-9, atol=1e-12)


def test_memory_is_flat_in_k_beyond_the_states():
    """Of a tiny Stable Diffusion: what is alive when the loss is yielded, and at the worst of the backward pass's network calls."""
    prompts = Prompts(("a dog", "two cats"))
    red = reward(differentiable=True)(lambda images, prompts: images[:, 0].mean((1, 2)))
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=1.0)
    policy.adapt(LoRA(rank=2))
    policy.encode(prompts)
    trained = [p for p in policy.module.parameters() if p.requires_grad]

    def alive(k: int) -> tuple[int, int]:
        within = list[int]()
        with Kept() as storages:
            (loss,) = AlignProp(truncation="fixed", k=k, inference_steps=k).losses(policy, red, prompts, a_context(prompts))
            kept = storages.bytes()
            hook = policy.module.register_forward_hook(lambda module, args, output: within.append(storages.bytes()))
            torch.autograd.grad(loss.value, trained)
            hook.remove()
        assert len(within) == k - 1, "the backward pass runs the network of each step but the last once more"
        return kept, max(within)

    (few, few_within), (many, many_within) = alive(3), alive(11)
    latent = 2 * 4 * 8 * 8 * 4
    assert min(few, few_within) > 100 * latent, "the measure sees the activations of a step"
    # of each step its state and a few numbers a row; in the backward pass the gradient of the state besides
    assert many - few <= 8 * (latent + 256)
    assert many_within - few_within <= 8 * (2 * latent + 256)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inference_steps": 0}, "method.inference_steps is 0: give 1 or more"),
        ({"truncation": "fixed", "k": 0}, "method.k is 0: give 1 or more"),
        ({"truncation": "fixed", "k": 9, "inference_steps": 8}, "method.k is 9: give 1 to 8"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        AlignProp(**fields)


def test_it_says_what_it_needs():
    assert AlignProp.needs.differentiable_reward
    assert AlignProp(inference_steps=8).truncation == "uniform", "k may be above the steps where it is not used"
