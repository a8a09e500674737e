"""What the pipeline adapters share."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.cache import Shelf, digest, fingerprint
from diffalign.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TextCache:
    """Text embeddings, computed once. `encode` maps n texts to tensors (n, ...), one for each of `names`; rows are kept on the CPU, up
    to `capacity` texts. A call gives the tensors by name.

    Missing texts go through the encoder in batches of one fixed size: a row's last bits depend on the batch size, and a resumed run
    has another cache than an uninterrupted one. With a `shelf` the rows are also kept on disk, for every later run.
    """

    encode: Callable[[list[str]], Sequence[Tensor]]
    device: str | torch.device = "cpu"
    names: tuple[str, ...] = ("encoder_hidden_states",)
    batch_size: int = 8
    capacity: int = 4096
    rows: OrderedDict[str, tuple[Tensor, ...]] = field(default_factory=OrderedDict)
    shelf: Shelf | None = None

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found = {text: self.rows[text] for text in texts if text in self.rows}
        for text in dict.fromkeys(texts):
            row = None if text in found else self._shelved(text)
            found |= {} if row is None else {text: row}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for i in range(0, len(missing), self.batch_size):
            chunk = missing[i : i + self.batch_size]
            padded = chunk + [""] * (self.batch_size - len(chunk))
            parts = [part.detach().cpu() for part in self.encode(padded)]
            for text, row in zip(chunk, zip(*parts, strict=True), strict=False):
                found[text] = row
                for name, part in zip(self.names, row, strict=True):
                    if self.shelf is not None:
                        self.shelf.put(digest(name, text), part)
        for text, row in found.items():
            self.rows[text] = row
            self.rows.move_to_end(text)
        while len(self.rows) > self.capacity:
            self.rows.popitem(last=False)
        return {name: torch.stack([found[text][i] for text in texts]).to(self.device) for i, name in enumerate(self.names)}

    def _shelved(self, text: str) -> tuple[Tensor, ...] | None:
        rows = [] if self.shelf is None else [self.shelf.get(digest(name, text)) for name in self.names]
        whole = tuple(row for row in rows if row is not None)
        return whole if len(whole) == len(self.names) else None


@contextmanager
def adapter_off(module: Any) -> Iterator[None]:
    """The base network, bit for bit, while the block runs."""
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()


def freeze(module: Any, device: str | torch.device, dtype: torch.dtype) -> None:
    """Move a module, and take its weights out of training. It is cast only where that changes something: diffusers warns at a cast."""
    module.to(device)
    if module.dtype != dtype:
        module.to(dtype)
        for name, parameter in module.named_parameters():
            if "lora_" in name:  # a LoRA that was loaded stays fp32, as it was trained
                parameter.data = parameter.data.float()
    module.requires_grad_(False).eval()


def frozen_copy(module: Any) -> Any:
    """A copy that takes no gradient: the reference of a full fine-tuning."""
    return copy.deepcopy(module).requires_grad_(False)


def call_unet(unet: Any, dtype: torch.dtype, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
    """The UNet's output (B, *latent) in the dtype of x, computed in `dtype`."""
    # Each weight is used once a call, and older torch handed a step with a graph the casts made without one: no cache.
    half = dtype != torch.float32
    with torch.autocast(x.device.type, dtype if half else None, enabled=half, cache_enabled=False):
        return unet(x, t, encoder_hidden_states=hidden, return_dict=False)[0].to(x.dtype)


def decode_images(vae: Any, x_0: Tensor) -> Tensor:
    """Latents to images (B, 3, H, W) in [0, 1], in fp32, with a graph where one is wanted."""
    images = vae.decode(x_0 / vae.config.scaling_factor, return_dict=False)[0]
    return (images / 2 + 0.5).clamp(0, 1)


def embed_images(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to x_0, the mode of the VAE's posterior."""
    return vae.encode(images * 2 - 1).latent_dist.mode() * vae.config.scaling_factor


def shelve(pipe: Any, texts: TextCache, height: int, width: int, root: Path) -> Shelf:
    """Keep text embeddings under `root` from now on; the shelf there of the VAE's latents of pictures of this size.

    Both are named after what they are computed with, so a shelf of another model, or of another precision, is another one.
    """
    tokens = sorted(pipe.tokenizer.get_vocab().items())
    texts.shelf = Shelf(root / "texts" / fingerprint(pipe.text_encoder, tokens, pipe.tokenizer.model_max_length))
    return Shelf(root / "latents" / f"{fingerprint(pipe.vae, pipe.vae.config.scaling_factor)}-{height}x{width}")


@contextmanager
def base_unet(pipe: Any, frozen: Any) -> Iterator[None]:
    """The base model while the block runs: LoRA switched off, or the frozen copy in the UNet's place."""
    if frozen is not None:
        trained, pipe.unet = pipe.unet, frozen
        try:
            yield
        finally:
            pipe.unet = trained
    elif getattr(pipe.unet, "peft_config", None):
        with adapter_off(pipe.unet):
            yield
    else:
        yield


def own_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """`(height, width)` in pixels of a UNet pipeline's pictures: those given, or the model's own.

    Raises InputError for a size that does not fit.
    """
    size, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
    own = [int(n) * factor for n in ((size, size) if isinstance(size, int) else size)]
    height, width = int(own[0] if height is None else height), int(own[1] if width is None else width)
    check_size(height, width, factor)
    return height, width


def check_size(height: int, width: int, multiple: int) -> None:
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise InputError(f"A picture of {height} x {width} does not fit this model: give multiples of {multiple}.")
