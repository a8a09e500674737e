"""LoRA on a diffusers pipeline, through peft: attach, save what plain diffusers (or peft alone) loads, load to continue."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign import bare, kohya
from diffalign.errors import InputError

WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv 2106.09685)."""

    rank: int = 8
    """Rank of the update."""
    alpha: float | None = None
    """Scale of the update is alpha / rank; by default alpha = rank."""
    target_modules: list[str] | None = None
    """Names, or ends of names, of the layers to adapt; by default the attention projections."""
    init: str | None = None
    """A LoRA to continue from: a folder or a .safetensors file that diffusers loads, kohya's too; of sound peft's folder. Rank and alpha
    are then the file's."""

    def __post_init__(self) -> None:
        if not self.rank >= 1:
            raise InputError(f"lora.rank is {self.rank}: give 1 or more.")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise InputError(f"lora.alpha is {self.alpha}: give a number above 0.")


def native(pipe: Any) -> bool:
    """Whether the pipeline, or its class, reads and writes LoRA files itself; those of sound do not."""
    return "load_lora_weights" in dir(pipe)


def attach(pipe: Any, component: str, lora: LoRA, target_modules: list[str], seed: int) -> None:
    """Freeze `pipe.<component>` and put a trainable fp32 LoRA on it; its random half is drawn from `seed`.

    Raises InputError where the names match no layer, or the LoRA to continue from cannot be loaded.
    """
    from peft import LoraConfig

    module: Any = getattr(pipe, component)
    module.requires_grad_(False)
    others = native(pipe) and lora.init is not None and any(pipe.get_list_adapters().values())
    if getattr(module, "peft_config", None) or others:
        raise InputError("The pipeline already carries an adapter. Unload it (pipe.unload_lora_weights()), or pass it as lora.init.")
    names = lora.target_modules or target_modules
    alpha: Any = lora.rank if lora.alpha is None else lora.alpha
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if lora.init is None:
            try:
                config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
                module.add_adapter(config) if native(pipe) else bare.add(module, config)
            except ValueError as error:
                layers = sorted({n.rsplit(".", 1)[-1] for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)})
                raise InputError(f"lora.target_modules: {names} fit no layer. Names that would: {', '.join(layers)}.") from error
        else:
            _load(pipe, component, lora.init)
    if not any("lora_" in name for name, _ in module.named_parameters()):
        raise InputError(f"lora.init: {lora.init} holds no weights for the {component}.")
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()


def _load(pipe: Any, component: str, source: str) -> None:
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"lora.init: {path} does not exist. Give a folder with {WEIGHTS}, or a .safetensors file.")
    if not native(pipe):
        try:
            bare.load(getattr(pipe, component), path)
        except InputError as error:
            raise InputError(f"lora.init: {error}") from error
        return
    folder, name = (path, WEIGHTS) if path.is_dir() else (path.parent, path.name)
    try:
        _fill(pipe, folder / name)
        _check_parts(pipe, component, folder / name)
        if name.endswith(".safetensors"):
            _check_whole(folder / name, getattr(pipe, component))
    except InputError:
        pipe.unload_lora_weights()  # what was loaded before it was refused: a live pipeline is the caller's
        raise


def _fill(pipe: Any, file: Path) -> None:
    try:
        theirs = kohya.read(file) if file.suffix == ".safetensors" else None
        if theirs is None:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="default", local_files_only=True)
        else:
            pipe.load_lora_weights(theirs, adapter_name="default")
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        more = f", and {len(lines) - 2} more lines" if len(lines) > 2 else ""
        reason = f"{' '.join(lines[:2])[:300]}{more}"
        raise InputError(f"lora.init: {file} is no LoRA that fits this pipeline ({reason}). Give one of this model.") from error


def _check_parts(pipe: Any, component: str, file: Path) -> None:
    others = sorted({name for name, held in pipe.get_list_adapters().items() if held} - {component})
    if others:
        raise InputError(f"lora.init: {file} also adapts the {', '.join(others)}, which is not trained. Give one of the {component} alone.")


def _check_whole(file: Path, module: Any) -> None:
    """Raise InputError where layers of the file have no place in the network: it is of another one, and diffusers leaves them out."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        held = sum(bool(re.search(r"lora_A\b|lora_down\b|lora\.down\b", key)) for key in opened.keys())  # noqa: SIM118
    found = sum("lora_A." in name for name, _ in module.named_parameters())
    if found < held:
        raise InputError(
            f"lora.init: {file} adapts {held} layers, of which a {type(module).__name__} like this has {found}: it was made for another "
            "network. Give one of this model."
        )


def as_loaded(lora: LoRA, module: Any) -> LoRA:
    """The settings with rank and alpha of the LoRA that the network carries: a continued one has its file's, of several the usual one."""
    config = getattr(module, "peft_config", {}).get("default")
    return lora if lora.init is None or config is None else replace(lora, rank=config.r, alpha=float(config.lora_alpha))


def load(pipe: Any, component: str, folder: Path) -> None:
    """Put the LoRA that `save` wrote into a pipeline."""
    if native(pipe):
        pipe.load_lora_weights(str(folder), adapter_name="default")
    else:
        bare.load(getattr(pipe, component), folder)


@contextmanager
def scaled(pipe: Any, component: str, scale: float) -> Iterator[None]:
    """The pipeline's LoRA at another strength while the block runs."""
    if scale == 1.0:
        yield
        return
    if not native(pipe):
        with bare.scaled(getattr(pipe, component), scale):
            yield
        return
    pipe.set_adapters("default", scale)
    try:
        yield
    finally:
        pipe.set_adapters("default", 1.0)


def save(pipe: Any, component: str, folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors`, with rank and alpha, as `pipe.load_lora_weights(folder)` reads it; of a pipeline without
    that method peft's own files, as `PeftModel.from_pretrained(network, folder)` reads them."""
    from peft.utils import get_peft_model_state_dict

    module: Any = getattr(pipe, component)
    if not native(pipe):
        bare.save(module, folder)
        return
    metadata = module.peft_config["default"].to_dict()
    for key, value in metadata.items():
        if isinstance(value, set):
            metadata[key] = sorted(value)  # a set's order changes from process to process, and with it the file's bytes
    folder.mkdir(parents=True, exist_ok=True)
    type(pipe).save_lora_weights(
        folder,
        **{
            f"{component}_lora_layers": get_peft_model_state_dict(module),
            f"{component}_lora_adapter_metadata": metadata,
        },
    )
    sort_header(folder / WEIGHTS)


def sort_header(path: Path) -> None:
    """Sort the metadata in a safetensors file's header: the library orders them at random, and equal runs must give equal bytes."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
