"""FLUX.1 (Black Forest Labs, 2024): CLIP's pooled text and T5's tokens; guidance that the network is told, or classifier-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.pipelines.tiny import flux
from diffalign.pipelines.transformer import Named, TransformerFamily


def _encode(pipe: Any, texts: list[str], tokens: int, device: str | torch.device) -> Sequence[Tensor]:
    """T5's tokens, and CLIP's pooled embedding."""
    hidden, pooled, _ = pipe.encode_prompt(texts, None, device, 1, max_sequence_length=tokens)
    return hidden, pooled


def _call(pipe: Any, x_t: Tensor, t: Tensor, tensors: Named, told: float | None) -> Tensor:
    """On patches of 2 x 2 latents, (B, h/2 w/2, 4 C), each with its position; text has position 0."""
    n, channels, height, width = x_t.shape
    velocity = pipe.transformer(
        hidden_states=pipe._pack_latents(x_t, n, channels, height, width),
        timestep=t / 1000,
        guidance=None if told is None else torch.full((n,), told, device=x_t.device, dtype=torch.float32),
        **tensors,
        txt_ids=torch.zeros(tensors["encoder_hidden_states"].shape[1], 3, device=x_t.device),
        img_ids=pipe._prepare_latent_image_ids(n, height // 2, width // 2, x_t.device, torch.float32),
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    return pipe._unpack_latents(velocity, height * factor, width * factor, factor)


def _multiple(pipe: Any) -> int:
    return pipe.vae_scale_factor * 2


def _check(pipe: Any, height: int, width: int) -> None:
    config, latent = pipe.transformer.config, pipe.vae.config.latent_channels
    if config.in_channels != 4 * latent:
        raise InputError(
            f"The transformer has {config.in_channels} input channels, and FLUX of text to image {4 * latent}. Those of Fill, Canny and "
            "Depth see a picture besides, which is not supported."
        )
    if getattr(pipe.transformer, "encoder_hid_proj", None) is not None:
        raise InputError("This transformer wants pictures from an IP-Adapter: pipe.unload_ip_adapter() first.")


Flux = TransformerFamily(
    encode=_encode,
    call=_call,
    encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    tokens=512,
    multiple=_multiple,
    check=_check,
    spacing="linear",
    distilled=True,
    tiny=flux,
)
