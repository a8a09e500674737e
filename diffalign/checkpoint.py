"""Checkpoints: a tree of tensors and plain values as a folder, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import InputError

TENSORS, TREE, SUMS = "tensors.safetensors", "tree.json", "sha256.json"


def _flatten(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(tree, dict):
        # keys may be numbers (an optimiser's state), which JSON would turn into text
        return {"dict": [[key, _flatten(value, tensors, f"{path}/{key}")] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [_flatten(value, tensors, f"{path}/{i}") for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"A checkpoint cannot hold {type(tree).__name__} at {path}.")


def _unflatten(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = node.items()
    match kind:
        case "tensor":
            return tensors[value]
        case "dict":
            return {key: _unflatten(child, tensors) for key, child in value}
        case "list":
            return [_unflatten(child, tensors) for child in value]
        case _:
            return value


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def write(folder: Path, step: int, tree: Any, keep: int) -> Path:
    """Write `folder/step-000100`, atomically, then delete all but the newest `keep`.

    Raises InputError where the disk does not take it; the checkpoints before are left as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, draft = folder / f"step-{step:06d}", folder / f".step-{step:06d}"
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_flatten(tree, tensors, ""))
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        (draft / TREE).write_text(text)
        save_file(tensors, draft / TENSORS)
        (draft / SUMS).write_text(json.dumps({name: _digest(draft / name) for name in (TREE, TENSORS)}))
        for file in draft.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise InputError(
            f"The checkpoint of step {step} could not be written ({error}). Those before it are whole: mend the disk, then "
            f"diffalign train --resume {folder.parent}"
        ) from error
    shutil.rmtree(final, ignore_errors=True)  # an incomplete one of the same step, met by a resumed run
    draft.rename(final)
    for old in sorted(folder.glob("step-*"), key=_step)[: -max(keep, 1)]:
        shutil.rmtree(old)
    return final


def read(folder: Path) -> Any:
    """The tree in `folder`; raises InputError where a file is missing, cut short or changed."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        whole = all(_digest(folder / name) == sums[name] for name in (TREE, TENSORS))
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        raise InputError(f"The checkpoint {folder} is incomplete or damaged.")
    return _unflatten(json.loads((folder / TREE).read_text()), load_file(folder / TENSORS))


def newest(folder: Path) -> tuple[Any, list[Path]]:
    """The tree of the newest whole checkpoint, and the damaged ones that were passed over; raises InputError where none is whole."""
    damaged: list[Path] = []
    for candidate in sorted(folder.glob("step-*"), key=_step, reverse=True):
        try:
            return read(candidate), damaged
        except InputError:
            damaged.append(candidate)
    found = f"{len(damaged)} damaged ones" if damaged else "none"
    raise InputError(f"No whole checkpoint in {folder} ({found}): nothing to resume from. Start the run again with another --output.")
