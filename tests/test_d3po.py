"""D3PO: the loss and its gradient on single transitions by hand, and prompts that say nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from by_hand import follow, gradient, log_probs_by_hand, record, total, value
from torch import Tensor
from toy import GOAL, Exact, Network, Toy, a_context, diffusion, in_processes, move, nearness

from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.methods.d3po import D3PO
from diffalign.rounds import Round, sample_round
from diffalign.sampling import ddim
from diffalign.shards import Shared
from diffalign.types import Loss, Processes, Prompts

ONE = Prompts(("0.5",))
FOUR = Prompts(("0", "0.5", "-1", "2"))


def a_toy(**scheduler: Any) -> Toy:
    return Toy(diffusion(**scheduler), Network())


def d3po(**fields: Any) -> D3PO:
    return D3PO(**{"inference_steps": 2, "batches": 1, "updates": 1, **fields})


def losses(policy: Toy, prompts: Prompts = ONE, **fields: Any) -> list[Loss]:
    return list(d3po(**fields).losses(policy, nearness, prompts, a_context(prompts)))


def its_round(policy: Toy, prompts: Prompts = ONE, steps: int = 2) -> Round:
    return sample_round(policy, nearness, prompts, a_context(prompts), batches=1, samples=2, steps=steps, kernel=ddim(1.0))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("seed", "bound"), [(3, 0.9), (2, 1.1)])
def test_the_loss_on_two_transitions_by_hand(seed: int, bound: float):
    """`-log sigmoid(beta (log rho_w - log rho_l))`, rho cut to [0.9, 1.1]: in the second step one is cut, and has no gradient."""
    beta, policy = 3.0, move(a_toy(), 0.05, seed)
    stored = its_round(policy)
    win, lose = (0, 1) if stored.scores[0] > stored.scores[1] else (1, 0)
    base = log_probs_by_hand(policy.base, stored.trajectory).detach()
    log_ratio = log_probs_by_hand(policy.module, stored.trajectory) - base
    rho = log_ratio.detach().exp()
    outside = (rho < 0.9) | (rho > 1.1)
    assert outside[1].sum() == 1
    assert (rho[1].clamp(0.9, 1.1) == bound).any()

    want, slope = 0.0, torch.zeros_like(gradient(log_ratio[0, 0], policy))
    log_ratio = log_probs_by_hand(policy.module, stored.trajectory) - base
    for t in range(2):
        margin = math.log(min(max(float(rho[t, win]), 0.9), 1.1)) - math.log(min(max(float(rho[t, lose]), 0.9), 1.1))
        want += -math.log(sigmoid(beta * margin)) / 2
        for row, sign in ((win, 1), (lose, -1)):
            if not outside[t, row]:
                to_row = torch.autograd.grad(log_ratio[t, row], policy.weights, retain_graph=True)
                slope -= sign * beta * sigmoid(-beta * margin) / 2 * torch.cat([g.flatten() for g in to_row])
    ours = losses(policy, beta=beta)
    assert len(ours) == 2
    assert value(ours) == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(total(ours, policy), slope, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["logistic", "squared", "hinge"])
def test_where_it_starts_the_margin_is_0(kind: Any):
    beta = 0.1
    ours = losses(a_toy(), FOUR, beta=beta, loss=kind)
    assert value(ours) == pytest.approx({"logistic": math.log(2), "squared": 1 / (2 * beta) ** 2, "hinge": 1.0}[kind])
    assert [loss.metrics["margin"] for loss in ours] == [0.0] * len(ours)
    assert [loss.metrics["implicit_accuracy"] for loss in ours] == [0.5] * len(ours), "a tie counts half"


def test_a_pair_is_the_best_and_the_worst_at_the_same_step():
    policy, steps = a_toy(), 3
    stored = its_round(policy, FOUR, steps)
    calls = record(policy)
    losses(policy, FOUR, inference_steps=steps)
    forwards = [call for call in calls if not call.reference][2 * steps :]
    assert len(forwards) == 4 * steps / 2, "of two pairs each"
    seen = set[tuple[float, int]]()
    for call in forwards:
        won, lost = call.x_t.chunk(2)
        assert torch.equal(*call.t.chunk(2))
        for t, better, worse in zip(call.t, won, lost, strict=False):
            step = stored.trajectory.schedule.now.t.tolist().index(float(t))
            rows = [int((stored.trajectory.states[step] == x).all(1).nonzero()) for x in (better, worse)]
            assert rows[0] % 4 == rows[1] % 4, "of one prompt"
            assert stored.scores[rows[0]] > stored.scores[rows[1]]
            seen.add((float(t), rows[0] % 4))
    assert len(seen) == 4 * steps, "every step of every pair"


def test_prompts_whose_samples_are_worth_the_same_are_left_out():
    @reward(differentiable=False)
    def only_of_two(media: Tensor, prompts: Prompts) -> Tensor:
        return torch.tensor([float(x) if text in ("0", "2") else 7.0 for x, text in zip(media[:, 0], prompts.text, strict=True)])

    policy = a_toy()
    ours = list(d3po().losses(policy, only_of_two, FOUR, a_context(FOUR)))
    assert ours[0].metrics["ties"] == 0.5
    assert len(ours) == 2 * 2 / 2, "two pairs at two steps, in forwards of two pairs"
    assert value(ours) == pytest.approx(math.log(2)), "a mean over the pairs there are"


def test_rounds_without_any_pair_take_no_step_and_end_in_an_error():
    constant, context = reward(differentiable=False)(lambda media, prompts: torch.ones(len(media))), a_context(FOUR)
    for _ in range(9):
        assert list(d3po().losses(a_toy(), constant, FOUR, context)) == []
    with pytest.raises(InputError, match="no two samples of a prompt differed in reward"):
        list(d3po().losses(a_toy(), constant, FOUR, context))


def test_more_updates_than_a_round_can_have_transitions_is_an_error_before_anything_is_sampled():
    """4 prompts, so 4 pairs at most, of 2 steps each; of 1 where one alone is random."""
    for random_steps, most in ((None, 8), (1, 4)):
        policy = a_toy()
        assert sum(loss.update for loss in losses(policy, FOUR, updates=most, random_steps=random_steps)) == most
        policy.graphs.clear()
        with pytest.raises(InputError, match=rf"{most + 1} optimiser steps cannot share the {most} transitions .* lower method.updates"):
            losses(policy, FOUR, updates=most + 1, random_steps=random_steps)
        assert policy.graphs == []


def test_rounds_with_fewer_transitions_than_updates_are_passed_over_and_at_last_refused():
    """Two of the four prompts have a pair: 4 transitions for 5 updates."""

    @reward(differentiable=False)
    def only_of_two(media: Tensor, prompts: Prompts) -> Tensor:
        return torch.tensor([float(x) if text in ("0", "2") else 7.0 for x, text in zip(media[:, 0], prompts.text, strict=True)])

    context = a_context(FOUR)
    for _ in range(9):
        assert list(d3po(updates=5).losses(a_toy(), only_of_two, FOUR, context)) == []
    with pytest.raises(InputError, match=r"too few samples .* 4 transitions, for 5 optimiser steps. Lower method.updates"):
        list(d3po(updates=5).losses(a_toy(), only_of_two, FOUR, context))
    assert len(list(d3po(updates=4).losses(a_toy(), only_of_two, FOUR, context))) == 4


def test_where_one_process_has_no_pair_it_takes_the_steps_all_the_same():
    """The others would wait for its gradient for ever."""
    constant = reward(differentiable=False)(lambda media, prompts: torch.ones(len(media)))

    def a_process(processes: Processes) -> tuple[list[float], int, list[Any]]:
        context = replace(a_context(FOUR, processes=processes), rng=Shared(processes).manual_seed(0))
        ours = list(d3po(updates=2).losses(a_toy(), [nearness, constant][processes.rank], FOUR, context))
        return [float(loss.value.detach()) for loss in ours], sum(loss.update for loss in ours), [loss.metrics.get("ties") for loss in ours]

    (first, updates, ties), (second, its_updates, others) = in_processes(a_process)
    assert updates == its_updates == 2
    # each of the 8 transitions counts log 2, over the 4 that a process has on average
    assert (sum(first), second) == (pytest.approx(2 * 2 * math.log(2)), [0.0, 0.0])
    assert (ties, others) == ([0.5] * len(first), [None, None])


@pytest.mark.parametrize(("to_one", "updates"), [(True, 2), (False, 3)])
def test_each_update_is_on_its_own_share_of_the_transitions(to_one: bool, updates: int):
    """A step of std 0 is no transition."""
    ours = losses(a_toy(set_alpha_to_one=to_one), FOUR, inference_steps=4, updates=updates)
    transitions, marks = 4 * (3 if to_one else 4), [i + 1 for i, loss in enumerate(ours) if loss.update]
    shares = [len(share) for share in torch.arange(transitions).tensor_split(updates)]
    assert marks == [sum(math.ceil(n / 2) for n in shares[: i + 1]) for i in range(updates)]
    assert len(ours) == marks[-1]


def test_the_preferred_samples_become_likelier():
    """The implicit accuracy starts at a half, all margins being 0. It counts single steps, of which most say little of the reward."""
    policy = Toy(diffusion(), Exact(diffusion()))
    context, seen = a_context(FOUR), list[dict[str, float]]()
    for _ in range(15):
        method = d3po(batches=8, inference_steps=4, beta=1.0)
        seen += [update.metrics for update in follow(method.losses(policy, nearness, FOUR, context), policy, rate=0.05)]
    assert seen[0]["implicit_accuracy"] == 0.5
    assert seen[0]["margin"] == 0
    assert sum(m["implicit_accuracy"] for m in seen[5:]) / 10 > 0.52
    assert sum(m["margin"] for m in seen[5:]) / 10 > 0.003
    assert (policy.module.get_parameter("mean") - GOAL).norm() < (policy.base.get_parameter("mean") - GOAL).norm() - 0.05


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inference_steps": 0}, "method.inference_steps is 0: give 1 or more"),
        ({"random_steps": 4}, "method.random_steps is 4: give 1 to"),
        ({"batches": 0}, "method.batches is 0"),
        ({"samples": 1}, "method.samples is 1: give 2 or more"),
        ({"updates": 0}, "method.updates is 0"),
        ({"eta": 0.0}, "method.eta is 0.0"),
        ({"beta": 0.0}, "method.beta is 0.0"),
        ({"ratio_clip": 0.0}, "method.ratio_clip is 0.0: give a number between 0 and 1"),
        ({"ratio_clip": 1.0}, "method.ratio_clip is 1.0"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        d3po(**fields)


def test_the_defaults_are_the_authors():
    method, settings = D3PO(), D3PO.defaults
    assert (method.beta, method.ratio_clip, method.inference_steps, method.eta, method.samples) == (0.1, 0.1, 20, 1.0, 2)
    assert (settings["learning_rate"], settings["guidance_scale"]) == (3e-5, 5.0)
