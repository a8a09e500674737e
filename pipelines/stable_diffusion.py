"""Stable Diffusion 1.x and 2.x: a text-conditioned UNet on the latents of a VAE (Rombach et al., CVPR 2022, arXiv 2112.10752)."""

from __future__ import annotations

from diffalign.pipelines.common import ONE_ENCODER
from diffalign.pipelines.unet import UNetFamily

StableDiffusion = UNetFamily(ONE_ENCODER)
