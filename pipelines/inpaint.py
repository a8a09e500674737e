"""Inpainting: a UNet that sees, beside the noisy latents, a mask and the picture without what is masked (arXiv 2112.10752)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.pipelines.common import ONE_ENCODER, TWO_ENCODERS, posterior_mode
from diffalign.pipelines.unet import Named, UNetFamily
from diffalign.types import Prompts


def masked_picture(pipe: Any, prompts: Prompts) -> tuple[Named, Named]:
    """The mask at the latents' size, 1 where the picture is made anew, and the latents of the picture, grey there; in both branches.

    The latents are the mode of the posterior, scaled: diffusers draws a sample, and a condition must not change from call to call.
    """
    if prompts.image is None or prompts.mask is None:
        raise InputError("This pipeline fills masked pictures, and the prompts have no picture or no mask.")
    image, mask = (x.to(pipe.vae.device, torch.float32) for x in (prompts.image, prompts.mask))
    hole = mask >= 0.5
    latents = posterior_mode(pipe.vae, torch.where(hole, 0.5, image)) * pipe.vae.config.scaling_factor
    shown = {"mask": F.interpolate(hole.float(), size=latents.shape[-2:]), "masked": latents}
    return shown, shown


Inpaint = UNetFamily(ONE_ENCODER, takes=("image", "mask"), beside=("mask", "masked"), show=masked_picture)
InpaintXL = replace(Inpaint, texts=TWO_ENCODERS)
