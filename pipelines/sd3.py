"""Stable Diffusion 3 and 3.5 (Esser et al., ICML 2024, arXiv 2403.03206): three text encoders, of which T5 may be absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.pipelines.tiny import sd3
from diffalign.pipelines.transformer import Named, TransformerFamily


def _encode(pipe: Any, texts: list[str], tokens: int, device: str | torch.device) -> Sequence[Tensor]:
    """Two CLIPs side by side, padded to T5's width, then T5's tokens (zeros where it is absent); both CLIPs' pooled embeddings."""
    found = pipe.encode_prompt(texts, None, None, device, 1, False, max_sequence_length=tokens)
    return found[0], found[2]


def _call(pipe: Any, x_t: Tensor, t: Tensor, tensors: Named, told: float | None) -> Tensor:
    return pipe.transformer(hidden_states=x_t, timestep=t, **tensors, return_dict=False)[0]


def _multiple(pipe: Any) -> int:
    return pipe.vae_scale_factor * pipe.transformer.config.patch_size


def _check(pipe: Any, height: int, width: int) -> None:
    config = pipe.transformer.config
    if config.in_channels != pipe.vae.config.latent_channels:
        raise InputError(f"The transformer takes {config.in_channels} channels, and the VAE has {pipe.vae.config.latent_channels}.")
    most = config.pos_embed_max_size * _multiple(pipe)
    if max(height, width) > most:
        raise InputError(f"A picture of {height} x {width} does not fit this model: it knows positions up to {most} pixels a side.")


StableDiffusion3 = TransformerFamily(
    encode=_encode,
    call=_call,
    encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"},
    spare=("text_encoder_3",),
    tokens=256,
    multiple=_multiple,
    check=_check,
    tiny=sd3,
)
