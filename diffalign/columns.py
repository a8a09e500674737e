"""What a record of preference data says under a key: text, numbers and pictures, checked, with the place where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from diffalign.errors import InputError
from diffalign.media import from_data_uri
from diffalign.records import Fault, Record

SINGLE = "prompts with a single picture"


@dataclass(frozen=True)
class Picture:
    """A picture, or a sound, that is not read yet: a file, or the bytes of a row; `name` is what messages call it."""

    name: str
    path: Path | None = None
    data: bytes | None = None


def present(record: Record, *names: str) -> str:
    """The first of the names that the record has; raises InputError where it has none."""
    for name in names:
        if name in record.values:
            return name
    raise InputError(f"{record.where}: the key {' or '.join(names)} is missing. It holds {', '.join(record.values)}.")


def prompt(record: Record) -> str:
    """What was asked for, under one of its three names; beside a transcript it may be missing, and is then empty."""
    if record.values.get("transcript") is not None and not any(record.values.get(key) for key in ("prompt", "caption", "text")):
        return ""
    return text(record, present(record, "prompt", "caption", "text"))


def text(record: Record, key: str) -> str:
    """Words without the white space around them. Raises InputError for what is none, Fault where they are missing or empty."""
    words = record.values[key]
    if not isinstance(words, str | None):
        raise InputError(f"{record.where}: {key} is no text.")
    if not words or not words.strip():
        raise Fault("empty prompts", f"{record.where}: {key} is empty.")
    try:
        words.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise InputError(f"{record.where}: {key} is no text ({error.reason}).") from error
    return words.strip()


def number(record: Record, key: str) -> float:
    """A finite number; raises InputError for anything else."""
    value = record.values[present(record, key)]
    if not is_number(value):
        raise InputError(f"{record.where}: {key} is {value!r}: give a number.")
    return float(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # no NaN, no infinity, and what float() takes


def scores(record: Record, *keys: str) -> tuple[float, ...] | None:
    """Numbers that a row may have: all of them, or none."""
    if all(record.values.get(key) is None for key in keys):
        return None
    return tuple(number(record, key) for key in keys)


def several(record: Record, key: str) -> list[Any]:
    """A list of two or more. Raises InputError for what is no list, Fault for a shorter one."""
    value = record.values[present(record, key)]
    if not isinstance(value, list):
        raise InputError(f"{record.where}: {key} is no list of two or more pictures.")
    if len(value) < 2:
        raise Fault(SINGLE)
    return value


def numbers(record: Record, key: str, count: int) -> tuple[float, ...]:
    """A list of numbers, one for each of `count` pictures. Raises InputError for what is none, Fault for another count."""
    value = record.values[present(record, key)]
    if not isinstance(value, list) or not all(map(is_number, value)):
        raise InputError(f"{record.where}: {key} is no list of numbers.")
    if len(value) != count:
        raise contradiction(record, f"{key} has {len(value)} numbers for {count} pictures")
    return tuple(float(v) for v in value)


def contradiction(record: Record, what: str) -> Fault:
    """The fault of a row whose labels cannot all be true."""
    return Fault("rows whose labels contradict", f"{record.where}: the labels contradict: {what}.")


def picture(record: Record, key: str, value: Any = None, *folders: str) -> Picture:
    """The picture of a row: bytes, or a path in the record's folder (or in one of `folders` in it, the first that has it)."""
    value = record.values[present(record, key)] if value is None else value
    if isinstance(value, dict):  # an Image or Audio column of the package datasets
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Picture(f"{record.where} ({key})", data=value)
    if value is None or value == "":
        raise Fault("missing pictures", f"{record.where}: {key} holds no picture.")
    if not isinstance(value, str):
        raise InputError(f"{record.where}: {key} is no picture: give its path in the folder.")
    if value.startswith("data:"):
        try:
            return Picture(f"{record.where} ({key})", data=from_data_uri(value))
        except InputError as error:
            raise Fault("pictures that cannot be read", f"{record.where}: {key}: {error}") from error
    if record.root is None:
        raise InputError(f"{record.where}: {key} is a path, and a stream has no files. Download the data set, and give its folder.")
    paths = [_inside(record, record.root / folder, value) for folder in (*folders, "")]
    path = next((path for path in paths if path.is_file()), paths[0])
    return Picture(f"{path} ({record.where})", path)


def _inside(record: Record, folder: Path, name: str) -> Path:
    """A path that a data file names. It must stay in the data's folder, also through links: the file may come from anyone."""
    assert record.root is not None
    root, path = record.root.resolve(), folder / name
    try:
        inside = "\0" not in name and not PurePath(name).is_absolute() and path.resolve().is_relative_to(root)
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long or no text, links that go in circles
        raise InputError(f"{record.where}: {name[:100]!r} is no path.") from error
    if not inside:
        raise InputError(
            f"{record.where}: the path {name!r} leads out of {record.root}, or a link on it does. Keep pictures in the folder."
        )
    return path
