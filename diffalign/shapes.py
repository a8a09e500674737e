"""The world of the embedded default `shapes`: scenes, their captions, their pictures, and who may train on which.

One to three equal shapes of one colour and one size on a background of another colour, 32 x 32 pixels:
"two small green squares on a yellow background".
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from diffalign.errors import InputError, nearest

PIXELS = 32
COLOURS: dict[str, tuple[float, float, float]] = {  # the nearest two are 0.37 apart, the jitter moves one by at most 0.07
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.54, 0.08),
    "yellow": (0.98, 0.90, 0.18),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.12, 0.30, 0.88),
    "purple": (0.56, 0.14, 0.68),
    "white": (0.95, 0.95, 0.95),
    "black": (0.06, 0.06, 0.06),
}
SHAPES: dict[str, str] = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS: dict[int, str] = {1: "a", 2: "two", 3: "three"}
SIZES: dict[str, tuple[float, float]] = {"small": (3.9, 4.3), "large": (5.7, 6.2)}  # pixels, the scale s below
EXTENT: dict[str, tuple[float, float, float]] = {  # half width, top, bottom from the centroid, in units of s
    "circle": (1.0, 1.0, 1.0),
    "square": (0.9, 0.9, 0.9),
    "triangle": (1.15, 4 / 3, 2 / 3),
    "cross": (1.08, 1.08, 1.08),
}
AREA: dict[str, float] = {"circle": 3.1416, "square": 3.24, "triangle": 2.3, "cross": 2.7056}  # in units of s^2
VALUES: dict[str, tuple] = {
    "count": tuple(COUNTS),
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "background": tuple(COLOURS),
}
JITTER = 0.04
EXAMPLE = "two small green squares on a yellow background"
GRAMMAR = (
    "<a|two|three> [small|large] <colour> <shape> on a <colour> background, "
    f"colours {', '.join(COLOURS)}, shapes {', '.join(SHAPES)}; for example '{EXAMPLE}'"
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `size` None: the caption leaves it open."""

    count: int
    size: str | None
    colour: str
    shape: str
    background: str


def caption(scene: Scene) -> str:
    """`Scene(2, "small", "green", "square", "yellow")` -> "two small green squares on a yellow background"."""
    noun = scene.shape if scene.count == 1 else SHAPES[scene.shape]
    adjectives = f"{scene.size} {scene.colour}" if scene.size else scene.colour
    count = _article(adjectives) if scene.count == 1 else COUNTS[scene.count]
    return f"{count} {adjectives} {noun} on {_article(scene.background)} {scene.background} background"


def parse(text: str) -> Scene:
    """The scene a caption asks for; the inverse of `caption`. Raises InputError for a text outside the grammar."""
    found = re.fullmatch(r"(\w+)(?: (small|large))? (\w+) (\w+) on (?:a|an) (\w+) background\.?", " ".join(text.lower().split()))
    if not found:
        raise InputError(f"'{text}' is not a caption of the shapes world. Its grammar: {GRAMMAR}.")
    count, size, colour, noun, background = found.groups()
    counts = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
    nouns = {name: name for name in SHAPES} | {plural: name for name, plural in SHAPES.items()}
    for word, known in ((count, counts), (colour, COLOURS), (noun, nouns), (background, COLOURS)):
        if word not in known:
            hint = nearest(word, known)
            raise InputError(f"'{word}' in '{text}' is not a word of the shapes world. {hint} Its grammar: {GRAMMAR}.")
    if colour == background:
        raise InputError(f"'{text}' asks for {colour} on {colour}, which nobody can see. Name two colours.")
    return Scene(counts[count], size, colour, nouns[noun], background)


def every() -> list[Scene]:
    """All 1344 scenes: 3 counts x 2 sizes x 8 colours x 4 shapes x 7 other backgrounds."""
    product = itertools.product(COUNTS, SIZES, COLOURS, SHAPES, COLOURS)
    return [Scene(*values) for values in product if values[2] != values[4]]


def split() -> tuple[list[Scene], list[Scene]]:
    """(832 for training, 512 held out). Held out are 256 combinations of count, colour, shape and background, in both sizes.

    The 256 are those whose caption has the smallest hash: the same on every machine and in every version.
    """

    def order(scene: Scene) -> str:
        return hashlib.sha256(caption(replace(scene, size=None)).encode()).hexdigest()

    ranked = sorted(every(), key=lambda scene: (order(scene), scene.size))
    held_out = ranked[:512]
    held = set(held_out)
    return [scene for scene in every() if scene not in held], held_out


def sample(scenes: Sequence[Scene], n: int, rng: Generator, unsized: float = 0.1) -> list[Scene]:
    """`n` random ones of the scenes; a share `unsized` leaves the size open."""
    picked = [scenes[i] for i in torch.randint(len(scenes), (n,), generator=rng).tolist()]
    open_ = torch.rand(n, generator=rng) < unsized
    return [replace(s, size=None) if o else s for s, o in zip(picked, open_.tolist(), strict=True)]


def one_wrong(scene: Scene, attribute: str, held_out: set[Scene], rng: Generator, among: Sequence[int | str] | None = None) -> Scene | None:
    """The scene with one attribute redrawn among its other values, or those `among`; None if its size is open or none is left.

    Not even as a wrong caption may a held-out combination appear: the scorer would learn that it is always wrong.
    """
    if getattr(scene, attribute) is None:
        return None
    choices = [replace(scene, **{attribute: value}) for value in among or VALUES[attribute] if value != getattr(scene, attribute)]
    choices = [s for s in choices if s.colour != s.background and replace(s, size="small") not in held_out]
    return choices[int(torch.randint(len(choices), (), generator=rng))] if choices else None


def fits(asked: Scene, shown: Scene) -> bool:
    """Whether a caption is right for a picture; an open size on either side fits both."""
    return replace(asked, size=shown.size and asked.size) == replace(shown, size=asked.size and shown.size)


def signed_distance(shape: str, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Distance in pixels to the edge of `shape` centred on its centroid, negative inside; any broadcastable shapes.

    Exact inside and at the edges, a lower bound at outer corners: antialiasing looks at half a pixel only.
    """
    if shape == "circle":
        return (x**2 + y**2).sqrt() - scale
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * scale
    if shape == "triangle":  # apex up (y points down): width 2.3 s, height 2 s
        slope = 2.0 / 1.15
        sides = (slope * x.abs() - y - 4 / 3 * scale) / (1 + slope**2) ** 0.5
        return torch.maximum(sides, y - 2 / 3 * scale)
    length, width = 1.08 * scale, 0.38 * scale
    bars = [torch.maximum(a.abs() - length, b.abs() - width) for a, b in ((x, y), (y, x))]
    return torch.minimum(*bars)


def coverage(shape: str, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """(N, 32, 32) in [0, 1]: how much of each pixel `shape` covers, for centroids x, y and scales (N,) in pixels."""
    grid = torch.arange(PIXELS, device=x.device) + 0.5
    at = (grid[None, None, :] - x[:, None, None], grid[None, :, None] - y[:, None, None])
    return (0.5 - signed_distance(shape, *at, scale[:, None, None])).clamp(0, 1)


@dataclass(frozen=True)
class Layout:
    """Where and how B scenes are drawn: what chance decides, not the caption."""

    jitter: Tensor  # (B, 2, 3): of the shapes' colour and of the background's
    scale: Tensor  # (B,) pixels
    x: Tensor  # (B, 3) centroids of up to three shapes, in pixels
    y: Tensor


def arrange(scenes: Sequence[Scene], rng: Generator, snap: float | None = None, others: Sequence[Scene] = ()) -> Layout:
    """A random layout for the scenes, in which their `others` (of the same counts, perhaps of another shape) have room as well.

    With `snap` the places are multiples of so many pixels, and each size has one scale: pictures that a small network learns to
    draw cleanly.
    """
    b = len(scenes)
    jitter = (torch.rand(b, 2, 3, generator=rng) * 2 - 1) * JITTER
    drop, where = torch.rand(b, generator=rng), torch.rand(b, 3, 2, generator=rng)
    cells = torch.rand(b, 4, generator=rng).argsort(1)[:, :3]  # several shapes: a quadrant each
    sizes = [s.size or list(SIZES)[int(drop[i] < 0.5)] for i, s in enumerate(scenes)]
    low, high = torch.tensor([SIZES[size] for size in sizes]).unbind(1)
    scale = low + (high - low) * torch.rand(b, generator=rng)
    if snap is not None:
        scale = (low + high) / 2

    extent = torch.tensor([EXTENT[s.shape] for s in scenes])  # (B, 3)
    if others:
        extent = extent.maximum(torch.tensor([EXTENT[s.shape] for s in others]))
    extent = extent * scale[:, None]
    count = torch.tensor([s.count for s in scenes])
    alone = count[:, None] == 1
    side = torch.where(alone, PIXELS, PIXELS / 2)
    margin = 1.0
    left = torch.where(alone, 0.0, (cells % 2) * PIXELS / 2) + extent[:, :1] + margin
    top = torch.where(alone, 0.0, (cells // 2) * PIXELS / 2) + extent[:, 1:2] + margin
    room_x = (side - 2 * (extent[:, :1] + margin)).clamp(min=0)
    room_y = (side - (extent[:, 1:2] + extent[:, 2:3] + 2 * margin)).clamp(min=0)
    x, y = left + room_x * where[..., 0], top + room_y * where[..., 1]  # (B, 3)
    if snap is not None:
        x = torch.minimum((x / snap).round() * snap, left + room_x).maximum(left)
        y = torch.minimum((y / snap).round() * snap, top + room_y).maximum(top)
    return Layout(jitter, scale, x, y)


def paint(scenes: Sequence[Scene], layout: Layout) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1] of the scenes in a layout."""
    palette, names = torch.tensor(list(COLOURS.values())), list(COLOURS)
    ink = palette[[names.index(s.colour) for s in scenes]] + layout.jitter[:, 0]
    paper = palette[[names.index(s.background) for s in scenes]] + layout.jitter[:, 1]
    cover = torch.zeros(len(scenes), PIXELS, PIXELS)
    for shape, place in itertools.product(SHAPES, range(3)):
        mine = torch.tensor([s.shape == shape and s.count > place for s in scenes])
        if mine.any():
            drawn = coverage(shape, layout.x[mine, place], layout.y[mine, place], layout.scale[mine])
            cover[mine] = torch.maximum(cover[mine], drawn)
    pictures = paper[:, :, None, None] + (ink - paper)[:, :, None, None] * cover[:, None]
    return pictures.clamp(0, 1)


def draw(scenes: Sequence[Scene], rng: Generator, snap: float | None = None) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1] of the scenes, with random places, scales and a jitter of the colours; see `arrange`."""
    return paint(scenes, arrange(scenes, rng, snap))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
