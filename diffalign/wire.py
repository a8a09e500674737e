"""Media on the wire, between a reward server and its clients: pictures, sound and masks as base64 of a PNG, a WAV or a safetensors file."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Literal

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from diffalign.errors import InputError
from diffalign.media import decode_image, to_pil, to_tensor
from diffalign.sound import EDGE, decode_wav

Encoding = Literal["png", "float16", "float32"]
Kind = Literal["png", "wav", "safetensors", "path"]
NAME = "media"  # of the tensor in a safetensors payload


def encode(media: Tensor, encoding: Encoding) -> dict[str, str]:
    """One picture (3, H, W), mask (1, H, W) or sound as a payload.

    `png` rounds to 8 bits: no pixel moves by more than 1 / 510. `float32` changes nothing; `float16` rounds to 11 significant bits.
    """
    if encoding == "png":
        data, kind = png(media), "png"
    else:
        dtype = torch.float16 if encoding == "float16" else torch.float32
        data, kind = safetensors.torch.save({NAME: media.detach().to("cpu", dtype).contiguous()}), "safetensors"
    return {"type": kind, "data": base64.b64encode(data).decode()}


def png(picture: Tensor) -> bytes:
    """A picture (3, H, W) or mask (1, H, W) in [0, 1] as an 8-bit PNG file."""
    file = io.BytesIO()
    image = to_pil(picture.expand(3, -1, -1))
    (image.convert("L") if len(picture) == 1 else image).save(file, format="PNG", compress_level=1)  # 1: speed counts more than size here
    return file.getvalue()


def from_base64(data: str, name: str) -> bytes:
    """The bytes; raises InputError with `name` for text that is no base64."""
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name} is no base64.") from error


def picture(kind: Kind, data: bytes, name: str, max_pixels: int, channels: Literal[1, 3] = 3) -> Tensor:
    """(channels, H, W) in [0, 1], fp32, of a picture file or a safetensors payload.

    Raises InputError with `name` for what is none, or has more than `max_pixels`, before it is unpacked.
    """
    if kind == "wav":
        raise InputError(f"{name} is a WAV file, and this reward judges pictures.")
    if kind == "safetensors":
        found = _tensor(data, name)
        if found.ndim != 3 or len(found) != channels:
            raise InputError(f"{name} has the shape {tuple(found.shape)}: expected ({channels}, H, W).")
        _refuse_large(found.shape[2], found.shape[1], name, max_pixels)
        low, high = (float(x) for x in found.aminmax())
        if not (low >= -EDGE and high <= 1 + EDGE):
            raise InputError(f"{name} has pixels from {low:.4g} to {high:.4g}: expected numbers in [0, 1].")
        return found
    try:
        with Image.open(io.BytesIO(data)) as file:  # the header alone
            size = file.size
    except Exception as error:  # a damaged file may raise anything in a decoder
        raise InputError(f"{name} is no picture that can be read.") from error
    _refuse_large(*size, name, max_pixels)
    return to_tensor(decode_image(data, name))[:channels]


def sound(kind: Kind, data: bytes, name: str, rate: int | None = None) -> tuple[Tensor, int | None]:
    """A waveform (samples,), fp32 in [-1, 1], of a WAV file or a safetensors payload, and its sample rate, Hz.

    `rate` is what was said of it beside: a WAV file says it itself, of a safetensors payload None is an unknown one. Raises InputError with
    `name` for what is none, for several channels, and where the two rates differ.
    """
    if kind == "png":
        raise InputError(f"{name} is a picture, and this reward judges sound.")
    if kind == "wav":
        found = decode_wav(data, name)
        if rate not in (None, found.sample_rate):
            raise InputError(f"{name} has {found.sample_rate} samples a second, and its sample_rate is {rate}: drop that.")
        return found.waveform, found.sample_rate
    waveform = _tensor(data, name)
    if waveform.ndim != 1:
        raise InputError(f"{name} has the shape {tuple(waveform.shape)}: expected (samples,).")
    if float(waveform.abs().max()) > 1 + EDGE:
        raise InputError(f"{name} has samples up to {float(waveform.abs().max()):.4g}: expected numbers in [-1, 1].")
    return waveform, rate


def _tensor(data: bytes, name: str) -> Tensor:
    try:
        found = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{name} is no safetensors file that can be read.") from error
    if list(found) != [NAME] or not found[NAME].is_floating_point() or not found[NAME].numel():
        raise InputError(f"{name}: a safetensors payload holds one tensor of floating-point numbers, '{NAME}'.")
    if not (media := found[NAME].float()).isfinite().all():
        raise InputError(f"{name} holds numbers that are not finite.")
    return media


def _refuse_large(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InputError(f"{name} has {width} x {height} pixels: this server takes at most {max_pixels:,}.")
