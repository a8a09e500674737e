"""Recordings that sounds are compared with: one for all prompts, one for each in a file of prompts, or those that the prompts carry."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from diffalign.errors import InputError
from diffalign.sound import CLIPPED, Sound, read_wav
from diffalign.types import Prompts

KEY = "reference"
EXAMPLE = '{"prompt": "a calm voice", "transcript": "seven", "reference": "seven.wav"}'
SILENT = 1e-6  # the largest sample of a recording that says nothing: less than a step of 16 bits


@functools.lru_cache(maxsize=256)
def _opened(path: Path, changed: int, size: int) -> Sound:
    """A recording; `changed` is when, so that a file that was written anew is read anew."""
    sound = read_wav(path)
    if float(sound.waveform.abs().max()) < SILENT:
        raise InputError(f"The recording {path} is silent: there is nothing to compare with. Name another.")
    if sound.clipped > CLIPPED:
        logging.getLogger("diffalign").warning("The recording %s is clipped: %.1f%% of it is at full scale.", path, 100 * sound.clipped)
    return sound


def _open(path: Path) -> Sound:
    """Raises InputError where the file is missing, no .wav, or silent."""
    return _opened(*identity(path))


def identity(path: Path) -> tuple[Path, int, int]:
    """What tells a file from others and from itself before it was written anew."""
    found = path.stat() if path.is_file() else None
    return path, found.st_mtime_ns if found else 0, found.st_size if found else 0


@dataclass(frozen=True)
class Recordings:
    """The recordings of prompts. `given`: a .wav file for all of them; a .jsonl file; None: `metadata["reference"]` of each.

    A line of a .jsonl file is as one of a file of prompts, and has a path in the file's folder besides.
    """

    given: Path | None

    def check(self) -> None:
        """Open what is given; raises InputError for a file that is missing, damaged or silent."""
        if self.given is not None:
            for path in {_path(self.given)} if not self._is_list else set(self.listed.values()):
                _open(path)

    def check_for(self, prompts: Prompts, sample_rate: int) -> list[int]:
        """Open the recording of each prompt; their samples at `sample_rate` Hz. Raises InputError for a prompt that has none,
        or one that `check` refuses, or that is not brought to that rate."""
        paths = self.paths(prompts)
        lengths = {path: _open(path).length_at(sample_rate, f"The recording {path}") for path in {*paths}}
        return [lengths[path] for path in paths]

    def of(self, prompts: Prompts, sample_rate: int) -> list[Tensor]:
        """For each prompt its recording (any,) at `sample_rate` Hz. Raises InputError for a prompt that has none."""
        return [_open(path).at(sample_rate).waveform for path in self.paths(prompts)]

    def paths(self, prompts: Prompts) -> list[Path]:
        """For each prompt the file of its recording."""
        if self.given is not None and not self._is_list:
            return [_path(self.given)] * len(prompts)
        if self.given is not None:
            keys = list(zip(prompts.text, prompts.transcript or (None,) * len(prompts), strict=True))
            lacking = [said or text for text, said in keys if (text, said) not in self.listed]
            if lacking:
                raise InputError(f"{self.given} has no line for the prompt '{lacking[0]}'. Add one such as {EXAMPLE}.")
            return [self.listed[key] for key in keys]
        found: list[Any] = [row.get(KEY) for row in prompts.metadata or ({},) * len(prompts)]
        for path, text in zip(found, prompts.spoken, strict=True):
            if not isinstance(path, str | Path):
                raise InputError(
                    f"The prompt '{text}' has no recording to compare with: --reward.reference takes a .wav file for all prompts, or a "
                    f".jsonl file of lines such as {EXAMPLE}."
                )
        return [_path(Path(path)) for path in found]

    @property
    def _is_list(self) -> bool:
        return self.given is not None and self.given.suffix == ".jsonl"

    @cached_property
    def listed(self) -> Mapping[tuple[str, str | None], Path]:
        """The files of a .jsonl file, by text and transcript. Raises InputError for a line that cannot be used."""
        assert self.given is not None
        path = _path(self.given)
        if not path.is_file():
            raise InputError(f"There is no file {path}: --reward.reference takes a .wav file, or a .jsonl file of lines such as {EXAMPLE}.")
        found: dict[tuple[str, str | None], Path] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            key, file = _line(line, f"{path}, line {number}", path.parent)
            if found.setdefault(key, file) != file:
                raise InputError(f"{path}, line {number}: the prompt '{key[1] or key[0]}' has another recording further up. Drop one.")
        if not found:
            raise InputError(f"{path} names no recordings. Write lines such as {EXAMPLE}.")
        return found


def _path(path: Path) -> Path:
    return path.expanduser().absolute()


def _line(line: str, where: str, root: Path) -> tuple[tuple[str, str | None], Path]:
    try:
        values = json.loads(line)
        text, said, file = values.get("prompt") or "", values.get("transcript"), values[KEY]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{where}: expected an object with the key "{KEY}", such as {EXAMPLE}.') from error
    if not isinstance(text, str) or not isinstance(said, str | None) or not isinstance(file, str) or not file or "\0" in file:
        raise InputError(f"{where}: prompt, transcript and {KEY} are texts, such as {EXAMPLE}.")
    if PurePath(file).is_absolute() or not (root / file).resolve().is_relative_to(root.resolve()):
        raise InputError(f"{where}: the path {file!r} leads out of {root}. Recordings lie in the file's folder.")
    return (text.strip(), None if said is None else said.strip()), root / file
