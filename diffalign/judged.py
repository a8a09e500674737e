"""Judged pictures as rewards are trained and tested on them: pairs and ratings by the keys of their pictures, and who may see which."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from diffalign import layouts
from diffalign.cache import digest
from diffalign.data import Prompt, text_of
from diffalign.errors import InputError, nearest
from diffalign.examples import KINDS
from diffalign.layouts import Picture, Row
from diffalign.records import Tally

Take = Callable[[Picture], str | None]
"""A picture to its key, a digest of what is in its file; None where it cannot be used, and the tally lets that pass."""


@dataclass(frozen=True)
class Judged:
    """What was said of pictures with one prompt. Of a pair: `pictures` are the better and the worse one. Of ratings: one picture."""

    prompt: Prompt
    pictures: tuple[str, ...]
    ratings: tuple[tuple[str, float], ...] = ()

    @property
    def asked(self) -> str:
        """What tells prompts apart, where it matters that one is not seen in training and in testing: not case, not spaces."""
        return " ".join(text_of(self.prompt).casefold().split())


def pairs(source: str, take: Take, tally: Tally, limit: int | None = None) -> Iterator[Judged]:
    """The pairs of a source, `limit` of them, the first ones. Ties are left out and counted: they say nothing of which is better.

    Raises InputError for what is wrong with the data; see `diffalign.layouts`.
    """

    def found() -> Iterator[Judged]:
        for row in layouts.rows(source, "pairs", tally):
            for _, example in KINDS["pairs"](row, [take(picture) for picture in row.pictures], tally):
                assert example.rejected is not None
                yield Judged(example.prompt, (example.x_0, example.rejected))

    return itertools.islice(found(), limit)


def ratings(source: str, take: Take, tally: Tally, limit: int | None = None) -> Iterator[Judged]:
    """The rated pictures of a source, `limit` of them, the first ones. Raises InputError as `pairs` does."""

    def found() -> Iterator[Judged]:
        for row in layouts.rows(source, "ratings", tally):
            key = take(row.pictures[0])
            if key is not None:
                yield Judged(row.prompt, (key,), _given(row))

    return itertools.islice(found(), limit)


def _given(row: Row) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((row.ratings or {}).items()))


def aspects_of(judged: Sequence[Judged], wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """The aspects that were rated, in their alphabetical order, or those `wanted`; raises InputError for one that nobody has rated."""
    known = sorted({name for each in judged for name, _ in each.ratings})
    for name in wanted or ():
        if name not in known:
            raise InputError(f"The data rates no aspect '{name}'. {nearest(name, known)}")
    return tuple(dict.fromkeys(wanted or known))


def split(judged: Sequence[Judged], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held-out) indices. A prompt is on one side with all that belongs to it, and so is a picture, whatever prompts it has.

    So prompts that share a picture stay together. Raises InputError where everything hangs together, and nothing can be held out.
    """
    owners = _together(judged)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, owner in enumerate(owners):
        groups[owner].append(i)
    if len(groups) < 2:
        prompts = len({each.asked for each in judged})
        what = "one prompt" if prompts == 1 else f"{prompts} prompts that share pictures with each other"
        raise InputError(
            f"The data is of {what}: nothing can be held out to test the reward on. Give judgements of two prompts or more, "
            "better some hundred."
        )
    sizes = {owner: len({judged[i].asked for i in rows}) for owner, rows in groups.items()}
    names = list(groups)
    order = [names[i] for i in torch.randperm(len(names), generator=Generator().manual_seed(seed)).tolist()]
    room, held = max(1, round(share * sum(sizes.values()))), set[int]()
    for owner in order:
        if sizes[owner] <= room and len(held) < len(groups) - 1:
            held.add(owner)
            room -= sizes[owner]
    held = held or {min(order, key=sizes.__getitem__)}
    return [i for i, owner in enumerate(owners) if owner not in held], [i for i, owner in enumerate(owners) if owner in held]


def _together(judged: Sequence[Judged]) -> list[int]:
    """For each judgement the number of its group: those that share a prompt or a picture, also by way of others, have the same."""
    parents = list(range(len(judged)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, each in enumerate(judged):
        for thing in (("prompt", each.asked), *(("picture", key) for key in each.pictures)):
            parents[root(i)] = root(first.setdefault(thing, i))
    return [root(i) for i in range(len(judged))]


@dataclass(frozen=True)
class Rows:
    """Judgements as a stream's source."""

    rows: Sequence[Judged]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> list[Judged]:
        return [self.rows[i] for i in indices]

    def contents(self) -> str:
        return contents(self.rows)


def contents(judged: Sequence[Judged]) -> str:
    """A digest of all that was said."""
    return digest(*(f"{text_of(each.prompt)}\0{each.pictures}\0{each.ratings}" for each in judged))


def marks(judged: Sequence[Judged]) -> dict[str, list[str]]:
    """What a folder keeps, to know its prompts and pictures again: short digests, sorted."""
    return {
        "prompts": sorted({digest(each.asked)[:16] for each in judged}),
        "pictures": sorted({key[:16] for each in judged for key in each.pictures}),
    }


def seen(each: Judged, known: dict[str, set[str]]) -> bool:
    """Whether the prompt or a picture of a judgement is among the marks."""
    return digest(each.asked)[:16] in known["prompts"] or any(key[:16] in known["pictures"] for key in each.pictures)
