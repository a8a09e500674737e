"""`diffalign pairs --from-labels`: what people said, as the folder that the offline methods read."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffalign.cache import digest
from diffalign.checkpoint import occupied, whole_by_one
from diffalign.errors import InputError
from diffalign.label_results import agreement, verdicts
from diffalign.labels import Answer, Labels
from diffalign.trajectories import beside


@dataclass(frozen=True)
class Majority:
    """What most people said of every two samples. `pairs` are (the better, the worse, votes for it, votes against it)."""

    pairs: tuple[tuple[int, int, int, int], ...]
    ties: int
    divided: int
    skipped: int

    def in_words(self) -> str:
        counts = {"ties": self.ties, "people are divided": self.divided, "skipped": self.skipped}
        left = "; ".join(f"{what} {count:,}" for what, count in counts.items() if count)
        return f"{len(self.pairs):,} pairs" + (f". Left out: {left}." if left else ".")


def majority(answers: Sequence[Answer]) -> Majority:
    """Each answer is a vote on every two of its samples. A pair has a better one where more votes are for it than against it; a tie is
    neither, so that one vote and two ties make a pair."""
    votes: dict[tuple[int, int], Counter[str]] = {}
    for answer in answers:
        for pair, verdict in verdicts(answer).items():
            votes.setdefault(pair, Counter())[verdict] += 1
    pairs, ties, divided = list[tuple[int, int, int, int]](), 0, 0
    for (a, b), said in sorted(votes.items()):
        if said["first"] > said["second"]:
            pairs.append((a, b, said["first"], said["second"]))
        elif said["second"] > said["first"]:
            pairs.append((b, a, said["second"], said["first"]))
        else:
            ties, divided = ties + (not said["first"]), divided + bool(said["first"])
    return Majority(tuple(pairs), ties, divided, sum(answer.ranks is None for answer in answers))


def export(labels: Labels, output: Path) -> str:
    """Write pairs.jsonl, labels.jsonl, labels.yaml and the samples they name into the new folder `output`; what came of it, in words.

    Raises InputError where nothing was judged, a sample is gone or has changed, and where `output` holds something.
    """
    if occupied(output):
        raise InputError(f"{output} exists already, and is never overwritten: choose another --output.")
    answers = labels.answers()
    found = majority(answers)
    if not found.pairs:
        raise InputError(f"{labels.path} gives no pairs: {len(answers):,} answers, {found.in_words()} Label more: diffalign label.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_by_one(output) as draft:
            _write(labels, found, answers, draft)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): choose another --output.") from error
    return f"{output}: {found.in_words()}"


def _write(labels: Labels, found: Majority, answers: Sequence[Answer], folder: Path) -> None:
    gathered, asked_of = labels.gathered, {n: c.asked for c in labels.comparisons for n in c.media}
    places, kind = {id(medium): n for n, medium in enumerate(gathered.media)}, "sounds" if gathered.sounds else "images"
    (folder / kind).mkdir()
    names: dict[int, str] = {}

    def named(number: int) -> str:
        """The file's path in the folder; it is copied there the first time."""
        if number not in names:
            names[number] = _copy(labels, number, folder, kind)
        return names[number]

    def asking(number: int) -> dict[str, Any]:
        asked = gathered.asked[asked_of[number]]
        said = {} if asked.transcript is None else {"transcript": asked.transcript}
        about = {key: each for key, each in (("image", asked.source), ("mask", asked.mask)) if each is not None}
        return {"prompt": asked.text, **said, **{key: named(places[id(each)]) for key, each in about.items()}}

    def write(name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")

    write("pairs.jsonl", [{**asking(a), "chosen": named(a), "rejected": named(b), "votes": [n, m]} for a, b, n, m in found.pairs])
    balance = Counter[int]()
    for better, worse, *_ in found.pairs:
        balance.update({better: 1})
        balance.subtract({worse: 1})
    if not any("image" in asking(number) for number in balance):  # labels.jsonl has the sample itself under this key
        key = "audio" if gathered.sounds else "image"
        write("labels.jsonl", [{**asking(n), key: named(n), "label": wins > 0} for n, wins in sorted(balance.items()) if wins])
    agreed = agreement(answers)
    kappa = {"common": agreed.common, "share": agreed.share, "kappa": agreed.kappa, "name": agreed.name} if agreed.common else None
    about = {
        "database": str(labels.path.absolute()),
        "fingerprint": gathered.fingerprint(),
        "folders": [str(root) for root in gathered.roots],
        "settings": labels.settings,
        "raters": dict(sorted(Counter(answer.rater for answer in answers).items())),
        "pairs": len(found.pairs), "ties": found.ties, "divided": found.divided, "skipped": found.skipped,
        "agreement": kappa,
    }  # fmt: skip
    (folder / "labels.yaml").write_text(yaml.safe_dump(about, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _copy(labels: Labels, number: int, folder: Path, kind: str) -> str:
    medium = labels.gathered.media[number]
    path = labels.gathered.roots[medium.model] / medium.path
    mend = "put it back. Where the folder has moved, diffalign label FOLDER --labels FILE finds out."
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {mend}") from error
    if digest(data) != medium.sha256:
        raise InputError(f"{path} has changed since people judged it: {mend}")
    name = f"{kind}/{number + 1:06d}{path.suffix.lower()}"
    (folder / name).write_bytes(data)
    if beside(path).is_file():  # its trajectory, which D3PO learns from
        shutil.copyfile(beside(path), beside(folder / name))
    return name
