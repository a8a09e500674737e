"""Stable Diffusion XL (Podell et al., ICLR 2024, arXiv 2307.01952): two text encoders, and a UNet that is told pooled text and sizes.

The base model alone: its refiner works on pictures of the base model, and is no policy of its own.
"""

from __future__ import annotations

from diffalign.pipelines.common import TWO_ENCODERS
from diffalign.pipelines.unet import UNetFamily

StableDiffusionXL = UNetFamily(TWO_ENCODERS)
