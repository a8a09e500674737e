"""PickScore (Kirstain et al., NeurIPS 2023, arXiv 2305.01569): CLIP ViT-H-14 tuned on which picture people picked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from diffalign.rewards import tiny
from diffalign.rewards.common import DTYPES, Precision, Towers, View, Words, check_fields, towers
from diffalign.rewards.weights import TOKENIZER, WEIGHTS, load, load_tokenizer, snapshot
from diffalign.types import Modality, Prompts

REPO = "yuvalkirstain/PickScore_v1"
TOKENIZER_REPO = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True)
class PickScore:
    """Cosine of the picture's and the prompt's features times exp(logit scale), which is 100 at most in CLIP."""

    checkpoint: Path | None = None
    """A folder with the model in transformers' layout, in place of the download."""
    tokenizer: Path | None = None
    """A folder with CLIP's tokenizer, in place of the download."""
    revision: str = "main"
    """Revision of the model on the Hub: a commit is always the same."""
    precision: Precision = "fp32"
    """Of the networks; cosines are fp32."""
    batch_size: int = 8
    """Pictures that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "image"
    range: ClassVar[tuple[float, float]] = (-100.0, 100.0)
    resolution: ClassVar[int] = 224

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to (B,); the gradient reaches the images."""
        cosine = self.towers.cosine(media, prompts, self.batch_size)
        return self.towers.network.logit_scale.float().exp() * cosine

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.towers

    @cached_property
    def towers(self) -> Towers:
        from transformers import CLIPModel, CLIPTokenizer

        model = load(CLIPModel, snapshot(REPO, self.revision, self.checkpoint, "checkpoint", WEIGHTS), DTYPES[self.precision])
        # the tokenizer's repository has branches of its own, so `revision` is not for it
        folder, text = snapshot(TOKENIZER_REPO, "main", self.tokenizer, "tokenizer", TOKENIZER), model.config.text_config
        tokenizer = load_tokenizer(CLIPTokenizer, folder, text.vocab_size)
        return towers(model, Words(tokenizer, text.max_position_embeddings, "pickscore"), View(model.config.vision_config.image_size))

    def tiny(self, folder: Path) -> PickScore:
        """The same reward with a tiny random CLIP, which is written into `folder` as the real one lies on the Hub."""
        tiny.save_clip(folder, tiny.clip())
        return replace(self, checkpoint=folder, tokenizer=folder)
