"""Diffusion-DPO, KTO and MaPO: the formulas on what the network was given, and where they begin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from by_hand import Noised, gradient, record, record_noised, value
from torch import Generator, Tensor
from toy import Network, Toy, a_context, diffusion, flow, in_processes, move

from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.kto import KTO
from diffalign.methods.mapo import MaPO
from diffalign.pipelines.latent import LatentPolicy
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.sampling import denoising_error, paired_errors, without_some_text
from diffalign.types import Context, Examples, Loss, Method, Processes, Prompts

B = 4
PROMPTS = Prompts(("1", "0.5", "-1", "2"))


def a_toy(scale: float = 0.1, **scheduler: Any) -> Toy:
    return move(Toy(diffusion(**scheduler), Network()), scale)


def a_policy_of_pictures(guidance: float = 5.0) -> LatentPolicy:
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=guidance)
    policy.adapt(LoRA(rank=2))
    return policy


def pairs(seed: int = 0) -> Examples:
    won, lost = torch.randn(2, B, 2, generator=Generator().manual_seed(seed), dtype=torch.float64)
    return Examples(PROMPTS, won, lost)


def labels(*desirable: bool, seed: int = 0) -> Examples:
    x = torch.randn(B, 2, generator=Generator().manual_seed(seed), dtype=torch.float64)
    return Examples(PROMPTS, x, desirable=torch.tensor(desirable))


def pictures(desirable: list[bool] | None = None) -> Examples:
    won, lost = torch.randn(2, 2, 4, 8, 8, generator=Generator().manual_seed(0))
    return Examples(Prompts(("a dog", "two cats")), won, lost, None if desirable is None else torch.tensor(desirable))


def only(losses: Iterator[Loss]) -> Loss:
    (loss,) = losses
    assert loss.update
    return loss


def once(method: Method, policy: Any, batch: Examples, context: Context | None = None) -> Loss:
    return only(method.losses(policy, None, batch, context or a_context(batch.prompts)))


@pytest.fixture
def noised(monkeypatch: pytest.MonkeyPatch) -> list[Noised]:
    return record_noised(monkeypatch, "diffalign.sampling", "diffalign.methods.kto")


def errors_by_hand(noised: list[Noised], policy: Toy) -> tuple[list[Tensor], list[Tensor]]:
    """`(e_w, e_l)` of the policy and of the base on what the network was given."""
    assert len({tuple(call.noise.flatten().tolist()) for call in noised}) == 1
    return [*noised[-1].error(policy.module).chunk(2)], [*noised[-1].error(policy.base).detach().chunk(2)]


# --- what pairs are given ---


def test_a_pair_shares_noise_level_and_prompt_in_one_call(noised: list[Noised]):
    policy, batch = a_toy(), pairs()
    calls = record(policy)
    once(DiffusionDPO(drop_text=0.5), policy, batch, a_context(PROMPTS, seed=1))
    assert [len(call.x_t) for call in calls] == [2 * B, 2 * B]
    assert [call.reference for call in calls] == [True, False]
    assert torch.equal(calls[0].x_t, calls[1].x_t)
    assert policy.graphs == [False, True], "the base without a graph"
    given = noised[0]
    assert batch.rejected is not None
    assert torch.equal(given.x_0, torch.cat([batch.x_0, batch.rejected]))
    for shared in (given.noise, given.at.t, given.context):
        assert torch.equal(*shared.chunk(2))
    assert len(given.at.t.unique()) == B, "each pair has a level of its own"
    assert len(given.noise.unique(dim=0)) == B, "and noise"


@pytest.mark.parametrize("method", [DiffusionDPO(drop_text=0.3), KTO(drop_text=0.3), MaPO(drop_text=0.3)], ids=["dpo", "kto", "mapo"])
def test_a_share_is_trained_with_an_empty_prompt(noised: list[Noised], method: Method):
    """In the toy an empty prompt is 0, and none of ours is."""
    batch, context = Examples(PROMPTS, *pairs_of_zeros(), desirable=torch.tensor([True, False] * 2)), a_context(PROMPTS)
    for _ in range(100):
        once(method, a_toy(), batch, context)
    empty = torch.cat([call.context[:B] for call in noised]) == 0
    assert 0.23 < float(empty.double().mean()) < 0.37


def pairs_of_zeros() -> tuple[Tensor, Tensor]:
    return torch.zeros(B, 2, dtype=torch.float64), torch.zeros(B, 2, dtype=torch.float64)


def test_dropped_text_is_the_empty_prompts_and_nothing_is_guided():
    policy, rng = a_policy_of_pictures(), Generator().manual_seed(0)
    texts = Prompts(("a dog", "two cats", "a hen"))
    none, every = (without_some_text(policy, texts, share, rng) for share in (0.0, 1.0))
    assert none.null is None
    assert torch.equal(none.tensors["encoder_hidden_states"], policy.encode(texts).tensors["encoder_hidden_states"])
    assert torch.equal(every.tensors["encoder_hidden_states"], policy.encode(Prompts(("", "", ""))).tensors["encoder_hidden_states"])
    image = torch.rand(3, 3, 2, 2)
    seen = list[Prompts]()
    toy = a_toy()
    inner = toy.encode
    toy.encode = lambda prompts: (seen.append(prompts), inner(prompts))[1]
    without_some_text(toy, Prompts(("1", "2", "3"), image=image), 1.0, rng)
    assert seen[0].text == ("", "", "")
    assert seen[0].image is image, "the picture to edit stays"


@pytest.mark.parametrize("path", [diffusion(), diffusion(prediction_type="v_prediction"), flow()], ids=["epsilon", "v", "flow"])
def test_denoising_errors_are_against_the_paths_own_target(path: Any):
    """Epsilon; `alpha noise - sigma x_0`; `noise - x_0`: a mean over the dimensions, one value a sample."""
    policy, rng = Toy(path, Network()), Generator().manual_seed(0)
    (x_0, noise), at = torch.randn(2, B, 2, generator=rng, dtype=torch.float64), path.draw(B, rng)
    condition = policy.encode(PROMPTS)
    alpha, sigma = at.alpha[:, None], at.sigma[:, None]
    targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x_0, "flow": noise - x_0}
    target = targets[getattr(path, "prediction", "flow")]
    output = policy.module(alpha * x_0 + sigma * noise, at, condition.tensors["context"])
    torch.testing.assert_close(denoising_error(policy, x_0, noise, at, condition), ((output - target) ** 2).mean(1))


def test_each_sample_has_its_own_prompt(noised: list[Noised]):
    for method, batch in (
        (DiffusionDPO(drop_text=0.0), pairs()),
        (MaPO(), pairs()),
        (KTO(drop_text=0.0), labels(True, False, True, False)),
    ):
        once(method, a_toy(), batch)
        assert all(call.context[:, 0].tolist() == [1, 0.5, -1, 2] * (len(call.x_0) // B) for call in noised)


def test_paired_errors_are_in_their_order():
    policy, batch = a_toy(), pairs()
    won, lost, base_won, base_lost = paired_errors(policy, batch, Generator().manual_seed(0), 0.0)
    assert base_won is not None
    assert base_lost is not None
    assert batch.rejected is not None
    assert not base_won.requires_grad
    swapped = paired_errors(policy, Examples(PROMPTS, batch.rejected, batch.x_0), Generator().manual_seed(0), 0.0)
    for ours, theirs in zip((lost, won, base_lost, base_won), swapped, strict=True):
        assert theirs is not None
        torch.testing.assert_close(ours, theirs)
    assert paired_errors(policy, batch, Generator().manual_seed(0), 0.0, reference=False)[2:] == (None, None)


# --- Diffusion-DPO ---


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def f(kind: str, m: float, beta: float, offset: float) -> float:
    match kind:
        case "logistic" | "dpo":
            return -math.log(sigmoid(beta * m - offset))
        case "squared" | "ipo":
            return (m - offset - 1 / (2 * beta)) ** 2
        case "hinge" | "slic":
            return max(0.0, 1 - (beta * m - offset))
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("offset", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["logistic", "squared", "hinge", "dpo", "ipo", "slic"])
def test_diffusion_dpo_by_hand(noised: list[Noised], kind: Any, offset: float, smoothing: float):
    """f of `-[(e_w - e_w_ref) - (e_l - e_l_ref)]` with beta / 2."""
    policy = a_toy()
    loss = once(DiffusionDPO(beta=6.0, loss=kind, offset=offset, label_smoothing=smoothing), policy, pairs())
    (won, lost), (base_won, base_lost) = errors_by_hand(noised, policy)
    margin = (-((won - base_won) - (lost - base_lost))).tolist()
    assert min(margin) < 0 < max(margin)
    want = sum((1 - smoothing) * f(kind, m, 3.0, offset) + smoothing * f(kind, -m, 3.0, offset) for m in margin) / B
    assert value([loss]) == pytest.approx(want, rel=1e-9)
    assert loss.metrics["margin"] == pytest.approx(sum(margin) / B)
    assert loss.metrics["implicit_accuracy"] == sum(m > 0 for m in margin) / B
    assert loss.metrics["denoising_error"] == pytest.approx(float(won.detach().mean()))


def test_diffusion_dpos_gradient_by_hand(noised: list[Noised]):
    """`(beta / 2) sigmoid(-(beta / 2) m) (grad e_w - grad e_l)`, mean over the pairs."""
    policy = a_toy()
    loss = once(DiffusionDPO(beta=6.0), policy, pairs())
    (won, lost), (base_won, base_lost) = errors_by_hand(noised, policy)
    margin = (-((won - base_won) - (lost - base_lost))).tolist()
    weights = torch.tensor([3 * sigmoid(-3 * m) / B for m in margin], dtype=torch.float64)
    torch.testing.assert_close(gradient(loss.value, policy), gradient((weights * (won - lost)).sum(), policy), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_diffusion_dpo_begins_at_ln_2(guidance: float):
    """A new LoRA changes nothing: the errors are the base model's to the last bit, in fp32 and with beta 5000."""
    loss = once(DiffusionDPO(), a_policy_of_pictures(guidance), pictures())
    assert loss.metrics["margin"] == 0
    assert loss.metrics["implicit_accuracy"] == 0.5
    assert value([loss]) == pytest.approx(math.log(2), abs=1e-7)
    assert value([once(DiffusionDPO(), a_toy(0.0), pairs())]) == pytest.approx(math.log(2), abs=1e-12)


def test_diffusion_dpos_first_gradient_leaves_a_new_lora():
    policy = a_policy_of_pictures()
    loss = once(DiffusionDPO(), policy, pictures())
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    assert any(bool(g.any()) for g in torch.autograd.grad(loss.value, trained))


def test_reference_free_dpo_does_not_ask_the_base(noised: list[Noised]):
    policy = a_toy()
    loss = once(DiffusionDPO(beta=6.0, reference_free=True), policy, pairs())
    assert [call.reference for call in noised] == [False]
    won, lost = noised[0].error(policy.module).chunk(2)
    want = sum(-math.log(sigmoid(3 * m)) for m in (lost - won).tolist()) / B
    assert value([loss]) == pytest.approx(want)


# --- KTO ---


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("scale", [0.1, -0.1])
def test_kto_by_hand(noised: list[Noised], scale: float, weights: tuple[float, float]):
    """`w (1 - sigmoid(+-beta (g - z)))`, `g = -(e - e_ref)`, `z = max(mean g, 0)` without a gradient."""
    policy, beta = a_toy(scale), 5.0
    batch = labels(True, False, False, True)
    loss = once(KTO(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1]), policy, batch)
    assert [call.reference for call in noised] == [True, False]
    assert policy.graphs == [False, True]
    assert torch.equal(noised[0].x_0, batch.x_0)
    assert torch.equal(noised[0].noise, noised[1].noise)
    error, base = noised[1].error(policy.module), noised[1].error(policy.base).detach()
    gain = (base - error).tolist()
    z = max(sum(gain) / B, 0.0)
    signs, w = (1, -1, -1, 1), [weights[0], weights[1], weights[1], weights[0]]
    want = sum(w[i] * (1 - sigmoid(signs[i] * beta * (gain[i] - z))) for i in range(B)) / B
    assert value([loss]) == pytest.approx(want, rel=1e-9)
    steep = [sigmoid(signs[i] * beta * (gain[i] - z)) for i in range(B)]
    slopes = torch.tensor([w[i] * signs[i] * beta * steep[i] * (1 - steep[i]) / B for i in range(B)], dtype=torch.float64)
    torch.testing.assert_close(gradient(loss.value, policy), gradient((slopes * error).sum(), policy), rtol=1e-7, atol=1e-9)
    assert loss.metrics["baseline"] == pytest.approx(z)
    assert loss.metrics["gain_liked"] == pytest.approx((gain[0] + gain[3]) / 2)
    assert loss.metrics["gain_disliked"] == pytest.approx((gain[1] + gain[2]) / 2)


def test_ktos_baseline_is_0_where_the_mean_gain_is_less_and_the_gain_elsewhere(noised: list[Noised]):
    """Over some batches both happen, or `test_kto_by_hand` would not have seen the clamp."""
    baselines, policy, context = list[tuple[float, float]](), a_toy(), a_context(PROMPTS)
    for seed in range(12):
        loss = once(KTO(), policy, labels(True, False, True, False, seed=seed), context)
        gain = (noised[-1].error(policy.base) - noised[-1].error(policy.module)).mean()
        baselines.append((float(loss.metrics["baseline"]), float(gain.detach())))
    assert any(mean < 0 for _, mean in baselines)
    assert any(mean > 0 for _, mean in baselines)
    for z, mean in baselines:
        assert z == pytest.approx(max(mean, 0.0))


def test_ktos_baseline_and_gains_are_of_all_processes():
    def a_process(processes: Processes) -> tuple[dict[str, float], dict[str, float], float]:
        policy, batch = a_toy(), labels(True, False, True, False, seed=processes.rank + 2)
        together = once(KTO(beta=5.0), policy, batch, a_context(PROMPTS, seed=processes.rank, processes=processes))
        alone = once(KTO(beta=5.0), policy, batch, a_context(PROMPTS, seed=processes.rank))
        metrics = [{name: float(number) for name, number in loss.metrics.items()} for loss in (together, alone)]
        return metrics[0], metrics[1], abs(value([together]) - value([alone]))

    (first, its_own, differs), (second, the_others, _) = in_processes(a_process)
    for name in ("gain_liked", "gain_disliked"):
        assert its_own[name] != the_others[name]
        assert first[name] == second[name] == pytest.approx((its_own[name] + the_others[name]) / 2)
    assert first["baseline"] == second["baseline"] == pytest.approx(max((first["gain_liked"] + first["gain_disliked"]) / 2, 0))
    assert first["baseline"] > 0
    assert differs > 0


def test_processes_log_the_same_metrics_where_one_has_a_label_alone():
    """The loop averages them over the processes by their names."""

    def a_process(processes: Processes) -> dict[str, float]:
        batch = labels(*([True] * 4 if processes.rank == 0 else [True, True, False, False]), seed=processes.rank)
        loss = once(KTO(), a_toy(), batch, a_context(PROMPTS, seed=processes.rank, processes=processes))
        return {name: float(loss.metrics[name]) for name in ("gain_liked", "gain_disliked", "baseline")}

    first, second = in_processes(a_process)
    assert first == second
    assert first["gain_disliked"] != 0


def test_kto_begins_at_a_half():
    """Gains of 0: `1 - sigmoid(0)`."""
    loss = once(KTO(), a_policy_of_pictures(), pictures([True, False]))
    assert loss.metrics["baseline"] == 0
    assert value([loss]) == 0.5
    assert value([once(KTO(desirable_weight=3.0), a_toy(0.0), labels(True, True, True, False))]) == pytest.approx((9 + 1) / 8)


@pytest.mark.parametrize(("label", "said", "unsaid"), [(True, "gain_liked", "gain_disliked"), (False, "gain_disliked", "gain_liked")])
def test_a_batch_of_one_label_says_nothing_of_the_other(label: bool, said: str, unsaid: str):
    """A 0 would pull the mean over the micro-batches towards it."""
    loss = once(KTO(), a_toy(), labels(*[label] * 4))
    assert unsaid not in loss.metrics
    assert loss.metrics[said] != 0


# --- MaPO ---


def test_mapo_by_hand(noised: list[Noised]):
    """`e_w - beta log sigmoid(1000 (f(e_w) - f(e_l)))`, `f(e) = s e / (exp(s e) - 1)`; the base is not asked."""
    policy = a_toy()
    beta, s = 0.2, 1e-3  # so small that f(e_w) - f(e_l) is about 1e-3, and the sigmoid is not saturated
    loss = once(MaPO(beta=beta, s=s), policy, pairs())
    assert [call.reference for call in noised] == [False]
    won, lost = noised[0].error(policy.module).chunk(2)

    def amplified(e: float) -> float:
        return s * e / math.expm1(s * e)

    ahead = [1000 * (amplified(w) - amplified(e)) for w, e in zip(won.tolist(), lost.tolist(), strict=True)]
    assert max(map(abs, ahead)) < 20
    want = sum(w - beta * math.log(sigmoid(a)) for w, a in zip(won.tolist(), ahead, strict=True)) / B
    assert value([loss]) == pytest.approx(want, rel=1e-6)
    assert loss.metrics["margin"] == pytest.approx(float((lost - won).detach().mean()))
    assert loss.metrics["implicit_accuracy"] == sum(a > 0 for a in ahead) / B


def test_mapos_gradient_is_of_both_errors(noised: list[Noised]):
    policy, s = a_toy(), 1e-3
    loss = once(MaPO(beta=0.2, s=s), policy, pairs())
    won, lost = noised[0].error(policy.module).chunk(2)
    ratio = [s * e / torch.expm1(s * e) for e in (won, lost)]
    want = (won + 0.2 * torch.log1p(torch.exp(-1000 * (ratio[0] - ratio[1])))).mean()
    torch.testing.assert_close(gradient(loss.value, policy), gradient(want, policy), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "fields", "says"),
    [
        (DiffusionDPO, {"beta": 0.0}, "method.beta is 0.0: give a number above 0"),
        (DiffusionDPO, {"label_smoothing": 0.6}, "method.label_smoothing is 0.6: give a share from 0 to 0.5"),
        (DiffusionDPO, {"drop_text": 1.1}, "method.drop_text is 1.1: give a share from 0 to 1"),
        (KTO, {"beta": 0.0}, "method.beta is 0.0: give a number above 0"),
        (KTO, {"desirable_weight": -1.0}, "method.desirable_weight is -1.0: give 0 or more"),
        (KTO, {"undesirable_weight": -1.0}, "method.undesirable_weight is -1.0: give 0 or more"),
        (KTO, {"drop_text": -0.1}, "method.drop_text is -0.1: give a share from 0 to 1"),
        (MaPO, {"beta": 0.0}, "method.beta is 0.0"),
        (MaPO, {"s": 0.0}, "method.s is 0.0: give a number above 0"),
        (MaPO, {"drop_text": 2.0}, "method.drop_text is 2.0"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(method: Any, fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        method(**fields)


def test_they_say_what_they_need_and_the_papers_defaults():
    assert (DiffusionDPO.needs.data, KTO.needs.data, MaPO.needs.data) == ("pairs", "labels", "pairs")
    assert not any(method.needs.reward for method in (DiffusionDPO, KTO, MaPO))
    assert (DiffusionDPO().beta, DiffusionDPO().drop_text, KTO().beta, MaPO().beta, MaPO().s) == (5000.0, 0.2, 1000.0, 0.1, 0.5)
    settings = DiffusionDPO.defaults
    assert settings["batch_size"] * settings["accumulate"] == 2048
    assert settings["learning_rate"] == pytest.approx(1e-8 * 2048)
    assert (settings["warmup_steps"], settings["steps"], settings["lr_schedule"]) == (500, 2000, "constant_with_warmup")
