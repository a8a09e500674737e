"""What rewards of sound share: what is refused, how waveforms reach a network, and recognisers with an alphabet."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import sound
from diffalign.errors import InputError
from diffalign.rewards.weights import TOKENIZER, WEIGHTS, load, quiet, snapshot
from diffalign.types import Prompts

LOUDEST = 1.5  # resampling overshoots where a sound is clipped; what is louder is on another scale
MASKING = r"masked_spec_embed$"  # of training alone: published checkpoints often lack it
DIGITS = "digits"
ASSETS = Path(sound.__file__).parent / "assets" / DIGITS
RECOGNISER = ASSETS / "recogniser"
WAV2VEC2 = ("wav2vec2", "hubert", "wavlm")  # encoders of a waveform, by transformers' names of their types


def check_sounds(media: Tensor, prompts: Prompts) -> None:
    """Raise InputError for what is not float (B, samples) in [-1, 1] with B prompts."""
    if media.ndim != 2 or not media.is_floating_point() or not media.shape[1]:
        raise InputError(f"Sounds of shape {tuple(media.shape)} and type {media.dtype}: this reward takes float (B, samples) in [-1, 1].")
    if len(media) != len(prompts):
        raise InputError(f"{len(media)} sounds and {len(prompts)} prompts: give one prompt for each sound.")
    low, high = (float(x) for x in media.detach().float().aminmax())
    if not (low >= -LOUDEST and high <= LOUDEST):  # said so that NaN, which compares as false, is refused too
        raise InputError(f"Sounds with samples from {low:.4g} to {high:.4g}: this reward takes numbers in [-1, 1].")


def check_model(model: str, *embedded: str) -> None:
    """Raise InputError for what is no Hub id, and none of the names of embedded models."""
    if model not in embedded and (Path(model).expanduser().is_dir() or model.count("/") != 1):
        known = "".join(f"{name}, " for name in embedded)
        raise InputError(f"model is {model}: give {known}a Hub id user/model, or a folder with --reward.checkpoint FOLDER.")


def folder_of(model: str, revision: str, local: Path | None) -> Path:
    """The folder of a model of the Hub, or the user's `local` one, or the embedded recogniser's."""
    return snapshot(model, revision, RECOGNISER if local is None and model == DIGITS else local, "checkpoint", [*WEIGHTS, *TOKENIZER])


def config_of(folder: Path, kinds: Sequence[str]) -> Any:
    """A model's configuration; raises InputError where there is none, or it is of another type than `kinds`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder} holds no model that transformers knows: {' '.join(str(error).split())[:200]}") from error
    if config.model_type not in kinds:
        raise InputError(f"The model in {folder} is of the type '{config.model_type}': this reward takes {', '.join(kinds)}.")
    return config


def extractor_of(folder: Path, extractor_class: Any) -> Any:
    """A feature extractor from a folder; raises InputError where it does not load."""
    try:
        with quiet():
            return extractor_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"The feature extractor in {folder} does not load: {' '.join(str(error).split())[:200]}") from error


def check_rate(found: int, wanted: int, folder: Path) -> None:
    """Raise InputError where a model hears at another rate than the reward says, to which sounds are brought before it is opened."""
    if found != wanted:
        raise InputError(f"The model in {folder} hears {found} Hz, and sample_rate is {wanted}: --reward.sample-rate {found}.")


@dataclass(frozen=True)
class Ear:
    """How a wav2vec 2.0-like network hears waveforms: at `sample_rate` Hz, brought to mean 0 and variance 1 or as they are."""

    sample_rate: int
    normalises: bool

    @staticmethod
    def of(folder: Path, sample_rate: int) -> Ear:
        """As the preprocessor_config.json says. Raises InputError where that is another rate."""
        from transformers import Wav2Vec2FeatureExtractor

        said = extractor_of(folder, Wav2Vec2FeatureExtractor)
        check_rate(int(said.sampling_rate), sample_rate, folder)
        return Ear(int(said.sampling_rate), bool(said.do_normalize))

    def __call__(self, media: Tensor) -> Tensor:
        """(B, samples) to the same, fp32: each sound by its own mean and variance, which is 0 of silence."""
        media = media.float()
        if not self.normalises:
            return media
        return (media - media.mean(-1, keepdim=True)) / (media.var(-1, correction=0, keepdim=True) + 1e-7).sqrt()


def frames(network: Any, samples: int, sample_rate: int) -> int:
    """How many frames a network of wav2vec 2.0's make sees in so many samples; raises InputError where there is none."""
    found = int(network._get_feat_extract_output_lengths(torch.tensor(samples)))
    if found < 1:
        raise InputError(
            f"The sound is too short, {samples} samples at {sample_rate} Hz: the network does not see one frame. Make it longer."
        )
    return found


@dataclass(frozen=True)
class Letters:
    """The alphabet of a CTC network: characters by id, the blank, and the delimiter of words where it has one."""

    known: Mapping[str, int]
    blank: int
    delimiter: int | None

    @staticmethod
    def of(folder: Path, config: Any) -> Letters:
        """Of the folder's tokenizer; raises InputError where it does not spell, or does not belong to the network."""
        from transformers import Wav2Vec2CTCTokenizer

        try:
            with quiet():
                tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise InputError(f"The tokenizer in {folder} does not load: {' '.join(str(error).split())[:200]}") from error
        vocabulary: Any = tokenizer.get_vocab()
        blank, special = config.pad_token_id, {tokenizer.word_delimiter_token, *tokenizer.all_special_tokens}
        known = {token: i for token, i in vocabulary.items() if len(token) == 1 and token not in special and i < config.vocab_size}
        if not known:
            raise InputError(f"The tokenizer in {folder} has no single characters: this reward takes models that spell, not of phonemes.")
        if vocabulary.get(tokenizer.pad_token) != blank:
            raise InputError(f"The tokenizer in {folder} and the network have different blanks: they do not belong together.")
        return Letters(known, blank, vocabulary.get(tokenizer.word_delimiter_token))

    def lacking(self, text: str) -> str:
        """The characters of a text that cannot be spelt, each once."""
        return "".join(dict.fromkeys(c for c in _plain(text) if c != " " and self._id(c) is None and not _silent(c)))

    def check(self, plain: str, text: str) -> None:
        """Raise InputError for characters of `plain`, which is written for the transcript `text`, that the network does not know."""
        lacking = self.lacking(plain)
        if lacking:
            known = "".join(sorted(self.known))
            named = " ".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in lacking)
            raise InputError(f"The recogniser does not know {named} in '{text}': write it in the letters {known}")

    def spell(self, text: str) -> list[int]:
        """The ids of a text; raises InputError for characters that the network does not know, and where nothing is left.

        A letter is taken as it is, or in upper or lower case, where the alphabet has only that. Dashes part words, and punctuation that is
        not in the alphabet is left out.
        """
        self.check(text, text)
        plain = "".join(c if c == " " or self._id(c) is not None else "" for c in _plain(text))
        ids = [self.delimiter if c == " " else self._id(c) for c in " ".join(plain.split())]
        found = [i for i in ids if i is not None]
        if not found:
            raise InputError(f"There is nothing to be said in '{text}': give a transcript of words.")
        return found

    def read(self, ids: Tensor) -> str:
        """What the best path (frames,) of ids says: repeated ones are one, blanks nothing."""
        letters = {i: c for c, i in self.known.items()} | ({} if self.delimiter is None else {self.delimiter: " "})
        return " ".join("".join(letters.get(i, "") for i in ids.unique_consecutive().tolist()).split())

    def _id(self, character: str) -> int | None:
        for form in (character, character.upper(), character.lower()):
            if form in self.known:
                return self.known[form]
        return None


def _plain(text: str) -> str:
    """In composed Unicode, with plain apostrophes, and a blank for dashes and white space of any kind."""
    text = unicodedata.normalize("NFC", text).replace("\u2019", "'")
    return "".join(" " if c.isspace() or unicodedata.category(c) == "Pd" else c for c in text)


def _silent(character: str) -> bool:
    return unicodedata.category(character).startswith("P") and character not in "%&@#"  # which are read out


@dataclass(frozen=True)
class Recogniser:
    """A CTC network, frozen, with what it hears and the alphabet that it writes."""

    network: Any
    ear: Ear
    letters: Letters

    @staticmethod
    def of(folder: Path, dtype: torch.dtype, sample_rate: int) -> Recogniser:
        """Wav2Vec2ForCTC, HubertForCTC or WavLMForCTC of a folder, with its feature extractor and its tokenizer."""
        from transformers import AutoModelForCTC

        config = config_of(folder, WAV2VEC2)
        ear, letters = Ear.of(folder, sample_rate), Letters.of(folder, config)
        if getattr(config, "adapter_attn_dim", None) is not None:
            raise InputError(f"The model in {folder} has an adapter for each language (MMS), which this reward does not read.")
        return Recogniser(load(AutoModelForCTC, folder, dtype, unused=MASKING), ear, letters)

    def log_probs(self, media: Tensor) -> Tensor:
        """Sounds (n, samples) to log-probabilities (n, frames, alphabet), fp32.

        Without an attention mask: the sounds of a batch are of one length, so no sample is padding.
        """
        return self.network(self.ear(media).to(self.network.dtype)).logits.float().log_softmax(-1)
