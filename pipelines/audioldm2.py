"""AudioLDM 2 (arXiv 2308.05734): text to sound; with VITS as its second text encoder, speech of a transcript in the text's voice.

A UNet on the latents of a mel spectrogram, which a vocoder makes into a waveform.
"""

from __future__ import annotations

import importlib.util
import math
import unicodedata
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.noise import path_of
from diffalign.pipelines.common import sampled_with
from diffalign.pipelines.latent import Named
from diffalign.pipelines.sound import SoundFamily, Voice, check_said, check_tokens
from diffalign.pipelines.tiny_sound import audioldm2
from diffalign.sound import LogMel, fit
from diffalign.types import Prompts

TOKENS = 128  # of T5, as the authors train with


def _voice(pipe: Any, seconds: float | None, tokens: int | None, negative_prompt: str | None) -> Voice:
    """By default sounds of the model's own length (10.24 s). Of T5's tokens so many are kept, of VITS' as many as it has."""
    speech = pipe.text_encoder_2.config.model_type == "vits"
    _check(pipe, speech)
    frames, samples = _length(pipe, seconds)
    config, factor = pipe.vocoder.config, pipe.vae_scale_factor
    mel = LogMel.of(config.sampling_rate, math.prod(config.upsample_rates), config.model_in_dim)

    def keys(prompts: Prompts) -> list[str]:
        if speech and prompts.transcript is None:
            raise InputError("This pipeline says transcripts, and the prompts have none.")
        check_said(prompts, speech)
        said = prompts.transcript or [""] * len(prompts)
        return [f"{text}\0{words}\0{negative_prompt or ''}" for text, words in zip(prompts.text, said, strict=True)]

    def network(x_t: Tensor, t: Tensor, tensors: Named) -> Tensor:
        return pipe.unet(x_t, t, **tensors, return_dict=False)[0]

    def embed(pipe: Any, waveforms: Tensor) -> Tensor:
        """Through the vocoder's own kind of mel spectrogram: the mode of the VAE's posterior, scaled."""
        spectrogram = mel(fit(waveforms, frames * mel.hop))[:, None]
        return pipe.vae.encode(spectrogram.to(pipe.vae.dtype)).latent_dist.mode().float() * pipe.vae.config.scaling_factor

    def decode(pipe: Any, x_0: Tensor) -> Tensor:
        spectrogram = pipe.vae.decode((x_0 / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample
        return pipe.vocoder(spectrogram.squeeze(1).to(pipe.vocoder.dtype)).float()[:, :samples].clamp(-1, 1)

    return Voice(
        path=path_of(pipe.scheduler),
        network=network,
        keys=keys,
        tokens=int(pipe.tokenizer_2.model_max_length) if speech else tokens or TOKENS,
        sample_rate=config.sampling_rate,
        samples=samples,
        latent=(pipe.unet.config.in_channels, frames // factor, config.model_in_dim // factor),
        decoder=decode,
        embedder=embed,
        coding=(mel,),
        takes=("transcript",) if speech else (),
        unspeakable=lambda said: _unspeakable(pipe.tokenizer_2, said) if speech else None,
        notes=sampled_with(pipe),
    )


def _encode(pipe: Any, key: str, tokens: int, guided: bool, device: str | torch.device) -> list[Tensor]:
    """What the network is conditioned on for one prompt, text, transcript and negative prompt, and with guidance the same of the
    unconditional branch. An empty prompt is the unconditional branch itself, as training with dropped text wants it.

    Alone, not in a batch: the pipeline pads T5 to its longest prompt, and GPT-2's positions count that.
    """
    text, _, rest = key.partition("\0")
    transcript, _, negative = rest.partition("\0")
    speech, empty = pipe.text_encoder_2.config.model_type == "vits", not text and not transcript
    said = {"transcription": [transcript]} if speech else {}
    hidden, mask, generated = pipe.encode_prompt([text], device, 1, guided or empty, negative_prompt=[negative], **said)
    if not speech:
        check_tokens(text, hidden.shape[1], tokens)
        hidden, mask = F.pad(hidden, (0, 0, 0, tokens - hidden.shape[1])), F.pad(mask, (0, tokens - mask.shape[1]))
    rows = [[part[i] for part in (generated, hidden, mask)] for i in range(len(hidden))]  # the unconditional one first
    return [*(rows[0] if empty else rows[-1]), *(rows[0] if guided else [])]


def _length(pipe: Any, seconds: float | None) -> tuple[int, int]:
    """`(frames, samples)` of sounds of so many seconds, as the pipeline's call has them: frames are multiples of the VAE's factor."""
    config, factor = pipe.vocoder.config, pipe.vae_scale_factor
    hop = math.prod(config.upsample_rates) / config.sampling_rate
    seconds = pipe.unet.config.sample_size * factor * hop if seconds is None else seconds
    if seconds < hop * factor:
        raise InputError(f"audio_seconds is {seconds:g}, and this model's shortest sound has {hop * factor:g}.")
    frames = math.ceil(int(seconds / hop) / factor) * factor
    return frames, min(int(seconds * config.sampling_rate), frames * math.prod(config.upsample_rates))


def _check(pipe: Any, speech: bool) -> None:
    """Raise InputError for parts that do not fit one another."""
    unet, latent = pipe.unet.config, pipe.vae.config.latent_channels
    if unet.in_channels != latent:
        raise InputError(f"The UNet has {unet.in_channels} input channels, and the VAE {latent}: load the parts of one checkpoint.")
    if pipe.vocoder.config.model_in_dim % pipe.vae_scale_factor:
        raise InputError(f"The vocoder's {pipe.vocoder.config.model_in_dim} mel bins are no multiple of the VAE's {pipe.vae_scale_factor}.")
    if speech and pipe.tokenizer_2.phonemize and importlib.util.find_spec("phonemizer") is None:
        raise InputError(
            "This model's tokenizer writes phonemes with a package that is not installed: pip install phonemizer (and espeak-ng)."
        )


def _unspeakable(tokenizer: Any, transcript: str) -> str | None:
    """Why a transcript would not be said as it stands. Punctuation that the tokenizer leaves out by design counts as said."""
    words = transcript
    if tokenizer.phonemize:
        words, _ = tokenizer.prepare_for_tokenization(transcript)
    elif tokenizer.normalize:
        words = "".join(c for c in tokenizer.normalize_text(transcript) if c in tokenizer.encoder or not _between_words(c))
    lacking = dict.fromkeys(c for c in words if c not in tokenizer.encoder)
    if lacking:
        return f"its tokenizer lacks {', '.join(map(repr, lacking))}"
    count, most = len(tokenizer(transcript).input_ids), tokenizer.model_max_length - 1  # the pipeline puts an end behind it
    return f"it has {count} tokens, and the model says {most} at most" if count > most else None


def _between_words(c: str) -> bool:
    return c.isspace() or unicodedata.category(c).startswith("P")


AudioLDM2 = SoundFamily(
    component="unet",
    encoders={
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "projection_model": "tokenizer",
        "language_model": "tokenizer_2",
    },
    names=("encoder_hidden_states", "encoder_hidden_states_1", "encoder_attention_mask_1"),  # as the UNet has them; GPT-2's come first
    voice=_voice,
    encode=_encode,
    coders=("vae", "vocoder"),
    tiny=audioldm2,
)
