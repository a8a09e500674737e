"""DPOK: both presets by hand, the value network's round trips, and the distribution where it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from by_hand import denoising_step, descend, follow, gradient, log_probs_by_hand, tilted_mean, total
from torch import Generator, Tensor
from toy import Exact, Network, Toy, a_context, diffusion, in_processes, move, nearness

from diffalign import checkpoint
from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.methods.dpok import DPOK
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.rounds import Round, sample_round
from diffalign.sampling import ddim
from diffalign.shards import Shared
from diffalign.types import Context, Loss, Processes, Prompts
from diffalign.value import Critic, Value, pooled

T = 4
PROMPTS = Prompts(("0", "0.5", "-1"))
ALL = {"batches": 2, "forwards": 2 * T, "policy_steps": 1}  # each update is on all transitions of a round: 2T forwards of 3


def a_toy(**scheduler: Any) -> Toy:
    return move(Toy(diffusion(**scheduler), Network()))


def dpok(**fields: Any) -> DPOK:
    return DPOK(**{"inference_steps": T, "value_batch": 32, **ALL, **fields})


def losses(policy: Toy, context: Context | None = None, **fields: Any) -> list[Loss]:
    return list(dpok(**fields).losses(policy, nearness, PROMPTS, context or a_context(PROMPTS)))


def its_round(policy: Toy, context: Context | None = None) -> Round:
    context = context or a_context(PROMPTS)
    return sample_round(policy, nearness, PROMPTS, context, batches=2, samples=1, steps=T, kernel=ddim(1.0))


def gaussian_kl(policy: Toy, round_: Round) -> Tensor:
    steps = [[denoising_step(m, round_.trajectory, i) for m in (policy.module, policy.base)] for i in range(T)]
    return torch.stack([((ours.mean - base.mean) ** 2 / (2 * ours.variance)).mean(1) for ours, base in steps])


def distance(policy: Toy, round_: Round) -> Tensor:
    """`mean (eps - eps_ref)^2` at each state, (T, N)."""
    states, now, context = round_.trajectory.states, round_.trajectory.schedule.now, round_.trajectory.condition.tensors["context"]
    outputs = [[module(states[i], now[i], context) for module in (policy.module, policy.base)] for i in range(T)]
    return torch.stack([((ours - base) ** 2).mean(1) for ours, base in outputs])


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_the_presets_by_hand(preset: Literal["paper", "reference"]):
    """Two updates on a stored round: `-w r rho`, rho cut by PPO's max or by a plain clamp, and the preset's KL."""
    clip, w, beta, rate, policy = 0.02, 10.0, 0.7, 1e-5, a_toy()
    stored, by_hand = its_round(policy), list[tuple[Tensor, float]]()
    r, outside = stored.scores, list[float]()
    for _ in range(2):
        rho = (log_probs_by_hand(policy.module, stored.trajectory) - stored.trajectory.log_probs).exp()
        cut = rho.clamp(1 - clip, 1 + clip)
        if preset == "paper":
            loss = (w * torch.maximum(-r * rho, -r * cut) + beta * gaussian_kl(policy, stored)).mean()
        else:
            loss = (-w * r * cut + beta * distance(policy, stored)).mean()
        outside.append(float((cut != rho).double().mean()))
        by_hand.append((gradient(loss, policy), float(loss.detach())))
        descend(policy, by_hand[-1][0], rate)
    assert outside[0] == 0
    assert 0.1 < outside[1] < 0.9

    policy = a_toy()
    method = dpok(preset=preset, clip=clip, reward_weight=w, kl_weight=beta, baseline="none", policy_steps=2)
    updates = follow(method.losses(policy, nearness, PROMPTS, a_context(PROMPTS)), policy, rate)
    for ours, (slope, value), share in zip(updates, by_hand, outside, strict=True):
        torch.testing.assert_close(ours.slope, slope, rtol=1e-9, atol=1e-8)
        assert ours.value == pytest.approx(value)
        assert ours.metrics["clip_fraction"] == pytest.approx(share, abs=1e-6)


def test_the_clamps_gradient_dies_outside_the_band():
    """PPO's does not where a bad sample has become likelier: with no KL, the first update is the same and the second is not."""

    def updates(preset: str) -> list[Tensor]:
        policy = a_toy()
        method = dpok(preset=preset, clip=0.005, kl_weight=0.0, baseline="none", policy_steps=2)
        slopes = follow(method.losses(policy, nearness, PROMPTS, a_context(PROMPTS)), policy, rate=1e-7)
        return [update.slope for update in slopes]

    (first, second), (same, other) = updates("reference"), updates("paper")
    assert torch.equal(first, same)
    assert (second - other).norm() > 0.01 * other.norm()


@pytest.mark.parametrize("forwards", [1, 3])
def test_an_update_is_on_transitions_drawn_from_the_rounds(forwards: int):
    ours = losses(a_toy(), baseline="none", kl_weight=0.0, forwards=forwards, policy_steps=4)
    assert [loss.update for loss in ours] == ([False] * (forwards - 1) + [True]) * 4
    scores = its_round(a_toy()).scores
    means = [-sum(float(loss.value.detach()) for loss in ours[i : i + forwards]) / 1000 for i in range(0, len(ours), forwards)]
    assert len(set(means)) == 4, "each its own"
    assert all(float(scores.min()) < mean < float(scores.max()) for mean in means), "a mean over the transitions drawn"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_references_kl_is_between_epsilons(prediction: str):
    """For a v-prediction, epsilon is `alpha v + sigma x_t`: the distance is alpha^2 times that of the outputs."""
    policy = a_toy(prediction_type=prediction)
    stored = its_round(policy)
    weight = stored.trajectory.schedule.now.alpha[:, None] ** 2 if prediction == "v_prediction" else 1
    want = (distance(policy, stored) * weight).mean()
    assert want > 1e-4
    with_kl, without = losses(policy, baseline="none", kl_weight=2.0), losses(policy, baseline="none", kl_weight=0.0)
    assert sum(float(loss.metrics["kl"]) for loss in with_kl) / len(with_kl) == pytest.approx(float(want.detach()))
    slope = total(with_kl, policy) - total(without, policy)
    torch.testing.assert_close(slope, 2 * gradient(want, policy), rtol=1e-6, atol=1e-8)


def test_the_references_kl_is_between_guided_epsilons():
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=5.0)
    policy.adapt(LoRA(rank=2))
    prompts, rng = Prompts(("a dog", "two cats")), Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.module.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=rng))
    red = reward(differentiable=False)(lambda images, prompts: images[:, 0].mean((1, 2)))
    method = DPOK(inference_steps=2, batches=1, policy_steps=1, forwards=2, baseline="none")
    ours = list(method.losses(policy, red, prompts, a_context(prompts)))

    round_ = sample_round(policy, red, prompts, a_context(prompts), batches=1, samples=1, steps=2, kernel=ddim(1.0))
    text = round_.trajectory.condition.tensors["encoder_hidden_states"]
    empty = policy.encode(Prompts(("", ""))).tensors["encoder_hidden_states"]

    @torch.no_grad()
    def guided(i: int) -> Tensor:
        x, t = round_.trajectory.states[i], round_.trajectory.schedule.now.t[i].float()
        conditional, unconditional = (policy.pipe.unet(x, t, encoder_hidden_states=h).sample for h in (text, empty))
        return unconditional + 5 * (conditional - unconditional)

    trained = [guided(i) for i in range(2)]
    with policy.reference():
        base = [guided(i) for i in range(2)]
    want = float(torch.stack([((a - b) ** 2).mean() for a, b in zip(trained, base, strict=True)]).mean())
    assert want > 1e-4
    assert sum(float(loss.metrics["kl"]) for loss in ours) / 2 == pytest.approx(want, rel=1e-4)


def test_the_kl_can_be_taken_off_the_reward():
    """`r - (beta / w) sum_t log(pi / pi_ref)`, of the densities: D = 2 times the mean over the latent dimensions, which is logged."""
    policy, w, beta = a_toy(), 10.0, 4.0
    stored = its_round(policy)
    log_prob = log_probs_by_hand(policy.module, stored.trajectory)
    with torch.no_grad():
        ratio = log_prob - log_probs_by_hand(policy.base, stored.trajectory)
    returns = stored.scores - beta / w * 2 * ratio.sum(0)
    assert (returns - stored.scores).abs().max() > 0.01
    want = -w * (returns * log_prob).mean()
    ours = losses(policy, kl_mode="reward", reward_weight=w, kl_weight=beta, baseline="none")
    torch.testing.assert_close(total(ours, policy), gradient(want, policy), rtol=1e-9, atol=1e-8)
    assert ours[0].metrics["kl"] == pytest.approx(float(ratio.mean()))
    assert ours[0].metrics["reward"] == pytest.approx(float(stored.scores.mean())), "what is shown is the reward itself"


def test_near_the_base_both_modes_have_the_same_expected_gradient():
    """A step's `E[log(pi / pi_ref) grad log pi] = grad KL`. The loss has 1 / D of both terms, by its means over the D dimensions.

    What the reward's mode has besides, that a step leads later ones to where their KL is high, is of second order in the policy's distance
    from the base. Of 2,048 samples the two agree within a few percent, and were a factor of D = 2 apart if the ratio were a mean.
    """
    prompts = Prompts(("0",) * 2048)
    nothing = reward(differentiable=False)(lambda media, prompts: torch.zeros(len(media), dtype=torch.float64))

    def slope(mode: Literal["loss", "reward"]) -> Tensor:
        policy = move(Toy(diffusion(), Exact(diffusion())), 0.03)
        method = dpok(preset="paper", batches=1, forwards=T, baseline="none", reward_weight=10.0, kl_weight=2.0, kl_mode=mode)
        return total(list(method.losses(policy, nothing, prompts, a_context(prompts))), policy)

    in_loss, in_reward = slope("loss"), slope("reward")
    assert (in_loss.abs() > 0.1).all(), "each weight is pulled back"
    assert (in_reward - in_loss).norm() < 0.15 * in_loss.norm()


# --- the value network ---


def the_value(saved: dict[str, Any], round_: Round) -> Tensor:
    """V (T, N) of the round's states, by the network in the memory."""
    states, words = round_.trajectory.states, pooled(round_.trajectory.condition)
    network = Value(2, 1)
    network.load_state_dict(saved["network"])
    with torch.no_grad():
        t = (round_.trajectory.schedule.now.t / 1000).float()
        return torch.stack([network(states[i], t[i].expand(len(words)), words) for i in range(T)]) * saved["std"] + saved["mean"]


def test_the_advantage_is_the_reward_above_the_value():
    policy, context = a_toy(), a_context(PROMPTS)
    stored = its_round(policy)
    ours = losses(policy, context, reward_weight=10.0, kl_weight=0.0, value_steps=20, value_learning_rate=1e-3)
    baseline = the_value(context.memory["value"], stored)
    assert baseline.std() > 1e-3
    assert (baseline - baseline[:1]).abs().max() > 1e-3, "it depends on the step"
    want = -10 * ((stored.scores - baseline) * log_probs_by_hand(policy.module, stored.trajectory)).mean()
    torch.testing.assert_close(total(ours, policy), gradient(want, policy), rtol=1e-6, atol=1e-6)


def test_a_new_value_network_says_the_mean_of_the_returns():
    policy, context = a_toy(), a_context(PROMPTS)
    scores = its_round(policy).scores
    losses(policy, context, value_learning_rate=1e-30, value_steps=1)
    saved = context.memory["value"]
    assert (saved["mean"], saved["std"]) == pytest.approx((float(scores.mean()), float(scores.std(correction=0))))
    torch.testing.assert_close(the_value(saved, its_round(policy)).double(), scores.mean().expand(T, 6))


def test_the_value_network_learns_over_the_rounds():
    """Its error is in units of the returns' variance: 1 is what a constant gets."""
    policy, context = Toy(diffusion(), Exact(diffusion())), a_context(PROMPTS)
    fields = {"batches": 16, "value_steps": 10, "value_batch": 256, "value_learning_rate": 1e-2}
    errors = [float(losses(policy, context, **fields)[0].metrics["value_loss"]) for _ in range(15)]
    assert errors[0] > 0.7
    assert sum(errors[-5:]) / 5 < 0.35


def test_the_value_network_survives_a_checkpoint(tmp_path: Path):
    policy, context = a_toy(), a_context(PROMPTS)
    losses(policy, context)
    saved = checkpoint.read(checkpoint.write(tmp_path, 1, context.memory, keep=1))
    resumed = a_context(PROMPTS, memory=saved)
    resumed.rng.set_state(context.rng.get_state())
    for _ in range(2):
        ours, theirs = losses(policy, context), losses(policy, resumed)
        assert [loss.metrics["value_loss"] for loss in ours] == [loss.metrics["value_loss"] for loss in theirs]
        assert torch.equal(total(ours, policy), total(theirs, policy))
    for name, weight in context.memory["value"]["network"].items():
        assert torch.equal(weight, resumed.memory["value"]["network"][name])
    assert context.memory["value"]["optimizer"]["state"][0]["step"] == 3 * 5, "one optimiser over the rounds"


def test_two_processes_have_one_value_network():
    def rounds(processes: Processes) -> dict[str, Any]:
        policy = a_toy()
        context = replace(a_context(PROMPTS, processes=processes), rng=Shared(processes).manual_seed(0))
        for _ in range(3):
            losses(policy, context)
        return context.memory["value"]

    first, second = in_processes(rounds)
    alone = a_context(PROMPTS)
    losses(a_toy(), alone)
    assert (first["mean"], first["std"]) == (second["mean"], second["std"])
    for name, weight in first["network"].items():
        assert torch.equal(weight, second["network"][name])
        assert not torch.equal(weight, alone.memory["value"]["network"][name])


def test_a_value_step_in_two_processes_is_one_on_both_batches():
    rng = Generator().manual_seed(0)
    x, t, words, target = (torch.randn(8, *shape, generator=rng) for shape in ((2,), (), (1,), ()))

    def slopes(processes: Processes, rows: slice) -> list[Tensor]:
        critic = Critic(x, words, 1e-2, None)
        torch.nn.init.constant_(critic.network.layers[-1].get_parameter("weight"), 0.1)  # new, it is 0, and stops the gradient
        critic.rescale(target)
        critic.fit(x[rows], t[rows], words[rows], target[rows], 8 / processes.count, processes)
        return [p.grad for p in critic.network.parameters() if p.grad is not None]

    halves = in_processes(lambda p: slopes(p, slice(4 * p.rank, 4 * p.rank + 4)))
    for first, second, whole in zip(*halves, slopes(Context(rng).processes, slice(0, 8)), strict=True):
        assert torch.equal(first, second)
        assert whole.any()
        torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-6)


# --- where it ends ---


@pytest.mark.parametrize("mode", ["loss", "reward"])
def test_it_lands_at_the_tilted_distribution(mode: Literal["loss", "reward"]):
    """With a linear reward `gain . x_0` the optimum of `w E[r] - beta KL` is the base times `exp(w r / beta)`; see `tilted_mean`."""
    path, gain, prompts = diffusion(), torch.tensor([1.0, -1.0], dtype=torch.float64), Prompts(("0",) * 256)
    policy = Toy(path, Exact(path, mean=(1.0, 1.0), std=0.05))
    mean, along = policy.module.get_parameter("mean"), reward(differentiable=False)(lambda media, prompts: media @ gain)
    method = DPOK(
        preset="paper", inference_steps=T, batches=1, policy_steps=1, forwards=T, baseline="none", clip=0.1,
        reward_weight=1.0, kl_weight=0.01, kl_mode=mode,
    )  # fmt: skip
    want, context, passed = tilted_mean(policy, T, 100 * gain), a_context(prompts), list[Tensor]()
    assert (want - mean).abs().min() > 0.1
    optimiser = torch.optim.Adam([mean], lr=0.02)
    for _ in range(90):
        for loss in method.losses(policy, along, prompts, context):
            loss.value.backward()
        optimiser.step()
        optimiser.zero_grad()
        passed.append(mean.detach().clone())
    assert (torch.stack(passed[30:]).mean(0) - want).abs().max() < 0.03


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inference_steps": 0}, "method.inference_steps is 0: give 1 or more"),
        ({"batches": 0}, "method.batches is 0"),
        ({"policy_steps": 0}, "method.policy_steps is 0"),
        ({"forwards": 0}, "method.forwards is 0"),
        ({"value_steps": 0}, "method.value_steps is 0"),
        ({"value_batch": 0}, "method.value_batch is 0"),
        ({"eta": 0.0}, "method.eta is 0.0"),
        ({"eta": float("inf")}, "method.eta is inf"),
        ({"random_steps": 0}, "method.random_steps is 0: give 1 to 4"),
        ({"random_steps": T + 1}, "method.random_steps is 5"),
        ({"clip": 0.0}, "method.clip is 0.0: give a number above 0"),
        ({"reward_weight": 0.0}, "method.reward_weight is 0.0"),
        ({"value_learning_rate": -1e-4}, "method.value_learning_rate is -0.0001"),
        ({"kl_weight": -1.0}, "method.kl_weight is -1.0: give 0 or more"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        dpok(**fields)


def test_the_defaults_are_the_authors():
    method, settings = DPOK(), DPOK.defaults
    assert (method.preset, method.kl_mode, method.baseline) == ("reference", "loss", "value")
    assert (method.reward_weight, method.kl_weight, method.clip, method.inference_steps) == (1000.0, 0.1, 1e-4, 50)
    assert (method.policy_steps, method.value_steps, method.value_batch, method.value_learning_rate) == (5, 5, 256, 1e-4)
    assert (settings["learning_rate"], settings["max_grad_norm"], settings["guidance_scale"]) == (1e-5, 0.1, 7.5)
    assert settings["lora"] == {"rank": 4}


def test_a_constant_reward_ends_in_an_error_and_rounds_of_one_sample_are_compared_with_one_another():
    constant, context = reward(differentiable=False)(lambda media, prompts: torch.ones(len(media))), a_context(PROMPTS)
    for _ in range(9):
        assert list(dpok().losses(a_toy(), constant, PROMPTS, context)), "the KL has a gradient of its own"
    with pytest.raises(InputError, match=r"In 10 rounds on end no two samples .* Is it constant"):
        list(dpok().losses(a_toy(), constant, PROMPTS, context))
    one, context = dpok(batches=1, baseline="none"), a_context(PROMPTS[:1])
    for _ in range(12):
        assert list(one.losses(a_toy(), nearness, PROMPTS[:1], context))
