"""Advantages: numbers worked out by hand, and two processes that agree with one."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch
from torch import Generator, Tensor

from diffalign.advantages import Kind, advantages
from diffalign.errors import InputError
from diffalign.types import Alone, Context, Processes

KINDS: list[Kind] = ["global", "per_prompt", "group", "group_global", "loo", "greedy"]
T = TypeVar("T")


@dataclass
class Meeting:
    """Where two threads meet to gather; a call that only one of them makes breaks the barrier."""

    parts: dict[int, Tensor] = field(default_factory=dict)
    barrier: Barrier = field(default_factory=lambda: Barrier(2, timeout=10))


@dataclass
class Half:
    meeting: Meeting
    rank: int
    count: int = 2

    def gather(self, x: Tensor) -> Tensor:
        self.meeting.parts[self.rank] = x
        self.meeting.barrier.wait()
        whole = torch.cat([self.meeting.parts[0], self.meeting.parts[1]])
        self.meeting.barrier.wait()
        return whole


def a_context(processes: Processes | None = None) -> Context:
    return Context(Generator(), Alone() if processes is None else processes)


def of(kind: Kind, scores: Sequence[float], prompts: str, context: Context | None = None, **options: Any) -> list[float]:
    """With a letter for each prompt, and in float64 to see the numbers."""
    ours = advantages(kind, torch.tensor(scores, dtype=torch.float64), list(prompts), context or a_context(), **options)
    return ours.tolist()


def in_both(call: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(call, range(2)))


# --- by hand ---


def test_global():
    # mean 4, squared distances 9, 1, 1, 9: variance 5
    ours = of("global", [1, 3, 5, 7], "aabc", epsilon=0)
    assert ours == pytest.approx([x / math.sqrt(5) for x in (-3, -1, 1, 3)])
    assert of("global", [1, 3, 5, 7], "aabc", epsilon=1.0) == pytest.approx([x / (math.sqrt(5) + 1) for x in (-3, -1, 1, 3)])


def test_group():
    # a: 1, 5, 6, mean 4, variance (9 + 1 + 4) / 3; b: 10, 30, mean 20, std 10; c: equal
    a = math.sqrt(14 / 3)
    ours = of("group", [1, 10, 5, 0.1, 30, 6, 0.1], "abacbac", epsilon=0.5)
    assert ours == pytest.approx([-3 / (a + 0.5), -10 / 10.5, 1 / (a + 0.5), 0, 10 / 10.5, 2 / (a + 0.5), 0])


def test_group_over_the_deviation_of_all():
    # a: 1, 5, 6, mean 4; b: 10, 30, mean 20; of all: mean 10.4, squared distances 88.36, 0.16, 29.16, 384.16, 19.36, variance 104.24
    std = math.sqrt(104.24)
    ours = of("group_global", [1, 10, 5, 30, 6], "ababa", epsilon=0.5)
    assert ours == pytest.approx([x / (std + 0.5) for x in (-3, -10, 1, 10, 2)])


def test_loo():
    # a: 1, 5, 6: 1 - 5.5, 5 - 3.5, 6 - 3; b: 10 - 30 and 30 - 10
    assert of("loo", [1, 10, 5, 30, 6], "ababa", clip=100) == pytest.approx([-4.5, -20, 1.5, 20, 3])


def test_greedy():
    assert of("greedy", [1, 2, 3], "aab", greedy=torch.tensor([0.5, 4.0, 3.0])) == [0.5, -2, 0]


def test_clipping():
    assert of("loo", [1, 10, 5, 30, 6], "ababa", clip=3) == [-3, -3, 1.5, 3, 3]
    assert of("greedy", [100, -100], "ab", greedy=torch.zeros(2)) == [5, -5]  # the default
    assert max(of("global", [0.0] * 99 + [1.0], "a" * 100)) == 5  # sqrt(99) otherwise


@pytest.mark.parametrize("kind", ["global", "per_prompt", "group", "group_global", "loo"])
@pytest.mark.parametrize("score", [0.1, -1234.567, 1e8 + 0.3])
def test_equal_scores_are_exactly_nothing(kind: Kind, score: float):
    """Also in fp32, whose rounded mean of equal numbers is off by as much as epsilon."""
    ours = advantages(kind, torch.full((30,), score), ["a"] * 20 + ["b"] * 10, a_context(), least=15)
    assert ours.tolist() == [0.0] * 30


# --- per prompt ---


def test_per_prompt_by_hand():
    context = a_context()
    options: dict[str, Any] = {"least": 3, "buffer": 4, "epsilon": 0.0}
    # too few of each, so the round's mean 4 and variance 5
    first = of("per_prompt", [1, 3, 5, 7], "aabb", context, **options)
    assert first == pytest.approx([x / math.sqrt(5) for x in (-3, -1, 1, 3)])
    # a holds 1, 3, 8 (this round's included): mean 4, variance 26/3. c has one: the round's 8, 0, 4, mean 4, variance 32/3
    # b holds 5, 7, 0: mean 4, variance 26/3
    second = of("per_prompt", [8, 0, 4], "abc", context, **options)
    assert second == pytest.approx([4 / math.sqrt(26 / 3), -4 / math.sqrt(26 / 3), 0])
    # a: 1, 3, 8, 2, 6 of which the last four are kept: mean 4.75, variance (3.0625 + 10.5625 + 7.5625 + 1.5625) / 4
    third = of("per_prompt", [2, 6], "aa", context, **options)
    assert third == pytest.approx([-2.75 / math.sqrt(5.6875), 1.25 / math.sqrt(5.6875)])
    assert sorted(context.memory["prompt_scores"].values()) == [[3, 8, 2, 6], [4], [5, 7, 0]]


def ddpo(buffers: dict[str, list[float]], prompts: list[str], scores: list[float], buffer: int, least: int) -> list[float]:
    """What kvablack/ddpo-pytorch's stat_tracking.py computes, prompt by prompt."""
    values = [0.0] * len(scores)
    for prompt in set(prompts):
        rows = [i for i, p in enumerate(prompts) if p == prompt]
        buffers[prompt] = (buffers.get(prompt, []) + [scores[i] for i in rows])[-buffer:]
        held = torch.tensor(scores if len(buffers[prompt]) < least else buffers[prompt], dtype=torch.float64)
        for i in rows:
            values[i] = float((scores[i] - held.mean()) / (held.std(correction=0) + 1e-6))
    return values


def test_per_prompt_is_ddpos_over_many_rounds():
    dice, context, buffers, known = random.Random(0), a_context(), {}, set()
    for _ in range(12):
        prompts = [dice.choice("abcdefghij") for _ in range(20)]
        scores = [dice.gauss(0, 1) for _ in prompts]
        want = ddpo(buffers, prompts, scores, buffer=8, least=5)
        assert of("per_prompt", scores, "".join(prompts), context, clip=100, buffer=8, least=5) == pytest.approx(want)
        known.add(sum(len(b) >= 5 for b in buffers.values()))
    assert {0, 10} & known  # both branches were met
    assert len(known) > 2


def test_the_memory_goes_through_a_checkpoint():
    first = a_context()
    options: dict[str, Any] = {"least": 2, "buffer": 3}
    of("per_prompt", [1, 2, 4, 8], "aabb", first, **options)
    second = a_context()
    second.memory = json.loads(json.dumps(first.memory))
    rounds = [of("per_prompt", [3, 9], "ab", context, **options) for context in (first, second)]
    assert rounds[0] == rounds[1]
    assert rounds[0] != of("per_prompt", [3, 9], "ab", **options)


def test_a_prompts_key_is_the_same_in_every_run():
    """Python's own hash of a text changes from process to process."""
    script = (
        "import torch; from diffalign.advantages import advantages; from diffalign.types import Context, Alone\n"
        "context = Context(torch.Generator(), Alone())\n"
        "advantages('per_prompt', torch.zeros(2), ['a red cube', ''], context); print(sorted(context.memory['prompt_scores']))"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    context = a_context()
    advantages("per_prompt", torch.zeros(2), ["a red cube", ""], context)
    assert there == str(sorted(context.memory["prompt_scores"]))


# --- two processes ---


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind: Kind):
    """Over several rounds: prompts shared by both, and prompts of one alone."""
    meeting, alone = Meeting(), a_context()
    halves = [a_context(Half(meeting, rank)) for rank in range(2)]
    options: dict[str, Any] = {"least": 5, "buffer": 7}
    rng, dice = Generator().manual_seed(0), random.Random(0)
    for _ in range(6):
        prompts = [p for p in dice.sample("abcdefgh", 6) for _ in range(2)]
        dice.shuffle(prompts)
        scores, greedy = torch.randn(2, 12, generator=rng)
        parts = [slice(0, 6), slice(6, 12)]

        def here(
            rank: int, scores: Tensor = scores, greedy: Tensor = greedy, prompts: list[str] = prompts, parts: list[slice] = parts
        ) -> Tensor:
            of_greedy = greedy[parts[rank]] if kind == "greedy" else None
            return advantages(kind, scores[parts[rank]], prompts[parts[rank]], halves[rank], greedy=of_greedy, **options)

        whole = advantages(kind, scores, prompts, alone, greedy=greedy if kind == "greedy" else None, **options)
        ours = in_both(here)
        assert torch.equal(torch.cat(ours), whole)
        assert halves[0].memory == halves[1].memory == alone.memory
        assert not torch.equal(*ours)
    assert bool(alone.memory) == (kind == "per_prompt")


def test_a_group_may_be_split_over_processes():
    meeting = Meeting()
    ours = in_both(lambda rank: of("loo", [[1, 10], [5, 30]][rank], "ab", a_context(Half(meeting, rank)), clip=100))
    assert ours == [[-4, -20], [4, 20]]


@pytest.mark.parametrize(("kind", "bad", "error"), [("global", math.nan, ValueError), ("group", 1.0, InputError)])
def test_both_processes_raise(kind: Kind, bad: float, error: type[Exception]):
    """What is wrong in one is wrong in all: none is left waiting at the next collective."""
    meeting = Meeting()

    def here(rank: int) -> type[Exception] | None:
        try:
            of(kind, [[0.0, 1.0], [bad, 2.0]][rank], ["aa", "ab"][rank], a_context(Half(meeting, rank)))
        except Exception as raised:
            return type(raised)

    assert in_both(here) == [error, error]


# --- dtypes and errors ---


def test_the_dtype_is_fp32_or_better_and_nothing_has_a_gradient():
    for given, got in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        scores = torch.tensor([1.0, 2.0, 4.0], dtype=given, requires_grad=True)
        for kind in KINDS:
            ours = advantages(kind, scores, ["a"] * 3, a_context(), greedy=scores * 2 if kind == "greedy" else None)
            assert ours.dtype == got
            assert not ours.requires_grad


@pytest.mark.parametrize("kind", ["group", "group_global", "loo"])
def test_a_group_of_one_is_an_input_error(kind: Kind):
    with pytest.raises(InputError, match=r"'.*' advantages.*2 of this round's 3 prompts.*--method\.samples 2"):
        of(kind, [1, 2, 3, 4], "abbc")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_raise_and_leave_no_trace(kind: Kind, bad: float):
    context = a_context()
    of("per_prompt", [1, 2], "ab", context)
    before = copy.deepcopy(context.memory)
    with pytest.raises(ValueError, match="1 of 4 scores are not finite"):
        of(kind, [1, bad, 3, 4], "aabb", context, greedy=torch.zeros(4) if kind == "greedy" else None)
    assert context.memory == before
    assert before["prompt_scores"]


def test_what_else_raises():
    with pytest.raises(ValueError, match="needs the greedy"):
        of("greedy", [1, 2], "aa")
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        of("greedy", [1, 2], "aa", greedy=torch.tensor([math.nan, 0]))
    with pytest.raises(ValueError, match="both are"):
        of("global", [1, 2], "aab")
    with pytest.raises(ValueError, match="both are"):
        of("greedy", [1, 2], "aa", greedy=torch.zeros(1))
    with pytest.raises(ValueError, match="give one of 'global', 'per_prompt', 'group', 'group_global', 'loo', 'greedy'"):
        of("median", [1, 2], "aa")  # pyright: ignore[reportArgumentType]
    for least in (0, 9):
        with pytest.raises(InputError, match="give 1 to 8"):
            of("per_prompt", [1, 2], "aa", least=least, buffer=8)
