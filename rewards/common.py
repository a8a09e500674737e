"""What rewards with a trained network share: how pictures and prompts reach it, and how a batch goes through."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffalign.cache import TextCache
from diffalign.errors import InputError
from diffalign.types import Prompts

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EDGE = 1e-3  # how far above 1 or below 0 a pixel may lie: what rounding does


def check_fields(precision: str, batch_size: int) -> None:
    """Raise InputError for what the fields of every reward here cannot be: a Python caller's values have passed no parser."""
    if precision not in DTYPES:
        raise InputError(f"precision is {precision}: give {' or '.join(DTYPES)}.")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: give 1 or more.")


def check_pictures(media: Tensor, prompts: Prompts) -> None:
    """Raise InputError for what is not float (B, 3, H, W) in [0, 1] with B prompts."""
    if media.ndim != 4 or media.shape[1] != 3 or not media.is_floating_point():
        raise InputError(
            f"Pictures of shape {tuple(media.shape)} and type {media.dtype}: this reward takes float (B, 3, H, W), RGB in [0, 1]."
        )
    if len(media) != len(prompts):
        raise InputError(f"{len(media)} pictures and {len(prompts)} prompts: give one prompt for each picture.")
    if not media.numel():
        raise InputError(f"Pictures of shape {tuple(media.shape)}: none holds a pixel.")
    low, high = (float(x) for x in media.detach().float().aminmax())
    if not (low >= -EDGE and high <= 1 + EDGE):  # said so that NaN, which compares as false, is refused too
        raise InputError(f"Pictures with pixels from {low:.4g} to {high:.4g}: this reward takes numbers in [0, 1].")


@dataclass(frozen=True)
class View:
    """How a network sees pictures: `size` pixels square, resized with antialiasing, then normalised.

    `crop` scales the shorter side to `size` and cuts the middle out, `pad` scales the longer side and puts black around it, `squash`
    scales both. `rounds`: a crop whose margin is odd starts at the nearest whole pixel (torchvision), else before it (transformers).
    """

    size: int = 224
    how: Literal["crop", "pad", "squash"] = "crop"
    mode: Literal["bicubic", "bilinear", "area"] = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rounds: bool = False

    def __call__(self, media: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] to (B, 3, size, size), fp32 and differentiable; bicubic overshoot is not clipped."""
        fitted = self.fit(media.float())
        mean, std = (torch.tensor(values, device=media.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (fitted - mean) / std

    def fit(self, media: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, size, size), not yet normalised."""
        height, width = media.shape[-2:]
        size, short, long = self.size, min(height, width), max(height, width)
        if self.how == "squash":
            return self._resize(media, size, size)
        if self.how == "pad":
            height, width = (max(1, round(side * (size / long))) for side in (height, width))
            down, right = size - height, size - width
            return F.pad(self._resize(media, height, width), (right // 2, right - right // 2, down // 2, down - down // 2))
        height, width = (size if side == short else int(size * side / short) for side in (height, width))
        top, left = (round(spare / 2) if self.rounds else spare // 2 for spare in (height - size, width - size))
        return self._resize(media, height, width)[..., top : top + size, left : left + size]

    def _resize(self, media: Tensor, height: int, width: int) -> Tensor:
        if media.shape[-2:] == (height, width):
            return media
        if self.mode == "area":
            return F.interpolate(media, (height, width), mode="area")
        return F.interpolate(media, (height, width), mode=self.mode, align_corners=False, antialias=True)


def in_chunks(score: Callable[..., Tensor], batch_size: int, *rows: Tensor) -> Tensor:
    """`score` of `rows` (each (B, ...)), at most `batch_size` at once.

    With a gradient, several chunks are each computed again on the way back: memory holds the activations of one.
    """
    starts = range(0, len(rows[0]), batch_size)
    again = len(starts) > 1 and torch.is_grad_enabled() and any(row.requires_grad for row in rows)
    parts = [[row[i : i + batch_size] for row in rows] for i in starts]
    return torch.cat([checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) if again else score(*part) for part in parts])


@dataclass
class Words:
    """Prompts as token ids of one length, (n, length). Longer ones are cut; that some were is said once, in the log, by `note`."""

    tokenizer: Any
    length: int
    name: str
    unescape: bool = False  # as open_clip cleans texts
    said: bool = False

    def __call__(self, texts: Sequence[str]) -> Any:
        """input_ids and attention_mask, each (n, length)."""
        return self.tokenizer(self._clean(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")

    def note(self, texts: Sequence[str]) -> None:
        """Say how many of these texts are cut, the first time that there are any."""
        if self.said:
            return
        distinct = list(dict.fromkeys(texts))
        found = self.tokenizer(self._clean(distinct), verbose=False).input_ids
        long = sum(len(ids) > self.length for ids in found)
        if long:
            self.said = True
            logging.getLogger("diffalign").warning(
                "%s reads %d tokens of a prompt: %d of %d prompts are longer, and the rest of them is not read. "
                "This is said once.", self.name, self.length, long, len(distinct),
            )  # fmt: skip

    def _clean(self, texts: Sequence[str]) -> list[str]:
        return [html.unescape(html.unescape(text)).strip() if self.unescape else text for text in texts]


@dataclass
class Towers:
    """A network for pictures and one for texts with features in one space, as CLIP has them.

    `look` maps pixels (n, 3, S, S) in the network's type to features (n, D), `read` texts to (n, D). Every text is read once.
    """

    network: Any
    look: Callable[[Tensor], Tensor]
    read: Callable[[list[str]], Tensor]
    view: View
    note: Callable[[Sequence[str]], None]
    texts: TextCache = field(init=False)

    def __post_init__(self) -> None:
        self.texts = TextCache(self._unit_features, names=("features",))

    def cosine(self, media: Tensor, prompts: Prompts, batch_size: int) -> Tensor:
        """(B,) cosines in [-1, 1], fp32, of pictures (B, 3, H, W) in [0, 1] and B prompts; the network moves to the pictures' device."""
        check_pictures(media, prompts)
        self.network.to(media.device)
        self.note(prompts.text)
        texts = self.texts(prompts.text)["features"].to(media.device)
        return in_chunks(lambda pictures, wanted: (self._see(pictures) * wanted).sum(-1), batch_size, media, texts)

    def _see(self, media: Tensor) -> Tensor:
        return F.normalize(self.look(self.view(media).to(self.dtype)).float(), dim=-1)

    @torch.no_grad()
    def _unit_features(self, texts: list[str]) -> tuple[Tensor]:
        return (F.normalize(self.read(texts).float(), dim=-1),)

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype


def towers(model: Any, words: Words, view: View) -> Towers:
    """The towers of transformers' CLIPModel or SiglipModel. Padding needs no mask: CLIP looks back only, and SigLIP was trained on it."""

    def read(texts: list[str]) -> Tensor:
        return model.get_text_features(input_ids=words(texts).input_ids.to(model.device)).pooler_output

    return Towers(model, lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output, read, view, words.note)
