"""Pipelines of sound: what tells one family from another, and what makes a policy of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.cache import TextCache
from diffalign.errors import InputError
from diffalign.pipelines.common import PRECISIONS, check_parts, place, vae_dtype
from diffalign.pipelines.latent import NULL, LatentPolicy, Named, says_nothing
from diffalign.pipelines.unet import ATTENTION
from diffalign.types import Modality, NoisePath, PromptField, Prompts, says


@dataclass(frozen=True)
class Voice:
    """What one live pipeline is, by the names of `LatentPolicy`'s fields, for sounds of the length and texts of the `tokens` that were
    asked for."""

    path: NoisePath
    network: Callable[[Tensor, Tensor, Named], Tensor]
    keys: Callable[[Prompts], Sequence[str]]
    tokens: int
    sample_rate: int
    samples: int
    latent: tuple[int, ...]
    decoder: Callable[[Any, Tensor], Tensor]
    embedder: Callable[[Any, Tensor], Tensor]
    coding: tuple[object, ...]
    takes: tuple[PromptField, ...] = ()
    unspeakable: Callable[[str], str | None] = says_nothing
    dropped: Callable[[Named, Tensor], Named] | None = None
    uneven: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SoundFamily:
    """One family of pipelines; `of` makes a policy of a live one. An adapter is a value of this class.

    `voice(pipe, audio_seconds, tokens, negative_prompt)` is what the pipeline is, the first three settings being None where nothing was
    asked; it raises InputError for what does not fit. `encode(pipe, key, tokens, guided, device)` gives of one of the voice's keys a tensor
    for each of `names`, and where `guided` those of the unconditional branch after them: a prompt is encoded alone, as the pipeline's call
    encodes it. Names that the network reads as numbers are `counts`, and stay on the CPU. `encoders` are the text encoders with their
    tokenizers, `coders` what goes from latents to waveforms. `tiny` makes such a pipeline with random weights, for dry runs.
    """

    component: str
    encoders: Mapping[str, str]
    names: tuple[str, ...]
    voice: Callable[[Any, float | None, int | None, str | None], Voice]
    encode: Callable[[Any, str, int, bool, str | torch.device], list[Tensor]]
    counts: tuple[str, ...] = ()
    coders: tuple[str, ...] = ("vae",)
    modality: Modality = "audio"
    tiny: Callable[[], Any] | None = None

    def of(
        self,
        pipe: Any,
        *,
        guidance_scale: float = 4.0,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        audio_seconds: float | None = None,
        max_sequence_length: int | None = None,
        precision: str = "fp32",
        vae_precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> LatentPolicy:
        """Wrap a live pipeline: moves it to `device`, its network and text encoders to `precision`, VAE and vocoder to `vae_precision`.

        All sounds are of one length, `audio_seconds`. Guidance is on where its scale is above 1. Raises InputError for what this pipeline
        does not take.
        """
        check_given(pipe, height, width, audio_seconds)
        check_parts(pipe, self.component, *self.coders, *self.encoders, *self.encoders.values())
        voice = self.voice(pipe, audio_seconds, max_sequence_length, negative_prompt)
        dtype, coder = PRECISIONS[precision], vae_dtype(pipe.vae, vae_precision)
        came = place(pipe, device, {**dict.fromkeys(self.coders, coder), **dict.fromkeys((self.component, *self.encoders), dtype)})
        guided = guidance_scale > 1

        def both(names: tuple[str, ...]) -> tuple[str, ...]:
            return (*names, *(NULL + name for name in names)) if guided else names

        @torch.no_grad()
        def encode(keys: list[str]) -> list[Tensor]:
            known = {key: self.encode(pipe, key, voice.tokens, guided, device) for key in dict.fromkeys(keys)}
            return [torch.stack(parts).float() for parts in zip(*(known[key] for key in keys), strict=True)]

        return LatentPolicy(
            pipe=pipe,
            component=self.component,
            lora_targets=list(ATTENTION),
            texts=TextCache(encode, device, both(self.names), capacity=256, on_cpu=both(self.counts)),
            encoders=self.encoders,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            modality=self.modality,
            coders=self.coders,
            dtype=dtype,
            came=came,
            **vars(voice),
        )


def check_given(pipe: Any, height: int | None, width: int | None, audio_seconds: float | None) -> None:
    """Raise InputError for settings of pictures, and for a length that is none."""
    if height is not None or width is not None:
        raise InputError(f"height and width are of pictures, and a {type(pipe).__name__} makes sound: --audio-seconds.")
    if audio_seconds is not None and not 0 < audio_seconds < float("inf"):
        raise InputError(f"audio_seconds is {audio_seconds}: give a number above 0.")


def check_said(prompts: Prompts, speech: bool) -> None:
    """Raise InputError for transcripts that the pipeline would leave out: of those that are told the text alone, what is not in it."""
    for text, said in zip(prompts.text, () if speech else prompts.transcript or (), strict=False):
        if not says(text, said):
            raise InputError(f"This pipeline says the text itself, and the transcript '{said}' is not in '{text}'.")


def check_tokens(text: str, found: int, tokens: int) -> None:
    """Raise InputError for a text that does not fit into the tokens that are kept of each."""
    if found > tokens:
        raise InputError(f"The prompt '{text}' has {found} tokens, and {tokens} are kept of each: --max-sequence-length {found}.")
