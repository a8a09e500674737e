"""Does the sound say the words? The likelihood of the transcript under a recogniser (CTC), and its error rates of words and characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.rewards import tiny
from diffalign.rewards.common import DTYPES, Precision, check_fields, in_chunks
from diffalign.rewards.hearing import (
    DIGITS,
    WAV2VEC2,
    Letters,
    Recogniser,
    check_model,
    check_rate,
    check_sounds,
    config_of,
    extractor_of,
    folder_of,
    frames,
)  # fmt: skip
from diffalign.rewards.weights import load, load_tokenizer, quiet
from diffalign.types import Modality, Prompts

MOST_TOKENS = 440  # of Whisper's 448 places, less what its prompt takes


@dataclass(frozen=True)
class CTC:
    """The log-likelihood of the transcript, over all its alignments to the sound (Graves et al., ICML 2006), for each of its characters."""

    model: str = "facebook/wav2vec2-base-960h"
    """Hub id of a Wav2Vec2ForCTC, HubertForCTC or WavLMForCTC; digits: the embedded one."""
    checkpoint: Path | None = None
    """A folder with the model, its tokenizer and its feature extractor, in place of the download."""
    sample_rate: int = 16000
    """Hz that the model hears, as its feature extractor must say."""
    revision: str = "main"
    """Revision of the model on the Hub: a commit is always the same."""
    precision: Precision = "fp32"
    """Of the network; the likelihood is fp32."""
    batch_size: int = 8
    """Sounds that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (float("-inf"), 0.0)

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)
        check_model(self.model, DIGITS)

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.recogniser

    def check_prompts(self, prompts: Prompts, seconds: float) -> None:
        """Raise InputError for a transcript that the recogniser cannot write, or that takes longer than the sounds have."""
        self._spelt(prompts, round(seconds * self.sample_rate))

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] at `sample_rate` Hz and B prompts to (B,), 0 at best; the gradient reaches the sounds.

        Raises InputError for a transcript that the recogniser cannot write, or that has more characters than the sound has frames.
        """
        check_sounds(media, prompts)
        self.recogniser.network.to(media.device)
        spelt = self._spelt(prompts, media.shape[1])
        wanted = torch.nn.utils.rnn.pad_sequence(spelt, batch_first=True).to(media.device)
        lengths = torch.tensor([len(ids) for ids in spelt], device=media.device)
        return in_chunks(self._score, self.batch_size, media, wanted, lengths)

    def _spelt(self, prompts: Prompts, samples: int) -> list[Tensor]:
        """The ids of each transcript."""
        spelt = [torch.tensor(self.recogniser.letters.spell(text)) for text in prompts.spoken]
        there = frames(self.recogniser.network, samples, self.sample_rate)
        for ids, text in zip(spelt, prompts.spoken, strict=True):
            # a blank must part equal characters; with fewer frames no alignment exists, and the likelihood is 0
            least = len(ids) + int((ids[1:] == ids[:-1]).sum())
            if least > there:
                raise InputError(
                    f"'{text}' takes {least} frames at least, and a sound of {samples / self.sample_rate:.2f} s has {there}: "
                    "make the sounds longer (--audio-seconds), or the transcripts shorter."
                )
        return spelt

    def _score(self, media: Tensor, wanted: Tensor, lengths: Tensor) -> Tensor:
        found = self.recogniser.log_probs(media).transpose(0, 1)
        there = torch.full_like(lengths, len(found))
        return -F.ctc_loss(found, wanted, there, lengths, self.recogniser.letters.blank, reduction="none") / lengths

    @cached_property
    def recogniser(self) -> Recogniser:
        """The network, frozen, with what it hears and writes."""
        folder = folder_of(self.model, self.revision, self.checkpoint)
        return Recogniser.of(folder, DTYPES[self.precision], self.sample_rate)

    def tiny(self, folder: Path) -> CTC:
        """The same reward with a tiny random Wav2Vec2ForCTC, which is written into `folder` as the real one lies on the Hub."""
        return replace(self, checkpoint=tiny.save_recogniser(folder, sample_rate=self.sample_rate))


def edits(found: Sequence[str], wanted: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other (Levenshtein, 1966)."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def normal(text: str) -> str:
    """In lower case, without punctuation and symbols but apostrophes within words, one blank between words. Numbers stay as they are."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower()
    kept = "".join(" " if c != "'" and unicodedata.category(c)[0] in "PSZ" else c for c in text)
    return " ".join(found for word in kept.split() if (found := word.strip("'")))


@dataclass(frozen=True)
class ErrorRate:
    """Minus the edits that make the transcript of what a recogniser hears, for each word or character of the transcript."""

    unit: Literal["word", "character"] = "word"
    """What is counted; a blank between words is a character."""
    model: str = "openai/whisper-small"
    """Hub id of a Whisper, or of a Wav2Vec2ForCTC, HubertForCTC or WavLMForCTC; digits: the embedded one."""
    checkpoint: Path | None = None
    """A folder with the model, its tokenizer and its feature extractor, in place of the download."""
    sample_rate: int = 16000
    """Hz that the model hears, as its feature extractor must say."""
    revision: str = "main"
    """Revision of the model on the Hub: a commit is always the same."""
    language: str | None = None
    """What a Whisper of many languages is told, such as en; by default it guesses for each sound."""
    precision: Precision = "fp32"
    """Of the network."""
    batch_size: int = 8
    """Sounds that go through the network at once."""

    differentiable: ClassVar[bool] = False
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (float("-inf"), 0.0)

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)
        check_model(self.model, DIGITS)
        if self.unit not in ("word", "character"):
            raise InputError(f"unit is {self.unit}: give word or character.")

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.listener

    def check_prompts(self, prompts: Prompts, seconds: float) -> None:
        """Raise InputError for transcripts without words, and of a CTC network for those that it can never write."""
        for text in prompts.spoken:
            plain = normal(text)
            if not plain:
                raise InputError(f"There is nothing to be said in '{text}': give a transcript of words.")
            if self._alphabet is not None:
                self._alphabet.check(plain, text)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] at `sample_rate` Hz and B prompts to (B,): 0 at best, below -1 where too much is said."""
        check_sounds(media, prompts)
        self.check_prompts(prompts, media.shape[1] / self.sample_rate)
        heard = self.transcribe(media)
        split: Callable[[str], Sequence[str]] = str.split if self.unit == "word" else list
        pairs = [(split(normal(found)), split(normal(wanted))) for found, wanted in zip(heard, prompts.spoken, strict=True)]
        return torch.tensor([-edits(found, wanted) / len(wanted) for found, wanted in pairs])

    @torch.no_grad()
    def transcribe(self, media: Tensor) -> list[str]:
        """What is heard in sounds (B, samples), as the recogniser writes it."""
        return [text for part in media.split(self.batch_size) for text in self.listener(part)]

    @property
    def listener(self) -> Callable[[Tensor], list[str]]:
        """From sounds to texts."""
        return self._heard[0]

    @property
    def _alphabet(self) -> Letters | None:
        """What a CTC network writes; None of a Whisper, which writes what it likes."""
        return self._heard[1]

    @cached_property
    def _heard(self) -> tuple[Callable[[Tensor], list[str]], Letters | None]:
        folder, dtype = folder_of(self.model, self.revision, self.checkpoint), DTYPES[self.precision]
        config = config_of(folder, ("whisper", *WAV2VEC2))
        if config.model_type == "whisper":
            return _whisper(folder, dtype, self.language, self.sample_rate), None
        if self.language is not None:
            raise InputError(f"language is {self.language}: only a Whisper of many languages is told one. Drop it.")
        recogniser = Recogniser.of(folder, dtype, self.sample_rate)

        def listen(media: Tensor) -> list[str]:
            recogniser.network.to(media.device)
            frames(recogniser.network, media.shape[1], recogniser.ear.sample_rate)
            return [recogniser.letters.read(path) for path in recogniser.log_probs(media).argmax(-1)]

        return listen, recogniser.letters

    def tiny(self, folder: Path) -> ErrorRate:
        """The same with a tiny random Wav2Vec2ForCTC of few letters, which is written into `folder`; it is told no language, and takes all
        transcripts, as a Whisper does.

        Not a Whisper: one of random weights hears the same in all short sounds, and policy gradients want samples that differ.
        """
        checkpoint = tiny.save_recogniser(folder, letters="aeinot", sample_rate=self.sample_rate)
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Twin(**{**own, "checkpoint": checkpoint, "language": None})


class _Twin(ErrorRate):
    """That of a dry run, whose few letters say nothing of what the real network writes."""

    @property
    def _alphabet(self) -> None:
        return None


def _whisper(folder: Path, dtype: torch.dtype, language: str | None, sample_rate: int) -> Callable[[Tensor], list[str]]:
    """A Whisper's greedy transcripts. Raises InputError for sounds beyond its window, and for a language that it does not know."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    network: Any = load(WhisperForConditionalGeneration, folder, dtype)
    tokenizer = load_tokenizer(WhisperTokenizer, folder, network.config.vocab_size, at_least=network.config.vocab_size // 2)
    hear, said = extractor_of(folder, WhisperFeatureExtractor), network.generation_config
    check_rate(int(hear.sampling_rate), sample_rate, folder)
    known = getattr(said, "lang_to_id", None) or {}
    if language is not None and f"<|{language}|>" not in known:
        codes = " ".join(sorted(code.strip("<|>") for code in known)) or "none: drop it"
        raise InputError(f"language is {language}: the Whisper in {folder} is told one of {codes}.")
    if known and language is None:
        fields: dict[str, Any] = {"task": "transcribe"}
    else:
        fields = {} if language is None else {"task": "transcribe", "language": language}

    def listen(media: Tensor) -> list[str]:
        seconds = media.shape[1] / hear.sampling_rate
        if media.shape[1] > hear.n_samples:
            raise InputError(f"Whisper hears {hear.chunk_length} s at once, and the sounds are {seconds:.1f} s long: make them shorter.")
        network.to(media.device)
        heard = hear(list(media.float().cpu().numpy()), sampling_rate=hear.sampling_rate, return_tensors="pt").input_features
        heard = heard.to(network.device, dtype)
        most = min(MOST_TOKENS, network.config.max_target_positions - 8)
        with quiet():
            # one candidate and no temperature: greedy, and without a draw
            ids = network.generate(heard, num_beams=1, do_sample=False, max_new_tokens=most, return_timestamps=False, **fields)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return listen
