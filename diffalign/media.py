"""Pictures: between tensors, PIL and files, and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from diffalign.errors import InputError


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to an 8-bit RGB picture, rounded as diffusers rounds."""
    pixels = (image.detach().float().cpu().permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    return Image.fromarray(pixels)


def read_image(path: Path) -> Tensor:
    """A picture file as (3, H, W) in [0, 1], RGB; raises InputError where it is missing, no picture, cut short or a bomb."""
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no picture that can be read ({' '.join(str(error).split())[:120]}).") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def grid(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], cell: int = 128) -> Image.Image:
    """Rows of pictures, each `(name, images (B, 3, H, W))`, under the B captions; small pictures are enlarged without smoothing."""
    font, margin, head = ImageFont.load_default(11), 60, 40
    height, width = rows[0][1].shape[-2:]
    scale = max(1, cell // max(height, width))
    height, width = height * scale, width * scale
    sheet = Image.new("RGB", (margin + len(captions) * (width + 4), head + len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        draw.multiline_text((margin + i * (width + 4), 2), _wrapped(caption, font, width, head), font=font, fill="black", spacing=1)
    for j, (name, images) in enumerate(rows):
        top = head + j * (height + 4)
        draw.text((4, top + height // 2), name, font=font, fill="black")
        for i, image in enumerate(images):
            sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (margin + i * (width + 4), top))
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, height: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join([line for line in lines if line][: height // 13])
