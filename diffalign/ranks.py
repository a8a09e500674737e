"""A folder of ranked samples: pictures or sounds, ranks.jsonl (all samples of a prompt) and pairs.jsonl (the best and the worst of them).

ranks.jsonl is the ledger: a prompt whose line is there is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml
from torch import Tensor

from diffalign.errors import InputError
from diffalign.media import to_pil
from diffalign.sound import write_wav
from diffalign.trajectories import Stored, beside


class Drawn(NamedTuple):
    """One sample: its picture (3, H, W) or sound (samples,), its score, and its trajectory where that is kept."""

    medium: Tensor
    score: float
    trajectory: Stored | None = None


@dataclass(frozen=True)
class Outcome:
    """The samples of one prompt, in the order in which they were drawn; sounds have a `sample_rate`, Hz."""

    number: int
    prompt: str
    samples: list[Drawn]
    transcript: str | None = None
    sample_rate: int | None = None


@dataclass(frozen=True)
class Ranked:
    """The samples of one prompt, best first: `images` are paths in the folder, of pictures or sounds."""

    prompt: str
    images: list[str]
    scores: list[float]
    transcript: str | None = None

    @property
    def line(self) -> dict[str, Any]:
        """The line of ranks.jsonl."""
        what = "sounds" if self.images[0].endswith(".wav") else "images"
        return {**self._asked, what: self.images, "scores": self.scores}

    @property
    def _asked(self) -> dict[str, str]:
        return {"prompt": self.prompt} | ({} if self.transcript is None else {"transcript": self.transcript})

    @staticmethod
    def of(line: Mapping[str, Any]) -> Ranked:
        """Raises TypeError for what is no such line."""
        return Ranked(**{"images" if key == "sounds" else key: value for key, value in line.items()})

    @property
    def pair(self) -> dict[str, Any] | None:
        """The line of pairs.jsonl: best and worst; None where they score the same."""
        if not self.scores[0] > self.scores[-1]:
            return None
        chosen, rejected = {"chosen": self.images[0], "chosen_score": self.scores[0]}, {"rejected": self.images[-1]}
        return {**self._asked, **chosen, **rejected, "rejected_score": self.scores[-1]}


def count(done: Sequence[Ranked]) -> int:
    return sum(ranked.pair is not None for ranked in done)


def ledger(folder: Path, settings: Mapping[str, Any]) -> list[Ranked]:
    """What ranks.jsonl holds: which prompts are done. A last line that was cut short by a kill does not count.

    Raises InputError for a folder that was not made here, or with other settings.
    """
    if not folder.exists() or (folder.is_dir() and not {path.name for path in folder.iterdir()} - {".lock"}):
        return []
    if not (folder / "pairs.yaml").is_file():
        raise InputError(f"{folder} exists already, and was not made by diffalign pairs: choose another --output.")
    try:
        before = yaml.safe_load((folder / "pairs.yaml").read_text(encoding="utf-8"))
        data = (folder / "ranks.jsonl").read_bytes() if (folder / "ranks.jsonl").is_file() else b""
        done = [Ranked.of(json.loads(line)) for line in data.split(b"\n")[:-1]]
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{folder}: pairs.yaml or ranks.jsonl is damaged ({' '.join(str(error).split())[:120]}).") from error
    other = [key for key, value in settings.items() if not isinstance(before, dict) or before.get(key) != value]
    if done and other:
        were = "; ".join(f"{key} was {before.get(key)!r}, and is {settings[key]!r}" for key in other) if isinstance(before, dict) else ""
        raise InputError(f"{folder} was made with other settings: {were}. Choose another --output, or the same settings to go on.")
    return done


@contextmanager
def claim(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder while the block runs, with its settings written down; raises InputError where another command holds it."""
    import fcntl  # not on Windows

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"Another diffalign pairs is at work in {folder}: wait for it, or choose another folder.") from error
            draft = folder / "pairs.yaml.draft"
            draft.write_text(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True), encoding="utf-8")
            os.replace(draft, folder / "pairs.yaml")
            yield
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another --output.") from error


def rewrite(folder: Path, done: Sequence[Ranked]) -> None:
    """Both files as the ledger has them: a line that was cut short goes, and a pair that was not written yet comes."""
    lines = {"ranks.jsonl": [ranked.line for ranked in done], "pairs.jsonl": [ranked.pair for ranked in done if ranked.pair]}
    for name, rows in lines.items():
        draft = folder / f"{name}.draft"
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(draft, folder / name)


def write(folder: Path, blocks: Iterable[list[Outcome]]) -> Generator[Ranked]:
    """Write each outcome's pictures or sounds, then its lines, then yield it; on the disk for good after each block."""
    with (folder / "ranks.jsonl").open("a", encoding="utf-8") as ranks, (folder / "pairs.jsonl").open("a", encoding="utf-8") as pairs:
        try:
            for block in blocks:
                for outcome in block:
                    kind, ending = ("images", "png") if outcome.sample_rate is None else ("sounds", "wav")
                    (folder / kind).mkdir(exist_ok=True)
                    names = [f"{kind}/{outcome.number + 1:06d}-{j}.{ending}" for j in range(len(outcome.samples))]
                    for name, drawn in zip(names, outcome.samples, strict=True):
                        if outcome.sample_rate is None:
                            to_pil(drawn.medium).save(folder / name)
                        else:
                            write_wav(folder / name, drawn.medium, outcome.sample_rate)
                        if drawn.trajectory is not None:
                            drawn.trajectory.save(beside(folder / name))
                    order = sorted(range(len(names)), key=lambda j, outcome=outcome: -outcome.samples[j].score)
                    scores = [outcome.samples[j].score for j in order]
                    ranked = Ranked(outcome.prompt, [names[j] for j in order], scores, outcome.transcript)
                    _append(ranks, ranked.line)
                    if ranked.pair is not None:
                        _append(pairs, ranked.pair)
                    yield ranked
                os.fsync(ranks.fileno())
                os.fsync(pairs.fileno())
        finally:
            os.fsync(ranks.fileno())
            os.fsync(pairs.fileno())


def _append(file: IO[str], values: Mapping[str, Any]) -> None:
    file.write(json.dumps(values, ensure_ascii=False) + "\n")
    file.flush()
