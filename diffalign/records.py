"""Files of rows, read as a stream of plain records that know where they stand: JSON lines, JSON lists, parquet, captioned pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import InputError

CHUNK = 1 << 20
NAMED = 5  # faults of one kind that are named; the others are counted
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".wav")  # a sound stands where a picture does


@dataclass(frozen=True)
class Record:
    """One row: its values, where it stands (a file and a line), and the folder that its paths are relative to, None for a stream."""

    where: str
    values: Mapping[str, Any]
    root: Path | None
    stem: str = ""  # of the file: HPDv2 keeps the pictures of train.json in train/


class Fault(Exception):
    """What is wrong with one row or picture and can be left out: a `reason` to count it under, and the whole `message`.

    Without a message it is no fault, and always left out: a tie, a row without a label.
    """

    def __init__(self, reason: str, message: str | None = None) -> None:
        super().__init__(message or reason)
        self.reason, self.message = reason, message


@dataclass
class Tally:
    """What was left out, by reason. Raises InputError at the first fault, unless faults are to be skipped."""

    skip: bool
    counts: Counter[str] = field(default_factory=Counter[str])
    named: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def note(self, fault: Fault) -> None:
        if fault.message is not None and not self.skip:
            raise InputError(f"{fault.message} Mend it, or leave out what is like it: --bad-pictures skip.") from fault
        self.counts[fault.reason] += 1
        if fault.message is not None and self.counts[fault.reason] <= NAMED:
            self.named.setdefault(fault.reason, []).append(fault.message)

    def in_words(self) -> str:
        """`Left out: ties 3; missing pictures 2 (There is no picture a.png; There is no picture b.png)`, or nothing."""
        named = {reason: f" ({' '.join(messages)})" for reason, messages in self.named.items()}
        parts = [f"{reason} {count:,}{named.get(reason, '')}" for reason, count in self.counts.items()]
        return f"Left out: {'; '.join(parts)}" if parts else ""


def read(path: Path) -> Iterator[Record]:
    """The records of a file or of a folder of captioned pictures. Raises InputError for one that is none, with the line."""
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    if path.is_dir():
        yield from _captioned(path)
    elif path.suffix in readers:
        for number, values in readers[path.suffix](path):
            unit = {".jsonl": "line", ".json": "entry", ".parquet": "row"}[path.suffix]
            yield Record(f"{path}, {unit} {number}", values, path.parent, path.stem)
    else:
        raise InputError(f"{path} is no file of examples: give a folder, or one of its .jsonl, .json or .parquet files.")


def hub(name: str) -> Iterator[Record]:
    """The rows of a Hub data set, `user/dataset` or `user/dataset:split`, as they come over the network."""
    repository, _, split = name.partition(":")
    with _datasets(f"hf:{name}") as datasets:
        try:
            stream = datasets.load_dataset(repository, split=split or "train", streaming=True)
            for number, values in enumerate(stream.decode(False) if stream.features else stream, 1):
                yield Record(f"hf:{name}, row {number}", values, None)
        except Exception as error:
            raise InputError(
                f"hf:{name} cannot be streamed ({_said(error)}). Check the name, the split (hf:user/dataset:split), the network and your "
                "token (hf auth login); a data set that needs its own loading script is downloaded by hand, and given as a folder."
            ) from error


def check_hub(name: str) -> None:
    """Raise InputError where the Hub cannot be streamed from here at all; nothing is fetched."""
    with _datasets(f"hf:{name}"):
        pass


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(line, f"{path}, line {number}")


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON ({_said(error)}). Each line is one object.") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a JSON object such as {{...}}.")
    return values


def _json_list(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSON list one by one: HPDv2's is some hundred MB, and only a limit of it may be wanted."""
    decoder, number = json.JSONDecoder(), 0
    with _text(path) as file:
        text, at = file.read(CHUNK).lstrip(), 1
        if not text.startswith("["):
            raise InputError(f"{path} is no JSON list of objects: expected [{{...}}, ...].")
        while True:
            at = _skip(text, at, ", \n\r\t" if number else " \n\r\t")
            try:
                if at < len(text) and text[at] == "]":
                    return
                values, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                more = file.read(max(CHUNK, len(text) - at))  # an object longer than a chunk: twice as much each time
                if not more:
                    raise InputError(f"{path}, entry {number + 1}: no JSON, or cut short ({_said(error)}).") from error
                text, at = text[at:] + more, 0
                continue
            number += 1
            if not isinstance(values, dict):
                raise InputError(f"{path}, entry {number}: expected a JSON object such as {{...}}.")
            yield number, values


def _skip(text: str, at: int, what: str) -> int:
    while at < len(text) and text[at] in what:
        at += 1
    return at


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _datasets(str(path)) as datasets:
        try:
            stream = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True).decode(False)
            yield from enumerate(stream, 1)
        except Exception as error:
            raise InputError(f"{path} is no parquet file that can be read ({_said(error)}). Fetch it again.") from error


def _captioned(folder: Path) -> Iterator[Record]:
    """Pictures with a text file of the same name beside them."""
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES):
        caption = path.with_suffix(".txt")
        text = "".join(_lines(caption)).strip() if caption.is_file() else ""
        yield Record(str(caption), {"text": text, "image": str(path.relative_to(folder))}, folder)


def _lines(path: Path) -> Iterator[str]:
    with _text(path) as file:
        yield from file


@contextmanager
def _text(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # with or without a byte-order mark
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file (UTF-8).") from error


@contextmanager
def _datasets(name: str) -> Iterator[Any]:
    """The package, silent while the block runs; raises InputError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name} is read with the package datasets, which is not installed: pip install 'diffalign[data]'") from error
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(level)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
