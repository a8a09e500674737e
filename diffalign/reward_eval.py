"""Testing rewards on judged pictures: how often they order a pair as it was judged, how sure they are of it, and how far they agree."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign import agreement, judged
from diffalign.agreement import Array
from diffalign.cache import digest
from diffalign.console import say
from diffalign.contract import CheckedReward
from diffalign.data import PicturePrompt, Prompt, text_of
from diffalign.errors import InputError
from diffalign.examples import check
from diffalign.inputs import named_rewards
from diffalign.intake import SAY_EVERY, contents, decoded
from diffalign.judged import Judged
from diffalign.layouts import Picture
from diffalign.media import fit, to_tensor
from diffalign.models import device_of
from diffalign.records import Fault, Tally
from diffalign.registry import trained_folder
from diffalign.reward_model import SPLIT
from diffalign.settings import Settings
from diffalign.types import Prompts, Reward

Split = Literal["heldout", "train", "all"]
RESAMPLES = 2_000


@runtime_checkable
class RatingReward(Reward, Protocol):
    """A reward that rates several aspects."""

    @property
    def aspects(self) -> tuple[str, ...]: ...
    def rate(self, media: Tensor, prompts: Prompts) -> Tensor: ...


@dataclass
class Files:
    """Pictures by the digests of their files, read again when they are scored."""

    tally: Tally
    found: dict[str, Picture] = field(default_factory=dict[str, Picture])

    def take(self, picture: Picture) -> str | None:
        try:
            data = contents(picture)
            key = digest(data)
            if key not in self.found:
                decoded(data, picture.name)
        except Fault as fault:
            self.tally.note(fault)
            return None
        self.found.setdefault(key, picture)
        return key

    def open(self, key: str) -> Image.Image:
        return decoded(contents(self.found[key]), self.found[key].name)


Item = tuple[Prompt, str]  # a prompt, and a picture's key


def open_rewards(names: Sequence[str], fields: Mapping[str, Any] | None = None) -> list[CheckedReward]:
    """The rewards of these names, opened; a folder is one that `diffalign reward train` has made. `fields` are of a single reward."""
    if fields and len(names) != 1:
        raise InputError(f"--reward.{next(iter(fields))}: fields are of one reward, and {len(names)} are named. Test them one by one.")
    rewards = list[CheckedReward]()
    for name in dict.fromkeys(names):
        (reward,) = named_rewards([name], fields)
        if reward.modality != "image":
            raise InputError(f"{name} judges {reward.modality}, and the data is of pictures.")
        if any(reward.name == other.name for other in rewards):
            reward.name = name
        rewards.append(reward)
    return rewards


def evaluate_rewards(
    data: str | Path,
    rewards: Sequence[CheckedReward],
    *,
    known: Mapping[str, set[str]] | None = None,
    split: Split = "all",
    limit: int | None = None,
    skip: bool = False,
    batch_size: int = 32,
    device: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Test rewards on the pairs, or the ratings, of `data`; what `diffalign reward eval` writes as JSON.

    `known` are the marks of what a reward was trained on: `split` "train" takes the judgements with such a prompt or picture, "heldout"
    the others. Raises InputError for what is wrong with the data, and where nothing is left of it.
    """
    kind = "ratings" if _rated(str(data)) else "pairs"
    check(str(data), kind)
    files = Files(Tally(skip))
    found = (judged.ratings if kind == "ratings" else judged.pairs)(str(data), files.take, files.tally, None if known else limit)
    rows = [row for row in found if known is None or split == "all" or judged.seen(row, dict(known)) == (split == "train")][:limit]
    if not rows:
        part = "" if split == "all" else f" in the split '{split}'"
        raise InputError(f"{data}: no {kind} are left{part}. {files.tally.in_words()}")
    if files.tally.counts:
        say(files.tally.in_words())
    items = list(dict.fromkeys((row.prompt, key) for row in rows for key in row.pictures))
    target = device_of(Settings(device=device))
    scores = {reward.name: _scored(reward, items, files, batch_size, target) for reward in rewards}
    prompts = [text_of(prompt) for prompt, _ in items]
    own = {
        "data": str(data),
        "sha256": judged.contents(rows),
        "split": split,
        kind: len(rows),
        "prompts": len({row.asked for row in rows}),
        "pictures": len({key for _, key in items}),
        "left_out": dict(files.tally.counts),
        "seed": seed,
    }
    test: Callable[[Mapping[str, Array], int], dict[str, Any]] = _Ratings(rows, items) if kind == "ratings" else _Pairs(rows, items)
    tests = {name: {**test(columns, seed), **_spread(columns[""])} for name, columns in scores.items()}
    return {**own, "rewards": tests, "agreement": _agreement({name: columns[""] for name, columns in scores.items()}, prompts)}


def _rated(source: str) -> bool:
    """Whether the data is of ratings, and not of pairs."""
    try:
        check(source, "pairs")
    except InputError:
        try:
            check(source, "ratings")
        except InputError:
            return False
        return True
    return False


@torch.no_grad()
def _scored(reward: CheckedReward, items: Sequence[Item], files: Files, batch_size: int, device: torch.device) -> dict[str, Array]:
    """Columns (n,) for n items: the scores under "", and the ratings of a reward that rates by aspect. Batches are of one size."""
    columns: dict[str, Array] = defaultdict(lambda: np.zeros(len(items)))
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor, Prompt]]] = defaultdict(list)

    def flush(batch: list[tuple[int, Tensor, Prompt]]) -> None:
        at, media = [i for i, _, _ in batch], torch.stack([pixels for _, pixels, _ in batch]).to(device)
        prompts = _batch([prompt for _, _, prompt in batch], media.shape[-2], media.shape[-1])
        columns[""][at] = reward(media, prompts).double().cpu().numpy()
        inner = reward.reward
        if isinstance(inner, RatingReward) and len(inner.aspects) > 1:
            for name, column in zip(inner.aspects, inner.rate(media, prompts).double().cpu().numpy().T, strict=True):
                columns[name][at] = column
        batch.clear()

    said = time.monotonic()
    for i, (prompt, key) in enumerate(items):
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say(f"{reward.name}: {i:,} of {len(items):,} pictures so far.")
        pixels = to_tensor(files.open(key))
        batch = waiting[tuple(pixels.shape)]
        batch.append((i, pixels, prompt))
        if len(batch) == batch_size:
            flush(batch)
    for batch in waiting.values():
        if batch:
            flush(batch)
    return dict(columns)


def _batch(prompts: Sequence[Prompt], height: int, width: int) -> Prompts:
    """Prompts with what they are about, where they are about pictures, in the size of what is judged."""
    texts = tuple(map(text_of, prompts))
    about = [prompt.open_both() for prompt in prompts if isinstance(prompt, PicturePrompt)]
    if not about:
        return Prompts(texts)
    if len(about) < len(prompts):
        raise InputError("Some rows of the data are about a picture (the key 'image'), and some are not: test them apart.")
    masks = [(fit(mask.convert("RGB"), height, width)[:1] >= 0.5).float() for _, mask in about if mask is not None]
    sources = torch.stack([fit(picture, height, width) for picture, _ in about])
    return Prompts(texts, sources, torch.stack(masks) if masks else None)


@dataclass(frozen=True)
class _Pairs:
    rows: Sequence[Judged]
    items: Sequence[Item]

    def __call__(self, columns: Mapping[str, Array], seed: int) -> dict[str, Any]:
        at = {item: i for i, item in enumerate(self.items)}
        better, worse = ([at[row.prompt, row.pictures[i]] for row in self.rows] for i in (0, 1))
        margins = columns[""][better] - columns[""][worse]
        accuracy = agreement.accuracy(margins, [row.asked for row in self.rows], seed, RESAMPLES)
        scale = agreement.fitted_scale(margins)
        table, error = agreement.reliability(margins, scale)
        return {
            "accuracy": accuracy.value,
            "interval": [accuracy.low, accuracy.high],
            "ties": int((margins == 0).sum()),
            "scale": scale,
            "calibration_error": error,
            "reliability": [row._asdict() for row in table],
        }


@dataclass(frozen=True)
class _Ratings:
    rows: Sequence[Judged]
    items: Sequence[Item]

    def __call__(self, columns: Mapping[str, Array], seed: int) -> dict[str, Any]:
        at = {item: i for i, item in enumerate(self.items)}
        found: dict[str, Any] = {}
        for name in judged.aspects_of(self.rows):
            own = [row for row in self.rows if name in dict(row.ratings)]
            wanted = np.array([dict(row.ratings)[name] for row in own])
            for column in ("", *([name] if name in columns else [])):
                scores = columns[column][[at[row.prompt, row.pictures[0]] for row in own]]
                found.setdefault(name, {})["own" if column else "reward"] = _correlation(scores, wanted, [row.asked for row in own], seed)
        return {"aspects": found}


def _correlation(scores: Array, wanted: Array, prompts: Sequence[str], seed: int) -> dict[str, Any]:
    def of(rows: Any) -> float:
        return agreement.spearman(scores[rows], wanted[rows])

    low, high = agreement.interval_over(prompts, of, seed, RESAMPLES // 4)
    return {"spearman": _number(of(slice(None))), "interval": [_number(low), _number(high)], "pictures": len(scores)}


def _spread(scores: Array) -> dict[str, float]:
    return {"mean": float(scores.mean()), "std": float(scores.std())}


def _agreement(scores: Mapping[str, Array], prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each two rewards the mean of Kendall's tau-b within prompts, and over how many prompts."""
    names, found = list(scores), dict[str, dict[str, Any]]()
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            tau, count = agreement.tau_within(scores[first], scores[second], prompts)
            found.setdefault(first, {})[second] = {"kendall_tau_b": _number(tau), "prompts": count}
    return found


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def marks_of(names: Sequence[str]) -> dict[str, set[str]]:
    """The prompts and pictures that any of the trained rewards among these names was trained on.

    Raises InputError where none is a trained reward's folder, or its list is missing or damaged.
    """
    folders = [folder for name in names if (folder := trained_folder(name))]
    if not folders:
        raise InputError("--split tells what a trained reward has seen from what it has not: name its folder in --reward, or drop --split.")
    known: dict[str, set[str]] = {"prompts": set(), "pictures": set()}
    for folder in folders:
        try:
            train = json.loads((folder / SPLIT).read_text(encoding="utf-8"))["train"]
            for kind, marks in known.items():
                marks.update(train[kind])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / SPLIT} is missing or damaged: what it was trained on is not known. Drop --split.") from error
    return known
