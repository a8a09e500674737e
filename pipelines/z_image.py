"""Z-Image (Alibaba, 2025, arXiv 2511.22699): one stream of picture and text, the hidden states of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.pipelines.latent import Named
from diffalign.pipelines.tiny import z_image
from diffalign.pipelines.transformer import TransformerFamily


def _encode(pipe: Any, texts: list[str], tokens: int, device: str | torch.device) -> Sequence[Tensor]:
    """The language model's tokens, (n, `tokens`, width) with zeros behind them, and how many there are, (n,)."""
    found, _ = pipe.encode_prompt(
        list(texts), device, do_classifier_free_guidance=False, max_sequence_length=tokens
    )  # it writes in its list
    lengths = torch.tensor([len(words) for words in found])
    return torch.stack([F.pad(words, (0, 0, 0, tokens - len(words))) for words in found]), lengths


def _call(pipe: Any, x_t: Tensor, t: Tensor, tensors: Named, told: float | None) -> Tensor:
    """Its time runs from noise to data, and so does its velocity."""
    texts = zip(tensors["encoder_hidden_states"], tensors["lengths"].long().tolist(), strict=True)
    out = pipe.transformer(
        list(x_t.unsqueeze(2).unbind(0)), (1000 - t) / 1000, [words[:n] for words, n in texts], return_dict=False
    )[0]  # fmt: skip
    return -torch.stack(list(out)).squeeze(2)


def _multiple(pipe: Any) -> int:
    return pipe.vae_scale_factor * 2


def _check(pipe: Any, height: int, width: int) -> None:
    if pipe.transformer.in_channels != pipe.vae.config.latent_channels:
        raise InputError(
            f"The transformer takes {pipe.transformer.in_channels} channels, and the VAE has {pipe.vae.config.latent_channels}."
        )


ZImage = TransformerFamily(
    encode=_encode,
    names=("encoder_hidden_states", "lengths"),
    counts=("lengths",),
    call=_call,
    encoders={"text_encoder": "tokenizer"},
    tokens=512,
    size=lambda pipe: vars(pipe).get("default_sample_size", 128) * pipe.vae_scale_factor,  # its own call knows 1024 pixels alone
    multiple=_multiple,
    check=_check,
    spacing="linear",
    lora_targets=("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    tiny=z_image,
)
