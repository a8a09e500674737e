"""JPEG size, the not differentiable reward of DDPO (arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.media import to_pil
from diffalign.rewards.common import check_pictures
from diffalign.types import Modality, Prompts


@dataclass(frozen=True)
class JPEGCompressibility:
    """`sign` times the size, in kB of 1000 bytes, of the picture as a JPEG of quality 95: -1 rewards small files, 1 large ones."""

    sign: int = -1
    """-1 for compressibility, 1 for incompressibility."""

    differentiable: ClassVar[bool] = False
    modality: ClassVar[Modality] = "image"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise InputError(f"sign is {self.sign}: give -1 (compressibility) or 1 (incompressibility).")

    def __call__(self, images: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to (B,) kB; raises InputError for others."""
        check_pictures(images, prompts)
        return torch.tensor([self.sign * _kilobytes(image) for image in images])


def _kilobytes(image: Tensor) -> float:
    file = io.BytesIO()
    to_pil(image).save(file, format="JPEG", quality=95)
    return file.tell() / 1000
