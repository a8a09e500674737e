"""LongCat-AudioDiT (Meituan, 2026): speech by flow matching, a transformer on the latents of a waveform VAE. The prompt is what is said."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.noise import RectifiedFlow, path_of
from diffalign.pipelines.latent import Named
from diffalign.pipelines.sound import SoundFamily, Voice, check_said, check_tokens
from diffalign.pipelines.tiny_sound import longcat_audio
from diffalign.sound import fit
from diffalign.types import Prompts

TOKENS, SECONDS = 256, 5.0


def _voice(pipe: Any, seconds: float | None, tokens: int | None, negative_prompt: str | None) -> Voice:
    """Latents are (B, frames, channels), by default of 5 s. Without a `negative_prompt` the unconditional branch is zeros of the prompt's
    length, as in the pipeline."""
    channels, vae = pipe.latent_dim, pipe.vae.config
    if vae.latent_dim != channels:
        raise InputError(
            f"The transformer has latents of {channels} channels, and the VAE of {vae.latent_dim}: load one checkpoint's parts."
        )
    asked = SECONDS if seconds is None else seconds
    frames = int(asked * pipe.sample_rate // pipe.vae_scale_factor)
    most = int(pipe.max_wav_duration * pipe.sample_rate // pipe.vae_scale_factor)
    if not 1 <= frames <= most:
        each = pipe.vae_scale_factor / pipe.sample_rate
        raise InputError(f"audio_seconds is {asked:g}: this model makes sounds of {each:.3g} to {pipe.max_wav_duration:g} s.")
    samples, mark = frames * pipe.vae_scale_factor, "" if negative_prompt is None else f"\0{negative_prompt}"
    why = None if negative_prompt is None else _unread(pipe.tokenizer, negative_prompt)
    if why is not None:
        raise InputError(f"The negative prompt '{negative_prompt}' cannot be used: {why}. It is read as it stands: write it otherwise.")

    def keys(prompts: Prompts) -> list[str]:
        check_said(prompts, False)
        return [text + mark for text in prompts.text]

    def embed(pipe: Any, waveforms: Tensor) -> Tensor:
        found = pipe.vae.encode(fit(waveforms, samples)[:, None], sample_posterior=False).latents
        return found.permute(0, 2, 1).float()

    def decode(pipe: Any, x_0: Tensor) -> Tensor:
        return pipe.vae.decode(x_0.permute(0, 2, 1)).sample.float()[:, 0].clamp(-1, 1)

    length = f"Every sound has {samples / pipe.sample_rate:.3g} s; in the pipeline's own call as many as the text takes: --audio-seconds."
    return Voice(
        path=_path(pipe.scheduler),
        network=partial(_velocity, pipe, pipe.scheduler.config.invert_sigmas),
        keys=keys,
        tokens=tokens or TOKENS,
        sample_rate=pipe.sample_rate,
        samples=samples,
        latent=(frames, channels),
        decoder=decode,
        embedder=embed,
        coding=(vae.scale,),
        unspeakable=lambda said: _unspeakable(pipe.tokenizer, said),
        dropped=_dropped,
        uneven=True,
        notes=(length,) if seconds is None else (),
    )


def _encode(pipe: Any, key: str, tokens: int, guided: bool, device: str | torch.device) -> list[Tensor]:
    """A prompt's tokens, (`tokens`, width) with zeros behind them, and how many there are; with guidance the same of the unconditional
    branch. Raises InputError where the tokenizer would cut one of the two short."""
    from diffusers.pipelines.longcat_audio_dit.pipeline_longcat_audio_dit import _normalize_text

    text, named, negative = key.partition("\0")
    read, found = [_normalize_text(text), *([negative] if named and guided else [])], list[Tensor]()
    for whose, plain in zip((text, negative), read, strict=False):
        count, most = len(_ids(pipe.tokenizer, plain)), _most(pipe.tokenizer)
        check_tokens(whose, count, tokens)
        if count > most:
            raise InputError(f"The prompt '{whose}' has {count} tokens, and the model reads {most} at most: write a shorter one.")
        words = pipe.encode_prompt([plain], device)[0][0]
        found += [F.pad(words, (0, 0, 0, tokens - len(words))), torch.tensor(len(words))]
    return [*found, torch.zeros_like(found[0]), found[1]] if guided and not named else found


def _dropped(tensors: Named, rows: Tensor) -> Named:
    """Prompts with the text dropped in `rows`, bool (B,): zeros of its length, which is what guidance takes for no text."""
    words = tensors["encoder_hidden_states"]
    return {**tensors, "encoder_hidden_states": words.masked_fill(rows.to(words.device)[:, None, None], 0.0)}


def _ids(tokenizer: Any, plain: str) -> list[int]:
    """The tokens of a text, of any length."""
    return tokenizer(plain, verbose=False).input_ids


def _most(tokenizer: Any) -> int:
    """How many tokens the pipeline's call reads; it leaves out the rest."""
    return tokenizer.model_max_length if 0 < tokenizer.model_max_length <= 32768 else 512


def _unspeakable(tokenizer: Any, said: str) -> str | None:
    """Why a text would not be said as it stands."""
    from diffusers.pipelines.longcat_audio_dit.pipeline_longcat_audio_dit import _normalize_text

    return _unread(tokenizer, _normalize_text(said))


def _unread(tokenizer: Any, plain: str) -> str | None:
    """Why a text is not read as it stands: words with characters that the tokenizer lacks, also punctuation, since its token for what is
    unknown changes what is said; or more tokens than the pipeline's call reads."""
    unknown, found, most = tokenizer.unk_token_id, _ids(tokenizer, plain), _most(tokenizer)
    if unknown in found:
        lacking = [word for word in dict.fromkeys(plain.split()) if unknown in _ids(tokenizer, word)]
        return f"its tokenizer lacks {', '.join(map(repr, lacking or [plain]))}"
    return f"it has {len(found)} tokens, and the model says {most} at most" if len(found) > most else None


def _velocity(pipe: Any, inverted: bool, x_t: Tensor, t: Tensor, tensors: Named) -> Tensor:
    """Rows of one length of text go through together, without padding: the network's text layers would mix it into the text.

    With `inverted` sigmas its time runs from noise to data, and so does its velocity.
    """
    lengths = [int(n) for n in tensors["lengths"].tolist()]
    order, parts = list[int](), list[Tensor]()
    for length in dict.fromkeys(lengths):
        rows = [i for i, n in enumerate(lengths) if n == length]
        x, words = x_t[rows], tensors["encoder_hidden_states"][rows, :length]
        time = (1000 - t[rows]) / 1000 if inverted else t[rows] / 1000
        parts.append(
            pipe.transformer(
                hidden_states=x,
                encoder_hidden_states=words,
                encoder_attention_mask=torch.ones(words.shape[:2], dtype=torch.bool, device=x.device),
                timestep=time,
                attention_mask=torch.ones(x.shape[:2], dtype=torch.bool, device=x.device),
                latent_cond=torch.zeros_like(x),
            ).sample
        )
        order += rows
    velocity = torch.cat(parts)[torch.tensor(order, device=x_t.device).argsort()]
    return -velocity if inverted else velocity


def _path(scheduler: Any) -> RectifiedFlow:
    """The path of the pipeline's scheduler, from noise to data: its own call gives it sigmas 1 to 1 / T, and may turn them around."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise InputError(f"LongCatAudioDiTPipeline is sampled with a FlowMatchEulerDiscreteScheduler, not {type(scheduler).__name__}.")
    config: Any = scheduler.config
    if config.use_dynamic_shifting:
        raise InputError("This scheduler shifts by the resolution (use_dynamic_shifting), and the pipeline's call tells it none.")
    path = path_of(FlowMatchEulerDiscreteScheduler.from_config({**config, "invert_sigmas": False}))
    assert isinstance(path, RectifiedFlow)
    return RectifiedFlow(path.scheduler, spacing="linear")


LongCatAudio = SoundFamily(
    component="transformer",
    encoders={"text_encoder": "tokenizer"},
    names=("encoder_hidden_states", "lengths"),
    counts=("lengths",),
    voice=_voice,
    encode=_encode,
    tiny=longcat_audio,
)
