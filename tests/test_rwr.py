"""RWR and RAFT: weights and losses by hand, and who is trained on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from by_hand import gradient, record_noised, total, value
from torch import Tensor
from toy import Network, Toy, a_context, diffusion, in_processes, move, nearness

from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.methods.rwr import RWR
from diffalign.rounds import Round, sample_round
from diffalign.sampling import ddim
from diffalign.types import Context, Loss, Processes, Prompts

PROMPTS = Prompts(("1", "0.5", "-1"))


def a_toy() -> Toy:
    return move(Toy(diffusion(), Network()))


def rwr(**fields: Any) -> RWR:
    return RWR(**{"inference_steps": 3, "batches": 2, "updates": 2, **fields})


def losses(policy: Toy, context: Context | None = None, **fields: Any) -> list[Loss]:
    return list(rwr(**fields).losses(policy, nearness, PROMPTS, context or a_context(PROMPTS)))


def its_round(policy: Toy, context: Context | None = None, eta: float = 1.0) -> Round:
    context = context or a_context(PROMPTS)
    return sample_round(policy, nearness, PROMPTS, context, batches=2, samples=4, steps=3, kernel=ddim(eta), keep="final")


def rows_of(x_0: Tensor, round_: Round) -> list[int]:
    return [int((round_.trajectory.final == x).all(1).nonzero()) for x in x_0]


def weights_by_hand(scores: list[float], beta: float, cap: float) -> list[float]:
    """Of 24 samples: 2 batches of the same 3 prompts, so 8 samples of a prompt."""
    gains = [0.0] * 24
    for prompt in range(3):
        rows = range(prompt, 24, 3)
        mean = sum(scores[i] for i in rows) / 8
        std = math.sqrt(sum((scores[i] - mean) ** 2 for i in rows) / 8)
        for i in rows:
            gains[i] = (scores[i] - mean) / (std + 1e-6)
    raw = [math.exp(gain / beta) for gain in gains]
    return [min(w / (sum(raw) / 24), cap) for w in raw]


@pytest.mark.parametrize(("beta", "cap"), [(1.0, 20.0), (0.5, 2.0)])
def test_the_weighted_loss_by_hand(monkeypatch: pytest.MonkeyPatch, beta: float, cap: float):
    policy, calls = a_toy(), record_noised(monkeypatch, "diffalign.methods.rwr")
    stored = its_round(policy)
    weights = weights_by_hand(stored.scores.tolist(), beta, cap)
    assert (max(weights) == cap) == (cap == 2.0)
    ours = losses(policy, beta=beta, cap=cap, forwards=2, updates=3)
    assert [loss.update for loss in ours] == [False, True] * 3
    assert len(calls) == 6
    for loss, call in zip(ours, calls, strict=True):
        rows = rows_of(call.x_0, stored)
        assert len(rows) == 3
        weight = torch.tensor([weights[row] for row in rows], dtype=torch.float64)
        want = (weight * call.error(policy.module)).mean() / 2
        assert value([loss]) == pytest.approx(float(want.detach()))
        torch.testing.assert_close(gradient(loss.value, policy), gradient(want, policy), rtol=1e-7, atol=1e-9)
        assert loss.metrics["denoising_error"] == pytest.approx(float(call.error(policy.module).detach().mean()))
    size = sum(weights) ** 2 / sum(w**2 for w in weights) / 24
    assert ours[0].metrics["effective_sample_size"] == pytest.approx(size)
    assert size < 0.9
    assert len({tuple(call.x_0.flatten().tolist()) for call in calls}) == 6, "each forward draws its own samples"
    assert len({float(t) for call in calls for t in call.at.t}) > 9, "and levels"


def test_the_weights_of_a_picture_are_among_its_own_samples(monkeypatch: pytest.MonkeyPatch):
    """One instruction for three pictures, whose level is most of the reward: the weights are those without it."""
    pictures = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None].expand(3, 3, 2, 2)
    edits = Prompts(("1", "1", "1"), image=pictures)

    @reward(differentiable=False)
    def mostly_of_the_source(media: Tensor, prompts: Prompts) -> Tensor:
        assert prompts.image is not None
        return 64 * prompts.image[:, 0, 0, 0] + nearness(media, prompts)

    def size(score: Any, prompts: Prompts) -> float:
        (loss,) = rwr(updates=1).losses(a_toy(), score, prompts, a_context(prompts))
        return float(loss.metrics["effective_sample_size"])

    assert size(mostly_of_the_source, edits) == pytest.approx(size(nearness, edits), rel=1e-4)
    assert size(mostly_of_the_source, edits) != pytest.approx(size(nearness, Prompts(edits.text)), rel=1e-2)


def test_raft_trains_on_the_best_alone(monkeypatch: pytest.MonkeyPatch):
    policy, calls = a_toy(), record_noised(monkeypatch, "diffalign.methods.rwr")
    stored = its_round(policy)
    best = {max(range(first, first + 12, 3), key=lambda row: float(stored.scores[row])) for first in (0, 1, 2, 12, 13, 14)}
    assert len(best) == 6
    ours = losses(policy, weighting="best", updates=12)
    used = [row for call in calls for row in rows_of(call.x_0, stored)]
    assert set(used) == best
    for loss, call in zip(ours, calls, strict=True):
        assert value([loss]) == pytest.approx(float(call.error(policy.module).detach().mean()))
        assert "effective_sample_size" not in loss.metrics


def test_a_sample_is_trained_with_its_own_prompt(monkeypatch: pytest.MonkeyPatch):
    policy, calls = a_toy(), record_noised(monkeypatch, "diffalign.methods.rwr")
    stored = its_round(policy)
    losses(policy, drop_text=0.0, updates=8)
    for call in calls:
        assert call.context[:, 0].tolist() == [float(stored.prompts.text[row]) for row in rows_of(call.x_0, stored)]


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.25, 0.15, 0.35), (1.0, 1, 1)])
def test_a_share_is_trained_with_an_empty_prompt(monkeypatch: pytest.MonkeyPatch, share: float, least: float, most: float):
    """In the toy an empty prompt is 0, and none of ours is."""
    calls = record_noised(monkeypatch, "diffalign.methods.rwr")
    losses(a_toy(), drop_text=share, updates=60)
    empty = torch.cat([call.context for call in calls]) == 0
    assert least <= float(empty.double().mean()) <= most


@pytest.mark.parametrize("weighting", ["exponential", "best"])
def test_rounds_of_equal_rewards_are_passed_over_and_at_last_refused(weighting: Any):
    constant = reward(differentiable=False)(lambda media, prompts: torch.ones(len(media)))
    method, context = rwr(weighting=weighting), a_context(PROMPTS)
    for _ in range(9):
        assert list(method.losses(a_toy(), constant, PROMPTS, context)) == []
    with pytest.raises(InputError, match="no two samples of a prompt differed in reward"):
        next(method.losses(a_toy(), constant, PROMPTS, context))


def test_the_weights_of_two_processes_have_mean_1_together(monkeypatch: pytest.MonkeyPatch):
    def a_process(processes: Processes) -> tuple[list[float], float, Tensor]:
        policy = a_toy()
        context = a_context(PROMPTS, seed=processes.rank, processes=processes)
        scores = its_round(policy, a_context(PROMPTS, seed=processes.rank)).scores
        ours = losses(policy, context, drop_text=0.0)
        return [float(ours[0].metrics["effective_sample_size"])], value(ours), scores

    (first, _, scores), (second, _, others) = in_processes(a_process)
    together = torch.cat([scores, others]).unflatten(0, (16, 3))
    gains = (together - together.mean(0)) / (together.std(0, correction=0) + 1e-6)
    weights = 48 * torch.softmax(gains.flatten(), 0)
    assert first == second == pytest.approx([float(weights.sum() ** 2 / (weights**2).sum() / 48)])


def test_samples_can_be_drawn_without_noise(monkeypatch: pytest.MonkeyPatch):
    policy, calls = a_toy(), record_noised(monkeypatch, "diffalign.methods.rwr")
    losses(policy, eta=0.0)
    stored = its_round(policy, eta=0.0)
    assert all(len(rows_of(call.x_0, stored)) == 3 for call in calls)


def test_the_round_is_not_differentiated():
    policy = a_toy()
    ours = losses(policy)
    assert policy.graphs == [False] * 24 + [True] * 2
    assert total(ours, policy).any()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inference_steps": 0}, "method.inference_steps is 0: give 1 or more"),
        ({"batches": 0}, "method.batches is 0"),
        ({"samples": 1}, "method.samples is 1: give 2 or more"),
        ({"updates": 0}, "method.updates is 0"),
        ({"forwards": 0}, "method.forwards is 0"),
        ({"eta": -0.1}, "method.eta is -0.1"),
        ({"drop_text": 1.1}, "method.drop_text is 1.1: give a share from 0 to 1"),
        ({"beta": 0.0}, "method.beta is 0.0"),
        ({"cap": 0.5}, "method.cap is 0.5: give 1 or more"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        rwr(**fields)
