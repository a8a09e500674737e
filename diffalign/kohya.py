"""LoRA files as kohya-ss's trainer, AUTOMATIC1111 and ComfyUI have them: `lora_down`, `lora_up` and `alpha` of each layer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError

ALPHA, DOWN, UP = ".alpha", ".lora_down.weight", ".lora_up.weight"


def read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a kohya file, with one alpha for all layers; None for a safetensors file in another layout.

    Raises safetensors' error where it is damaged.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        names = list(file.keys())
    return _one_alpha(load_file(path)) if any(name.endswith(DOWN) for name in names) else None


def convert(path: Path, pipeline_class: Any) -> dict[str, Tensor]:
    """A LoRA that `lora.save` wrote, in kohya's layout, as `pipeline_class.load_lora_weights` reads it back.

    Layers have the names of diffusers' network. Raises InputError for a LoRA of another kind, or of layers that would not be read
    back; and what json, safetensors and dictionaries raise for a damaged file.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = load_file(path)
    if not tensors:
        raise ValueError("it holds no weights")
    with safe_open(path, "pt") as file:
        told = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    odd = sorted(name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if odd:
        raise InputError(f"A kohya file holds plain LoRA, and {path} has {odd[0]} too: load that file through diffusers instead.")
    prefix = next(iter(tensors)).partition(".")[0]
    layers = {name.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    # a UNet's names begin with lora_unet in all programs, a transformer's with lora_transformer in those that take diffusers' names
    found: dict[str, Tensor] = convert_state_dict_to_kohya(
        {name if prefix == "unet" else f"lora_{name}": tensor.contiguous() for name, tensor in tensors.items()}
    )
    for layer in layers:  # diffusers' converter writes alpha = rank
        found[f"lora_{prefix}_{layer.replace('.', '_')}{ALPHA}"] = torch.tensor(_alpha(told, prefix, layer))
    found = _one_alpha(found)
    lost = sorted(layers - _layers(pipeline_class, found, prefix))
    if len(lost) == len(layers):
        raise InputError(f"{pipeline_class.__name__} reads no kohya file of these layers. Use {path}, which its load_lora_weights reads.")
    if lost:
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise InputError(
            f"A kohya file would lose layers: {pipeline_class.__name__} does not read {names} from one. "
            f"Use {path}, which its load_lora_weights reads, or train other --lora.target_modules."
        )
    return found


def _alpha(told: Mapping[str, Any], prefix: str, layer: str) -> float:
    """Of a layer, by the settings that peft's adapter had."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, float] = told.get(f"{prefix}.alpha_pattern") or {}
    pattern = get_pattern_key(list(patterns), layer)
    return float(patterns[pattern] if pattern in patterns else told[f"{prefix}.lora_alpha"])


def _layers(pipeline_class: Any, tensors: Mapping[str, Tensor], prefix: str) -> set[str]:
    """The layers that the class's own reader finds; none where it cannot read the file."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    try:
        read_back: Any = pipeline_class.lora_state_dict(dict(tensors))
    except Exception:  # its readers raise whatever comes: the caller says which layers are lost
        return set()
    read_back = read_back[0] if isinstance(read_back, tuple) else read_back
    bare = {name.removeprefix(f"{prefix}."): tensor for name, tensor in read_back.items()}
    return {name.removesuffix(".lora_A.weight") for name in convert_unet_state_dict_to_peft(bare) if name.endswith(".lora_A.weight")}


def _one_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA with one alpha: a layer that had another has the difference in its `lora_up`.

    Of several alphas diffusers applies those of attention layers to none, without a word. A layer that names none has its rank.
    """
    ranks = {name.removesuffix(DOWN): float(tensor.shape[0]) for name, tensor in tensors.items() if name.endswith(DOWN)}
    alphas = {layer: float(tensors[layer + ALPHA]) if layer + ALPHA in tensors else rank for layer, rank in ranks.items()}
    one = Counter(alphas.values()).most_common(1)[0][0]
    others = {layer: tensors[layer + UP] * (alpha / one) for layer, alpha in alphas.items() if alpha != one}
    return {
        **tensors,
        **{layer + UP: tensor for layer, tensor in others.items()},
        **{layer + ALPHA: torch.tensor(one) for layer in alphas},
    }
