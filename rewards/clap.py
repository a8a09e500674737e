"""CLAP score (Wu et al., ICASSP 2023, arXiv 2211.06687): how well a sound fits its description, by LAION's CLAP in transformers' layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.cache import TextCache
from diffalign.errors import InputError
from diffalign.rewards import tiny
from diffalign.rewards.common import DTYPES, Precision, Words, check_fields, in_chunks
from diffalign.rewards.hearing import check_model, check_rate, check_sounds, config_of, extractor_of, folder_of
from diffalign.rewards.weights import load, load_tokenizer
from diffalign.types import Modality, Prompts

TOKENS = 77  # as the authors cut and pad descriptions
LEAST = 1e-10  # of the mel power: -100 dB


@dataclass(frozen=True)
class View:
    """How CLAP sees sounds: `samples` of them at `sample_rate` Hz, as a mel spectrogram in dB, Slaney's filters."""

    sample_rate: int
    samples: int
    window: int
    hop: int
    filters: Tensor  # (window // 2 + 1, bins)
    padding: str

    @staticmethod
    def of(folder: Path) -> View:
        """As ClapFeatureExtractor does it for models without fusion; raises InputError for what is not known here."""
        from transformers import ClapFeatureExtractor

        said = extractor_of(folder, ClapFeatureExtractor)
        if said.truncation != "rand_trunc" or said.padding not in ("repeatpad", "repeat", "pad"):
            raise InputError(
                f"The feature extractor in {folder} has the truncation {said.truncation} and the padding {said.padding}: this reward takes "
                "models without fusion, such as laion/clap-htsat-unfused."
            )
        filters = torch.from_numpy(said.mel_filters_slaney).float()
        return View(int(said.sampling_rate), int(said.nb_max_samples), said.fft_window_size, said.hop_length, filters, said.padding)

    def __call__(self, media: Tensor) -> Tensor:
        """(B, samples) to (B, 1, frames, bins) in dB, from -100, fp32 and differentiable.

        Sounds that are shorter are said again while they fit, and silence follows; of longer ones the middle is taken, where the
        extractor draws a part at random.
        """
        sounds = self.fit(media.float())
        window = torch.hann_window(self.window, device=media.device)
        spectrum = torch.stft(sounds, self.window, self.hop, window=window, center=True, pad_mode="reflect", return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        mel = power.transpose(1, 2) @ self.filters.to(media.device)
        return 10 * mel.clamp(min=LEAST).log10()[:, None]

    def fit(self, media: Tensor) -> Tensor:
        """(B, any) to (B, samples)."""
        length = media.shape[1]
        if length >= self.samples:
            start = (length - self.samples) // 2
            return media[:, start : start + self.samples]
        times = {"pad": 1, "repeatpad": self.samples // length, "repeat": self.samples // length + 1}[self.padding]
        said = media.repeat(1, times)[:, : self.samples]
        return F.pad(said, (0, self.samples - said.shape[1]))


@dataclass(frozen=True)
class Judge:
    """The network, frozen, with what it hears and reads."""

    network: Any
    view: View
    words: Words
    texts: TextCache

    def see(self, media: Tensor) -> Tensor:
        """(n, samples) to unit features (n, D)."""
        found = self.network.get_audio_features(input_features=self.view(media).to(self.network.dtype)).pooler_output
        return F.normalize(found.float(), dim=-1)


@dataclass(frozen=True)
class CLAP:
    """Cosine of the sound's and the description's features. It reads the prompt's text, not the transcript."""

    model: str = "laion/clap-htsat-unfused"
    """Hub id of a ClapModel without fusion."""
    checkpoint: Path | None = None
    """A folder with the model, its tokenizer and its feature extractor, in place of the download."""
    sample_rate: int = 48000
    """Hz that the model hears, as its feature extractor must say."""
    revision: str = "main"
    """Revision of the model on the Hub: a commit is always the same."""
    precision: Precision = "fp32"
    """Of the networks; spectrograms and cosines are fp32."""
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
        judge = self.judge
        judge.network.to(media.device)
        judge.words.note(prompts.text)
        texts = judge.texts(prompts.text)["features"].to(media.device)
        return in_chunks(lambda sounds, wanted: (judge.see(sounds) * wanted).sum(-1), self.batch_size, media, texts)

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.judge

    @cached_property
    def judge(self) -> Judge:
        """The network, frozen, with what it hears and reads."""
        from transformers import AutoTokenizer, ClapModel

        folder = folder_of(self.model, self.revision, self.checkpoint)
        config, view = config_of(folder, ("clap",)), View.of(folder)
        check_rate(view.sample_rate, self.sample_rate, folder)
        ears = config.audio_config
        if ears.enable_fusion or ears.num_mel_bins != view.filters.shape[1]:
            what = (
                "fuses views of long sounds" if ears.enable_fusion else f"sees {ears.num_mel_bins} mel bins, and its extractor makes others"
            )
            raise InputError(f"The model in {folder} {what}: this reward takes models such as laion/clap-htsat-unfused.")
        network = load(ClapModel, folder, DTYPES[self.precision])
        size = config.text_config.vocab_size
        words = Words(load_tokenizer(AutoTokenizer, folder, size, at_least=size // 2), TOKENS, "clap")
        return Judge(network, view, words, TextCache(_reader(network, words), names=("features",)))

    def tiny(self, folder: Path) -> CLAP:
        """The same reward with a tiny random CLAP of sounds of 1 s, which is written into `folder` as the real one lies on the Hub."""
        return replace(self, checkpoint=tiny.save_clap(folder, sampling_rate=self.sample_rate))


def _reader(network: Any, words: Words) -> Callable[[list[str]], tuple[Tensor]]:
    @torch.no_grad()
    def read(texts: list[str]) -> tuple[Tensor]:
        found = words(texts).to(network.device)
        features = network.get_text_features(input_ids=found.input_ids, attention_mask=found.attention_mask).pooler_output
        return (F.normalize(features.float(), dim=-1),)

    return read
