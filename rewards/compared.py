"""How near a sound is to a recording of the same words, sample by sample: SI-SDR, STOI and PESQ. For tasks where the two are in step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.hearing import check_sounds
from diffalign.rewards.recordings import SILENT, Recordings
from diffalign.sound import fit
from diffalign.types import Modality, Prompts

BOUND = 1e-8  # of the shares of signal and of distortion: 80 dB either way
FAINTEST = 1e-12  # energy below which a sound is none


def beside(media: Tensor, prompts: Prompts, recordings: Recordings, sample_rate: int) -> Tensor:
    """The recordings, (B, samples) as the sounds: silence follows those that are shorter. Raises InputError where one is longer."""
    found: list[Tensor] = []
    for waveform, text in zip(recordings.of(prompts, sample_rate), prompts.spoken, strict=True):
        _check_length(text, len(waveform), media.shape[1], sample_rate)
        found.append(fit(waveform, media.shape[1]))
    return torch.stack(found).to(media.device)


def _check_length(text: str, recorded: int, samples: int, sample_rate: int) -> None:
    if recorded > samples:
        raise InputError(
            f"The recording of '{text}' is {recorded / sample_rate:.2f} s long, and the sounds are "
            f"{samples / sample_rate:.2f}: make them as long (--audio-seconds), or cut the recording."
        )


def _check_beside(recordings: Recordings, prompts: Prompts, seconds: float, sample_rate: int) -> None:
    """Raise InputError where `beside` would, of sounds of so many seconds."""
    samples = math.ceil(round(seconds * sample_rate, 6))  # as resampled sounds have, and not one more for the last bits of the product
    for text, recorded in zip(prompts.spoken, recordings.check_for(prompts, sample_rate), strict=True):
        _check_length(text, recorded, samples, sample_rate)


def si_sdr(sounds: Tensor, recordings: Tensor) -> Tensor:
    """Both (B, samples) to (B,) in dB (Le Roux et al., ICASSP 2019, arXiv 1811.02508, without removing means), computed in float64.

    10 log10 of the energy along the recording over the energy across it, each as its share of the sound's own, of at least 1e-8: so it is
    from -80 to 80 dB, and silence, whose ratio is 0 / 0, has the worst score.
    """
    sounds, recordings = sounds.double(), recordings.double()
    scale = (sounds * recordings).sum(-1, keepdim=True) / recordings.square().sum(-1, keepdim=True)
    along, across = (scale * recordings).square().sum(-1), (sounds - scale * recordings).square().sum(-1)
    whole = sounds.square().sum(-1)
    none = whole < FAINTEST
    whole = whole.clamp(min=FAINTEST)
    signal, rest = along / whole, torch.where(none, torch.ones_like(whole), across / whole)
    return 10 * (torch.where(none, torch.zeros_like(whole), signal) + BOUND).log10() - 10 * (rest + BOUND).log10()


@dataclass(frozen=True)
class SISDR:
    """The scale-invariant signal-to-distortion ratio of a sound to a recording, in dB."""

    reference: Path | None = None
    """A .wav file that all prompts are compared with, or a .jsonl file that names one for each; by default the prompts' own."""
    sample_rate: int = 16000
    """Hz at which they are compared."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (-80.0, 80.0)

    def __post_init__(self) -> None:
        if self.sample_rate < 1:
            raise InputError(f"sample_rate is {self.sample_rate}: give 1 or more Hz.")

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] and B prompts to (B,) dB; the gradient reaches the sounds, but not those that are silent."""
        check_sounds(media, prompts)
        return si_sdr(media, beside(media, prompts, self.recordings, self.sample_rate)).float().clamp(*self.range)

    def check_prompts(self, prompts: Prompts, seconds: float) -> None:
        """Raise InputError for a prompt without a recording that can be used, and for one that is longer than the sounds."""
        _check_beside(self.recordings, prompts, seconds, self.sample_rate)

    @cached_property
    def recordings(self) -> Recordings:
        """What sounds are compared with."""
        return Recordings(self.reference)

    def open(self) -> None:
        """Read the recordings, now rather than at the first call. Raises InputError where they cannot be had."""
        self.recordings.check()

    def tiny(self, folder: Path) -> SISDR:
        """The same reward: it has no weights."""
        return self


@dataclass(frozen=True)
class Compared:
    """STOI (Taal et al., 2011), the intelligibility of a sound beside a recording, or PESQ (ITU-T P.862), its quality."""

    measure: Literal["stoi", "estoi", "pesq"] = "stoi"
    """What is measured; estoi is STOI's extended form."""
    reference: Path | None = None
    """A .wav file that all prompts are compared with, or a .jsonl file that names one for each; by default the prompts' own."""
    sample_rate: int = 16000
    """Hz at which they are compared; PESQ is wideband at 16000 and narrowband at 8000."""

    differentiable: ClassVar[bool] = False
    modality: ClassVar[Modality] = "audio"

    def __post_init__(self) -> None:
        if self.measure not in ("stoi", "estoi", "pesq"):
            raise InputError(f"measure is {self.measure}: give stoi, estoi or pesq.")
        if self.measure == "pesq" and self.sample_rate not in (8000, 16000):
            raise InputError(f"sample_rate is {self.sample_rate}: PESQ is defined at 8000 and 16000 Hz.")
        if self.sample_rate < 1:
            raise InputError(f"sample_rate is {self.sample_rate}: give 1 or more Hz.")

    @property
    def range(self) -> tuple[float, float]:
        """Of STOI -1 to 1, as a correlation, mostly above 0; of PESQ, which maps to opinion scores, 0.999 to about 4.64."""
        return (0.999, 4.999) if self.measure == "pesq" else (-1.0, 1.0)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] and B prompts to (B,). Raises InputError for silence, and for what is too short to measure."""
        check_sounds(media, prompts)
        recordings = beside(media, prompts, self.recordings, self.sample_rate)
        rows = zip(media.detach().cpu().double().numpy(), recordings.cpu().double().numpy(), prompts.spoken, strict=True)
        return torch.tensor([self._of(sound, recording, text) for sound, recording, text in rows], dtype=torch.float32)

    def _of(self, sound: Any, recording: Any, text: str) -> float:
        if self.measure == "pesq" and abs(sound).max() < SILENT:
            return self.range[0]  # PESQ fails on silence, which is as bad as can be
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # pystoi warns of what is too short, and says 1e-5
                return float(_measure(self.measure)(self.sample_rate, recording, sound))
        except Exception as error:
            raise InputError(
                f"{self.measure} cannot be measured for '{text}' ({type(error).__name__}: {' '.join(str(error).split())}). It takes a "
                "recording with half a second of speech, and a sound in which there is some."
            ) from error

    def check_prompts(self, prompts: Prompts, seconds: float) -> None:
        """Raise InputError for a prompt without a recording that can be used, and for one that is longer than the sounds."""
        _check_beside(self.recordings, prompts, seconds, self.sample_rate)

    @cached_property
    def recordings(self) -> Recordings:
        """What sounds are compared with."""
        return Recordings(self.reference)

    def open(self) -> None:
        """Read the recordings, now rather than at the first call. Raises InputError where they or the package cannot be had."""
        _measure(self.measure)
        self.recordings.check()

    def tiny(self, folder: Path) -> Compared:
        """The same reward: it has no weights."""
        return self


def _measure(name: str) -> Callable[[int, Any, Any], Any]:
    """`(rate, recording, sound)` to a number. Raises InputError where the package is not installed."""
    try:
        if name == "pesq":
            from pesq import pesq  # pyright: ignore[reportMissingImports]

            return lambda rate, recording, sound: pesq(rate, recording, sound, "wb" if rate == 16000 else "nb")
        from pystoi import stoi  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"{name} needs a package that is not installed ({error}): pip install 'diffalign[speech-metrics]'") from error
    return lambda rate, recording, sound: stoi(recording, sound, rate, extended=name == "estoi")
