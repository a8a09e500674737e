"""The world of the embedded editing model `shapes-edit`: pictures of the shapes world, and instructions that change one thing in them.

"make the squares red", "turn it into a circle", "make the background white".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from diffalign import shapes
from diffalign.errors import InputError, nearest
from diffalign.shapes import COLOURS, SHAPES, Scene

CHANGES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": tuple(SHAPES), "background": tuple(COLOURS)}
HELD_OUT = 256
SNAP = 4.0  # pixels, the width of a latent: the shapes stand on this grid
GRAMMAR = (
    "make <it|them|the shapes> <colour>, turn <it|them|the shapes> into <a shape|shapes>, make the background <colour>; "
    f"colours {', '.join(COLOURS)}, shapes {', '.join(SHAPES)}; for example 'make the circle red'"
)


@dataclass(frozen=True)
class Edit:
    """One attribute of a scene is to become `value`; everything else stays."""

    source: Scene
    attribute: str
    value: str

    @property
    def target(self) -> Scene:
        """What the edited picture should show."""
        return replace(self.source, **{self.attribute: self.value})


def instruction(edit: Edit, named: bool = True) -> str:
    """`make the circle red`, or where the shapes are not named `make it red`."""
    if edit.attribute == "background":
        return f"make the background {edit.value}"
    one = edit.source.count == 1
    what = f"the {edit.source.shape if one else SHAPES[edit.source.shape]}" if named else "it" if one else "them"
    if edit.attribute == "colour":
        return f"make {what} {edit.value}"
    return f"turn {what} into {f'a {edit.value}' if one else SHAPES[edit.value]}"


def parse(text: str) -> tuple[str, str]:
    """`(attribute, value)` that an instruction asks for. Raises InputError for a text outside the grammar."""
    words = " ".join(text.lower().split())
    found = re.fullmatch(r"make (?P<what>it|them|the (?P<noun>\w+)) (?P<colour>\w+)\.?", words) or re.fullmatch(
        r"turn (?P<what>it|them|the (?P<noun>\w+)) into (?:an? )?(?P<shape>\w+)\.?", words
    )
    if not found:
        raise InputError(f"'{text}' is not an instruction of the shapes-edit world. Its grammar: {GRAMMAR}.")
    said = found.groupdict()
    attribute = "shape" if "shape" in said else "background" if said["noun"] == "background" else "colour"
    singular = {name: name for name in SHAPES} | {plural: name for name, plural in SHAPES.items()}
    known = singular if attribute == "shape" else COLOURS
    value = said["shape" if attribute == "shape" else "colour"]
    nouns = singular if attribute == "shape" else {**singular, "background": "background"}
    for word, words_of in ((said["noun"], nouns), (value, known)):
        if word is not None and word not in words_of:
            hint = nearest(word, words_of)
            raise InputError(f"'{word}' in '{text}' is not a word of the shapes-edit world. {hint} Its grammar: {GRAMMAR}.")
    return attribute, singular[value] if attribute == "shape" else value


def every(scenes: Sequence[Scene]) -> list[Edit]:
    """All edits that lead from one of the scenes to another of them: at most 15 of each."""
    known = set(scenes)
    edits = (Edit(scene, name, value) for scene in scenes for name, values in CHANGES.items() for value in values)
    return [edit for edit in edits if edit.target != edit.source and edit.target in known]


def split() -> tuple[list[Edit], list[Edit]]:
    """(edits for training, 256 held out): both pictures of the first are training scenes of `shapes`, of the others held-out ones.

    So a held-out edit starts and ends at combinations that training never shows. They are those with the smallest hash.
    """
    train, held = (every(scenes) for scenes in shapes.split())

    def order(edit: Edit) -> str:
        return hashlib.sha256(f"{shapes.caption(edit.source)} {instruction(edit)}".encode()).hexdigest()

    return train, sorted(held, key=order)[:HELD_OUT]


def draw(edits: Sequence[Edit], rng: Generator, shown: Sequence[Scene] | None = None) -> tuple[Tensor, Tensor]:
    """`(sources, edited)`, pictures (B, 3, 32, 32) in [0, 1]; shapes stay at their places, colours keep their jitter.

    `shown` are other scenes than the targets for the edited pictures to show. Rounded to 8 bits: a picture that goes through a
    file stays the same.
    """
    after = [edit.target for edit in edits] if shown is None else shown
    layout = shapes.arrange([edit.source for edit in edits], rng, SNAP, after)
    before = shapes.paint([edit.source for edit in edits], layout)
    return eight_bits(before), eight_bits(shapes.paint(after, layout))


def eight_bits(pictures: Tensor) -> Tensor:
    """As a PNG keeps them."""
    return (pictures * 255).round() / 255
