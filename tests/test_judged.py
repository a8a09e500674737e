"""Judged pictures: how they are read, and that nothing that is trained on is tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign import judged
from diffalign.cache import digest
from diffalign.errors import InputError
from diffalign.judged import Judged
from diffalign.layouts import Picture
from diffalign.records import Tally


def take(picture: Picture) -> str | None:
    assert picture.path is not None
    return digest(picture.path.read_bytes())


def pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / f"{i}.png")
    return [digest((folder / f"{i}.png").read_bytes()) for i in range(count)]


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_pairs_of_ranked_pictures_without_ties(tmp_path: Path) -> None:
    keys, tally = pictures(tmp_path, 3), Tally(skip=False)
    tie = {"prompt": "b", "images": ["0.png", "1.png"], "scores": [1, 1]}
    lines(tmp_path / "ranks.jsonl", {"prompt": "a", "images": ["2.png", "0.png", "1.png"], "scores": [3, 1, 1]}, tie)
    found = list(judged.pairs(str(tmp_path), take, tally))
    assert [(row.prompt, row.pictures) for row in found] == [("a", (keys[2], keys[0])), ("a", (keys[2], keys[1]))]
    assert tally.counts == {"ties": 1}
    assert list(judged.pairs(str(tmp_path), take, Tally(False), limit=1)) == found[:1]


def test_ratings(tmp_path: Path) -> None:
    keys = pictures(tmp_path, 2)
    lines(
        tmp_path / "labels.jsonl",
        {"prompt": "a", "image": "0.png", "ratings": {"shape": 1, "colour": 4.5}, "label": True},
        {"prompt": "a", "image": "1.png", "ratings": {"colour": 2, "shape": None}},
        {"prompt": "b", "image": "1.png", "ratings": {}},
    )
    tally = Tally(skip=False)
    found = list(judged.ratings(str(tmp_path), take, tally))
    assert [(row.pictures, row.ratings) for row in found] == [
        ((keys[0],), (("colour", 4.5), ("shape", 1.0))),
        ((keys[1],), (("colour", 2.0),)),
    ]
    assert tally.counts == {"rows without a rating": 1}
    assert judged.aspects_of(found) == ("colour", "shape")
    assert judged.aspects_of(found, ["shape"]) == ("shape",)
    with pytest.raises(InputError, match=r"The data rates no aspect 'color'. Did you mean 'colour'"):
        judged.aspects_of(found, ["color"])


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ({"colour": float("nan")}, "line 1: the rating of 'colour' is nan: give a number"),
        ({"colour": float("inf")}, "the rating of 'colour' is inf"),
        ({"colour": "good"}, "the rating of 'colour' is 'good'"),
        ([1, 2], r"ratings are \[1, 2\]: give numbers by aspect"),
    ],
)
def test_ratings_that_are_none(ratings: Any, message: str, tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    lines(tmp_path / "labels.jsonl", {"prompt": "a", "image": "0.png", "ratings": ratings})
    with pytest.raises(InputError, match=message):
        list(judged.ratings(str(tmp_path), take, Tally(skip=True)))


def test_labels_without_ratings_are_named(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    lines(tmp_path / "labels.jsonl", {"prompt": "a", "image": "0.png", "label": True})
    with pytest.raises(InputError, match=r"prompt, image, label are no known layout of ratings. Known: labels.jsonl with ratings"):
        list(judged.ratings(str(tmp_path), take, Tally(skip=True)))


def test_image_reward_db_rates_in_columns(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    row = {"prompt_id": "x", "prompt": "a", "image_path": "0.png", "rank": 1, "overall_rating": 5, "fidelity_rating": 6}
    (tmp_path / "m.json").write_text(json.dumps([{**row, "image_text_alignment_rating": None}]))
    (found,) = judged.ratings(str(tmp_path / "m.json"), take, Tally(False))
    assert found.ratings == (("fidelity", 6.0), ("overall", 5.0))


def test_prompts_and_pictures_are_on_one_side_only() -> None:
    """Prompts 3k, 3k + 1 share a picture; prompts differ in case and spaces as people type them."""
    rows = [
        Judged(f"Prompt  {i}" if j else f"prompt {i}", (f"{i}-{j}", f"s{i // 3}" if i % 3 < 2 else f"t{i}"))
        for i in range(60)
        for j in (0, 1)
    ]
    for seed in range(3):
        train, held = judged.split(rows, 0.2, seed)
        assert sorted([*train, *held]) == list(range(120))
        sides = [[rows[i] for i in side] for side in (train, held)]
        assert not {r.asked for r in sides[0]} & {r.asked for r in sides[1]}
        assert not {k for r in sides[0] for k in r.pictures} & {k for r in sides[1] for k in r.pictures}
        assert 10 <= len({r.asked for r in sides[1]}) <= 12
        known = {kind: set(marks) for kind, marks in judged.marks(sides[0]).items()}
        assert all(judged.seen(r, known) for r in sides[0])
        assert not any(judged.seen(r, known) for r in sides[1])
    assert judged.split(rows, 0.2, 0)[1] != judged.split(rows, 0.2, 1)[1]
    assert judged.split(rows, 0.2, 1) == judged.split(rows, 0.2, 1)


def test_what_hangs_together_cannot_be_split() -> None:
    with pytest.raises(InputError, match="The data is of one prompt: nothing can be held out"):
        judged.split([Judged("a", ("0", "1")), Judged("A ", ("2", "3"))], 0.1, 0)
    chain = [Judged(f"{i}", (f"{i}", f"{i + 1}")) for i in range(5)]
    with pytest.raises(InputError, match="5 prompts that share pictures with each other"):
        judged.split(chain, 0.1, 0)
    large = [*chain, Judged("alone", ("x", "y"))]
    assert judged.split(large, 0.1, 0) == ([0, 1, 2, 3, 4], [5])
