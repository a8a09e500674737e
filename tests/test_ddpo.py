"""DDPO: its gradients against transitions worked through by hand, and a first pass whose ratio is 1 to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from by_hand import denoising_step, descend, follow, gradient, log_probs_by_hand, record, total, value
from torch import Generator, Tensor
from toy import GOAL, Network, Toy, a_context, diffusion, move, nearness

from diffalign import checkpoint
from diffalign.advantages import Kind
from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.methods.ddpo import DDPO
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.rounds import Round, sample_round
from diffalign.sampling import ddim, rollout
from diffalign.types import Context, Loss, Prompts

T = 4
PROMPTS = Prompts(("0", "0.5", "-1"))
SHAPE: dict[str, Any] = {"batches": 1, "samples": 4}


def a_toy(**scheduler: Any) -> Toy:
    return move(Toy(diffusion(**scheduler), Network()))


def ddpo(**fields: Any) -> DDPO:
    return DDPO(**{"inference_steps": T, "updates": 1, **SHAPE, **fields})


def losses(policy: Toy, context: Context | None = None, **fields: Any) -> list[Loss]:
    return list(ddpo(**fields).losses(policy, nearness, PROMPTS, context or a_context(PROMPTS)))


def its_round(policy: Toy) -> Round:
    """The round that `losses` trains on: the same draws."""
    return sample_round(policy, nearness, PROMPTS, a_context(PROMPTS), steps=T, kernel=ddim(1.0), **SHAPE)


def groups(scores: Tensor) -> Tensor:
    """(4, 3): samples of each prompt."""
    return scores.unflatten(0, (4, 3))


def advantages_by_hand(kind: Kind, round_: Round) -> Tensor:
    r = round_.scores
    match kind:
        case "global" | "per_prompt":  # no prompt has 16 scores yet: the round's statistics
            return (r - r.mean()) / (r.std(correction=0) + 1e-6)
        case "group":
            return ((groups(r) - groups(r).mean(0)) / (groups(r).std(0, correction=0) + 1e-6)).flatten()
        case "group_global":
            return ((groups(r) - groups(r).mean(0)) / (r.std(correction=0) + 1e-6)).flatten()
        case "loo":
            return (groups(r) - (groups(r).sum(0) - groups(r)) / 3).flatten()
        case "greedy":
            start, condition = round_.trajectory.states[0], round_.trajectory.condition
            still = rollout(a_toy(), condition, steps=T, kernel=ddim(0.0), start=start).final
            return r + ((still - GOAL) ** 2).sum(1)
        case "none":
            return r


@pytest.mark.parametrize("estimator", ["is", "sf"])
@pytest.mark.parametrize("kind", ["global", "per_prompt", "group", "group_global", "loo", "greedy", "none"])
def test_the_first_gradient_is_reinforces(kind: Kind, estimator: str):
    """`-mean A grad log pi` over all transitions of the round."""
    policy = a_toy()
    round_ = its_round(policy)
    gains = advantages_by_hand(kind, round_)
    gains = gains if kind == "none" else gains.clamp(-5, 5)
    assert gains.std() > 0.1
    want = -(gains * log_probs_by_hand(policy.module, round_.trajectory)).mean()
    ours = losses(policy, advantage=kind, estimator=estimator)
    assert value(ours) == pytest.approx(float((want if estimator == "sf" else -gains.mean()).detach()), abs=1e-9)
    torch.testing.assert_close(total(ours, policy), gradient(want, policy), rtol=1e-9, atol=1e-10)


def test_advantages_are_cut():
    policy = a_toy()
    round_ = its_round(policy)
    gains = advantages_by_hand("global", round_)
    assert (gains.abs() > 0.7).any()
    want = -(gains.clamp(-0.7, 0.7) * log_probs_by_hand(policy.module, round_.trajectory)).mean()
    ours = total(losses(policy, advantage="global", advantage_clip=0.7), policy)
    torch.testing.assert_close(ours, gradient(want, policy), rtol=1e-9, atol=1e-10)


def test_a_step_without_noise_has_no_gradient():
    policy = a_toy(set_alpha_to_one=True)
    round_ = its_round(policy)
    steps = [denoising_step(policy.module, round_.trajectory, i).log_prob(round_.trajectory.states[i + 1]).mean(1) for i in range(T - 1)]
    want = -(advantages_by_hand("global", round_) * torch.stack(steps)).mean()
    ours = total(losses(policy, advantage="global"), policy)
    torch.testing.assert_close(ours, gradient(want, policy), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("random_steps", [1, 3])
def test_only_the_random_steps_are_trained_on(random_steps: int):
    policy = a_toy()
    context = a_context(PROMPTS)
    round_ = sample_round(policy, nearness, PROMPTS, context, steps=T, kernel=ddim(1.0), random_steps=random_steps, **SHAPE)
    taken = log_probs_by_hand(policy.module, round_.trajectory)[:random_steps]
    want = -(advantages_by_hand("global", round_) * taken).mean()
    ours = losses(policy, advantage="global", random_steps=random_steps)
    assert len(ours) == 4 * random_steps
    assert all(loss.metrics["policy_kl"] == 0 for loss in ours)
    torch.testing.assert_close(total(ours, policy), gradient(want, policy), rtol=1e-9, atol=1e-10)


def test_the_next_epochs_are_importance_sampled_and_clipped():
    """Three epochs of gradient descent on stored transitions, written out: `mean max(-A rho, -A clip(rho))`."""
    clip, rate, policy = 0.02, 0.02, a_toy()
    stored = its_round(policy)
    gains = advantages_by_hand("global", stored)
    slopes, values, shares = list[Tensor](), list[float](), list[float]()
    for _ in range(3):
        now = log_probs_by_hand(policy.module, stored.trajectory)
        rho = (now - stored.trajectory.log_probs).exp()
        loss = torch.maximum(-gains * rho, -gains * rho.clamp(1 - clip, 1 + clip)).mean()
        shares.append(float(((rho - 1).abs() > clip).double().mean()))
        values.append(float(loss.detach()))
        slopes.append(gradient(loss, policy))
        descend(policy, slopes[-1], rate)
    assert all(0.1 < share < 0.9 for share in shares[1:]), "some ratios are cut, and some are not"

    policy = a_toy()
    method = ddpo(inner_epochs=3, clip=clip, advantage="global")
    updates = follow(method.losses(policy, nearness, PROMPTS, a_context(PROMPTS)), policy, rate)
    for ours, slope, by_hand, share in zip(updates, slopes, values, shares, strict=True):
        torch.testing.assert_close(ours.slope, slope, rtol=1e-9, atol=1e-9)
        assert ours.value == pytest.approx(by_hand, abs=1e-9)
        assert ours.metrics["clip_fraction"] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("scheduler", [{}, {"set_alpha_to_one": True}, {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize(("updates", "fraction"), [(1, 1.0), (5, 1.0), (2, 0.6)])
def test_the_first_ratio_is_1_to_the_last_bit(scheduler: dict[str, Any], updates: int, fraction: float):
    policy = a_toy(**scheduler)
    calls = record(policy)
    ours = losses(policy, updates=updates, fraction=fraction, advantage="global")
    assert all(loss.metrics["policy_kl"] == 0 for loss in ours)
    assert all(loss.metrics["clip_fraction"] == 0 for loss in ours)
    updates_calls = [call for call in calls if len(call.t.unique()) > 1]
    assert updates_calls, "a forward mixes timesteps"
    assert all(len(call.x_t) == 3 for call in calls), "each forward is of the batch size, the last one filled up"


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_first_ratio_of_stable_diffusion_is_1_to_the_last_bit(guidance: float):
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=guidance)
    policy.adapt(LoRA(rank=2))
    rng, prompts = Generator().manual_seed(0), Prompts(("a dog", "two cats", "a hen"))
    with torch.no_grad():
        for p in policy.module.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=rng))

    @reward(differentiable=False)
    def red(images: Tensor, prompts: Prompts) -> Tensor:
        return images[:, 0].mean((1, 2))

    method = DDPO(inference_steps=4, batches=1, samples=3, updates=2, fraction=0.8)
    timesteps = list[Tensor]()
    policy.module.register_forward_pre_hook(lambda module, args: timesteps.append(args[1]))
    ours = list(method.losses(policy, red, prompts, a_context(prompts)))  # 5 and 4 samples of 3 steps: the last part is filled up
    assert len(ours) == 5 + 4
    assert {len(t) for t in timesteps} == {3 if guidance == 1 else 6}
    assert all(len(t.unique()) > 1 for t in timesteps[-9:]), "forwards of several timesteps"
    assert [float(loss.metrics["policy_kl"]) for loss in ours] == [0.0] * 9
    assert value(ours[:1]) != 0
    slopes = torch.autograd.grad(ours[0].value, [p for p in policy.module.parameters() if p.requires_grad])
    assert any(bool(slope.any()) for slope in slopes)


def test_old_log_probabilities_come_from_sampling():
    """A policy that is not the one that sampled is found out, not taken for it."""
    policy = a_toy()

    @reward(differentiable=False)
    def meddler(media: Tensor, prompts: Prompts) -> Tensor:
        move(policy, 1e-3)
        return nearness(media, prompts)

    with pytest.raises(InputError, match="ratio of the first pass"):
        next(ddpo().losses(policy, meddler, PROMPTS, a_context(PROMPTS)))


def test_the_kl_term_by_hand():
    """`mean (mu - mu_ref)^2 / (2 std^2)` over all transitions, with the states as they are."""
    policy = a_toy()
    round_ = its_round(policy)
    kl = list[Tensor]()
    for i in range(T):
        ours, base = (denoising_step(module, round_.trajectory, i) for module in (policy.module, policy.base))
        kl.append(((ours.mean - base.mean) ** 2 / (2 * ours.variance)).mean())
    want = torch.stack(kl).mean()
    assert want > 1e-3
    with_kl, without = losses(policy, kl_weight=0.3), losses(policy)
    assert sum(float(loss.metrics["kl"]) for loss in with_kl) / len(with_kl) == pytest.approx(float(want.detach()))
    assert value(with_kl) - value(without) == pytest.approx(0.3 * float(want.detach()))
    torch.testing.assert_close(total(with_kl, policy) - total(without, policy), 0.3 * gradient(want, policy), rtol=1e-8, atol=1e-10)
    assert "kl" not in without[0].metrics


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (2, 1), (3, 2), (5, 1)])
def test_it_takes_as_many_optimiser_steps_as_it_says(updates: int, epochs: int):
    ours = losses(a_toy(), updates=updates, inner_epochs=epochs)
    assert sum(loss.update for loss in ours) == updates * epochs
    assert ours[-1].update


def test_a_fraction_of_the_steps_is_trained_on():
    calls = record(policy := a_toy())
    losses(policy, fraction=0.5)
    assert len(calls) == 4 * T + 4 * T // 2, "four rollouts, and half as many transitions"
    assert sorted(call.t.unique().numel() for call in calls[: 4 * T]) == [1] * 4 * T


def test_the_metrics_are_the_rounds():
    policy = a_toy()
    scores = its_round(policy).scores
    for loss in losses(policy):
        assert loss.metrics["reward"] == pytest.approx(float(scores.mean()))
        assert loss.metrics["reward_std"] == pytest.approx(float(scores.std(correction=0)))


def test_the_statistics_of_prompts_live_in_the_memory(tmp_path: Path):
    policy, context = a_toy(), a_context(PROMPTS)
    for rounds in range(1, 5):
        losses(policy, context)
        assert [len(kept) for kept in context.memory["prompt_scores"].values()] == [4 * rounds] * 3
    context.memory = checkpoint.read(checkpoint.write(tmp_path, 1, context.memory, keep=1))
    ours = losses(policy, context, advantage_clip=100.0)
    # each prompt has 16 scores of its own by now, and this round's 4: its own mean and deviation
    kept = torch.tensor([*context.memory["prompt_scores"].values()], dtype=torch.float64)
    assert kept.shape == (3, 20)
    gains = (kept[:, -4:] - kept.mean(1, keepdim=True)) / (kept.std(1, correction=0, keepdim=True) + 1e-6)
    assert float(kept[:, -4:].mean()) == pytest.approx(ours[0].metrics["reward"])
    assert value(ours) == pytest.approx(-float(gains.mean()), abs=1e-9)
    assert abs(value(ours)) > 1e-3


def test_how_many_scores_of_a_prompt_are_kept_and_needed():
    """4 of each a round. After two rounds, the last 6 of a prompt's 8; with `least` 7 they never suffice."""
    policy, context = a_toy(), a_context(PROMPTS)
    rounds = [losses(policy, context, buffer=6, least=6, advantage_clip=100.0) for _ in range(2)]
    kept = torch.tensor([*context.memory["prompt_scores"].values()], dtype=torch.float64)
    assert kept.shape == (3, 6)
    own = (kept[:, -4:] - kept.mean(1, keepdim=True)) / (kept.std(1, correction=0, keepdim=True) + 1e-6)
    assert value(rounds[1]) == pytest.approx(-float(own.mean()), abs=1e-9)
    assert abs(value(rounds[1])) > 1e-3
    assert value(rounds[0]) == pytest.approx(0, abs=1e-9), "the round's own statistics"
    assert value(losses(policy, context, buffer=7, least=7, advantage_clip=100.0)) != pytest.approx(0, abs=1e-3)
    context = a_context(PROMPTS)
    for _ in range(3):
        assert value(losses(policy, context, buffer=32, least=13)) == pytest.approx(0, abs=1e-9)


def test_one_instruction_for_two_pictures_is_two_prompts():
    """The picture is worth a hundred, the sample next to nothing: within a picture's group that says nothing."""
    policy, pictures = a_toy(), torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 2, 2)
    edits = Prompts(("0.5", "0.5"), image=pictures)

    @reward(differentiable=False)
    def mostly_of_the_source(media: Tensor, prompts: Prompts) -> Tensor:
        assert prompts.image is not None
        return 100 * prompts.image[:, 0, 0, 0] + nearness(media, prompts)

    def slope(score: Any, prompts: Prompts) -> Tensor:
        return total(list(ddpo(advantage="loo", advantage_clip=1e9).losses(policy, score, prompts, a_context(prompts))), policy)

    apart = slope(mostly_of_the_source, edits)
    torch.testing.assert_close(apart, slope(nearness, edits), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(apart, slope(nearness, Prompts(edits.text)), rtol=1e-3), "the baseline is the picture's own"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inference_steps": 0}, "method.inference_steps is 0: give 1 or more"),
        ({"batches": 0}, "method.batches is 0"),
        ({"samples": -1}, "method.samples is -1"),
        ({"updates": 0}, "method.updates is 0"),
        ({"inner_epochs": 0}, "method.inner_epochs is 0"),
        ({"eta": 0.0}, "method.eta is 0.0: .* Without noise there are no actions"),
        ({"eta": float("nan")}, "method.eta is nan"),
        ({"random_steps": 0}, "method.random_steps is 0: give 1 to 4"),
        ({"random_steps": T + 1}, "method.random_steps is 5: give 1 to 4"),
        ({"clip": 0.0}, "method.clip is 0.0: give a number above 0"),
        ({"advantage_clip": 0.0}, "method.advantage_clip is 0.0: give a number above 0"),
        ({"kl_weight": -0.1}, "method.kl_weight is -0.1: give 0 or more"),
        ({"buffer": 0}, "method.buffer is 0: give 1 or more"),
        ({"buffer": 8}, r"method.least is 16: give 1 to 8 \(method.buffer\)"),
        ({"least": 0}, "method.least is 0: give 1 to 32"),
        ({"fraction": 0.0}, "method.fraction is 0.0: give a share above 0, up to 1"),
        ({"fraction": 1.5}, "method.fraction is 1.5"),
        ({"advantage": "group", "samples": 1}, "method.advantage group compares samples of one prompt: give method.samples 2"),
        ({"advantage": "group_global", "samples": 1}, "method.advantage group_global"),
        ({"advantage": "loo", "samples": 1}, "method.advantage loo"),
        ({"estimator": "sf", "updates": 2}, "method.estimator sf takes one optimiser step a round"),
        ({"estimator": "sf", "inner_epochs": 2}, "method.estimator sf"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        ddpo(**fields)


def test_the_defaults_are_the_papers():
    assert DDPO() == DDPO(
        estimator="is", inference_steps=50, eta=1.0, updates=2, inner_epochs=1, clip=1e-4, advantage="per_prompt", advantage_clip=5.0,
        buffer=32, least=16,
    )  # fmt: skip
    settings = DDPO.defaults
    assert (settings["learning_rate"], settings["weight_decay"], settings["max_grad_norm"]) == (3e-4, 1e-4, 1.0)
    assert (settings["guidance_scale"], settings["lora"]) == (5.0, {"rank": 4})
    assert DDPO().batches * DDPO().samples * settings["batch_size"] == 256, "samples of a round"


def test_a_constant_reward_takes_no_step_and_ends_in_an_error():
    constant, context = reward(differentiable=False)(lambda media, prompts: torch.ones(len(media))), a_context(PROMPTS)
    for _ in range(9):
        assert list(ddpo().losses(a_toy(), constant, PROMPTS, context)) == []
    with pytest.raises(InputError, match="In 10 rounds on end no two samples"):
        list(ddpo().losses(a_toy(), constant, PROMPTS, context))
    held, context = ddpo(kl_weight=0.1), a_context(PROMPTS)
    for _ in range(9):
        assert list(held.losses(a_toy(), constant, PROMPTS, context)), "the KL has a gradient of its own"
    with pytest.raises(InputError, match="In 10 rounds on end no two samples"):
        list(held.losses(a_toy(), constant, PROMPTS, context))
