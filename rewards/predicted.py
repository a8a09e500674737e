"""The quality of speech that DNSMOS (arXiv 2110.01763) and NISQA (arXiv 2104.09494) predict, through torchmetrics."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.hearing import check_sounds
from diffalign.types import Modality, Prompts

P835 = ("p808", "signal", "background", "overall")  # the columns of torchmetrics' answers
QUALITIES = ("overall", "noisiness", "discontinuity", "coloration", "loudness")


@dataclass(frozen=True)
class DNSMOS:
    """DNSMOS P.835, made for noise suppressed in calls: 1 to 5."""

    measure: Literal["overall", "signal", "background", "p808"] = "overall"
    """Which opinion: overall quality, of the signal, of the background; or that of the older model for P.808."""
    personalized: bool = False
    """Whether other speakers count as noise."""

    differentiable: ClassVar[bool] = False
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    sample_rate: ClassVar[int] = 16000

    def __post_init__(self) -> None:
        _check_measure(self.measure, P835)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] at 16 kHz to (B,), about 1 to 5. What is shorter than 9.01 s is repeated."""
        check_sounds(media, prompts)
        return _asked(self._of, media)[:, P835.index(self.measure)]

    def _of(self, media: Tensor) -> Tensor:
        score = _function("dnsmos", "deep_noise_suppression_mean_opinion_score")
        return score(media, self.sample_rate, self.personalized, device="cpu", num_threads=1)

    def open(self) -> None:
        """Fetch the weights, now rather than at the first call. Raises InputError where they or the packages cannot be had."""
        _open("dnsmos", "~/.torchmetrics/DNSMOS", self._of, self.sample_rate)

    def tiny(self, folder: Path) -> DNSMOS:
        """Raises InputError: torchmetrics reads the published weights and no others."""
        raise _no_twin("dnsmos")


@dataclass(frozen=True)
class NISQA:
    """NISQA 2.0, made for speech over phones and networks: 1 to 5."""

    measure: Literal["overall", "noisiness", "discontinuity", "coloration", "loudness"] = "overall"
    """Which opinion; higher is better for all of them."""

    differentiable: ClassVar[bool] = False
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    sample_rate: ClassVar[int] = 48000

    def __post_init__(self) -> None:
        _check_measure(self.measure, QUALITIES)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] at 48 kHz to (B,), about 1 to 5."""
        check_sounds(media, prompts)
        return _asked(self._of, media)[:, QUALITIES.index(self.measure)]

    def _of(self, media: Tensor) -> Tensor:
        return _function("nisqa", "non_intrusive_speech_quality_assessment")(media, self.sample_rate)

    def open(self) -> None:
        """Fetch the weights, now rather than at the first call. Raises InputError where they or the packages cannot be had."""
        _open("nisqa", "~/.torchmetrics/NISQA", self._of, self.sample_rate)

    def tiny(self, folder: Path) -> NISQA:
        """Raises InputError: torchmetrics reads the published weights and no others."""
        raise _no_twin("nisqa")


def _check_measure(measure: str, known: tuple[str, ...]) -> None:
    if measure not in known:
        raise InputError(f"measure is {measure}: give {', '.join(known)}.")


def _function(module: str, name: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module(f"torchmetrics.functional.audio.{module}"), name)


@torch.no_grad()
def _asked(score: Callable[[Tensor], Tensor], media: Tensor) -> Tensor:
    """(B, columns); a sound alone each time: DNSMOS' spectrograms are scaled by the loudest of their batch."""
    return torch.cat([score(row[None]) for row in media.detach().cpu().float()]).float()


def _open(name: str, kept: str, score: Callable[[Tensor], Any], sample_rate: int) -> None:
    try:
        score(torch.sin(torch.arange(float(sample_rate)) * 0.05)[None] / 2)
    except ModuleNotFoundError as error:
        said = " ".join(str(error).split())
        raise InputError(f"{name} needs packages that are not installed ({said}): pip install 'diffalign[speech-metrics]'") from error
    except Exception as error:
        raise InputError(
            f"{name} does not open ({type(error).__name__}). torchmetrics fetches its weights from GitHub into {kept} at the first call: "
            "where there is no network, or half a download lies there, put the files of another machine's folder there."
        ) from error


def _no_twin(name: str) -> InputError:
    return InputError(f"{name} has no tiny twin: torchmetrics reads the published weights alone. Leave it out with --tiny.")
