"""The layouts of preference data that exist, each read into one kind of row: a prompt, its pictures, and which is better."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from diffalign import columns, records
from diffalign.columns import Picture
from diffalign.errors import InputError
from diffalign.records import Fault, Record, Tally
from diffalign.registry import MODELS
from diffalign.types import Data


@dataclass(frozen=True)
class Row:
    """What a prompt got. `merits` order its pictures, higher is better, equal is a tie; of a single one, above 0 is liked.

    None: nothing is said of them. `scores` are a reward's or a person's, where the data has some. `source` is what was edited, or filled
    where `mask` is white. `transcript` is what sounds say, the prompt being how; of sounds `pictures` are those.
    """

    where: str
    prompt: str
    pictures: tuple[Picture, ...]
    merits: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    source: Picture | None = None
    mask: Picture | None = None
    transcript: str | None = None
    ratings: Mapping[str, float] | None = field(default=None, kw_only=True)  # of a single picture, by aspect


Parse = Callable[[Iterable[Record], Tally], Iterator[Row]]


@dataclass(frozen=True)
class Layout:
    """A layout is known by the keys of its first record (`a|b`: either)."""

    name: str
    keys: tuple[str, ...]
    rows: Parse

    def fits(self, record: Record) -> bool:
        return all(any(name in record.values for name in key.split("|")) for key in self.keys)


def rows(source: str, kind: Data, tally: Tally) -> Iterator[Row]:
    """The rows of a source (a folder, a file of one, or hf:user/dataset) that serve `kind`, as a stream.

    Raises InputError where there is none, it is empty, in no known layout, or a record lacks a key; for paths that lead out of the
    folder; and, unless the tally skips them, for rows whose labels contradict, empty prompts and missing pictures.
    """
    stream = _records(source, kind)
    first = next(stream, None)
    if first is None:
        raise InputError(f"{source} is empty: it holds no {kind}.")
    for layout in LAYOUTS[kind]:
        if layout.fits(first):
            return layout.rows(itertools.chain([first], stream), tally)
    known = "; ".join(f"{layout.name} ({', '.join(key.replace('|', ' or ') for key in layout.keys)})" for layout in LAYOUTS[kind])
    raise InputError(f"{first.where}: the keys {', '.join(first.values)} are no known layout of {kind}. Known: {known}. See docs/data.md.")


def _records(source: str, kind: Data) -> Iterator[Record]:
    if source.startswith("hf:"):
        return records.hub(source.removeprefix("hf:"))
    path = MODELS.get(source, Path(source).expanduser())
    if not path.exists():
        raise InputError(f"There is no data {path}: give a folder, a file of one, or hf:user/dataset. See docs/data.md.")
    if not path.is_dir():
        return records.read(path)
    for name in FILES[kind]:
        found = [path / name] if "*" not in name else _training_part(sorted(path.rglob(name)), path)
        if found and found[0].is_file():
            return itertools.chain.from_iterable(records.read(file) for file in found)
    if kind == "pictures" and any(p.with_suffix(".txt").is_file() for p in path.rglob("*") if p.suffix.lower() in records.PICTURES):
        return records.read(path)
    others = " or pictures with a .txt file of the same name" if kind == "pictures" else ""
    raise InputError(f"{path} holds no {kind}: expected {', '.join(FILES[kind])}{others}. See docs/data.md.")


def _training_part(files: list[Path], folder: Path) -> list[Path]:
    """Of shards that are named by their split, those of the training split."""
    return [file for file in files if "train" in str(file.relative_to(folder))] or files


def _each(parse: Callable[[Record], Row]) -> Parse:
    def parsed(stream: Iterable[Record], tally: Tally) -> Iterator[Row]:
        for record in stream:
            try:
                row = parse(record)
            except Fault as fault:
                tally.note(fault)
                continue
            yield row

    return parsed


def _pair(record: Record) -> Row:
    pictures = tuple(columns.picture(record, key) for key in ("chosen", "rejected"))
    scores = columns.scores(record, "chosen_score", "rejected_score")
    if scores is not None and scores[0] < scores[1]:
        raise columns.contradiction(record, f"chosen_score {scores[0]:g} is below rejected_score {scores[1]:g}")
    return Row(record.where, columns.prompt(record), pictures, scores or (1.0, 0.0), scores, *_about(record))


def _ranked(record: Record) -> Row:
    """`images`, or `sounds`, best first. Equal scores are a tie; without scores the order alone counts."""
    key = columns.present(record, "images", "sounds")
    names = columns.several(record, key)
    pictures = tuple(columns.picture(record, key, value) for value in names)
    if record.values.get("scores") is None:
        return Row(record.where, columns.prompt(record), pictures, tuple(-float(i) for i in range(len(pictures))), None, *_about(record))
    scores = columns.numbers(record, "scores", len(pictures))
    if any(after > before for before, after in itertools.pairwise(scores)):
        raise columns.contradiction(record, f"{key} stand best first, and scores do not fall")
    return Row(record.where, columns.prompt(record), pictures, scores, scores, *_about(record))


def _about(record: Record) -> tuple[Picture | None, Picture | None, str | None]:
    """The picture and the mask that the prompt of a row is about, and its transcript, under the keys that prompt files have: each may be
    missing."""
    picture, mask = (None if record.values.get(key) is None else columns.picture(record, key) for key in ("image", "mask"))
    if picture is None and mask is not None:
        raise InputError(f"{record.where}: there is a mask, and no image that it is of.")
    return picture, mask, _transcript(record)


def _transcript(record: Record) -> str | None:
    return None if record.values.get("transcript") is None else columns.text(record, "transcript")


def _pick_a_pic(record: Record) -> Row:
    """arXiv 2305.01569: label_0 and label_1 are 1 and 0, or 0.5 each for a tie."""
    if record.values.get("has_label") is False or any(record.values.get(key) is None for key in ("label_0", "label_1")):
        raise Fault("rows without a label")
    labels = tuple(columns.number(record, key) for key in ("label_0", "label_1"))
    if not set(labels) <= {0.0, 0.5, 1.0} or sum(labels) != 1:
        raise columns.contradiction(record, f"label_0 is {labels[0]:g} and label_1 is {labels[1]:g}; they are 1 and 0, or 0.5 each")
    if labels[0] == labels[1]:
        raise Fault("ties")
    return Row(record.where, columns.prompt(record), tuple(columns.picture(record, key) for key in ("jpg_0", "jpg_1")), labels)


def _preferred(record: Record) -> Row:
    """HPDv2's train.json (arXiv 2306.09341): human_preference is 1 at the picture that was preferred."""
    key = columns.present(record, "image_path", "file_path")
    names = columns.several(record, key)
    labels = columns.numbers(record, "human_preference", len(names))
    if not set(labels) <= {0.0, 1.0} or sum(labels) != 1:
        raise columns.contradiction(record, f"human_preference is {[int(v) for v in labels]}; one of them is 1, the others 0")
    pictures = tuple(columns.picture(record, key, name, record.stem, "images") for name in names)
    return Row(record.where, columns.prompt(record), pictures, labels)


def _by_rank(record: Record) -> Row:
    """HPDv2's test.json, and the JSON files that ImageReward trains on: 1 (or the lowest) is the best rank."""
    key = columns.present(record, "image_path", "file_path", "generations")
    names = columns.several(record, key)
    ranks = columns.numbers(record, columns.present(record, "rank", "ranking"), len(names))
    pictures = tuple(columns.picture(record, key, name, record.stem, "images") for name in names)
    return Row(record.where, columns.prompt(record), pictures, tuple(-rank for rank in ranks))


def _image_reward(stream: Iterable[Record], tally: Tally) -> Iterator[Row]:
    """ImageRewardDB (arXiv 2304.05977): a row a picture, put together by prompt_id; rank 1 is the best.

    Rows that name files may stand in any order. Rows that hold pictures must stand together, or all of them would be in memory.
    """
    groups: dict[str, list[Rated]] = {}
    done: set[str] = set()
    for record in stream:
        try:
            identity, rated = str(record.values[columns.present(record, "prompt_id")]), _rated(record)
        except Fault as fault:
            tally.note(fault)
            continue
        if rated.row.pictures[0].data is not None and identity not in groups:
            done.update(groups)
            yield from _together(groups, tally)
            groups = {}
            if identity in done:
                raise InputError(f"{record.where}: prompt_id {identity} came before. The rows of a prompt must stand together: sort them.")
        groups.setdefault(identity, []).append(rated)
    yield from _together(groups, tally)


class Rated(NamedTuple):
    """A row of one picture, with what it says of its merit: a rank (1 is the best), a rating, or both."""

    row: Row
    rank: float | None
    rating: float | None


def _rated(record: Record) -> Rated:
    key = columns.present(record, "image_path", "image")
    given = {name: columns.number(record, name) for name in ("rank", "overall_rating") if record.values.get(name) is not None}
    if not given:
        raise Fault("rows without a label")
    return Rated(Row(record.where, columns.prompt(record), (columns.picture(record, key),)), given.get("rank"), given.get("overall_rating"))


def _together(groups: Mapping[str, Sequence[Rated]], tally: Tally) -> Iterator[Row]:
    for group in groups.values():
        if len(group) == 1:
            tally.note(Fault(columns.SINGLE))
            continue
        first = group[0].row
        merits = [-each.rank for each in group if each.rank is not None]
        if len(merits) < len(group):
            merits = [each.rating for each in group if each.rating is not None]
        if len(merits) < len(group):
            what = "the pictures of a prompt need a rank each, or an overall_rating each, and some have one, some the other"
            tally.note(Fault("rows whose labels contradict", f"{first.where}: {what}."))
            continue
        yield Row(first.where, first.prompt, tuple(each.row.pictures[0] for each in group), tuple(merits))


def _labelled(record: Record) -> Row:
    label = record.values[columns.present(record, "label")]
    if not isinstance(label, bool | int | float) or label not in (0, 1, -1):
        raise InputError(f"{record.where}: the label is {label!r}: give true or false (or 1 and 0, or 1 and -1).")
    medium = columns.picture(record, columns.present(record, "image", "audio"))
    asked, scores = columns.prompt(record), columns.scores(record, "score")
    return Row(record.where, asked, (medium,), (float(label),), scores, transcript=_transcript(record))


def _rated_aspects(record: Record) -> Row:
    """`ratings` are numbers by aspect. An aspect may be missing, or null; without any the row says nothing."""
    values = record.values[columns.present(record, "ratings")]
    if not isinstance(values, dict):
        raise InputError(f'{record.where}: ratings are {values!r}: give numbers by aspect, such as {{"colour": 4}}.')
    for name, value in values.items():
        if value is not None and not columns.is_number(value):
            raise InputError(f"{record.where}: the rating of '{name}' is {value!r}: give a number, or leave it out.")
    return _with_ratings(record, "image", {str(name): float(value) for name, value in values.items() if value is not None})


def _rated_by_columns(record: Record) -> Row:
    """ImageRewardDB: a column an aspect."""
    given = {name.removesuffix("_rating"): columns.number(record, name) for name in _RATINGS if record.values.get(name) is not None}
    return _with_ratings(record, columns.present(record, "image_path", "image"), given)


def _with_ratings(record: Record, key: str, ratings: Mapping[str, float]) -> Row:
    if not ratings:
        raise Fault("rows without a rating")
    return Row(record.where, columns.prompt(record), (columns.picture(record, key),), ratings=ratings)


def _captioned(record: Record) -> Row:
    medium = columns.picture(record, columns.present(record, "image", "audio", "file_name"))
    asked, scores = columns.prompt(record), columns.scores(record, "score")
    return Row(record.where, asked, (medium,), None, scores, transcript=_transcript(record))


def _edited(record: Record) -> Row:
    """`edited` is the answer to `instruction` about `source`; the keys of InstructPix2Pix's data sets mean the same."""
    instruction, source, edited = (columns.present(record, *names.split("|")) for names in (_INSTRUCTION, _SOURCE, _EDITED))
    picture, about = columns.picture(record, edited), columns.picture(record, source)
    return Row(record.where, columns.text(record, instruction), (picture,), None, columns.scores(record, "score"), about)


_ASKED = "prompt|caption|transcript"
_RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
_HPD = "image_path|file_path"
_BETTER = (
    Layout("pairs.jsonl", (_ASKED, "chosen", "rejected"), _each(_pair)),
    Layout("Pick-a-Pic", ("caption", "jpg_0", "jpg_1", "label_0", "label_1"), _each(_pick_a_pic)),
    Layout("ImageRewardDB", ("prompt_id", "prompt", "image_path|image", "rank|overall_rating"), _image_reward),
    Layout("HPDv2 train.json", ("prompt", _HPD, "human_preference"), _each(_preferred)),
    Layout("HPDv2 test.json or ImageReward", ("prompt", f"{_HPD}|generations", "rank|ranking"), _each(_by_rank)),
    Layout("ranks.jsonl", (_ASKED, "images|sounds"), _each(_ranked)),
)
_SOURCE = "source|original_image|input_image|source_img|original_image_file_name|input_image_file_name"
_INSTRUCTION = "instruction|edit_prompt|edit_instruction|edit"
_EDITED = "edited|edited_image|edited_img|target_img|edited_image_file_name"
LAYOUTS: dict[Data, tuple[Layout, ...]] = {
    "pairs": _BETTER,
    "trajectories": tuple(layout for layout in _BETTER if layout.name in ("pairs.jsonl", "ranks.jsonl")),
    "labels": (Layout("labels.jsonl", (_ASKED, "image|audio", "label"), _each(_labelled)), *_BETTER),
    "ratings": (
        Layout("labels.jsonl with ratings", ("prompt|caption", "image", "ratings"), _each(_rated_aspects)),
        Layout("ImageRewardDB", ("prompt", "image_path|image", "overall_rating"), _each(_rated_by_columns)),
    ),
    "pictures": (Layout("pictures.jsonl or an imagefolder", (f"{_ASKED}|text", "image|audio|file_name"), _each(_captioned)),),
    "edits": (Layout("edits.jsonl, or InstructPix2Pix's columns", (_SOURCE, _INSTRUCTION, _EDITED), _each(_edited)),),
}
_BETTER_FILES = ("pairs.jsonl", "ranks.jsonl", "train.json", "metadata-train.parquet", "*.parquet")
FILES: dict[Data, tuple[str, ...]] = {
    "pairs": _BETTER_FILES,
    "trajectories": ("pairs.jsonl", "ranks.jsonl"),
    "labels": ("labels.jsonl", *_BETTER_FILES),
    "ratings": ("labels.jsonl", "metadata-train.parquet", "*.parquet"),
    "pictures": ("pictures.jsonl", "metadata.jsonl", "*.parquet"),
    "edits": ("edits.jsonl", "metadata.jsonl", "*.parquet"),
}
