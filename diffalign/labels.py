"""The database of what people said: SQLite, a transaction an answer, so that nothing that was answered is ever lost."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from diffalign.comparing import Comparison
from diffalign.errors import InputError
from diffalign.gathering import Asked, Gathered, Medium

FORMAT = "diffalign labels 1"
SCHEMA = """
create table meta (key text primary key, value text not null);
create table media (id integer primary key, model integer not null, path text not null, sha256 text not null);
create table asked (id integer primary key, text text not null, transcript text, samples text not null, source integer, mask integer);
create table comparisons (id integer primary key, asked integer not null, media text not null);
create table answers (
    id integer primary key autoincrement, at text not null, rater text not null, comparison integer not null references comparisons,
    shown text not null, ranks text, seconds real, undone text);
create unique index one_answer on answers (rater, comparison) where undone is null;
"""


class Conflict(ValueError):
    """This rater has given another answer to this comparison already."""


@dataclass(frozen=True)
class Answer:
    """One person's answer: `ranks[i]` is that of `shown[i]`, 0 is the best, equal ones are a tie; None where the person skipped it.

    `shown` are numbers of media from left to right; `seconds` is how long the person looked.
    """

    id: int
    at: str
    rater: str
    comparison: int
    shown: tuple[int, ...]
    ranks: tuple[int, ...] | None
    seconds: float | None


@dataclass(frozen=True)
class Labels:
    """An open database. Its methods may be called from several threads, and several processes may have it open at once."""

    path: Path
    _sql: sqlite3.Connection
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def open(cls, path: str | Path) -> Labels:
        """A database that exists; raises InputError where there is none, or it is none of labels."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f"There is no database {path}: diffalign label FOLDER makes one.")
        labels = cls(path, _connect(path))
        labels._check_format()
        return labels

    @staticmethod
    def begun(path: Path) -> bool:
        """Whether there is a database at `path`. Where there is none, or an empty one, as a kill may leave it, one can be begun: raises
        InputError where it cannot be written."""
        if path.exists():
            with closing(_connect(path)) as sql, _said(path):
                return sql.execute("select count(*) from sqlite_master").fetchone()[0] > 0
        try:
            with tempfile.TemporaryDirectory(prefix=".labels-", dir=path.parent) as folder:
                _connect(Path(folder) / path.name).close()
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): choose another --labels.") from error
        return False

    @classmethod
    def begin(cls, path: Path, gathered: Gathered, comparisons: list[Comparison], settings: Mapping[str, Any]) -> Labels:
        """A new database of these comparisons; one that another process made meanwhile is taken as it is. Raises InputError where it
        cannot be written."""
        labels = cls(path, _connect(path))
        with labels._transaction() as sql:
            if sql.execute("select count(*) from sqlite_master").fetchone()[0]:
                labels._check_format()
                return labels
            for statement in SCHEMA.split(";"):
                sql.execute(statement)
            media = gathered.media
            at = {id(medium): n for n, medium in enumerate(media)}  # an object a place: equal ones may stand in two prompts
            sql.executemany("insert into media values (?, ?, ?, ?)", [(n, m.model, m.path, m.sha256) for n, m in enumerate(media)])
            rows = [
                (
                    i,
                    a.text,
                    a.transcript,
                    json.dumps([at[id(m)] for m in a.samples]),
                    at.get(id(a.source)),
                    at.get(id(a.mask)),
                )
                for i, a in enumerate(gathered.asked)
            ]
            sql.executemany("insert into asked values (?, ?, ?, ?, ?, ?)", rows)
            sql.executemany(
                "insert into comparisons values (?, ?, ?)", [(i, c.asked, json.dumps(c.media)) for i, c in enumerate(comparisons)]
            )
            known = {"format": FORMAT, "fingerprint": gathered.fingerprint(), "models": json.dumps(gathered.models), **_places(gathered)}
            sql.executemany("insert into meta values (?, ?)", [*known.items(), ("settings", json.dumps(dict(settings)))])
        return labels

    def check_settings(self, given: Mapping[str, Any]) -> None:
        """Raise InputError where one of the settings that are given, those that are not None, is another than that of the comparisons."""
        if other := [name for name, value in given.items() if value not in (None, self.settings[name])]:
            were = ", ".join(f"--{name} {self.settings[name]}" for name in other)
            raise InputError(f"{self.path} was begun with {were}: leave that out, or begin another database: --labels OTHER.sqlite.")

    def check_same(self, gathered: Gathered) -> None:
        """Raise InputError where the folders hold other samples than those the database was begun on; else note where they lie now."""
        if self._meta("fingerprint") != gathered.fingerprint():
            raise InputError(
                f"{self.path} was begun on other samples: {self._difference(gathered)}. Give its own folders, in their order, or a new "
                "database: --labels OTHER.sqlite."
            )
        with self._transaction() as sql:
            sql.executemany("update meta set value = ? where key = ?", [(value, key) for key, value in _places(gathered).items()])

    def _difference(self, gathered: Gathered) -> str:
        before, now = ({(m.model, m.path): m.sha256 for m in each.media} for each in (self.gathered, gathered))
        changed = sum(sha256 != now.get(key, sha256) for key, sha256 in before.items())
        counts = {"are new": len(now.keys() - before.keys()), "are gone": len(before.keys() - now.keys()), "have changed": changed}
        said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        return said or "its prompts are others"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the comparisons were made with: compare, rounds, seed."""
        return json.loads(self._meta("settings"))

    @cached_property
    def gathered(self) -> Gathered:
        """The samples, as they were when the database was begun."""
        rows = self._rows("select model, path, sha256 from media order by id")
        media = [Medium(model, path, sha256) for model, path, sha256 in rows]

        def at(number: int | None) -> Medium | None:
            return None if number is None else media[number]

        rows = self._rows("select text, transcript, source, mask, samples from asked order by id")
        asked = [
            Asked(text, said, at(source), at(mask), tuple(media[n] for n in json.loads(samples)))
            for text, said, source, mask, samples in rows
        ]
        return Gathered(tuple(json.loads(self._meta("models"))), tuple(map(Path, json.loads(self._meta("roots")))), tuple(asked))

    @cached_property
    def comparisons(self) -> list[Comparison]:
        rows = self._rows("select asked, media from comparisons order by id")
        return [Comparison(asked, tuple(json.loads(media))) for asked, media in rows]

    def answers(self, rater: str | None = None) -> list[Answer]:
        """The answers that were not undone, in the order in which they came; of one rater, or of all."""
        where, given = ("", ()) if rater is None else ("and rater = ?", (rater,))
        rows = self._rows(
            f"select id, at, rater, comparison, shown, ranks, seconds from answers where undone is null {where} order by id", given
        )
        return [
            Answer(number, at, by, comparison, tuple(json.loads(shown)), None if ranks is None else tuple(json.loads(ranks)), seconds)
            for number, at, by, comparison, shown, ranks, seconds in rows
        ]

    def reopened(self, rater: str) -> list[int]:
        """Comparisons whose answer the rater took back and has not given again, the last one first."""
        query = "select comparison from answers where rater = ? group by comparison having sum(undone is null) = 0"
        return [row[0] for row in self._rows(f"{query} order by max(undone) desc", (rater,))]

    def answer(
        self, rater: str, comparison: int, shown: tuple[int, ...], ranks: tuple[int, ...] | None, seconds: float | None = None
    ) -> None:
        """Write an answer; it is on the disk when this returns. The same one again changes nothing; raises Conflict for another one."""
        said = None if ranks is None else json.dumps(ranks)
        with self._transaction() as sql:
            before = sql.execute(
                "select ranks from answers where rater = ? and comparison = ? and undone is null", (rater, comparison)
            ).fetchone()
            if before is None:
                sql.execute(
                    "insert into answers (at, rater, comparison, shown, ranks, seconds) values (?, ?, ?, ?, ?, ?)",
                    (_now(), rater, comparison, json.dumps(shown), said, seconds),
                )
            elif before[0] != said:
                raise Conflict(f"{rater} has answered this comparison already: undo that first.")

    def undo(self, rater: str) -> int | None:
        """Take the rater's last answer back, and return its comparison; None where there is none. The log keeps it, marked."""
        with self._transaction() as sql:
            last = sql.execute(
                "select id, comparison from answers where rater = ? and undone is null order by id desc limit 1", (rater,)
            ).fetchone()
            if last is None:
                return None
            sql.execute("update answers set undone = ? where id = ?", (_now(), last[0]))
            return last[1]

    def close(self) -> None:
        with self._lock:
            self._sql.close()

    def _meta(self, key: str) -> str:
        return self._rows("select value from meta where key = ?", (key,))[0][0]

    def _rows(self, query: str, given: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock, _said(self.path):
            return self._sql.execute(query, given).fetchall()

    def _check_format(self) -> None:
        tables = {name for (name,) in self._rows("select name from sqlite_master")}
        if not tables:
            self.close()
            raise InputError(f"{self.path} is an empty database: diffalign label FOLDER --labels {self.path} begins it.")
        if "meta" not in tables or self._rows("select value from meta where key = 'format'") != [(FORMAT,)]:
            self.close()
            raise InputError(f"{self.path} is a database, and none of labels: choose another --labels.")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _said(self.path):
            self._sql.execute("begin immediate")
            try:
                yield self._sql
            except BaseException:
                self._sql.execute("rollback")
                raise
            self._sql.execute("commit")


def _places(gathered: Gathered) -> dict[str, str]:
    return {"roots": json.dumps([str(root) for root in gathered.roots])}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _connect(path: Path) -> sqlite3.Connection:
    with _said(path):
        if path.exists() and not os.access(path, os.W_OK):
            raise sqlite3.OperationalError("no write permission")
        sql = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        mode = sql.execute("pragma journal_mode = wal").fetchone()[0]
        sql.execute("pragma synchronous = full")  # in WAL mode the default may lose the last answers when the power fails
        if mode != "wal":
            raise sqlite3.OperationalError(f"its file system has no write-ahead log, {mode} instead")
        return sql


@contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        damaged = not isinstance(error, sqlite3.OperationalError)
        mend = "It is no database of labels, or a damaged one" if damaged else "Is its folder there, and may you write in it"
        raise InputError(f"{path} cannot be used ({error}). {mend}{'' if damaged else '?'}: choose another --labels.") from error
