"""Which samples are compared, in which order, and on which side each stands: all of it from a seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign import arena
from diffalign.arena import Skill
from diffalign.cache import digest
from diffalign.errors import InputError
from diffalign.gathering import Asked, Gathered


@dataclass(frozen=True)
class Comparison:
    """Two to four samples of the prompt number `asked`: `media` are their numbers in `Gathered.media`."""

    asked: int
    media: tuple[int, ...]


def plan(gathered: Gathered, *, compare: int, rounds: int, seed: int) -> tuple[list[Comparison], str]:
    """All comparisons of `compare` samples at most, and in words what cannot be compared.

    Of several models each comparison has one sample of each of `compare` models, and there is one for every choice of models: round r takes
    the r-th sample of each. Of one model each round deals a prompt's samples out at random. Samples that are byte for byte the same are
    not put to people. Raises InputError where nothing is left.
    """
    several, rng = len(gathered.models) > 1, np.random.default_rng(seed)
    found, seen, same, alone, number = list[Comparison](), set[tuple[int, ...]](), 0, 0, 0
    for i, asked in enumerate(gathered.asked):
        numbers = range(number, number + len(asked.samples))
        number += len(asked.samples) + sum(each is not None for each in (asked.source, asked.mask))
        drawn = list(_across(asked, numbers, compare, rounds) if several else _within(numbers, compare, rounds, rng))
        alone += not drawn
        for media in drawn:
            files = {gathered.media[n].sha256: n for n in reversed(media)}
            media = tuple(sorted(files.values()))
            if len(media) < 2:
                same += 1
            elif media not in seen:
                seen.add(media)
                found.append(Comparison(i, media))
    one = "samples of one model alone" if several else "one sample"
    if not found:
        where = " and ".join(map(str, gathered.roots))
        why = f"has {one} of each prompt" if alone else "has samples that are all the same"
        mend = (
            "Give folders of samples of the same prompts" if several else "Make two or more of each (--samples 2), or give another folder"
        )
        raise InputError(f"{where} {why}: there is nothing to compare. {mend}.")
    counts = {f"prompts with {one}": alone, "comparisons of files that are the same": same}
    left = "; ".join(f"{what} {count:,}" for what, count in counts.items() if count)
    return found, f"Left out: {left}." if left else ""


def _across(asked: Asked, numbers: Sequence[int], compare: int, rounds: int) -> Iterator[tuple[int, ...]]:
    of_models: dict[int, list[int]] = {}
    for number, medium in zip(numbers, asked.samples, strict=True):
        of_models.setdefault(medium.model, []).append(number)
    if len(of_models) > 1:
        for chosen in itertools.combinations(of_models.values(), min(compare, len(of_models))):
            yield from (tuple(own[r % len(own)] for own in chosen) for r in range(rounds))


def _within(numbers: Sequence[int], compare: int, rounds: int, rng: Any) -> Iterator[tuple[int, ...]]:
    if len(numbers) > 1:
        for _ in range(rounds):
            order = [numbers[i] for i in rng.permutation(len(numbers))]
            hands = [order[i : i + compare] for i in range(0, len(order), compare)]
            if len(hands[-1]) == 1:  # the one that is left over meets another again
                hands[-1].append(order[0])
            yield from map(tuple, hands)


def order_of(count: int, seed: int, rater: str) -> list[int]:
    """The order in which this rater meets the comparisons."""
    return _rng(f"{seed} order {rater}").permutation(count).tolist()


def shown(comparison: Comparison, seed: int, rater: str) -> tuple[int, ...]:
    """The comparison's media in the order in which this rater sees them, from left to right."""
    order = _rng(f"{seed} sides {rater} {comparison.media}").permutation(len(comparison.media))
    return tuple(comparison.media[i] for i in order)


def _rng(what: str) -> np.random.Generator:
    return np.random.default_rng(int(digest(what)[:16], 16))


def most_telling(waiting: Sequence[Sequence[int]], skills: Sequence[Skill]) -> int:
    """The place in `waiting`, lists of models, of the comparison that lowers the skills' variances most; of equal ones the first."""
    gains = dict[tuple[int, ...], float]()
    for models in waiting:
        key = tuple(sorted(models))
        if key not in gains:
            gains[key] = arena.gain([skills[m] for m in key])
    return max(range(len(waiting)), key=lambda i: gains[tuple(sorted(waiting[i]))])
