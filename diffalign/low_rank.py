"""Sums of LoRAs, as their files hold them: the sum of products of low rank is the product of the factors laid side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign import bare, lora
from diffalign.errors import InputError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
TOLD = "lora_adapter_metadata"  # peft's settings in the header of a file, as diffusers writes them
EXACT = torch.float64


@dataclass(frozen=True)
class Factors:
    """The update of one layer, `up @ down`: up (out, r) and down (r, in), float64; of a convolution (out, r, 1, 1) and (r, in, k, k).

    What peft multiplies it with, alpha / r, is in `up`.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """What is added to the layer's weight: (out, in), of a convolution (out, in, k, k)."""
        return (self.up.flatten(1) @ self.down.flatten(1)).unflatten(1, self.down.shape[1:])


@dataclass(frozen=True)
class Update:
    """A LoRA: its layers by name, the network's name among a pipeline's parts (None in peft's own files), and peft's settings of it."""

    layers: Mapping[str, Factors]
    component: str | None
    settings: Mapping[str, Any]


def read(folder: Path) -> Update:
    """The LoRA of a run's lora/. Raises InputError for one of another kind and for numbers that are not finite, and what json, safetensors
    and dictionaries raise for damaged files."""
    component, prefix = None, bare.PREFIX
    if (folder / bare.WEIGHTS).is_file():
        file = folder / bare.WEIGHTS
        tensors, settings = load_file(file), json.loads((folder / bare.CONFIG).read_text())
    else:
        file = folder / lora.WEIGHTS
        tensors = load_file(file)
        component = next(iter(tensors), "").partition(".")[0]
        prefix = f"{component}."
        with safe_open(file, "pt") as opened:
            told = json.loads((opened.metadata() or {})[TOLD])
        settings = {key.removeprefix(prefix): value for key, value in told.items() if key.startswith(prefix)}
    if not tensors:
        raise ValueError("it holds no weights")
    odd = sorted(name for name in tensors if not name.endswith((DOWN, UP)) or not name.startswith(prefix))
    if odd:
        raise InputError(f"{file} holds {odd[0]}: only plain LoRA, matrices A and B of each layer, can be added up.")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{file}: {name} holds numbers that are not finite. The training has diverged: take another run.")
    names = sorted(name.removeprefix(prefix).removesuffix(DOWN) for name in tensors if name.endswith(DOWN))
    layers = {
        name: _scaled(tensors[prefix + name + UP].to(EXACT), tensors[prefix + name + DOWN].to(EXACT), name, settings) for name in names
    }
    return Update(layers, component, settings)


def _scaled(up: Tensor, down: Tensor, layer: str, settings: Mapping[str, Any]) -> Factors:
    from peft.utils.other import get_pattern_key

    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    pattern = get_pattern_key(list(patterns), layer)
    alpha = float(patterns[pattern] if pattern in patterns else settings["lora_alpha"])
    rank = down.shape[0]
    return Factors(up * (alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)), down)


def add(terms: Sequence[tuple[float, Factors]]) -> Factors:
    """`sum_i w_i up_i @ down_i`, exactly: its rank is the sum of theirs."""
    return Factors(torch.cat([weight * factors.up for weight, factors in terms], 1), torch.cat([factors.down for _, factors in terms]))


def truncate(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """`(the nearest update of at most this rank, |its error|^2, |the update|^2)` in the Frobenius norm (Eckart and Young).

    The singular values are those of a matrix of the factors' rank, so the layer's own is never made.
    """
    q_up, r_up = torch.linalg.qr(factors.up.flatten(1))
    q_down, r_down = torch.linalg.qr(factors.down.flatten(1).T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    up, down = q_up @ (u[:, : len(root)] * root), (root[:, None] * v[: len(root)]) @ q_down.T
    shaped = Factors(up.reshape(*up.shape, *factors.up.shape[2:]), down.unflatten(1, factors.down.shape[1:]))
    return shaped, float((s[rank:] ** 2).sum()), float((s**2).sum())


def _widened(factors: Factors, rank: int) -> Factors:
    """The same with zeros, where a layer has less than the rank that the file names for all."""
    more = rank - factors.rank
    up = torch.cat([factors.up, factors.up.new_zeros(factors.up.shape[0], more, *factors.up.shape[2:])], 1)
    return Factors(up, torch.cat([factors.down, factors.down.new_zeros(more, *factors.down.shape[1:])]))


def write(folder: Path, update: Update, note: Mapping[str, Any]) -> int:
    """Write a new folder with the LoRA as the pipeline's own loader or peft reads it, in float32, and return its rank.

    `note`, on where it comes from, is the header's entry `diffalign`.
    """
    rank = max(factors.rank for factors in update.layers.values())
    prefix = bare.PREFIX if update.component is None else f"{update.component}."
    tensors: dict[str, Tensor] = {}
    for name, factors in update.layers.items():
        wide = _widened(factors, rank)
        tensors |= {prefix + name + DOWN: wide.down.float().contiguous(), prefix + name + UP: wide.up.float().contiguous()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise InputError("The weights are so large that the sum is not finite in float32: give smaller ones.")
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}  # so that peft scales it by 1
    settings, header = {**update.settings, **plain}, {"diffalign": json.dumps(note, sort_keys=True)}
    folder.mkdir(parents=True)
    if update.component is None:
        (folder / bare.CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        save_file(tensors, folder / bare.WEIGHTS, header)
        return rank
    told = json.dumps({prefix + key: value for key, value in settings.items()}, indent=2, sort_keys=True)
    save_file(tensors, folder / lora.WEIGHTS, {"format": "pt", TOLD: told, **header})
    lora.sort_header(folder / lora.WEIGHTS)
    return rank
