"""Rounds: who stands in which row, which transitions count, and log-probabilities by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from by_hand import log_probs_by_hand
from torch import Generator, Tensor
from toy import GOAL, Network, Toy, a_context, diffusion, move, nearness

from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.rounds import (
    Round,
    best_and_worst,
    check_first_pass,
    greedy_scores,
    log_probs,
    nothing_differs,
    parts,
    reference_log_probs,
    sample_round,
    shares,
)
from diffalign.sampling import Kernel, ddim, rollout
from diffalign.types import Context, Prompts

T = 4
FIRST, SECOND = Prompts(("0", "0.5", "-1")), Prompts(("2", "1", "-2"))


def a_toy(**scheduler: Any) -> Toy:
    return Toy(diffusion(**scheduler), Network())


def a_round(policy: Toy, seed: int = 0, kernel: Kernel | None = None, **fields: Any) -> Round:
    fields = {"batches": 2, "samples": 2, "steps": T, **fields}
    context = Context(Generator().manual_seed(seed), more=lambda: SECOND)
    return sample_round(policy, nearness, FIRST, context, kernel=kernel or ddim(1.0), **fields)


def scored(*scores: float, prompts: int = 3) -> Round:
    """Two samples of each prompt, with these scores."""
    texts = Prompts(("0",) * prompts)
    context = a_context(texts)
    round_ = sample_round(a_toy(), nearness, texts, context, batches=1, samples=len(scores) // prompts, steps=1, kernel=ddim(1.0))
    return replace(round_, scores=torch.tensor(scores))


def in_turn(policy: Toy, seed: int = 0) -> list[Any]:
    """The four rollouts of `a_round`, one after another from the same generator."""
    rng = Generator().manual_seed(seed)
    order = (FIRST, FIRST, SECOND, SECOND)
    return [rollout(policy, policy.encode(p), steps=T, kernel=ddim(1.0), rng=rng) for p in order]


def test_rows_are_ordered_by_batch_then_sample_then_prompt():
    round_, one_by_one = a_round(a_toy()), in_turn(a_toy())
    assert len(round_) == 12
    assert round_.size == 3
    assert round_.prompts.text == (*FIRST.text, *FIRST.text, *SECOND.text, *SECOND.text)
    assert round_.trajectory.condition.tensors["context"][:, 0].tolist() == [float(text) for text in round_.prompts.text]
    assert round_.trajectory.states.shape == (T + 1, 12, 2)
    assert torch.equal(round_.trajectory.states, torch.cat([t.states for t in one_by_one], 1))
    assert torch.equal(round_.trajectory.log_probs, torch.cat([t.log_probs for t in one_by_one], 1))
    assert torch.equal(round_.scores, -((round_.trajectory.final - GOAL) ** 2).sum(1))
    assert not round_.trajectory.states.requires_grad


def test_a_rounds_metrics_are_of_its_scores():
    assert scored(1.0, 2, 4, 1, 0, 4).metrics() == pytest.approx({"reward": 2.0, "reward_std": math.sqrt((1 + 0 + 4 + 1 + 4 + 4) / 6)})


def test_each_row_is_scored_with_its_own_prompt():
    @reward(differentiable=False)
    def shift(media: Tensor, prompts: Prompts) -> Tensor:
        return torch.tensor([float(text) for text in prompts.text])

    context = Context(Generator(), more=lambda: SECOND)
    round_ = sample_round(a_toy(), shift, FIRST, context, batches=2, samples=2, steps=1, kernel=ddim(1.0))
    assert round_.scores.tolist() == [0, 0.5, -1, 0, 0.5, -1, 2, 1, -2, 2, 1, -2]


def test_what_prompts_bring_along_stays_with_them():
    def prompts(first: int) -> Prompts:
        of_one_colour = torch.arange(first, first + 2.0)[:, None, None, None].expand(2, 3, 2, 2)
        return Prompts(("0", "1"), image=of_one_colour, mask=of_one_colour[:, :1], metadata=({"n": first}, {"n": first + 1}))

    context = Context(Generator(), more=lambda: prompts(2))
    round_ = sample_round(a_toy(), nearness, prompts(0), context, batches=2, samples=2, steps=1, kernel=ddim(1.0))
    want, image, mask = [0, 1, 0, 1, 2, 3, 2, 3], round_.prompts.image, round_.prompts.mask
    assert [m["n"] for m in round_.prompts.metadata or ()] == want
    assert image is not None
    assert image[:, 0, 0, 0].tolist() == want
    assert mask is not None
    assert mask[:, 0, 0, 0].tolist() == want


def test_a_round_can_keep_x_0_alone():
    whole, final = a_round(a_toy()), a_round(a_toy(), keep="final")
    assert final.trajectory.states.shape == (1, 12, 2)
    assert torch.equal(final.trajectory.final, whole.trajectory.final)
    assert torch.equal(final.scores, whole.scores)
    assert final.trajectory.states.untyped_storage().nbytes() == final.trajectory.states.nbytes, "the other states are not held"


def test_parts_are_of_one_size_and_filled_with_their_own_transitions():
    steps, rows = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([10, 20, 30, 40, 50])
    ours = [(p.steps.tolist(), p.rows.tolist(), p.count, p.last) for p in parts(steps, rows, 2)]
    assert ours == [([1, 2], [10, 20], 2, False), ([3, 4], [30, 40], 2, False), ([5, 5], [50, 50], 1, True)]
    (few,) = parts(steps[:3], rows[:3], 8)
    assert few.steps.tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    assert few.rows.tolist() == [10, 20, 30, 10, 20, 30, 10, 20]
    assert (few.count, few.last) == (3, True)
    assert [(p.count, p.last) for p in parts(steps[:4], rows[:4], 2)] == [(2, False), (2, True)]


def test_old_log_probabilities_are_of_the_transitions_that_count():
    round_ = a_round(a_toy())
    *_, last = parts(torch.tensor([0, 3, 2, 1]), torch.tensor([11, 0, 5, 5]), 3)
    assert round_.old_log_probs(last).tolist() == [float(round_.trajectory.log_probs[1, 5])]


@pytest.mark.parametrize(("updates", "fraction", "kept"), [(1, 1.0, 4), (2, 1.0, 4), (5, 0.5, 2), (3, 0.7, 3), (2, 0.01, 1)])
def test_shares_are_samples_of_their_own_with_random_steps(updates: int, fraction: float, kept: int):
    round_ = a_round(a_toy())
    ours = shares(round_, updates, fraction, Generator().manual_seed(0))
    assert len(ours) == updates
    samples = [sorted(set(rows.tolist())) for _, rows, _ in ours]
    assert sorted(row for share in samples for row in share) == list(range(12)), "each sample in one share"
    assert max(map(len, samples)) - min(map(len, samples)) <= 1
    chosen = {row: steps[rows == row].tolist() for steps, rows, _ in ours for row in rows.tolist()}
    assert all(len(steps) == len(set(steps)) == kept for steps in chosen.values())
    assert len({tuple(steps) for steps in chosen.values()}) > 1, "each has its own order of steps"
    assert {s for steps in chosen.values() for s in steps} == set(range(T))

    again, other = (shares(round_, updates, fraction, Generator().manual_seed(seed)) for seed in (0, 1))
    assert all(torch.equal(a, b) for mine, yours in zip(ours, again, strict=True) for a, b in zip(mine[:2], yours[:2], strict=True))
    assert [share.total for share in ours] == [len(share.rows) for share in ours]
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(ours, other, strict=True))


def test_more_updates_than_samples_is_an_error_with_its_mend():
    assert len(shares(a_round(a_toy()), 12, 1.0, Generator())) == 12
    with pytest.raises(InputError, match=r"13 optimiser steps .* 12 samples .* method.updates"):
        shares(a_round(a_toy()), 13, 1.0, Generator())


def test_a_step_without_noise_is_left_out_everywhere():
    policy = move(a_toy(set_alpha_to_one=True))
    round_ = a_round(policy)
    assert round_.trajectory.actions.tolist() == [True] * (T - 1) + [False]
    assert round_.steps.tolist() == [0, 1, 2]
    ((steps, rows, _),) = shares(round_, 1, 1.0, Generator())
    assert sorted(steps.tolist()) == [0] * 12 + [1] * 12 + [2] * 12
    assert len(rows) == 36
    for ours in (log_probs(policy, round_, ddim(1.0)), reference_log_probs(policy, round_, ddim(1.0))):
        assert (ours[-1] == 0).all()
        assert (ours[:-1] != 0).all()


@pytest.mark.parametrize("random_steps", [1, 3])
def test_the_steps_after_the_random_ones_are_left_out(random_steps: int):
    policy = move(a_toy())
    round_ = a_round(policy, random_steps=random_steps)
    assert round_.steps.tolist() == [*range(random_steps)]
    ((steps, rows, _),) = shares(round_, 1, 1.0, Generator())
    assert sorted(steps.tolist()) == [step for step in range(random_steps) for _ in range(12)]
    assert len(rows) == 12 * random_steps
    with torch.no_grad():
        by_hand = log_probs_by_hand(policy.module, round_.trajectory)
    for ours in (round_.trajectory.log_probs, log_probs(policy, round_, ddim(1.0))):
        torch.testing.assert_close(ours[:random_steps], by_hand[:random_steps], rtol=1e-9, atol=1e-9)
        assert (ours[random_steps:] == 0).all()
    # the samples are those of the rollouts alone, and end without noise
    one = rollout(policy, policy.encode(FIRST), steps=T, kernel=ddim(1.0), random_steps=random_steps, rng=Generator().manual_seed(0))
    assert torch.equal(round_.trajectory.states[:, :3], one.states)


def test_a_round_without_a_random_step_is_an_error():
    """It would give no loss, and the training would sample for ever."""
    with pytest.raises(InputError, match=r"raise method.inference_steps"):
        shares(a_round(a_toy(set_alpha_to_one=True), steps=1), 1, 1.0, Generator())
    assert a_round(a_toy(set_alpha_to_one=False), steps=1).steps.tolist() == [0]


def test_log_probabilities_by_hand():
    policy = move(a_toy())
    round_ = a_round(policy)
    with torch.no_grad():
        theirs, base = (log_probs_by_hand(module, round_.trajectory) for module in (policy.module, policy.base))
    assert (theirs - base).abs().max() > 1e-3
    torch.testing.assert_close(round_.trajectory.log_probs, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference_log_probs(policy, round_, ddim(1.0)), base, rtol=1e-9, atol=1e-9)
    assert torch.equal(log_probs(policy, round_, ddim(1.0)), round_.trajectory.log_probs), "bit for bit what sampling gave"
    move(policy, seed=1)
    with torch.no_grad():
        moved = log_probs_by_hand(policy.module, round_.trajectory)
    ours = log_probs(policy, round_, ddim(1.0))
    torch.testing.assert_close(ours, moved, rtol=1e-9, atol=1e-9)
    assert not ours.requires_grad


def test_greedy_scores_are_of_the_deterministic_samples_from_the_same_noise():
    policy = move(a_toy())
    round_ = a_round(policy)
    start, texts = round_.trajectory.states[0], round_.prompts
    final = rollout(policy, policy.encode(texts), steps=T, kernel=ddim(0.0), start=start).final
    torch.testing.assert_close(greedy_scores(policy, nearness, round_, T), nearness(final, texts), rtol=1e-12, atol=0)
    still = a_round(policy, kernel=ddim(0.0))
    assert torch.equal(greedy_scores(policy, nearness, still, T), still.scores)


def test_the_best_and_the_worst_of_each_prompt():
    # rows 0 to 5 are samples 0 and 1 of prompts 0, 1, 2
    best, worst = best_and_worst(scored(1, 5, 3, 2, 4, 3), 1, 2)
    assert (best.tolist(), worst.tolist()) == ([3, 1], [0, 4]), "the third prompt's samples are worth the same"
    best, worst = best_and_worst(scored(1, 0, 1, 0, 7, 0, prompts=2), 1, 3)
    assert (best.tolist(), worst.tolist()) == ([4], [0]), "one of the two worst"
    best, worst = best_and_worst(scored(1, 1, prompts=1), 1, 2)
    assert (best.tolist(), worst.tolist()) == ([], [])


def test_the_best_of_each_batch_is_its_own():
    round_ = a_round(a_toy(), samples=3)
    best, worst = best_and_worst(round_, 2, 3)
    for prompt in range(6):
        batch, column = divmod(prompt, 3)
        rows = [9 * batch + 3 * sample + column for sample in range(3)]
        assert len({round_.prompts.text[row] for row in rows}) == 1
        assert int(best[prompt]) == max(rows, key=lambda row: float(round_.scores[row]))
        assert int(worst[prompt]) == min(rows, key=lambda row: float(round_.scores[row]))


def test_ten_rounds_without_a_difference_are_an_error():
    context = a_context(FIRST)
    assert [nothing_differs(0, context) for _ in range(9)] == [True] * 9
    assert not nothing_differs(1, context)
    assert context.memory == {"empty_rounds": 0}, "they are counted on end"
    for _ in range(9):
        nothing_differs(0, context)
    with pytest.raises(InputError, match=r"In 10 rounds on end no two samples .* Is it constant"):
        nothing_differs(0, context)


def test_rounds_that_have_fewer_than_is_wanted_are_passed_over_too():
    context = a_context(FIRST)
    assert not nothing_differs(4, context, wanted=4)
    assert [nothing_differs(3, context, wanted=4) for _ in range(9)] == [True] * 9
    with pytest.raises(InputError, match=r"In 10 rounds on end too few .* 3 transitions, for 4 optimiser steps. Lower method.updates"):
        nothing_differs(3, context, wanted=4)


def test_prompts_of_other_pictures_or_masks_have_other_keys():
    texts, zeros = ("a", "a", "b"), torch.zeros(3, 3, 2, 2)
    assert Prompts(texts).keys == texts
    one_pixel = zeros.clone()
    one_pixel[1, 2, 1, 1] = 1 / 255
    same, apart = Prompts(texts, zeros).keys, Prompts(texts, one_pixel).keys
    assert same[0] == same[1] != same[2]
    assert (apart[0], apart[2]) == (same[0], same[2])
    assert len({*apart, *texts}) == 5
    masked = Prompts(texts, zeros, one_pixel[:, 2:]).keys
    assert len(set(masked)) == 3
    assert Prompts(texts, one_pixel)[[2, 1]].keys == (apart[2], apart[1]), "a row's key is its own, wherever it stands"


def test_the_first_pass_must_be_what_sampling_gave():
    check_first_pass(torch.zeros(3), clip=1e-4)
    check_first_pass(torch.tensor([0.0, -0.9e-4]), clip=1e-4)
    for change in (1.1e-4, -1.1e-4, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"off by .*, with a clip range of 0.0001"):
            check_first_pass(torch.tensor([0.0, change]), clip=1e-4)
