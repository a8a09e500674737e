"""How clean speech is, by the embedded judge of `digits`: what listening tests call a mean opinion, on worsened recordings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards import tiny
from diffalign.rewards.common import check_fields, in_chunks
from diffalign.rewards.hearing import ASSETS, Ear, check_sounds, config_of, frames
from diffalign.rewards.weights import load
from diffalign.types import Modality, Prompts


@dataclass(frozen=True)
class Quality:
    """A regression on a wav2vec 2.0, trained on speech that noise made worse, in the wave and in a VAE's latents; it reads no prompt."""

    checkpoint: Path | None = None
    """A folder with a Wav2Vec2ForSequenceClassification of one label and its feature extractor, in place of the embedded one."""
    sample_rate: int = 8000
    """Hz that the model hears, as its feature extractor must say."""
    batch_size: int = 8
    """Sounds that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))  # made for 1 to 5

    def __post_init__(self) -> None:
        check_fields("fp32", self.batch_size)

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.judge

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] at `sample_rate` Hz to (B,), about 1 to 5; the gradient reaches the sounds."""
        check_sounds(media, prompts)
        network, ear = self.judge
        network.to(media.device)
        frames(network, media.shape[1], self.sample_rate)
        return in_chunks(lambda sounds: network(ear(sounds)).logits[:, 0].float(), self.batch_size, media)

    @cached_property
    def judge(self) -> tuple[Any, Ear]:
        """The network, frozen, and how it hears."""
        from transformers import Wav2Vec2ForSequenceClassification

        folder = ASSETS / "quality" if self.checkpoint is None else self.checkpoint.expanduser()
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}: --reward.checkpoint takes one of a Wav2Vec2ForSequenceClassification.")
        config = config_of(folder, ("wav2vec2",))
        if config.num_labels != 1:
            raise InputError(f"The model in {folder} has {config.num_labels} labels: this reward takes a regression, of one.")
        return load(Wav2Vec2ForSequenceClassification, folder, torch.float32), Ear.of(folder, self.sample_rate)

    def tiny(self, folder: Path) -> Quality:
        """The same reward with tiny random weights, which are written into `folder` as the real ones lie."""
        network = tiny.wav2vec2("Wav2Vec2", "ForSequenceClassification", num_labels=1, classifier_proj_size=8)
        tiny.save_ear(folder, network, sample_rate=self.sample_rate)
        return replace(self, checkpoint=folder)
