"""The order in which a run sees what it trains on: a source that is read by index, and batches of it without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator

from diffalign.cache import digest
from diffalign.data import Prompt, batch_of, known_as
from diffalign.errors import InputError
from diffalign.types import Policy, Prompts


class Source(Protocol):
    """What a stream reads: batches by index."""

    def __len__(self) -> int: ...
    def take(self, indices: Sequence[int]) -> Any: ...
    def contents(self) -> str: ...  # another one where an index means another thing


@dataclass(frozen=True)
class PromptList:
    """Prompts as a source of `Prompts`, for a policy."""

    prompts: Sequence[Prompt]
    policy: Policy | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int]) -> Prompts:
        return batch_of([self.prompts[i] for i in indices], self.policy)

    def contents(self) -> str:
        return digest(*map(known_as, self.prompts))


@dataclass
class Stream:
    """Batches of a source without end: each epoch in a new order, drawn from the stream's own generator.

    With several processes every one calls `next` and takes its own part of the same order.
    """

    source: Source
    batch_size: int
    rng: Generator
    processes: int = 1
    rank: int = 0
    queue: list[int] = field(default_factory=list[int])

    def next(self) -> Any:
        need = self.batch_size * self.processes
        while len(self.queue) < need:
            self.queue += torch.randperm(len(self.source), generator=self.rng).tolist()
        taken, self.queue = self.queue[:need], self.queue[need:]
        return self.source.take(taken[self.rank * self.batch_size : (self.rank + 1) * self.batch_size])

    def position(self) -> dict[str, Any]:
        """Where it is, as a copy."""
        return {"rng": self.rng.get_state(), "queue": torch.tensor(self.queue, dtype=torch.int64)}

    def state(self, position: dict[str, Any] | None = None) -> dict[str, Any]:
        """What `restore` takes: where it is, or was, and what the source holds."""
        return {**(position or self.position()), "size": len(self.source), "contents": self.source.contents()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state; raises InputError where the source holds something else: its indices would mean other things."""
        if state["size"] != len(self.source):
            raise InputError(f"The run was made with {state['size']} prompts or examples, and now there are {len(self.source)}.")
        if state.get("contents", self.source.contents()) != self.source.contents():
            raise InputError("The prompts or examples are not those that the run was made with: put them back, or start a new run.")
        self.rng.set_state(state["rng"])
        self.queue = state["queue"].tolist()
