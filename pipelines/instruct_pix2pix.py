"""InstructPix2Pix: Stable Diffusion, or SDXL, that edits a picture as an instruction says (Brooks et al., CVPR 2023, arXiv 2211.09800)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.pipelines.common import TWO_ENCODERS, TextEncoding, posterior_mode
from diffalign.pipelines.unet import Named, UNetFamily
from diffalign.types import Condition, Prompts


def clip(pipe: Any, texts: list[str], device: str | torch.device) -> Sequence[Tensor]:
    """Embeddings (n, tokens, width): this pipeline's own method has another name."""
    return (pipe._encode_prompt(texts, device, 1, False),)


def source(pipe: Any, prompts: Prompts) -> tuple[Named, Named]:
    """The latents of `prompts.image`, the mode of the posterior, not scaled; zeros in the unconditional branch."""
    if prompts.image is None:
        raise InputError("This pipeline edits pictures, and the prompts have none.")
    latents = posterior_mode(pipe.vae, prompts.image.to(pipe.vae.device, torch.float32))
    if vars(pipe).get("is_cosxl_edit"):
        latents = latents * pipe.vae.config.scaling_factor
    return {"source": latents}, {"source": torch.zeros_like(latents)}


def both_source_neither(condition: Condition) -> list[Named]:
    """Text and source, the source alone, and neither: diffusers' order."""
    assert condition.null is not None
    return [condition.tensors, {**condition.null, "source": condition.tensors["source"]}, condition.null]


def two_scales(outputs: Sequence[Tensor], text_scale: float, image_scale: float) -> Tensor:
    """`e(0, 0) + s_T (e(I, T) - e(I, 0)) + s_I (e(I, 0) - e(0, 0))`, arXiv 2211.09800, eq. 3."""
    text, image, neither = outputs
    return neither + text_scale * (text - image) + image_scale * (image - neither)


InstructPix2Pix = UNetFamily(
    TextEncoding(clip), takes=("image",), beside=("source",), show=source, branches=both_source_neither, mix=two_scales
)
InstructPix2PixXL = replace(InstructPix2Pix, texts=TWO_ENCODERS)
