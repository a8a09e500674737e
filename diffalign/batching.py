"""A reward behind a bounded queue: one thread scores what has gathered, in batches."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.contract import as_heard
from diffalign.errors import InputError
from diffalign.types import LearnedReward, Prompts, Reward


class Fault(Exception):
    """The reward failed in a way that is not the asker's; the log has the traceback, and the message may be shown."""


class Busy(Exception):
    """The queue has no room; `seconds` is when it may have."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Sample:
    """One medium to be scored, (3, H, W) or (samples,), with what stands in `Prompts` for it, without the batch's axis."""

    prompt: str
    media: Tensor
    image: Tensor | None = None
    mask: Tensor | None = None
    transcript: str | None = None
    sample_rate: int | None = None
    metadata: Mapping[str, Any] | None = None

    @property
    def kind(self) -> Hashable:
        """Samples of one kind can be in one batch."""
        shapes = tuple(None if x is None else tuple(x.shape) for x in (self.media, self.image, self.mask))
        return (*shapes, self.transcript is None, self.sample_rate, self.metadata is None)


@dataclass
class Job:
    """The samples of one request, and where their scores go."""

    samples: Sequence[Sample]
    scores: Future[list[float]] = field(default_factory=Future)


@dataclass
class Scorer:
    """A reward with its queue of at most `capacity` samples, scored by one thread in batches of at most `max_batch`.

    Requests that wait while a batch is scored go into the next one together; none is split where it fits into a batch, so that the only
    client of a server has its scores in batches that do not depend on chance.
    """

    reward: Reward
    name: str
    device: torch.device
    max_batch: int
    capacity: int
    jobs: deque[Job] = field(default_factory=deque[Job])
    waiting: int = 0  # samples in the queue
    pace: float = 0.0  # seconds a sample, lately
    loaded: bool = False
    failed: BaseException | None = None
    closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    thread: threading.Thread | None = None

    def start(self, on_failure: Any) -> None:
        """Load the reward and score, in a thread of its own. `on_failure()` is called where that thread cannot go on; `failed` says why."""
        self.thread = threading.Thread(target=self._work, args=(on_failure,), name="scorer", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Score what is in the queue, and end. A reward that is still being loaded is not waited for."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        if self.thread is not None and self.loaded:
            self.thread.join()

    def submit(self, samples: Sequence[Sample]) -> Future[list[float]]:
        """Where the scores of these samples will be; raises Busy where they do not fit into the queue, or the reward is not loaded yet."""
        with self.changed:
            if not self.loaded or self.closed or self.waiting + len(samples) > self.capacity:
                raise Busy(max(1, math.ceil(self.waiting * self.pace)))
            job = Job(samples)
            self.jobs.append(job)
            self.waiting += len(samples)
            self.changed.notify()
        return job.scores

    def _work(self, on_failure: Any) -> None:
        jobs = list[Job]()
        try:
            if isinstance(self.reward, LearnedReward):
                self.reward.open()
            self.loaded = True
            while jobs := self._gathered():
                begin = time.perf_counter()
                self._answer(jobs)
                self.pace = (time.perf_counter() - begin) / sum(len(job.samples) for job in jobs)
        except BaseException as error:  # whoever waits would wait for ever
            self._give_up(error, jobs)
            on_failure()

    def _give_up(self, error: BaseException, jobs: list[Job]) -> None:
        """Take no more, and fail the `jobs` at hand and all that wait."""
        with self.changed:
            self.failed, self.closed = error, True
            waiting = [job for job in self.jobs if job.scores.set_running_or_notify_cancel()]
            self.jobs.clear()
            self.waiting = 0
        for job in (*jobs, *waiting):
            if not job.scores.done():
                job.scores.set_exception(self._fault(error))

    def _gathered(self) -> list[Job]:
        """The requests of the next batch, at least one; none where the scorer is closed and all are done."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.jobs or self.closed)
                jobs, size = list[Job](), 0
                while self.jobs and (not jobs or size + len(self.jobs[0].samples) <= self.max_batch):
                    job = self.jobs.popleft()
                    self.waiting -= len(job.samples)
                    if job.scores.set_running_or_notify_cancel():  # else whoever asked is gone
                        jobs.append(job)
                        size += len(job.samples)
                if jobs or self.closed:
                    return jobs

    def _answer(self, jobs: list[Job]) -> None:
        try:
            scores = self._score([sample for job in jobs for sample in job.samples])
        except (Exception, SystemExit) as error:
            if len(jobs) > 1:  # what is wrong with one request is not the others' trouble
                for job in jobs:
                    self._answer([job])
                return
            jobs[0].scores.set_exception(error if isinstance(error, InputError) else self._fault(error))
            return
        for job in jobs:
            scores, own = scores[len(job.samples) :], scores[: len(job.samples)]
            job.scores.set_result(own)

    def _fault(self, error: BaseException) -> Fault:
        if isinstance(error, Fault):
            return error
        logging.getLogger("diffalign").error("The reward %s failed.", self.name, exc_info=error)
        return Fault(f"The reward {self.name} failed with {type(error).__name__}; the server's log says more.")

    def _score(self, samples: list[Sample]) -> list[float]:
        kinds: dict[Hashable, list[int]] = {}
        for i, sample in enumerate(samples):
            kinds.setdefault(sample.kind, []).append(i)
        scores = [0.0] * len(samples)
        for rows in kinds.values():
            for i in range(0, len(rows), self.max_batch):
                chunk = rows[i : i + self.max_batch]
                for row, score in zip(chunk, self._score_batch([samples[row] for row in chunk]), strict=True):
                    scores[row] = score
        return scores

    @torch.no_grad()
    def _score_batch(self, samples: list[Sample]) -> list[float]:
        first = samples[0]
        prompts = Prompts(
            tuple(s.prompt for s in samples),
            None if first.image is None else torch.stack([s.image for s in samples if s.image is not None]).to(self.device),
            None if first.mask is None else torch.stack([s.mask for s in samples if s.mask is not None]).to(self.device),
            None if first.transcript is None else tuple(s.transcript or "" for s in samples),
            first.sample_rate,
            None if first.metadata is None else tuple(s.metadata or {} for s in samples),
        )
        scores: Any = self.reward(*as_heard(self.reward, torch.stack([s.media for s in samples]).to(self.device), prompts))
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (len(samples),) or scores.is_complex():
            raise Fault(f"The reward {self.name} did not give one real score a sample.")
        if not scores.isfinite().all():
            raise Fault(f"The reward {self.name} gave scores that are no finite numbers.")
        return scores.tolist()
