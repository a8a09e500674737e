"""LAION's aesthetic predictors (Schuhmann et al., 2022, github.com/christophschuhmann/improved-aesthetic-predictor): CLIP and a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.rewards import tiny
from diffalign.rewards.common import DTYPES, Precision, View, check_fields, check_pictures, in_chunks
from diffalign.rewards.weights import WEIGHTS, Source, convert, fetch, linears, load, read_weights, snapshot
from diffalign.types import Modality, Prompts

REPO, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"  # the authors' own is on GitHub alone
CLIP_REPO = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Aesthetic:
    """How much people would like the picture, on a scale of 1 to 10, from CLIP's picture features of length 1. Reads no prompt."""

    checkpoint: Path | None = None
    """The head as a local file, the authors' MLP or linear one, in place of the download (the MLP)."""
    clip: Path | None = None
    """A folder with CLIP ViT-L/14 in transformers' layout, in place of the download."""
    revision: str = "main"
    """Revision of the head on the Hub: a commit is always the same file."""
    sha256: str | None = None
    """Checksum that the head must have."""
    precision: Precision = "fp32"
    """Of CLIP; the head is fp32."""
    batch_size: int = 8
    """Pictures that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "image"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    resolution: ClassVar[int] = 224

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to (B,), of which most are from 1 to 10; the gradient reaches the images."""
        check_pictures(media, prompts)
        self.networks.to(media.device)
        return in_chunks(self._score, self.batch_size, media)

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.networks

    def _score(self, media: Tensor) -> Tensor:
        vision, head = self.networks["clip"], self.networks["head"]
        pixels = View(vision.config.image_size)(media).to(vision.dtype)
        return head(F.normalize(vision(pixel_values=pixels).image_embeds.float(), dim=-1))[:, 0]

    @cached_property
    def networks(self) -> Any:
        """`clip` and `head`, frozen."""
        from transformers import CLIPVisionModelWithProjection

        path = fetch(REPO, FILE, self.revision, self.checkpoint, self.sha256)
        weights = read_weights(path)
        head, source = _linear(weights) if "weight" in weights else linears(weights, "layers.", "LAION's aesthetic predictor", path)
        state = convert(weights, {"head": (head, source)}, path)["head"]
        head.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        # CLIP's repository has branches of its own, so `revision` is not for it
        vision = load(CLIPVisionModelWithProjection, snapshot(CLIP_REPO, "main", self.clip, "clip", WEIGHTS), DTYPES[self.precision])
        if vision.config.projection_dim != head[0].in_features:
            raise InputError(f"The head in {path} reads {head[0].in_features} features and this CLIP has {vision.config.projection_dim}.")
        return nn.ModuleDict({"clip": vision, "head": head.requires_grad_(False).eval()})

    def tiny(self, folder: Path) -> Aesthetic:
        """The same reward with a tiny random CLIP and MLP, which are written into `folder` as the real ones lie on the Hub."""
        tiny.save_clip(folder, tiny.clip("quick_gelu"))
        sizes = {0: (32, 32), 2: (32, 16), 4: (16, 8), 6: (8, 4), 7: (4, 1)}
        layers = tiny.seeded(lambda: {n: nn.Linear(*size).state_dict() for n, size in sizes.items()})
        torch.save({f"layers.{n}.{name}": tensor for n, layer in layers.items() for name, tensor in layer.items()}, folder / FILE)
        return replace(self, checkpoint=folder / FILE, clip=folder, sha256=None)


def _linear(weights: dict[str, Tensor]) -> tuple[nn.Sequential, Callable[[str], Source]]:
    """The first predictor: one linear layer, `weight` and `bias`."""
    with torch.device("meta"):
        stack = nn.Sequential(nn.Linear(weights["weight"].shape[-1], 1))
    return stack, lambda name: Source(name.removeprefix("0."))
