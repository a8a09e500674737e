"""Media on their way into a training: pictures and sounds that are embedded once, and stored trajectories that are only looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Generator, Tensor

from diffalign import sound, trajectories
from diffalign.cache import Shelf, digest
from diffalign.columns import Picture
from diffalign.contract import CheckedReward
from diffalign.data import Prompt, SpokenPrompt, batch_of, rate_of, takes
from diffalign.errors import InputError
from diffalign.media import decode_image, fit
from diffalign.records import Fault, Tally
from diffalign.types import Policy, Taken

SAY_EVERY = 20.0  # seconds


@runtime_checkable
class Shelving(Policy, Protocol):
    """A policy that data can be embedded with: media of its size, and a shelf that is named after what embeds them."""

    def shelve(self, root: Path) -> Shelf: ...


@dataclass(frozen=True)
class Medium:
    """A medium or a trajectory that was read: its key, and the picture (3, H, W) or sound (samples,) in the policy's size where a reward
    has to look at it."""

    key: str
    content: Tensor | None


@dataclass
class Intake:
    """Pictures, or sounds, on their way to the shelf: read, checked, embedded in batches of one size, each once.

    The size of a batch is fixed, and the last one filled up: a row's last bits depend on it, and another run has another cache.
    """

    policy: Any
    shelf: Shelf
    reward: CheckedReward | None
    tally: Tally
    say: Callable[[str], None]
    known: set[str] = field(default_factory=set[str])
    waiting: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    unscored: list[tuple[Prompt, Tensor]] = field(default_factory=list[tuple[Prompt, Tensor]])
    scores: list[float] = field(default_factory=list[float])
    taken: None = None
    embedded: int = 0
    clipped: int = 0
    resampled: int = 0
    cut: int = 0
    said: float = field(default_factory=time.monotonic)

    @property
    def batch(self) -> int:
        """Media of one forward of the VAE: 4 pictures of 512 x 512, 6 sounds of 10 s at 16 kHz, and at most 64."""
        size = self.policy.samples if rate_of(self.policy) else self.policy.height * self.policy.width
        return max(1, min(64, 2**20 // size))

    def take(self, picture: Picture) -> Medium | None:
        """The picture by its key, embedded by the end of the intake; None where it cannot be used, and the tally lets that pass."""
        try:
            data = contents(picture)
            key = digest(data)
            first = key not in self.known
            new = first and self.shelf.get(key) is None
            content = self._read(data, picture.name, first, new or self.reward is not None)
        except Fault as fault:
            self.tally.note(fault)
            return None
        self.known.add(key)
        if new and content is not None:
            self.waiting[key] = content
            if len(self.waiting) == self.batch:
                self._embed()
        return Medium(key, None if self.reward is None else content)

    def _read(self, data: bytes, name: str, first: bool, wanted: bool) -> Tensor | None:
        """The picture (3, H, W) or the sound (samples,) in these bytes, in the policy's size; None where it is not `wanted`.

        Raises Fault where it cannot be used. A sound that comes the `first` time is counted by what becomes of it, also where the shelf
        has it.
        """
        rate = rate_of(self.policy)
        if rate is None:
            return fit(decoded(data, name), self.policy.height, self.policy.width) if wanted else None
        if not (first or wanted):
            return None
        try:
            heard = sound.decode_wav(data, name)
            length = heard.length_at(rate, name)
        except InputError as error:
            raise Fault("sounds that cannot be read", str(error)) from error
        self.clipped += first and heard.clipped > sound.CLIPPED
        self.resampled += first and heard.sample_rate != rate
        self.cut += first and length > self.policy.samples
        return sound.fit(heard.at(rate).waveform, self.policy.samples) if wanted else None

    def score(self, prompt: Prompt, content: Tensor) -> None:
        """Line a medium up for the reward."""
        self.unscored.append((prompt, content))
        if len(self.unscored) == self.batch:
            self._score()

    def finish(self) -> list[float]:
        """Embed and score what is left; the scores, in the order of `score`."""
        if self.waiting:
            self._embed()
        if self.unscored:
            self._score()
        return self.scores

    def rows(self, keys: Sequence[str]) -> Tensor:
        """(B, *latent), fp32, on the CPU. Raises InputError where the cache was emptied meanwhile."""
        return self.shelf.take(keys)

    def in_words(self) -> str:
        rate = rate_of(self.policy)
        if rate is None:
            return f", {self.embedded:,} pictures embedded anew"
        what = {
            f"resampled to {rate} Hz": self.resampled,
            f"cut to {self.policy.samples / rate:.3g} s": self.cut,
            f"clipped (at full scale for more than {sound.CLIPPED:.1%})": self.clipped,
        }
        facts = [f"{n:,} {how}" for how, n in what.items() if n]
        of_all = f"; of {len(self.known):,} sounds {', '.join(facts)}" if facts else ""
        return f", {self.embedded:,} sounds embedded anew{of_all}"

    @torch.no_grad()
    def _embed(self) -> None:
        keys, pixels = list(self.waiting), torch.stack(list(self.waiting.values()))
        filled = torch.cat([pixels, pixels.new_zeros(self.batch - len(pixels), *pixels.shape[1:])])
        rows = self.policy.embed(filled.to(device_of(self.policy))).float().cpu()
        for key, row in zip(keys, rows, strict=False):
            if not row.isfinite().all():
                raise InputError("The model embeds a medium as NaN or infinity. Is its VAE one that needs another precision?")
            self.shelf.put(key, row)
        self.waiting.clear()
        self.embedded += len(keys)
        if time.monotonic() - self.said > SAY_EVERY:
            self.said = time.monotonic()
            self.say(f"Embedding the data: {self.embedded:,} so far.")

    @torch.no_grad()
    def _score(self) -> None:
        assert self.reward is not None
        pixels = torch.stack([pixels for _, pixels in self.unscored]).to(device_of(self.policy))
        self.scores += self.reward(pixels, batch_of([prompt for prompt, _ in self.unscored], self.policy)).tolist()
        self.unscored.clear()


@dataclass
class Reel:
    """Stored trajectories, known by their files' paths: read and checked here, and read again batch by batch.

    All of them were sampled alike, with latents and the guidance that the policy has.
    """

    policy: Policy
    tally: Tally
    taken: Taken | None = None
    latent: tuple[int, ...] = ()

    def take(self, picture: Picture) -> Medium | None:
        """A sample by its picture; None where its trajectory cannot be used, and the tally lets that pass."""
        try:
            return Medium(str(self._checked(picture)), None)
        except Fault as fault:
            self.tally.note(fault)
            return None

    def score(self, prompt: Prompt, content: Tensor) -> None:
        raise AssertionError("trajectories are not scored: people have judged them")

    def finish(self) -> list[float]:
        return []

    def in_words(self) -> str:
        steps = 0 if self.taken is None else len(self.taken.actions)
        return f", of {steps} denoising steps"

    def rows(self, keys: Sequence[str]) -> Tensor:
        """(B, T+1, *latent) states, fp32, on the CPU."""
        return torch.stack([trajectories.load(Path(key)).states for key in keys])

    def _checked(self, picture: Picture) -> Path:
        if picture.path is None:
            raise Fault("missing trajectories", f"{picture.name} is no file: trajectories lie beside their pictures.")
        path = trajectories.beside(picture.path)
        if not path.is_file() or path.is_symlink():
            raise Fault("missing trajectories", f"There is no trajectory {path}: diffalign pairs --trajectories keeps them.")
        try:
            stored = trajectories.load(path)
        except InputError as error:
            raise Fault("trajectories that cannot be read", str(error)) from error
        if self.taken is None:
            self._check_policy(stored, path)
            self.taken, self.latent = stored.taken, tuple(stored.states.shape[1:])
        if not self.taken.same_as(stored.taken) or stored.states.shape[1:] != self.latent:
            raise InputError(f"{path} was sampled in another way than the trajectories before it: train on what one command made.")
        return path

    def _check_policy(self, stored: trajectories.Stored, path: Path) -> None:
        spoken = "transcript" in takes(self.policy)
        condition = self.policy.encode(batch_of([SpokenPrompt("a voice", "a")] if spoken else ["a picture"], self.policy))
        latent, its = self.policy.prior(condition, Generator().manual_seed(0)).shape[1:], stored.states.shape[1:]
        if its != latent:
            raise InputError(f"{path} holds latents of shape {tuple(its)}, and this model's are {tuple(latent)}: train the model it is of.")
        if stored.taken.guidance_scale != condition.guidance_scale:
            raise InputError(
                f"{path} was sampled with guidance {stored.taken.guidance_scale:g}, and the training has {condition.guidance_scale:g}: "
                f"--guidance-scale {stored.taken.guidance_scale:g}"
            )


def device_of(policy: Policy) -> torch.device:
    return next(policy.module.parameters()).device


def decoded(data: bytes, name: str) -> Image.Image:
    """The picture in these bytes; Fault where there is none, or a damaged one, InputError where the data is of sounds."""
    if sound.is_wav(data):
        raise InputError(f"{name} is a sound, and what is asked for here looks at pictures: give data of pictures.")
    try:
        return decode_image(data, name)
    except InputError as error:
        raise Fault("pictures that cannot be read", str(error)) from error


def contents(picture: Picture) -> bytes:
    """The bytes of a row or of a file; Fault where the file is missing."""
    if picture.data is not None:
        return picture.data
    assert picture.path is not None
    if not picture.path.is_file():
        raise Fault("missing pictures", f"There is no picture {picture.name}.")
    return picture.path.read_bytes()
