"""What the pipeline adapters share."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TextCache:
    """Text embeddings, computed once. `encode` maps a list of texts to (n, tokens, width); rows are kept on the CPU, up to `capacity`.

    Missing texts go through the encoder in batches of one fixed size: a row's last bits depend on the batch size, and a resumed run
    has another cache than an uninterrupted one.
    """

    encode: Callable[[list[str]], Tensor]
    device: str | torch.device = "cpu"
    batch_size: int = 8
    capacity: int = 4096
    rows: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        found = {text: self.rows[text] for text in texts if text in self.rows}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for i in range(0, len(missing), self.batch_size):
            chunk = missing[i : i + self.batch_size]
            padded = chunk + [""] * (self.batch_size - len(chunk))
            found.update(zip(chunk, self.encode(padded).detach().cpu(), strict=False))
        for text, row in found.items():
            self.rows[text] = row
            self.rows.move_to_end(text)
        while len(self.rows) > self.capacity:
            self.rows.popitem(last=False)
        return torch.stack([found[text] for text in texts]).to(self.device)


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


def check_size(height: int, width: int, multiple: int) -> None:
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise InputError(f"A picture of {height} x {width} does not fit this model: give multiples of {multiple}.")
