"""Stable Diffusion 1.x and 2.x: a text-conditioned UNet on the latents of a VAE (Rombach et al., CVPR 2022, arXiv 2112.10752)."""

from __future__ import annotations

from diffalign.pipelines.unet import ONE_ENCODER, UNetFamily

StableDiffusion = UNetFamily(ONE_ENCODER)
