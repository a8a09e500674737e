"""Pictures: between tensors, PIL and files, and side by side."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from diffalign.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")  # not EPS: reading one starts another programme
MARGIN, HEAD, GAP = 60, 40, 4  # of a sheet, in pixels: left of its pictures, above them, and after each
DEEP = {"F": "floating point values", "I": "32-bit values"}  # Pillow's modes


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to an 8-bit RGB picture, rounded as diffusers rounds."""
    pixels = (image.detach().float().cpu().permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    return Image.fromarray(pixels)


def read_image(path: Path) -> Tensor:
    """A picture file as (3, H, W) in [0, 1], RGB; raises InputError where it is missing, no picture, cut short or a bomb."""
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    return to_tensor(decode_image(path.read_bytes(), str(path)))


def decode_image(data: bytes, name: str) -> Image.Image:
    """The bytes of a picture file in RGB, the right way up; raises InputError with `name` where they are no picture that can be used.

    From 89 million pixels on (Pillow's warning), a picture is taken for a decompression bomb. Transparency is dropped. Pictures of other
    than 8-bit values are refused where Pillow would cut them off at 255 without a word.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                if file.mode[0] in "IF":
                    raise InputError(
                        f"{name} holds {DEEP.get(file.mode, '16-bit values')}, which have no one meaning as colours: save it in 8 bits."
                    )
                return ImageOps.exif_transpose(file).convert("RGB")
        except InputError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"{name} is too large a picture, perhaps a decompression bomb ({_said(error)}). Make it smaller.") from error
        except Exception as error:  # a damaged file may raise anything in a decoder
            raise InputError(f"{name} is no picture that can be read ({_said(error)}).") from error


def data_uri(data: bytes) -> str:
    """The bytes of a picture file as a data: URI."""
    with Image.open(io.BytesIO(data)) as picture:
        kind = Image.MIME.get(picture.format or "", "image/*")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def from_data_uri(text: str) -> bytes:
    """The bytes of a data: URI; raises InputError for one that is not in base64."""
    try:
        return base64.b64decode(text.partition(";base64,")[2], validate=True)
    except binascii.Error as error:
        raise InputError("The image is no data: URI in base64.") from error


def fit(picture: Image.Image, height: int, width: int) -> Tensor:
    """(3, height, width) in [0, 1]: scaled, up or down, until it covers that size, and cut to it around its centre."""
    return to_tensor(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _said(error: BaseException) -> str:
    # Pillow names the buffer by its address
    return re.sub(r" ?<_io.BytesIO object at 0x[0-9a-f]+>", "", " ".join(str(error).split()))[:120] or type(error).__name__


def grid(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], cell: int = 128) -> Image.Image:
    """Rows of pictures, each `(name, images (B, 3, H, W))`, under the B captions; small pictures are enlarged without smoothing."""
    font = ImageFont.load_default(11)
    height, width = rows[0][1].shape[-2:]
    scale = max(1, cell // max(height, width))
    height, width = height * scale, width * scale
    sheet = Image.new("RGB", (MARGIN + len(captions) * (width + GAP), HEAD + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        draw.multiline_text((MARGIN + i * (width + GAP), 2), _wrapped(caption, font, width, HEAD), font=font, fill="black", spacing=1)
    for j, (name, images) in enumerate(rows):
        top = HEAD + j * (height + GAP)
        draw.text((4, top + height // 2), name, font=font, fill="black")
        for i, image in enumerate(images):
            sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (MARGIN + i * (width + GAP), top))
    return sheet


def cells(sheet: Image.Image, rows: int, columns: int) -> list[list[Image.Image]]:
    """The pictures of a sheet that `grid` made, a list for each row; raises InputError where it has no so many rows and columns."""
    (width, broken), (height, uneven) = divmod(sheet.width - MARGIN, columns), divmod(sheet.height - HEAD, rows)
    if broken or uneven or min(width, height) <= GAP:
        raise InputError(f"It is no sheet of {rows} x {columns} pictures: it has {sheet.width} x {sheet.height} pixels.")
    tops, lefts = range(HEAD, sheet.height, height), range(MARGIN, sheet.width, width)
    return [[sheet.crop((left, top, left + width - GAP, top + height - GAP)) for left in lefts] for top in tops]


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, height: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join([line for line in lines if line][: height // 13])
