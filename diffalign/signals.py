"""Signals while a training runs: noted, and heeded between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffalign.console import say
from diffalign.processes import failed_before


class Stopped(Exception):
    """A signal asked the training to stop; the run is saved and can be resumed."""

    def __init__(self, signum: int, step: int, path: Path) -> None:
        super().__init__(f"signal {signum} at step {step}; the run in {path} can be resumed")
        self.signum, self.step, self.path = signum, step, path


@contextmanager
def noted() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one dies at once."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, frame: Any) -> None:
        caught.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)
        if failed_before():  # the launcher ends the other processes: there is no step to wait for
            signal.raise_signal(signum)
        say("Stopping after this step, to save. Once more stops at once, and keeps the last checkpoint.")

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are not ours to take
        before.clear()
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
