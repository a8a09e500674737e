"""Two judges of `shapes` pictures: a tiny CLIP with a gradient, and a programme that measures what is in the picture.

The programme was never trained: it judges what the CLIP scorer trained. Each also judges edits: of a source and an instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign import edits, shapes
from diffalign.errors import InputError
from diffalign.notices import quiet
from diffalign.types import Prompts

SCORER = Path(shapes.__file__).parent / "assets" / "shapes" / "scorer"
SPECK = 10  # pixels: the smallest drawn shape covers 33


@dataclass(frozen=True)
class ShapesCLIP:
    """Cosine of image and text features of the tiny CLIP model that was trained with `shapes`, on any device."""

    folder: Path | None = None
    """Folder of another scorer; by default the one in the package."""

    differentiable = True
    modality = "image"
    range = (-1.0, 1.0)
    resolution = shapes.PIXELS
    texts: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False, repr=False, compare=False)

    @cached_property
    def model(self) -> Any:
        """CLIPModel in fp32, frozen, from fp16 files."""
        from transformers import CLIPModel

        with quiet():
            return CLIPModel.from_pretrained(self.folder or SCORER, dtype=torch.float32).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folder or SCORER)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts, any text -> (B,) in [-1, 1]; the gradient reaches the images."""
        model = self.model.to(media.device)
        pictures = resize(media.float()) * 2 - 1
        seen = F.normalize(model.get_image_features(pixel_values=pictures).pooler_output, dim=-1)
        return (seen * self.read(prompts.text).to(media.device)).sum(-1)

    @torch.no_grad()
    def read(self, texts: tuple[str, ...]) -> Tensor:
        """(B, D) unit text features; every text is encoded once. What is longer than 16 tokens is cut."""
        new = [text for text in dict.fromkeys(texts) if text not in self.texts]
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            found = self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output
            self.texts.update(zip(new, F.normalize(found, dim=-1).cpu(), strict=True))
        return torch.stack([self.texts[text] for text in texts])


@dataclass(frozen=True)
class Seen:
    """What a picture shows, measured. B pictures, up to K shapes in each."""

    paper: Tensor  # (B,) index of the background's colour
    ink: Tensor  # (B,) index of the shapes' colour
    count: Tensor  # (B,) shapes found
    shape: Tensor  # (B, K) index of the best template
    scale: Tensor  # (B, K) pixels, as in `shapes.SIZES`
    found: Tensor  # (B, K) bool: there is a k-th shape
    known: Tensor  # (B, K) bool: it fits its template
    flat: Tensor  # (B,) bool: one named colour on one named background, no specks


@dataclass(frozen=True)
class ShapesChecker:
    """Share of {colour, shape, count, background, and size where the prompt names one} that the picture has right.

    Colours come from segmentation, counts from connected components, shapes and sizes from the overlap with drawn templates.
    """

    strict: bool = False
    """Score 1 where everything is right and 0 elsewhere, instead of the share."""
    fit: float = 0.8
    """Least overlap (intersection over union) with the best template for a known shape."""

    differentiable = False
    modality = "image"
    range = (0.0, 1.0)
    resolution = shapes.PIXELS

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B captions of the shapes grammar -> (B,) in [0, 1]. InputError for other texts."""
        verdict = self.judge(media, prompts)
        if self.strict:
            return verdict["all"].float()
        right = torch.stack([verdict[name] for name in ("colour", "shape", "count", "background", "size")]).float()
        asked = torch.ones_like(right)
        asked[4] = torch.tensor([shapes.parse(text).size is not None for text in prompts.text], device=media.device)
        return (right * asked).sum(0) / asked.sum(0)

    def judge(self, media: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """(B,) bools: colour, shape, count, background, size (True where none is asked for), all of them, and `clean`.

        `clean` asks nothing of the prompt: one to three known shapes of one colour on one background.
        """
        scenes = [shapes.parse(text) for text in prompts.text]
        seen = self.look(media)
        device, colours, names = media.device, list(shapes.COLOURS), list(shapes.SHAPES)
        sizes = [None, *shapes.SIZES]

        def asked(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        some = seen.found.any(1)
        shape = ((seen.shape == asked([names.index(s.shape) for s in scenes])[:, None]) & seen.known) | ~seen.found
        large = (seen.scale * seen.found).sum(1) / seen.count.clamp(min=1) > _middle()
        size = asked([sizes.index(s.size) for s in scenes])
        verdict = {
            "colour": (seen.ink == asked([colours.index(s.colour) for s in scenes])) & some,
            "shape": shape.all(1) & some,
            "count": seen.count == asked([s.count for s in scenes]),
            "background": seen.paper == asked([colours.index(s.background) for s in scenes]),
            "size": (size == 0) | ((size == large + 1) & some),
        }
        verdict["all"] = torch.stack(list(verdict.values())).all(0)
        verdict["clean"] = seen.flat & some & (seen.count <= max(shapes.COUNTS)) & (seen.known | ~seen.found).all(1)
        return verdict

    @torch.no_grad()
    def look(self, media: Tensor) -> Seen:
        """Images (B, 3, H, W) in [0, 1] -> what they show."""
        x = resize(media.detach().float())
        ring = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], dim=-1)
        paper = ring.median(-1).values  # (B, 3): shapes leave the border free
        away = x - paper[..., None, None]
        distance = away.norm(dim=1)
        core = distance > 0.7 * distance.flatten(1).quantile(0.985, dim=1)[:, None, None]  # 15 pixels are farther
        ink = paper + (away * core[:, None]).sum((2, 3)) / core.sum((1, 2)).clamp(min=1)[:, None]
        line = (ink - paper)[..., None, None]
        alpha = ((away * line).sum(1) / line.square().sum(1).clamp(min=1e-6)).clamp(0, 1)  # (B, 32, 32)
        visible = line.norm(dim=1).flatten(1).amax(1) > 0.2
        mask = (alpha > 0.5) & visible[:, None, None]

        labels = components(mask)
        areas = torch.zeros(len(x), shapes.PIXELS**2 + 1, device=x.device)
        areas = areas.scatter_add(1, labels.flatten(1), mask.flatten(1).float())
        area, which = areas.topk(max(shapes.COUNTS) + 2)  # two more than may be there
        found = area >= SPECK
        shape, scale, overlap = self._classify(alpha, labels, which, found)
        stray = (away - alpha[:, None] * line).norm(dim=1) > 0.25
        ink_at, ink_off = _name(ink)
        paper_at, paper_off = _name(paper)
        named = (ink_off < 0.25) & (paper_off < 0.25) & visible
        flat = named & (stray.sum((1, 2)) <= 5) & ((area >= 3) & ~found).logical_not().all(1)
        return Seen(paper_at, ink_at, found.sum(1), shape, scale, found, found & (overlap >= self.fit), flat)

    def _classify(self, alpha: Tensor, labels: Tensor, which: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best template, its scale and its overlap, each (B, K), for the components `which` (B, K) of `labels` (B, 32, 32)."""
        picture, k = found.nonzero(as_tuple=True)
        own = labels[picture] == which[picture, k][:, None, None]
        other = (labels[picture] > 0) & ~own
        near = F.max_pool2d(own[:, None].float(), 3, 1, 1)[:, 0] * ~other  # with the antialiased edge
        weight = alpha[picture] * near
        total = weight.sum((1, 2)).clamp(min=1e-6)
        grid = torch.arange(shapes.PIXELS, device=alpha.device) + 0.5
        x, y = (weight.sum(1) * grid).sum(1) / total, (weight.sum(2) * grid).sum(1) / total
        overlaps, scales = [], []
        for name, unit in shapes.AREA.items():
            scale = (total / unit).sqrt()
            template = shapes.coverage(name, x, y, scale)
            overlaps.append(torch.minimum(weight, template).sum((1, 2)) / torch.maximum(weight, template).sum((1, 2)))
            scales.append(scale)
        best, at = torch.stack(overlaps).max(0)
        shape, scale, overlap = torch.zeros_like(which), torch.zeros_like(which, dtype=alpha.dtype), alpha.new_zeros(which.shape)
        shape[picture, k], overlap[picture, k] = at, best
        scale[picture, k] = torch.stack(scales).gather(0, at[None])[0]
        return shape, scale, overlap


@dataclass(frozen=True)
class ShapesEditChecker:
    """Of an edit: half for the attribute that the instruction asks for, half for the share of the four others that stay as they were.

    The source (`prompts.image`) and the edited picture are measured as `ShapesChecker` measures pictures.
    """

    strict: bool = False
    """Score 1 where everything is right and 0 elsewhere, instead of the share."""

    differentiable = False
    modality = "image"
    range = (0.0, 1.0)
    resolution = shapes.PIXELS

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], and B instructions with their sources -> (B,) in [0, 1]. InputError as `targets` has it."""
        verdict = self.judge(media, prompts)
        return verdict["all"].float() if self.strict else (verdict["asked"].float() + verdict["kept"]) / 2

    def judge(self, media: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """(B,): `asked`, bool; `kept`, the share of the others in [0, 1]; `all`, bool; and `clean` as `ShapesChecker.judge` has it."""
        wanted = targets(prompts)
        verdict = ShapesChecker().judge(media, Prompts(tuple(map(shapes.caption, wanted))))
        right = torch.stack([verdict[name] for name in shapes.VALUES])  # (5, B)
        attribute = torch.tensor([list(shapes.VALUES).index(edits.parse(text)[0]) for text in prompts.text], device=media.device)
        asked = right.gather(0, attribute[None])[0]
        kept = (right.sum(0) - asked.int()).float() / (len(right) - 1)
        return {"asked": asked, "kept": kept, "all": verdict["all"], "clean": verdict["clean"]}


@dataclass(frozen=True)
class ShapesEditCLIP:
    """`ShapesCLIP` of the edited picture with the caption that the source would have after the edit."""

    scorer: ShapesCLIP = field(default_factory=ShapesCLIP, init=False, repr=False, compare=False)

    differentiable = True
    modality = "image"
    range = (-1.0, 1.0)
    resolution = shapes.PIXELS

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], and B instructions with their sources -> (B,) in [-1, 1]. InputError as `targets` has it."""
        return self.scorer(media, Prompts(tuple(map(shapes.caption, targets(prompts)))))


def targets(prompts: Prompts) -> list[shapes.Scene]:
    """What the edited pictures should show: the scenes of the sources, measured, with what the instructions ask for.

    Raises InputError for prompts without a source, a source that shows no shape, an instruction outside the grammar of `edits`, and
    one that makes the shapes as their background.
    """
    if prompts.image is None:
        raise InputError("This reward judges edits: it needs prompts with the picture that was edited.")
    seen, wanted = ShapesChecker().look(prompts.image), list[shapes.Scene]()
    colours, names, sizes = list(shapes.COLOURS), list(shapes.SHAPES), list(shapes.SIZES)
    large = (seen.scale * seen.found).sum(1) / seen.count.clamp(min=1) > _middle()
    for i, text in enumerate(prompts.text):
        if not seen.count[i]:
            raise InputError(f"The picture of '{text}' shows no shapes on a plain background: this reward judges the shapes-edit world.")
        shape = int(seen.shape[i][seen.found[i]].mode().values)
        count = min(int(seen.count[i]), max(shapes.COUNTS))
        source = shapes.Scene(count, sizes[int(large[i])], colours[int(seen.ink[i])], names[shape], colours[int(seen.paper[i])])
        attribute, value = edits.parse(text)
        wanted.append(replace(source, **{attribute: value}))
        if wanted[-1].colour == wanted[-1].background:
            raise InputError(f"'{text}' makes the shapes of a {source.colour} on {source.background} picture as their background.")
    return wanted


def resize(media: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3, 32, 32), differentiable; the same tensor if it has that size."""
    if media.shape[-2:] == (shapes.PIXELS, shapes.PIXELS):
        return media
    return F.interpolate(media, (shapes.PIXELS, shapes.PIXELS), mode="area")  # exact for whole multiples: small shapes stay sharp


def components(mask: Tensor) -> Tensor:
    """(B, H, W) bool -> int64 labels, 0 outside the mask, one number for each 4-connected component of a picture."""
    numbers = torch.arange(1, mask[0].numel() + 1, device=mask.device, dtype=torch.float32).view(1, 1, *mask.shape[1:])
    inside = mask[:, None].float()
    labels = numbers * inside
    while True:  # every round spreads the largest number by one pixel
        spread = torch.maximum(F.max_pool2d(labels, (3, 1), 1, (1, 0)), F.max_pool2d(labels, (1, 3), 1, (0, 1))) * inside
        if torch.equal(spread, labels):
            return labels[:, 0].long()
        labels = spread


def _name(colour: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3) -> index of the nearest named colour and the distance to it, each (B,)."""
    off, at = torch.cdist(colour, torch.tensor(list(shapes.COLOURS.values()), device=colour.device)).min(1)
    return at, off


def _middle() -> float:
    """The scale half-way between small and large, in pixels."""
    return (shapes.SIZES["small"][1] + shapes.SIZES["large"][0]) / 2
