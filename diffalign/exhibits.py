"""What a run's prompts came to through its training: its pictures and sounds as data: URIs, bounded in number and size."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diffalign.data import PicturePrompt, caption_of
from diffalign.errors import InputError
from diffalign.evaluate import PICTURES
from diffalign.media import cells, data_uri, decode_image
from diffalign.run import Run

STEPS = 12  # shown of a training, the first and the last one among them
SIDE = 256  # pixels of a picture's longer side, at most
SMALL = 128  # pixels of the side of pictures that are shown as they are, enlarged without smoothing
SHEET = 1400  # pixels of a whole sheet's
SOUND_BYTES = 6_000_000  # of all sounds through the training together, as files


@dataclass(frozen=True)
class Moment:
    """The prompts' pictures at a step, and where they are of sounds, those: each a data: URI, in the order of the prompts."""

    step: int
    pictures: list[str]
    sounds: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Exhibition:
    """The same prompts and noise through a training. `sources` are the pictures that were edited; `notes` say what is not shown.

    `enlarged`: the pictures are so small that their pixels are to be seen.
    """

    captions: list[str]
    sources: list[str]
    moments: list[Moment]
    notes: list[str]
    enlarged: bool = False


@dataclass(frozen=True)
class Sheet:
    """The sheet of an evaluation, and of sounds those before and after."""

    picture: str
    before: list[str]
    after: list[str]


def through_training(run: Run) -> Exhibition | None:
    """The run's sheets, at most `STEPS` of them, cut into pictures; None where there are none yet.

    Sounds are shown of as many steps, and then of as many prompts, as `SOUND_BYTES` have room for. A sheet that cannot be read is a note.
    Raises InputError where the prompts cannot be read.
    """
    files = {int(file.stem[5:]): file for file in (run.path / "samples").glob("step-*.png") if re.fullmatch(r"step-\d+", file.stem)}
    if not files:
        return None
    held_out = run.read_prompts("heldout")
    prompts = (held_out * PICTURES)[:PICTURES]
    edits = isinstance(prompts[0], PicturePrompt)
    steps, notes = sorted(files), list[str]()
    sizes = [sum(file.stat().st_size for file in _sounds(files[step].with_suffix(""))) for step in (steps[0], steps[-1])]
    room = STEPS if not any(sizes) else max(2, min(STEPS, SOUND_BYTES // max(sizes)))
    heard = PICTURES if 2 * max(sizes) <= SOUND_BYTES else max(1, PICTURES * SOUND_BYTES // (2 * max(sizes)))
    chosen = evenly(steps, room)
    if len(chosen) < len(steps):
        notes.append(f"{len(chosen)} of {len(steps)} saved steps are shown; all are in samples/.")
    if heard < PICTURES:
        notes.append(f"Of the sounds the first {heard} of each step are here: more would make this file too large. All are in samples/.")
    moments, sources, longest = list[Moment](), list[str](), 0
    for step in chosen:
        try:
            rows = cells(decode_image(files[step].read_bytes(), files[step].name), 2 if edits else 1, len(prompts))
        except (InputError, OSError) as error:
            notes.append(f"Step {step} is not shown: {error}")
            continue
        longest = max(longest, *rows[-1][0].size)
        sources = sources or [small(picture, SIDE) for picture in rows[0]] if edits else []
        sounds = [_sound(file) for file in _sounds(files[step].with_suffix(""))[:heard]]
        moments.append(Moment(step, [small(picture, SIDE) for picture in rows[-1]], sounds))
    if longest > SIDE:
        notes.append(f"Pictures are scaled to {SIDE} pixels here; samples/ has them in full.")
    return Exhibition([caption_of(prompt) for prompt in prompts], sources, moments, notes, longest <= SMALL and not any(sizes))


def of_evaluation(run: Run) -> Sheet | None:
    """The newest sheet of before and after, of the training's end or of `diffalign eval`; None where there is none."""
    files = [file for file in (run.path / "samples" / "before-after.png", run.path / "eval.png") if file.is_file()]
    if not files:
        return None
    newest = max(files, key=lambda file: file.stat().st_mtime)
    before, after = (_sounds(newest.with_name(f"{newest.stem}-{name}")) for name in ("before", "after"))
    fit = sum(file.stat().st_size for file in (*before, *after)) <= SOUND_BYTES
    heard = [[_sound(file) for file in files] if fit else [] for files in (before, after)]
    return Sheet(small(decode_image(newest.read_bytes(), newest.name), SHEET), *heard)


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """`count` of the steps, evenly spaced, with the first and the last one; all of them where there are no more."""
    if len(steps) <= count:
        return [*steps]
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def small(picture: Image.Image, side: int) -> str:
    """A picture as a data: URI, scaled down to `side` pixels where it is larger: WebP, or PNG where that is smaller, as of flat ones."""
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    compressed, plain = io.BytesIO(), io.BytesIO()
    picture.save(compressed, "WEBP", quality=85, method=2)
    picture.save(plain, "PNG", compress_level=3)
    return data_uri(min(plain.getvalue(), compressed.getvalue(), key=len))


def _sounds(stem: Path) -> list[Path]:
    """`stem-0.wav`, `stem-1.wav`, ... in their order."""
    found = [file for file in stem.parent.glob(f"{stem.name}-*.wav") if re.fullmatch(r"\d+", file.stem[len(stem.name) + 1 :])]
    return sorted(found, key=lambda file: int(file.stem[len(stem.name) + 1 :]))


def _sound(file: Path) -> str:
    return f"data:audio/wav;base64,{base64.b64encode(file.read_bytes()).decode()}"
