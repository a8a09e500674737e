"""Files and folders that are written whole or not at all, and checkpoints: a tree of tensors and plain values as such a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import InputError

TENSORS, TREE, SUMS = "tensors.safetensors", "tree.json", "sha256.json"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to. When the block ends it is on the disk, and in the place of `path`.

    Where the block fails, or the process dies, `path` is what it was. A folder that is replaced is away for an instant.
    """
    draft, old = path.with_name(f".{path.name}.draft"), path.with_name(f".{path.name}.old")
    _remove(draft)
    with _drafted(draft):
        yield draft
    if path.is_dir():  # a folder that holds something cannot be replaced in one move
        _remove(old)
        path.rename(old)
    draft.replace(path)
    _remove(old)
    _sync(path.parent)  # the move itself


@contextmanager
def whole_by_one(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to write a new folder in, as `whole` has it, for one process at a time.

    Raises InputError where another process is writing `path`, before anything is done, and where `path` holds something when the block
    ends: what was written is then kept beside it.
    """
    draft = path.with_name(f".{path.name}.draft")
    draft.mkdir(exist_ok=True)
    held = os.open(draft, os.O_RDONLY)
    try:
        taken = _taken(held, draft)
        if taken and occupied(path):
            _remove(draft)
        if not taken or occupied(path):
            raise InputError(f"{path} is being written by another process: wait for it, or choose another --output.")
        for left in draft.iterdir():  # by one that was killed
            _remove(left)
        with _drafted(draft):
            yield draft
        if occupied(path):
            kept = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent))
            draft.replace(kept)
            raise InputError(f"{path} was written by another process meanwhile and is left alone: the result is in {kept}.")
        draft.replace(path)
        _sync(path.parent)
    finally:
        os.close(held)


@contextmanager
def _drafted(draft: Path) -> Iterator[None]:
    """What the block writes as `draft` is on the disk when it ends, and gone where it fails."""
    try:
        yield
        for part in (*draft.rglob("*"), draft):
            _sync(part)
    except BaseException:
        _remove(draft)
        raise


def _taken(held: int, folder: Path) -> bool:
    """Whether the open folder is locked now, and still the one of that name: another process may have moved it away meanwhile."""
    import fcntl  # not on Windows

    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder.stat().st_ino == os.fstat(held).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def occupied(path: Path) -> bool:
    """Whether there is a file, or a folder that holds something."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some network disks can sync files alone
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flatten(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(tree, Tensor):
        name = f"{len(tensors)}:{path}"  # numbered: the path alone is no name, since keys may hold a slash, or be 1 and "1"
        tensors[name] = tree.detach().cpu().clone().contiguous()
        return {"tensor": name}
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
    final = folder / f"step-{step:06d}"
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_flatten(tree, tensors, ""))
    try:
        with whole(final) as draft:
            draft.mkdir()
            (draft / TREE).write_text(text)
            save_file(tensors, draft / TENSORS)
            (draft / SUMS).write_text(json.dumps({name: _digest(draft / name) for name in (TREE, TENSORS)}))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"The checkpoint of step {step} could not be written ({error}). Those before it are whole: mend the disk, then "
            f"diffalign train --resume {folder.parent}"
        ) from error
    for old in sorted(folder.glob("step-*"), key=_step)[: -max(keep, 1)]:
        shutil.rmtree(old)
    return final


def read(folder: Path) -> Any:
    """The tree in `folder`; raises InputError where a file is missing, cut short or changed."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        intact = all(_digest(folder / name) == sums[name] for name in (TREE, TENSORS))
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
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
