"""Folders of samples that people compare, one of each model: which prompts there are, and which files answer them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffalign import columns, records
from diffalign.cache import digest
from diffalign.columns import Picture
from diffalign.data import Prompt, SpokenPrompt, text_of
from diffalign.errors import InputError
from diffalign.media import decode_image
from diffalign.records import PICTURES, Fault, Record
from diffalign.sound import decode_wav

LEDGER = "samples.jsonl"
FILES = (LEDGER, "ranks.jsonl")


@dataclass(frozen=True)
class Medium:
    """A picture or sound: its file's path in the folder of its model, and the sha256 of its bytes."""

    model: int
    path: str
    sha256: str


@dataclass(frozen=True)
class Asked:
    """A prompt and its samples, of all models; `source` is the picture that it is about, filled anew where `mask` is white."""

    text: str
    transcript: str | None
    source: Medium | None
    mask: Medium | None
    samples: tuple[Medium, ...]


@dataclass(frozen=True)
class Gathered:
    """What people compare: `models` are the names of the folders `roots`. All media are pictures, or all are sounds."""

    models: tuple[str, ...]
    roots: tuple[Path, ...]
    asked: tuple[Asked, ...]

    @cached_property
    def media(self) -> list[Medium]:
        """Every medium, numbered by its place."""
        return [each for asked in self.asked for each in (*asked.samples, asked.source, asked.mask) if each is not None]

    @property
    def sounds(self) -> bool:
        return is_wav(self.asked[0].samples[0].path)

    def fingerprint(self) -> str:
        """Of prompts and files; not of where the folders lie."""
        return digest(*(repr(asked) for asked in self.asked))


def gather(folders: Sequence[str | Path]) -> Gathered:
    """Read the folders, one a model; raises InputError where one is missing, holds no samples, or holds what cannot be used."""
    roots = tuple(Path(folder).expanduser().absolute() for folder in folders)
    if len({root.resolve() for root in roots}) < len(roots):
        raise InputError("One folder is named twice: give the folder of each model once.")
    found: dict[tuple[str, str | None, str, str], list[Medium]] = {}
    about: dict[tuple[str, str | None, str, str], tuple[Medium | None, Medium | None]] = {}
    for model, root in enumerate(roots):
        for record in _records(root):
            try:
                text, said, media, beside = _row(record, model)
            except Fault as fault:
                raise InputError(f"{fault.message or fault} Mend it: people cannot judge it.") from fault
            source, mask = ("" if each is None else each.sha256 for each in beside)
            key = (text, said, source, mask)
            about.setdefault(key, beside)
            own = found.setdefault(key, [])
            own.extend(medium for medium in media if medium not in own)
    asked = tuple(Asked(*key[:2], *about[key], tuple(media)) for key, media in found.items())
    kinds = {is_wav(each.path) for one in asked for each in one.samples}
    if len(kinds) > 1:
        raise InputError("There are both pictures and sounds: give folders of one kind.")
    return Gathered(_names(roots), roots, asked)


def check(gathered: Gathered) -> None:
    """Open every medium; raises InputError with the file for one that is damaged."""
    for medium in gathered.media:
        path = gathered.roots[medium.model] / medium.path
        (decode_wav if is_wav(medium.path) else decode_image)(path.read_bytes(), str(path))


def is_wav(path: str) -> bool:
    return path.lower().endswith(".wav")


def note(folder: Path, prompts: Sequence[Prompt], paths: Sequence[Path]) -> None:
    """Add a line to samples.jsonl for each sample, one of each prompt; a file that has a line there already gets none."""
    known = noted(folder)
    with (folder / LEDGER).open("a", encoding="utf-8") as opened:
        for prompt, path in zip(prompts, paths, strict=True):
            name = str(path.relative_to(folder))
            if name not in known:
                said = {"transcript": prompt.transcript} if isinstance(prompt, SpokenPrompt) else {}
                what = {"sounds": [name]} if is_wav(name) else {"images": [name]}
                opened.write(json.dumps({"prompt": text_of(prompt), **said, **what}, ensure_ascii=False) + "\n")


def noted(folder: Path) -> set[str]:
    """The files that samples.jsonl names; a last line that was cut short by a kill is taken away."""
    file = folder / LEDGER
    data = file.read_bytes() if file.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        file.write_bytes(whole)
    return {name for line in whole.splitlines() for name in _named(line)}


def _named(line: bytes) -> list[str]:
    try:
        values = json.loads(line)
        return [*values.get("images", ()), *values.get("sounds", ())]
    except (ValueError, AttributeError, TypeError):  # it is said where the folder is read
        return []


def _records(root: Path) -> Iterator[Record]:
    if not root.is_dir():
        raise InputError(f"There is no folder {root}: give one that diffalign sample or diffalign pairs has made. See docs/label.md.")
    for name in FILES:
        if (root / name).is_file():
            yield from records.read(root / name)
            return
    if (root / "config.yaml").is_file():
        raise InputError(f"{root} is a run. Its samples: diffalign label --pipeline {root} --prompts FILE --output DIR.")
    if not any(path.with_suffix(".txt").is_file() for path in root.rglob("*") if path.suffix.lower() in PICTURES):
        raise InputError(
            f"{root} holds no samples: expected {' or '.join(FILES)}, or pictures or sounds with a .txt file of the same name. "
            "See docs/label.md."
        )
    yield from records.read(root)


def _row(record: Record, model: int) -> tuple[str, str | None, list[Medium], tuple[Medium | None, Medium | None]]:
    captioned = "images" not in record.values and "sounds" not in record.values
    key = columns.present(record, "images", "sounds", "image") if captioned else columns.present(record, "images", "sounds")
    names = [record.values[key]] if captioned else record.values[key]
    if not isinstance(names, list) or not names:
        raise InputError(f"{record.where}: {key} is no list of files.")
    said = None if record.values.get("transcript") is None else columns.text(record, "transcript")
    media = [_medium(record, columns.picture(record, key, name), model) for name in names]
    source, mask = (
        None if captioned or record.values.get(name) is None else _medium(record, columns.picture(record, name), model)
        for name in ("image", "mask")
    )
    return columns.prompt(record), said, media, (source, mask)


def _medium(record: Record, picture: Picture, model: int) -> Medium:
    if picture.path is None or record.root is None:
        raise InputError(f"{record.where}: a sample stands in the line itself: give files, by their paths in the folder.")
    if picture.path.suffix.lower() not in PICTURES:
        raise InputError(f"{picture.name}: its ending is not one of {', '.join(PICTURES)}.")
    try:
        data = picture.path.read_bytes()
    except OSError as error:
        raise InputError(f"{picture.name} cannot be read ({error.strerror}): make it again, or take its line away.") from error
    return Medium(model, str(picture.path.relative_to(record.root)), digest(data))


def _names(roots: Sequence[Path]) -> tuple[str, ...]:
    """As many last parts of the paths as it takes to tell all apart."""
    for parts in range(1, max(len(root.parts) for root in roots) + 1):
        names = tuple("/".join(root.parts[-parts:]) for root in roots)
        if len(set(names)) == len(names):
            return names
    return tuple(map(str, roots))
