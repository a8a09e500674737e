"""Data that exists: preference pairs, labelled pictures, edits and captioned pictures, embedded once and kept on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign import layouts, records
from diffalign.cache import cache_root, digest
from diffalign.contract import CheckedReward
from diffalign.data import PicturePrompt, Prompt, SpokenPrompt, batch_of, caption_of, check_fit, hold_out
from diffalign.errors import InputError
from diffalign.intake import Intake, Reel, Shelving, contents, decoded, device_of
from diffalign.layouts import Row
from diffalign.records import Fault, Tally
from diffalign.types import Data, Examples, Policy, Taken

SAY_EVERY = 20.0  # seconds


@dataclass(frozen=True, slots=True)
class Example:
    """One example; its media are keys of the rows that `ExampleSet` reads."""

    prompt: Prompt
    x_0: str
    rejected: str | None = None
    desirable: bool | None = None
    score: float | None = None


@dataclass(frozen=True)
class ExampleSet:
    """Examples as a source of batches. What is in memory is text: `rows` reads latents, or trajectories, batch by batch."""

    rows: Callable[[Sequence[str]], Tensor]
    policy: Policy
    examples: Sequence[Example]
    taken: Taken | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each example."""
        return [example.prompt for example in self.examples]

    def take(self, indices: Sequence[int]) -> Examples:
        """Examples by index, fp32, on the policy's device. Raises InputError where the cache was emptied meanwhile."""
        chosen = [self.examples[i] for i in indices]
        rejected = [e.rejected for e in chosen if e.rejected is not None]
        desirable = [e.desirable for e in chosen if e.desirable is not None]
        scores = [e.score for e in chosen if e.score is not None]
        return Examples(
            batch_of([e.prompt for e in chosen], self.policy),
            self._rows([e.x_0 for e in chosen]),
            rejected=self._rows(rejected) if rejected else None,
            desirable=torch.tensor(desirable, device=device_of(self.policy)) if desirable else None,
            scores=torch.tensor(scores, device=device_of(self.policy)) if scores else None,
            taken=self.taken,
        )

    def contents(self) -> str:
        return digest(*(f"{caption_of(e.prompt)}\0{Path(e.x_0).name}\0{Path(e.rejected or '').name}\0{e.desirable}" for e in self.examples))

    def _rows(self, keys: Sequence[str]) -> Tensor:
        return self.rows(keys).to(device_of(self.policy))


def check(source: str | None, kind: Data | None) -> None:
    """Raise InputError for data that cannot be what `kind` needs, before any model is loaded; None is no data.

    Looks at the first row of files. Data on the Hub is looked at when it is read.
    """
    if source is None or kind is None:
        return
    if source.startswith("hf:"):
        records.check_hub(source.removeprefix("hf:"))
    else:
        next(layouts.rows(source, kind, Tally(skip=True)), None)


def read(
    source: str,
    kind: Data,
    policy: Policy,
    *,
    reward: CheckedReward | None,
    limit: int | None,
    skip: bool,
    seed: int,
    say: Callable[[str], None],
) -> tuple[ExampleSet, ExampleSet]:
    """Training and held-out examples of `source`, embedded by the policy's base model: `limit` of them, the first ones.

    Every picture is read, checked, and embedded where the cache has it not. Scores are the reward's where one is given, else the
    data's own where all examples have one. A tenth of the distinct prompts is held out, with all that belongs to them; with fewer than
    ten the held-out examples are the training ones. Raises InputError for what is wrong with the data; see `diffalign.layouts`.
    """
    if not isinstance(policy, Shelving):
        raise InputError(f"{type(policy).__name__} cannot embed data: its adapter lacks shelve. See docs/design.md.")
    tally = Tally(skip)
    stored = kind == "trajectories"
    intake = Reel(policy, tally) if stored else Intake(policy, policy.shelve(cache_root()), reward, tally, say)
    found = list(itertools.islice(_examples(source, kind, intake, tally), limit))
    scores = intake.finish()
    if not found:
        raise InputError(f"{source}: no {kind} are left. {tally.in_words()}")
    if reward is not None:
        found = [replace(example, score=score) for example, score in zip(found, scores, strict=True)]
    elif any(example.score is None for example in found):
        found = [replace(example, score=None) for example in found]
    found = _agreeing(found, tally, say)
    prompts: list[Prompt] = [example.prompt for example in found]
    held_prompts = set(hold_out(prompts, seed)[1])
    held = [example for example in found if example.prompt in held_prompts]
    train = [example for example in found if example.prompt not in held_prompts]
    say(f"Data {source}: {len(found):,} {kind} of {len(set(prompts)):,} prompts{intake.in_words()}.")
    if tally.counts:
        say(tally.in_words())
    if not train:
        say("Fewer than ten prompts: none is held out, and the evaluation uses the training examples.")
    return ExampleSet(intake.rows, policy, train or held, intake.taken), ExampleSet(intake.rows, policy, held, intake.taken)


def _agreeing(found: list[Example], tally: Tally, say: Callable[[str], None]) -> list[Example]:
    """Without labels that contradict one before. Says where pairs stand in both orders, and where all labels are the same."""
    labels: dict[tuple[Prompt, str], bool] = {}
    kept: list[Example] = []
    for example in found:
        liked = example.desirable
        if liked is not None and labels.setdefault((example.prompt, example.x_0), liked) != liked:
            what = f"an answer to '{caption_of(example.prompt)}' is labelled true in one row, and false in another."
            tally.note(Fault("rows whose labels contradict", f"The labels contradict: {what}"))
            continue
        kept.append(example)
    if labels and len(set(labels.values())) == 1:
        say(f"All pictures are {'liked' if labels.popitem()[1] else 'disliked'}: there is nothing to tell them from.")
    pairs = {(example.prompt, example.x_0, example.rejected) for example in kept}
    both = sum((prompt, rejected, chosen) in pairs for prompt, chosen, rejected in pairs) // 2
    if both:
        say(f"{both:,} pairs stand in both orders: people disagreed, and both count.")
    return kept


def _examples(source: str, kind: Data, intake: Intake | Reel, tally: Tally) -> Iterator[Example]:
    for row in layouts.rows(source, kind, tally):
        media = [intake.take(picture) for picture in row.pictures]
        for i, example in KINDS[kind](row, [found.key if found else None for found in media], tally):
            found = media[i]
            _check_subject(example.prompt, intake.policy, source)
            if found is not None and found.content is not None:
                intake.score(example.prompt, found.content)
            yield example


def _check_subject(prompt: Prompt, policy: Policy, source: str) -> None:
    """Raise InputError where the data comes without the pictures that the policy works on, or with some for one that takes none."""
    try:
        check_fit([prompt], policy)
    except InputError as error:
        raise InputError(
            f"{source}: {error} In pairs.jsonl and ranks.jsonl these keys stand beside those of the pictures compared."
        ) from error


def _pairs(row: Row, keys: Sequence[str | None], tally: Tally) -> Iterator[tuple[int, Example]]:
    """Every two pictures of which one is better, as (the better one's index, example)."""
    merits, asked = row.merits or (), _asked(row, tally)
    if asked is None:
        return
    order = [(i, j) for i, j in itertools.permutations(range(len(merits)), 2) if merits[i] > merits[j]]
    if not order:
        tally.note(Fault("ties"))
    for i, j in order:
        better, worse = keys[i], keys[j]
        if better is None or worse is None:
            continue
        if better == worse:
            tally.note(Fault("pairs of one picture", f"{row.where}: the better and the worse picture are the same one."))
            continue
        yield i, Example(asked, better, worse, score=row.scores[i] if row.scores else None)


def _labels(row: Row, keys: Sequence[str | None], tally: Tally) -> Iterator[tuple[int, Example]]:
    """Pictures that are liked or not. Of several of one prompt the best are liked, the worst are not, and the others say nothing."""
    merits, asked = row.merits or (), _asked(row, tally)
    if asked is None:
        return
    best, worst = (max(merits), min(merits)) if len(merits) > 1 else (1.0, 0.0)
    if best == worst:
        tally.note(Fault("ties"))
        return
    for i, key in enumerate(keys):
        liked = merits[i] >= best
        if key is not None and (liked or merits[i] <= worst):
            yield i, Example(asked, key, desirable=liked, score=row.scores[i] if row.scores else None)


def _pictures(row: Row, keys: Sequence[str | None], tally: Tally) -> Iterator[tuple[int, Example]]:
    asked = _asked(row, tally)
    for i, key in enumerate(keys):
        if key is not None and asked is not None:
            yield i, Example(asked, key, score=row.scores[i] if row.scores else None)


def _edits(row: Row, keys: Sequence[str | None], tally: Tally) -> Iterator[tuple[int, Example]]:
    asked = _asked(row, tally)
    for i, key in enumerate(keys):
        if key is not None and asked is not None:
            yield i, Example(asked, key, score=row.scores[i] if row.scores else None)


def _asked(row: Row, tally: Tally) -> Prompt | None:
    """The prompt of a row, with what it is about; None where that cannot be used, and the tally lets that pass.

    These pictures are read again with each batch: here it is seen that they can be.
    """
    if row.transcript is not None and row.source is None:
        return SpokenPrompt(row.prompt, row.transcript)
    if row.source is None:
        return row.prompt
    try:
        for picture in (row.source, row.mask):
            if picture is not None:
                decoded(contents(picture), picture.name)
        source, mask = (None if picture is None else picture.data or picture.path for picture in (row.source, row.mask))
        assert source is not None
        prompt = PicturePrompt(row.prompt, source, mask)
        try:
            prompt.open_both()
        except InputError as error:
            raise Fault("masks of another size", f"{row.where}: {error}") from error
    except Fault as fault:
        tally.note(fault)
        return None
    return prompt


KINDS: dict[Data, Callable[[Row, Sequence[str | None], Tally], Iterator[tuple[int, Example]]]] = {
    "pairs": _pairs,
    "trajectories": _pairs,
    "labels": _labels,
    "pictures": _pictures,
    "edits": _edits,
}
