"""LoRA on a network whose pipeline class has no methods for it: through peft alone, in peft's own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffalign.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as `peft.PeftModel.from_pretrained` has them
PREFIX = "base_model.model."


def add(module: Any, config: Any) -> None:
    """Put a LoRA named default into the network's layers; raises ValueError where the names match none."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, module, adapter_name="default")


def save(module: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as `PeftModel.from_pretrained(network, folder)` reads them."""
    from peft.utils import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = {**module.peft_config["default"].to_dict(), "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    tensors = get_peft_model_state_dict(module)
    save_file({PREFIX + name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}, folder / WEIGHTS)


def load(module: Any, folder: Path) -> None:
    """Put the LoRA of such a folder into the network; raises InputError where it is missing, damaged, or of another network."""
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}: give a folder with {CONFIG} and {WEIGHTS}, as peft and diffalign write them.")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder} holds no LoRA that can be read ({' '.join(str(error).split())[:200]}).") from error
    try:
        add(module, config)
        found = set_peft_model_state_dict(module, tensors, adapter_name="default")
        lacking = [name for name in found.missing_keys if "lora_" in name]
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{folder} was made for another network ({' '.join(str(error).split())[:200]}).") from error
    if lacking or found.unexpected_keys:
        some = [*lacking, *found.unexpected_keys][:3]
        raise InputError(f"{folder} was made for another network than this {type(module).__name__}: {', '.join(some)} do not fit.")


@contextmanager
def off(module: Any) -> Iterator[None]:
    """The base network, bit for bit, while the block runs."""
    _switch(module, False)
    try:
        yield
    finally:
        _switch(module, True)


@contextmanager
def scaled(module: Any, scale: float) -> Iterator[None]:
    """The LoRA at another strength while the block runs."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.set_scale("default", scale)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale("default", 1.0)


def _switch(module: Any, on: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(on)
