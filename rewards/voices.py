"""How near a sound is to a recording by what a network makes of both: the speaker (x-vectors of WavLM), and SpeechBERTScore."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.rewards import tiny
from diffalign.rewards.common import DTYPES, Precision, check_fields, in_chunks
from diffalign.rewards.hearing import MASKING, WAV2VEC2, Ear, check_model, check_sounds, config_of, folder_of, frames
from diffalign.rewards.recordings import Recordings, identity
from diffalign.rewards.weights import load
from diffalign.types import Modality, Prompts

KEPT = 256  # recordings whose features stay in memory


@dataclass
class Features:
    """A frozen network, how it hears, and what it makes of sounds: `of` takes (n, samples); a recording is heard once."""

    network: Any
    ear: Ear
    of: Callable[[Tensor], Tensor]
    least: int = 1  # frames that it takes
    kept: OrderedDict[tuple[Path, int, int], Tensor] = field(default_factory=OrderedDict[tuple[Path, int, int], Tensor])

    def check(self, samples: int) -> None:
        """Raise InputError where a sound of so many samples is too short."""
        found = frames(self.network, samples, self.ear.sample_rate)
        if found < self.least:
            raise InputError(
                f"The sound is too short, {samples / self.ear.sample_rate:.2f} s: {found} frames, and {self.least} are needed."
            )

    @torch.no_grad()
    def recorded(self, recordings: Recordings, prompts: Prompts, device: torch.device) -> list[Tensor]:
        """The features of each prompt's recording, alone in its batch, since recordings are of any length."""
        self.network.to(device)
        files = [identity(path) for path in recordings.paths(prompts)]
        for i, file in enumerate(files):
            if file not in self.kept:
                (waveform,) = recordings.of(prompts[[i]], self.ear.sample_rate)
                self.check(len(waveform))
                self.kept[file] = self.of(waveform[None].to(device))[0].cpu()
        found = [self.kept[file].to(device) for file in files]
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return found


@dataclass(frozen=True)
class SpeakerSimilarity:
    """Cosine of the x-vectors of a sound and of a recording of the speaker, as WavLM's speaker verification has them (arXiv 2110.13900)."""

    model: str = "microsoft/wavlm-base-plus-sv"
    """Hub id of a WavLMForXVector."""
    checkpoint: Path | None = None
    """A folder with the model and its feature extractor, in place of the download."""
    sample_rate: int = 16000
    """Hz that the model hears, as its feature extractor must say."""
    reference: Path | None = None
    """A .wav file that all prompts are compared with, or a .jsonl file that names one for each; by default the prompts' own."""
    revision: str = "main"
    """Revision of the model on the Hub: a commit is always the same."""
    precision: Precision = "fp32"
    """Of the network; cosines are fp32."""
    batch_size: int = 8
    """Sounds that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)
        check_model(self.model)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] at `sample_rate` Hz and B prompts to (B,) in [-1, 1]; the gradient reaches the sounds."""
        check_sounds(media, prompts)
        self.features.check(media.shape[1])
        wanted = torch.stack(self.features.recorded(self.recordings, prompts, media.device))
        return in_chunks(lambda sounds, theirs: (self.features.of(sounds) * theirs).sum(-1), self.batch_size, media, wanted)

    def open(self) -> None:
        """Load the weights and recordings, now rather than at the first call. Raises InputError where they cannot be had."""
        self.recordings.check()
        _ = self.features

    def check_prompts(self, prompts: Prompts, seconds: float) -> None:
        """Raise InputError for a prompt without a recording that can be used, and for sounds or recordings that are too short."""
        for samples in (round(seconds * self.sample_rate), *self.recordings.check_for(prompts, self.sample_rate)):
            self.features.check(samples)

    @cached_property
    def recordings(self) -> Recordings:
        """What sounds are compared with."""
        return Recordings(self.reference)

    @cached_property
    def features(self) -> Features:
        """Unit x-vectors (n, D) of a frozen WavLM."""
        from transformers import WavLMForXVector

        folder = folder_of(self.model, self.revision, self.checkpoint)
        config = config_of(folder, ("wavlm",))
        ear = Ear.of(folder, self.sample_rate)
        network = load(WavLMForXVector, folder, DTYPES[self.precision], unused=MASKING)

        def vectors(sounds: Tensor) -> Tensor:
            return F.normalize(network(ear(sounds).to(network.dtype)).embeddings.float(), dim=-1)

        # its layers look at frames around each, and the deviation over time wants two that are left
        around = sum((kernel - 1) * dilation for kernel, dilation in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))
        return Features(network, ear, vectors, around + 2)

    def tiny(self, folder: Path) -> SpeakerSimilarity:
        """The same reward with a tiny random WavLMForXVector, which is written into `folder` as the real one lies on the Hub."""
        return replace(self, checkpoint=tiny.save_ear(folder, tiny.wav2vec2("WavLM", "ForXVector"), self.sample_rate))


@dataclass(frozen=True)
class SpeechBERTScore:
    """BERTScore between frames of a sound and of a recording (Saeki et al., Interspeech 2024, arXiv 2401.16812)."""

    measure: Literal["precision", "recall", "f1"] = "precision"
    """Whether each frame of the sound has its like in the recording (the authors' choice), the other way round, or both."""
    model: str = "microsoft/wavlm-large"
    """Hub id of a WavLMModel, HubertModel or Wav2Vec2Model."""
    layer: int | None = 14
    """Layer whose features are compared, 0 for what goes into the first; null: the last."""
    checkpoint: Path | None = None
    """A folder with the model and its feature extractor, in place of the download."""
    sample_rate: int = 16000
    """Hz that the model hears, as its feature extractor must say."""
    reference: Path | None = None
    """A .wav file that all prompts are compared with, or a .jsonl file that names one for each; by default the prompts' own."""
    revision: str = "main"
    """Revision of the model on the Hub: a commit is always the same."""
    precision: Precision = "fp32"
    """Of the network; cosines are fp32."""
    batch_size: int = 8
    """Sounds that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)
        check_model(self.model)
        if self.measure not in ("precision", "recall", "f1"):
            raise InputError(f"measure is {self.measure}: give precision, recall or f1.")
        if self.layer is not None and self.layer < 0:
            raise InputError(f"layer is {self.layer}: give 0 or more, or null for the last.")

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] at `sample_rate` Hz and B prompts to (B,) in [-1, 1]; the gradient reaches the sounds."""
        check_sounds(media, prompts)
        self.features.check(media.shape[1])
        recorded = self.features.recorded(self.recordings, prompts, media.device)
        wanted = torch.nn.utils.rnn.pad_sequence(recorded, batch_first=True)
        there = torch.tensor([len(frames) for frames in recorded], device=media.device)
        return in_chunks(self._score, self.batch_size, media, wanted, there)

    def _score(self, media: Tensor, wanted: Tensor, there: Tensor) -> Tensor:
        cosines = self.features.of(media) @ wanted.transpose(1, 2)  # (n, frames, frames of the recordings)
        real = torch.arange(wanted.shape[1], device=media.device) < there[:, None]
        precision = cosines.masked_fill(~real[:, None], -2).amax(2).mean(1)
        recall = (cosines.amax(1) * real).sum(1) / there
        if self.measure == "f1":  # a mean of shares: of cosines below 0 it would be anything, or NaN
            precision, recall = precision.clamp(min=0), recall.clamp(min=0)
            return 2 * precision * recall / (precision + recall).clamp(min=1e-8)
        return precision if self.measure == "precision" else recall

    def open(self) -> None:
        """Load the weights and recordings, now rather than at the first call. Raises InputError where they cannot be had."""
        self.recordings.check()
        _ = self.features

    def check_prompts(self, prompts: Prompts, seconds: float) -> None:
        """Raise InputError for a prompt without a recording that can be used, and for sounds or recordings that are too short."""
        for samples in (round(seconds * self.sample_rate), *self.recordings.check_for(prompts, self.sample_rate)):
            self.features.check(samples)

    @cached_property
    def recordings(self) -> Recordings:
        """What sounds are compared with."""
        return Recordings(self.reference)

    @cached_property
    def features(self) -> Features:
        """Unit features (n, frames, D) of a layer of a frozen network. The waveform goes in as it is, as in the authors' code."""
        from transformers import AutoModel

        folder = folder_of(self.model, self.revision, self.checkpoint)
        config, ear = config_of(folder, WAV2VEC2), Ear(Ear.of(folder, self.sample_rate).sample_rate, normalises=False)
        if self.layer is not None and self.layer > config.num_hidden_layers:
            raise InputError(f"layer is {self.layer}, and the model in {folder} has {config.num_hidden_layers}.")
        network = load(AutoModel, folder, DTYPES[self.precision], unused=MASKING)

        def frames_of(sounds: Tensor) -> Tensor:
            found = network(ear(sounds).to(network.dtype), output_hidden_states=self.layer is not None)
            seen = found.last_hidden_state if self.layer is None else found.hidden_states[self.layer]
            return F.normalize(seen.float(), dim=-1)

        return Features(network, ear, frames_of)

    def tiny(self, folder: Path) -> SpeechBERTScore:
        """The same reward with a tiny random WavLMModel of as many layers, written into `folder` as the real one lies on the Hub."""
        network = tiny.wav2vec2("WavLM", num_hidden_layers=max(2, self.layer or 0))
        return replace(self, checkpoint=tiny.save_ear(folder, network, self.sample_rate))
