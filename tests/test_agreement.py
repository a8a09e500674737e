"""Accuracy, calibration and correlations against numbers worked out by hand, and against scipy where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign import agreement


def test_a_tie_counts_half() -> None:
    margins = np.array([2.0, -1.0, 0.0, 3.0])
    assert agreement.right(margins).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert agreement.accuracy(margins, ["a", "b", "c", "d"]).value == 2.5 / 4


def test_the_interval_is_over_prompts_and_not_over_pairs() -> None:
    """Two prompts, all right and all wrong: a resample is 0, 1/2 or 1, however many pairs there are."""
    margins, prompts = np.repeat([1.0, -1.0], 500), np.repeat(["a", "b"], 500)
    assert agreement.accuracy(margins, list(prompts))[1:] == (0.0, 1.0)
    alone = agreement.accuracy(margins, list(range(1000)))  # each pair a prompt of its own: the binomial's interval
    assert alone.low == pytest.approx(0.5 - 1.96 * math.sqrt(0.25 / 1000), abs=0.006)
    assert alone.high == pytest.approx(0.5 + 1.96 * math.sqrt(0.25 / 1000), abs=0.006)
    assert agreement.accuracy(margins, list(prompts), seed=3) == agreement.accuracy(margins, list(prompts), seed=3)


def test_prompts_weigh_as_much_as_they_have_pairs() -> None:
    """Prompt a has three pairs, b one: a resample of (a, b) is 3/4, of (a, a) 1, of (b, b) 0."""
    found = list[float]()

    def note(rows: np.ndarray) -> float:
        found.append(float(agreement.right(np.array([1.0, 1.0, 1.0, -1.0]))[rows].mean()))
        return found[-1]

    agreement.interval_over(["a", "a", "a", "b"], note, 0, 200)
    assert set(found) == {0.0, 0.75, 1.0}
    margins, prompts = np.random.default_rng(1).normal(0.3, 1, 60), [i // 4 for i in range(60)]
    whole = agreement.interval_over(prompts, lambda rows: float(agreement.right(margins)[rows].mean()), 5, 300)
    assert agreement.accuracy(margins, prompts, 5, 300)[1:] == pytest.approx(whole)


def test_groups_are_told_apart_by_all_of_their_text() -> None:
    """An array of texts would drop a NUL at the end, and be as wide as the longest: here 4 GB."""
    prompts = ["a", "a\0", "x" * 100_000, *(f"{i}" for i in range(10_000))]
    rows = agreement._by_group(prompts)
    assert len(rows) == len(prompts)
    assert [prompts[own[0]] for own in rows] == sorted(prompts)


def test_the_scale_is_that_of_the_largest_likelihood() -> None:
    """Margins of 1, three right and one wrong: sigmoid(s) = 3/4, s = log 3. In other units it scales along."""
    margins = np.array([1.0, 1.0, 1.0, -1.0])
    assert agreement.fitted_scale(margins) == pytest.approx(math.log(3))
    assert agreement.fitted_scale(margins * 100) == pytest.approx(math.log(3) / 100)
    assert agreement.fitted_scale(-margins) == 0.0
    assert agreement.fitted_scale(np.zeros(3)) == 0.0
    assert agreement.fitted_scale(np.array([1.0, 3.0])) == 50 / 2  # all right: no maximum


def test_calibration_by_hand() -> None:
    """Confidence sigmoid(log 3) = 0.75 in all pairs, of which half are right: off by 1/4. One sure pair more, right: its share is 1/5."""
    table, error = agreement.reliability(np.array([1.0, -1.0, 1.0, -1.0]), math.log(3))
    (only,) = table
    assert only[2:] == (4, pytest.approx(0.75), 0.5)
    assert (only.low, only.high) == (pytest.approx(0.75), pytest.approx(0.8))
    assert error == pytest.approx(0.25)
    table, error = agreement.reliability(np.array([1.0, -1.0, 1.0, -1.0, 1000.0]), math.log(3))
    assert [row.pairs for row in table] == [4, 1]
    assert table[1].confidence == 1.0
    assert error == pytest.approx(0.8 * 0.25)


def test_kendalls_tau_b_by_hand() -> None:
    """(1,1), (2,2), (3,2): of three pairs two agree and one is tied in y: 2 / sqrt(3 * 2)."""
    x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 2.0])
    assert agreement.kendall_tau_b(x, y) == pytest.approx(2 / math.sqrt(6))
    assert agreement.kendall_tau_b(x, -y) == pytest.approx(-2 / math.sqrt(6))
    assert math.isnan(agreement.kendall_tau_b(x, np.ones(3)))


def test_tau_within_prompts_leaves_out_those_that_say_nothing() -> None:
    x, y = np.array([1.0, 2.0, 5.0, 5.0, 9.0]), np.array([4.0, 3.0, 1.0, 2.0, 0.0])
    tau, prompts = agreement.tau_within(x, y, ["a", "a", "b", "b", "c"])  # b is tied in x, c has one picture
    assert (tau, prompts) == (-1.0, 1)
    assert agreement.tau_within(x, y, list("abcde"))[1] == 0


def test_spearman_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    x, y = np.array([10.0, 20.0, 20.0, 90.0]), np.array([0.1, 0.2, 0.3, 0.4])
    assert agreement.spearman(x, y) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(agreement.spearman(x, np.zeros(4)))


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 60).astype(float), rng.integers(0, 9, 60).astype(float)
    assert agreement.kendall_tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    assert agreement.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
