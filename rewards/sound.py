"""Two rewards of sound that need no weights: how loud it is, and how much of it is silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.sound import fit
from diffalign.types import Modality, Prompts

FLOOR = 1e-10  # of the mean square: -100 dBFS


def level(frames: Tensor) -> Tensor:
    """Root mean square of (..., n) in dBFS, from -100: a square wave at full scale has 0, a sine -3.01."""
    return 10 * frames.float().square().mean(-1).clamp(min=0).add(FLOOR).log10()


def check(media: Tensor, name: str) -> None:
    if media.ndim != 2 or media.shape[1] == 0:
        raise InputError(f"{name} judges sounds (B, samples), and these media have the shape {tuple(media.shape)}.")


@dataclass(frozen=True)
class Loudness:
    """Minus the distance of a sound's level to a target, in dB: from -100 to 0, at any sample rate."""

    target: float = -20.0
    """Level that is wanted: root mean square in dBFS, from -100 to 0."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "audio"
    sample_rate: ClassVar[int | None] = None
    range: ClassVar[tuple[float, float]] = (-100.0, 0.0)

    def __post_init__(self) -> None:
        if not -100 <= self.target <= 0:
            raise InputError(f"reward.target is {self.target}: give dBFS, -100 to 0.")

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        check(media, "loudness")
        return -(level(media) - self.target).abs()


@dataclass(frozen=True)
class Silence:
    """Minus the share of frames that are silent, from -1 to 0: a model that fills its sounds has 0."""

    below: float = -50.0
    """A frame is silent below this level: root mean square in dBFS."""
    frame: int = 20
    """Length of a frame in ms."""

    differentiable: ClassVar[bool] = False
    modality: ClassVar[Modality] = "audio"
    sample_rate: ClassVar[int | None] = 16000
    range: ClassVar[tuple[float, float]] = (-1.0, 0.0)

    def __post_init__(self) -> None:
        if not -100 < self.below <= 0:
            raise InputError(f"reward.below is {self.below}: give dBFS, above -100, to 0.")
        if not 1 <= self.frame <= 1000:
            raise InputError(f"reward.frame is {self.frame}: give 1 to 1000 ms.")

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        check(media, "silence")
        length = 16 * self.frame
        whole = max(1, media.shape[1] // length) * length  # what is left over at the end is no frame
        return -(level(fit(media, whole).unflatten(1, (-1, length))) < self.below).float().mean(1)
