"""Flow-GRPO: DDPO's loop on a flow's SDE, worked through by hand; its windows; and a step on real pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from by_hand import gradient, value
from torch import Generator, Tensor
from torch.distributions import Normal
from toy import Network, Toy, a_context, flow, move, nearness

import diffalign
from diffalign import config, registry
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.methods.ddpo import DDPO
from diffalign.models import adapter_of
from diffalign.rounds import Round, sample_round
from diffalign.sampling import noisy
from diffalign.types import Prompts

T = 4
PROMPTS = Prompts(("0", "0.5", "-1"))


def a_toy() -> Toy:
    return move(Toy(flow(shift=3.0), Network()))


def flow_grpo(name: str = "flow-grpo", **fields: Any) -> DDPO:
    _, preset = registry.find("methods", name)
    return DDPO(**{**preset, "inference_steps": T, "batches": 1, "samples": 4, "updates": 1, **fields})


def the_round(policy: Any, method: DDPO, prompts: Prompts = PROMPTS, reward: Any = nearness, **options: Any) -> Round:
    given: dict[str, Any] = {"batches": method.batches, "samples": method.samples, "steps": method.inference_steps, **options}
    context = a_context(prompts)
    return sample_round(policy, reward, prompts, context, kernel=noisy(policy.path, method.eta, method.noise), **given)


@pytest.mark.parametrize(("name", "sigma"), [("flow-grpo", "rising"), ("dance-grpo", "constant")])
def test_the_loss_is_the_papers(name: str, sigma: str):
    """On the first pass: `-A` on each transition with the gradient `-A grad log pi`, and beta times the KL of each step."""
    policy = a_toy()
    method = flow_grpo(name, kl_weight=0.04, fraction=1.0, same_noise=False, window="first", random_steps=None)
    ours = list(method.losses(policy, nearness, PROMPTS, a_context(PROMPTS)))
    taken = the_round(policy, method)
    trajectory, scores = taken.trajectory, taken.scores
    groups = scores.unflatten(0, (4, 3))
    centred = groups - groups.mean(0)
    deviation = scores.std(correction=0) if name == "flow-grpo" else groups.std(0, correction=0)
    advantage = (centred / (deviation + 1e-6)).flatten()
    assert trajectory.actions.tolist() == [True] * (T - 1) + [False]
    terms, kls = list[Tensor](), list[Tensor]()
    for i in range(T - 1):
        t, s = (float(level.sigma[i]) for level in trajectory.schedule)
        x_t, x_s = trajectory.states[i], trajectory.states[i + 1]
        std_t = method.eta * ((t / (1 - (t if t < 1 else s))) ** 0.5 if sigma == "rising" else 1)
        means = list[Tensor]()
        for module in (policy.module, policy.base):
            v = module(x_t, trajectory.schedule.now[i], trajectory.condition.tensors["context"])
            means.append(x_t + (v + std_t**2 / (2 * t) * (x_t + (1 - t) * v)) * (s - t))  # Flow-GRPO, eq. 9
        step = Normal(means[0], std_t * (t - s) ** 0.5)
        log_prob = step.log_prob(x_s).mean(1)
        terms.append(-advantage * (log_prob - log_prob.detach()).exp())
        # of a step in the paper; the preset's is that of the authors' code, without |dt|
        kls.append(((means[0] - means[1].detach()) ** 2).mean(1) / (2 * std_t**2 * (t - s if method.kl_unit == "step" else 1)))
    by_hand = torch.stack(terms).mean() + 0.04 * torch.stack(kls).mean()
    assert value(ours) == pytest.approx(float(by_hand.detach()), rel=1e-9)
    slopes = torch.stack([gradient(loss.value, policy) for loss in ours]).sum(0)
    torch.testing.assert_close(slopes, gradient(by_hand, policy), rtol=1e-7, atol=1e-10)
    assert all(loss.metrics["clip_fraction"] == 0 and loss.metrics["policy_kl"] == 0 for loss in ours), "the ratio is exactly 1"
    assert float(torch.stack(kls).detach().mean()) > 1e-3, "the policy is away from its base"


@pytest.mark.parametrize("make", sorted(tiny.FLOWS))
@pytest.mark.parametrize("name", ["flow-grpo", "dance-grpo"])
def test_the_ratio_of_the_first_pass_is_1_to_the_last_bit_on_a_pipeline(make: str, name: str):
    pipe = tiny.FLOWS[make]()
    policy = adapter_of(make).of(pipe, guidance_scale=3.0, max_sequence_length=8)
    policy.adapt(LoRA(rank=2))
    rng = Generator().manual_seed(7)
    for w in policy.module.parameters():
        if w.requires_grad:
            w.data.add_(0.1 * torch.randn(w.shape, generator=rng))
    prompts = Prompts(("a red fox", "two cats"))

    @diffalign.reward(differentiable=False)
    def brightness(images: Tensor, _: Prompts) -> Tensor:
        return images.mean((1, 2, 3))

    method = flow_grpo(name, samples=2, clip=1e-12)  # a ratio off by 1e-13 is an error
    given = list(method.losses(policy, brightness, prompts, a_context(prompts)))
    assert given
    for loss in given:
        assert float(loss.metrics["policy_kl"]) == 0
        assert loss.value.requires_grad


@pytest.mark.parametrize(
    ("window_range", "begins"),
    [(None, range(4)), ((0, 5), range(4)), ((0, 10), range(8)), ((3, 7), range(3, 6)), ((4, 6), range(4, 5)), ((8, 10), range(8, 9))],
)
def test_a_drawn_window_lies_in_its_range_and_begins_anywhere_in_it(window_range: tuple[int, int] | None, begins: range):
    """By default in the first half; never on the last step of a flow, which is no action, unless it is told to begin just before."""
    method, context = flow_grpo("flow-grpo-fast", inference_steps=10, window_range=window_range), a_context(PROMPTS)
    windows = [method._window(a_toy(), context.rng) for _ in range(200)]
    assert {(w.start, w.stop) for w in windows if isinstance(w, range)} == {(i, i + 2) for i in begins}


@pytest.mark.parametrize("window_range", [(0, 1), (-1, 4), (0, 11), (5, 5), (9, 3)])
def test_a_range_that_holds_no_window_is_an_error(window_range: tuple[int, int]):
    with pytest.raises(
        InputError, match=r"method.window_range is .*: give two steps from 0 to 10, 2 \(method.random_steps\) or more apart"
    ):
        flow_grpo("flow-grpo-fast", inference_steps=10, window_range=window_range)
    with pytest.raises(InputError, match=r"where a drawn window may lie: give method.window drawn"):
        flow_grpo("flow-grpo", window_range=(0, 5))


def test_steps_outside_a_drawn_window_are_not_random():
    method, policy = flow_grpo("flow-grpo-fast", inference_steps=10), a_toy()
    for begin in range(4):
        taken = the_round(policy, method, random_steps=range(begin, begin + 2))
        assert taken.steps.tolist() == [begin, begin + 1]
        still = the_round(policy, method, random_steps=range(begin, begin + 2), samples=2, same_noise=True).trajectory.states
        pair = still.unflatten(1, (2, 3))
        assert torch.equal(pair[: begin + 1, 0], pair[: begin + 1, 1]), "the same until the first random step"
        assert not torch.equal(pair[begin + 1, 0], pair[begin + 1, 1])


def test_samples_of_a_prompt_may_start_from_one_noise():
    policy, method = a_toy(), flow_grpo("dance-grpo")
    for same in (True, False):
        first = the_round(policy, method, same_noise=same).trajectory.states[0].unflatten(0, (4, 3))
        assert all(torch.equal(first[0], other) == same for other in first[1:])
        assert not torch.equal(first[0, 0], first[0, 1]), "each prompt has its own"


def test_a_drawn_window_without_a_length_is_an_error():
    with pytest.raises(InputError, match=r"method.window drawn .* give method.random_steps"):
        DDPO(window="drawn")


def test_the_presets_are_the_public_configurations():
    plans = {name: config.resolve({"method": name, "pipeline": "user/model"}) for name in ("flow-grpo", "flow-grpo-fast", "dance-grpo")}
    methods: dict[str, Any] = {name: plan.method for name, plan in plans.items()}
    grpo, settings = methods["flow-grpo"], plans["flow-grpo"].settings
    assert grpo.batches * settings.batch_size == 48
    assert (grpo.samples, grpo.updates, grpo.inference_steps, settings.sample_steps) == (24, 2, 10, 40)
    assert (grpo.eta, grpo.clip, grpo.kl_weight, grpo.kl_unit, grpo.noise) == (0.7, 1e-4, 0.04, "time", "rising")
    assert grpo.advantage == "group_global"
    assert (settings.learning_rate, settings.guidance_scale, settings.lora.rank, settings.lora.alpha) == (3e-4, 4.5, 32, 64)
    fast = methods["flow-grpo-fast"]
    assert (fast.eta, fast.clip, fast.kl_weight, fast.random_steps, fast.window) == (0.8, 1e-5, 0.0, 2, "drawn")
    dance, settings = methods["dance-grpo"], plans["dance-grpo"].settings
    assert (dance.eta, dance.noise, dance.samples, dance.inference_steps, dance.fraction) == (0.3, "constant", 12, 16, 0.6)
    assert (settings.learning_rate, settings.max_grad_norm, settings.guidance_scale, dance.updates) == (1e-5, 1.0, 3.5, 3)
    assert config.resolve({"method": "flow-grpo", "pipeline": "user/model", "guidance_scale": 1.0}).settings.guidance_scale == 1.0


@pytest.mark.parametrize("make", sorted(tiny.FLOWS))
def test_a_training_by_name_moves_the_lora(make: str, tmp_path: Path):
    pipe = tiny.FLOWS[make]()
    small: dict[str, Any] = {"inference_steps": 3, "batches": 1, "samples": 2, "updates": 1}
    given: dict[str, Any] = {"steps": 1, "batch_size": 2, "eval_size": 2, "sample_steps": 2, "lora": {"rank": 2}, "max_sequence_length": 8}

    def brightness(images: Tensor, prompts: Prompts) -> Tensor:
        return images.mean((1, 2, 3))

    run = diffalign.align(
        pipe, method="flow-grpo", reward=brightness, prompts=["a red fox", "two cats", "a cow"], eval_prompts=["a hen", "a dog"],
        output=tmp_path / "run", height=16, width=16, **small, **given,
    )  # fmt: skip
    assert run.metrics[0]["grad_norm"] > 0
    assert run.metrics[0]["clip_fraction"] == 0
    assert run.evaluation
    again = tiny.FLOWS[make]()
    again.load_lora_weights(run.path / "lora")
    assert any(p.any() for name, p in again.transformer.named_parameters() if "lora_B" in name)
