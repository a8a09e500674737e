"""A reward that is trained from judgements: a head on the features of a CLIP model's picture and text, and adapters in its towers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from diffalign.errors import InputError

FORMAT = "diffalign-reward-1"
CONFIG, WEIGHTS, SPLIT = "config.json", "model.safetensors", "split.json"
Tower = Literal["none", "lora", "full"]
TOWERS = {"vision": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}
MEND = "train the reward again, or copy its folder anew."
LAYERS = "(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"  # of a transformer block: SigLIP's pooling has an out_proj that no LoRA fits


class Base(Protocol):
    """A CLIP model: what `look` and `read` make of pixels (n, 3, S, S) and texts has one width D, `view` prepares
    pictures, and `note` says which texts are cut."""

    network: Any

    @property
    def look(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def read(self) -> Callable[[list[str]], Tensor]: ...
    @property
    def view(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def note(self) -> Callable[[Sequence[str]], None]: ...


@dataclass(frozen=True)
class Architecture:
    """What is trained: one output for each of the `aspects`, by a linear head or one with `hidden` units, and how much of the towers."""

    aspects: tuple[str, ...]
    hidden: int = 0
    train_tower: Tower = "none"
    train_text: bool = False
    lora_rank: int = 8
    lora_alpha: float = 8.0


@dataclass(frozen=True)
class Card:
    """What a folder's config.json says of the reward in it, as far as the reward needs it.

    Output k is a rating in units of `std[k]` around `mean[k]`; the reward is their mix with `weights`, less `centre`, over `spread`.
    """

    architecture: Architecture
    base: Mapping[str, str]  # model, revision, and the sha256 of its weights
    weights: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    centre: float = 0.0
    spread: float = 1.0

    def mix(self, outputs: Tensor) -> Tensor:
        """(n,) rewards of outputs (n, K)."""
        return (outputs @ outputs.new_tensor(self.weights) - self.centre) / self.spread

    def ratings(self, outputs: Tensor) -> Tensor:
        """(n, K) ratings in the data's units of outputs (n, K)."""
        return outputs * outputs.new_tensor(self.std) + outputs.new_tensor(self.mean)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


@dataclass
class RewardModel:
    """A base model with its head. The towers that are trained differ from the base's own; `head` maps features to (n, K)."""

    architecture: Architecture
    base: Base
    width: int  # D
    head: nn.ModuleDict

    def see(self, pixels: Tensor) -> Tensor:
        """(n, D) unit features of pixels (n, 3, S, S) as `base.view` makes them."""
        return F.normalize(self.base.look(pixels.to(_dtype(self.base.network))).float(), dim=-1)

    def read(self, texts: Sequence[str]) -> Tensor:
        """(n, D) unit features of n texts."""
        return F.normalize(self.base.read(list(texts)).float(), dim=-1)

    def rate(self, seen: Tensor, read: Tensor) -> Tensor:
        """(n, K) outputs of features of pictures and texts, each (n, D): `a cos + b`, and what the head makes of both and their product."""
        product, root = seen * read, seen.shape[-1] ** 0.5
        features = torch.cat([seen * root, read * root, product * root**2], -1)  # entries of order 1
        return self.head["cosine"](product.sum(-1, keepdim=True)) + self.head["features"](features)

    def start_again(self, aspects: tuple[str, ...], *, scale: float, seed: int) -> None:
        """Another head for these aspects, every output at its start `scale` times the cosine."""
        self.architecture = replace(self.architecture, aspects=aspects)
        self.head = _head(self.width, len(aspects), self.architecture.hidden, scale, seed).to(next(self.head.parameters()).device)

    def to(self, device: torch.device | str) -> RewardModel:
        self.base.network.to(device)
        self.head.to(device)
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name, as long as it is not frozen."""
        network = {f"network.{name}": p for name, p in self.base.network.named_parameters() if p.requires_grad}
        return {**{f"head.{name}": p for name, p in self.head.named_parameters()}, **network}


def prepare(architecture: Architecture, base: Base, *, width: int, scale: float, seed: int) -> RewardModel:
    """A model on the base, whose features are `width` wide, at its start: every output is `scale` times the cosine.

    Its random halves (the hidden layer's, LoRA's) are drawn from `seed`. Raises InputError where the base has no layers for a LoRA, or
    narrower ones than its rank.
    """
    network = base.network.requires_grad_(False)
    towers = [*TOWERS["vision"], *(TOWERS["text"] if architecture.train_text else ())]
    if architecture.train_tower == "lora":
        _attach(network, architecture, seed)
    if architecture.train_tower == "full":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(towers)))
    return RewardModel(architecture, base, width, _head(width, len(architecture.aspects), architecture.hidden, scale, seed))


def _attach(network: Any, architecture: Architecture, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    which = "(vision|text)" if architecture.train_text else "vision"
    alpha: Any = architecture.lora_alpha  # peft's annotation is narrower than what it takes
    layers = rf"{which}_model\.encoder\.layers\..*\.{LAYERS}"
    width = min((min(layer.weight.shape) for name, layer in network.named_modules() if re.fullmatch(layers, name)), default=math.inf)
    if architecture.lora_rank > width:
        raise InputError(f"lora_rank is {architecture.lora_rank}, and a layer is {width} wide: give {width} or less.")
    config = LoraConfig(r=architecture.lora_rank, lora_alpha=alpha, target_modules=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, network)
        except ValueError as error:
            raise InputError(f"The base model, a {type(network).__name__}, has no layers that a LoRA fits: --train-tower full.") from error
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _head(width: int, outputs: int, hidden: int, scale: float, seed: int) -> nn.ModuleDict:
    # not initialised by torch, which would draw from its global generator
    cosine: Any = nn.utils.skip_init(nn.Linear, 1, outputs)
    last: Any = nn.utils.skip_init(nn.Linear, hidden or 3 * width, outputs, bias=False)
    layers: list[nn.Module] = [last]
    with torch.no_grad():
        cosine.weight.fill_(scale)
        cosine.bias.zero_()
        last.weight.zero_()  # at its start the head adds nothing
        if hidden:
            first: Any = nn.utils.skip_init(nn.Linear, 3 * width, hidden)
            draws = Generator().manual_seed(seed)
            first.weight.copy_(torch.randn(first.weight.shape, generator=draws) / math.sqrt(3 * width))
            first.bias.zero_()
            layers = [first, nn.GELU(), last]
    return nn.ModuleDict({"cosine": cosine, "features": nn.Sequential(*layers)})


@torch.no_grad()
def restore(model: RewardModel, weights: Mapping[str, Tensor], path: Path) -> RewardModel:
    """The model with these weights, frozen. Raises InputError unless they are exactly what its architecture trains."""
    own = model.trained()
    faults = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape),
    }
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in faults.items() if names)
        raise InputError(f"{path} does not fit its {CONFIG}. Keys {text}. Was it made on another base model, or changed by hand?")
    for name, parameter in own.items():
        parameter.copy_(weights[name])
    model.head.requires_grad_(False)
    model.base.network.requires_grad_(False)
    return model


def read_config(folder: Path) -> Card:
    """What the folder's config.json says. Raises InputError where it is missing, damaged, or of another thing than a trained reward."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} holds no {CONFIG}: give a folder that diffalign reward train has made.")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:100]}): {MEND}") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        found = said.get("format", said.get("model_type")) if isinstance(said, dict) else None
        raise InputError(f"{path} is of no reward that diffalign reward train has made (format {found!r}, and {FORMAT!r} is expected).")
    try:
        return _config(said)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): {MEND}") from error


def _config(said: Mapping[str, Any]) -> Card:
    known = {field.name for field in fields(Architecture)}
    if set(said["architecture"]) != known:
        raise ValueError(f"architecture has the keys {', '.join(said['architecture'])}, not {', '.join(sorted(known))}")
    own = dict(said["architecture"])
    aspects = tuple(str(name) for name in own.pop("aspects"))
    architecture = Architecture(aspects, **own)
    numbers = {key: tuple(float(x) for x in said[key]) for key in ("weights", "mean", "std")}
    base = {key: str(said["base"][key]) for key in ("model", "revision", "sha256")}
    if architecture.train_tower not in get_args(Tower) or not aspects or any(len(row) != len(aspects) for row in numbers.values()):
        raise ValueError("the aspects, their numbers and the architecture do not go together")
    if not (float(said["spread"]) > 0 and all(std > 0 for std in numbers["std"])):
        raise ValueError("spread and std are above 0")
    return Card(architecture, base, **numbers, centre=float(said["centre"]), spread=float(said["spread"]))


def _dtype(network: Any) -> torch.dtype:
    return network.dtype
