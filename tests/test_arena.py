"""Strengths and skills of models that were compared, and what to compare next."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from diffalign import comparing
from diffalign.agreement import cohen_kappa, fleiss_kappa
from diffalign.arena import LEAST, Ranking, Skill, bradley_terry, gain, skills_of, updated, wins_of

# The American League East of 1987, 13 games of each two teams: Agresti, Categorical Data Analysis; the estimates and standard errors
# against Baltimore are those of the R package BradleyTerry2's vignette.
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
WINS = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ],
    dtype=np.float64,
)
ESTIMATES = (1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0)


def test_two_models_have_a_closed_form() -> None:
    """log(30 / 10), of variance 40 / (30 10); each model lies half of that from the mean."""
    found = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=1e6)
    assert found.values == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-9)
    half = 1.959964 * math.sqrt(40 / 300) / 2
    assert found.high - found.values == pytest.approx([half, half], rel=1e-6)
    assert found.values - found.low == pytest.approx([half, half], rel=1e-6)
    assert bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]])).values == pytest.approx(found.values, rel=1e-3), "the prior is weak"


def test_the_baseball_teams_of_the_textbook() -> None:
    found = bradley_terry(WINS, prior=1e6)
    assert found.values - found.values[-1] == pytest.approx(ESTIMATES, abs=1e-4)
    shuffled = np.random.default_rng(0).permutation(len(TEAMS))
    assert bradley_terry(WINS[np.ix_(shuffled, shuffled)], prior=1e6).values == pytest.approx(found.values[shuffled], abs=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    truth, rng, games, within = np.array([0.8, 0.1, -0.9]), np.random.default_rng(0), 60, 0
    chance = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    for _ in range(300):
        wins = np.zeros((3, 3))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            wins[i, j] = rng.binomial(games, chance[i, j])
            wins[j, i] = games - wins[i, j]
        found = bradley_terry(wins)
        within += int(((found.low <= truth) & (truth <= found.high)).sum())
    assert 0.92 < within / 900 < 0.98


@pytest.mark.parametrize("games", [1, 5, 1000])
def test_a_model_that_never_lost_is_finite_and_unsure(games: int) -> None:
    values, low, high = bradley_terry(np.array([[0.0, games], [0.0, 0.0]]))
    assert np.isfinite([*values, *low, *high]).all()
    assert values[0] > 0
    assert high[0] - low[0] > 2, "however many games: how far it is ahead is not known"


def test_models_that_never_met_are_as_unsure_as_the_prior() -> None:
    wins = np.zeros((3, 3))
    wins[0, 1] = wins[1, 0] = 50
    values, low, high = bradley_terry(wins)
    assert values == pytest.approx([0, 0, 0], abs=1e-9)
    assert high[2] - low[2] > 20
    with pytest.raises(ValueError, match="matrix of counts"):
        bradley_terry(np.array([[0.0, -1.0], [1.0, 0.0]]))


def test_a_pair_updates_as_openskill_does() -> None:
    """Weng and Lin's Algorithm 1 from 25 and 25 / 3; numbers of the package openskill's BradleyTerryFull."""
    winner, loser = updated([Skill(), Skill()], [0, 1])
    assert (winner.mean, winner.deviation) == pytest.approx((27.63523138, 8.0655063), abs=1e-7)
    assert (loser.mean, loser.deviation) == pytest.approx((22.36476862, 8.0655063), abs=1e-7)
    for skill in updated([Skill(), Skill()], [0, 0]):
        assert (skill.mean, skill.deviation) == pytest.approx((25, 8.0655063), abs=1e-7)


def test_a_ranking_of_three_by_hand() -> None:
    """All c are sqrt(173.61): the first gains two halves of 69.44 / c, the second none; variances fall by 2 (0.6325 0.4 0.25)."""
    first, second, third = updated([Skill()] * 3, [0, 1, 2])
    assert first.mean - 25 == pytest.approx(2 * 2.63523138, abs=1e-6)
    assert (second.mean, third.mean - 25) == pytest.approx((25, -2 * 2.63523138), abs=1e-6)
    c = math.sqrt(2 * (25 / 3) ** 2 + 2 * (25 / 6) ** 2)
    assert first.deviation == pytest.approx(25 / 3 * math.sqrt(1 - 2 * (25 / 3 / c) ** 3 / 4), abs=1e-9)


def test_the_gain_is_what_an_update_takes_off_the_variances() -> None:
    skills = [Skill(30, 2), Skill(24, 7), Skill(20, 4)]
    for ranks in ([0, 1, 2], [2, 1, 0], [0, 0, 0]):
        after = updated(skills, ranks)
        assert gain(skills) == pytest.approx(sum(a.deviation**2 - b.deviation**2 for a, b in zip(skills, after, strict=True)))
    assert gain([Skill(25, 8), Skill(25, 8)]) > gain([Skill(25, 8), Skill(25, 2)]) > gain([Skill(25, 8), Skill(60, 2)])
    assert 0 < LEAST < 1e-3


def test_skills_find_the_order_and_uncertain_choices_find_it_sooner() -> None:
    """Eight models of known strength, judged by chance: the most telling pairs leave less variance than random ones of the same number."""
    truth, pairs = np.linspace(-2, 2, 8), [(i, j) for i in range(8) for j in range(i)] * 20

    def judged(telling: bool) -> list[Skill]:
        rng, waiting, said = np.random.default_rng(1), list(pairs), list[Ranking]()
        rng.shuffle(waiting)
        for _ in range(120):
            pair = waiting.pop(comparing.most_telling(waiting, skills_of(8, said)) if telling else 0)
            first = rng.random() < 1 / (1 + math.exp(truth[pair[1]] - truth[pair[0]]))
            said.append(Ranking(tuple(pair), (0.0, 1.0) if first else (1.0, 0.0)))
        return skills_of(8, said)

    chosen, drawn = judged(True), judged(False)
    assert np.corrcoef([skill.mean for skill in chosen], truth)[0, 1] > 0.9
    assert sum(s.deviation**2 for s in chosen) < sum(s.deviation**2 for s in drawn)
    assert max(s.deviation for s in chosen) < max(s.deviation for s in drawn)


def test_wins_of_rankings() -> None:
    """A ranking of K weighs K - 1 in all, a tie is half a win for each, and two samples of one model say nothing."""
    wins = wins_of(3, [Ranking((0, 1, 2), (0, 1, 1)), Ranking((2, 0), (0, 1)), Ranking((1, 1), (0, 1))])
    assert wins == pytest.approx(np.array([[0, 2 / 3, 2 / 3], [0, 0, 1 / 3], [1, 1 / 3, 0]]))
    assert wins_of(3, [Ranking((0, 1, 2), (0, 1, 2))]).sum() == pytest.approx(2)
    assert skills_of(2, [Ranking((1, 1), (0, 1))]) == [Skill(), Skill()]


def test_kappas_of_the_textbooks() -> None:
    """Cohen's of 20 both yes, 5 and 10 divided, 15 both no is 0.4; Fleiss' of 14 raters, 10 things and 5 categories is 0.210."""
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa(one, one) == 1
    assert math.isnan(cohen_kappa(["yes"], ["yes"]))
    table: Any = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(np.array(table, dtype=np.float64)) == pytest.approx(0.210, abs=5e-4)
    assert math.isnan(fleiss_kappa(np.array([[2.0, 0.0]])))
    assert fleiss_kappa(np.array([[2.0, 0.0], [0.0, 3.0]])) == 1, "numbers of raters may differ"
