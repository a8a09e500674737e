"""What was computed once and is kept: tensors by what they were made from, on disk for every later run or in memory for this one."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffalign.errors import InputError

FORMAT = "v1"  # another one when a row comes to mean something else: how pictures are resized, for one


def cache_root() -> Path:
    """`$DIFFALIGN_CACHE`, else `$XDG_CACHE_HOME/diffalign`, else `~/.cache/diffalign`; InputError where it cannot be written."""
    own, shared = os.environ.get("DIFFALIGN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else Path(shared) / "diffalign" if shared else Path("~/.cache/diffalign")
    folder = root.expanduser().absolute() / FORMAT
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The cache folder {folder} cannot be made ({error.strerror}): name another in DIFFALIGN_CACHE.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"The cache folder {folder} cannot be written: name another in DIFFALIGN_CACHE.")
    return folder


def digest(*parts: bytes | str) -> str:
    """The sha256 of the parts, in hex; each part's length goes in, so that what is where matters."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def fingerprint(module: nn.Module, *more: object) -> str:
    """A name for what a module computes: of the bytes of its weights, their types and names, its device's kind, and `more`.

    The device counts: the last bits of a result differ between a CPU and a GPU. `more` is what the weights do not say, as text.
    """
    state = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        state.update(f"{name} {weight.dtype} {tuple(weight.shape)} {weight.device.type}\n".encode())
        state.update(memoryview(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest(type(module).__name__, state.digest(), *(str(thing) for thing in more))[:32]


@dataclass(frozen=True)
class Shelf:
    """Tensors by key, a small file each: a digest, and the safetensors bytes that it is of. A damaged file is never used.

    A file is written beside its place and moved there, so several processes may read and write at once.
    """

    folder: Path

    def get(self, key: str) -> Tensor | None:
        """The tensor, on the CPU; None where there is none, or only a damaged one."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        head, body = data[:32], data[32:]
        if hashlib.sha256(body).digest() != head:
            return None
        try:
            return safetensors.torch.load(body)["row"]
        except (SafetensorError, KeyError):
            return None

    def put(self, key: str, row: Tensor) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = safetensors.torch.save({"row": row.detach().cpu().contiguous()})
        descriptor, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(body).digest())
                file.write(body)
            os.replace(draft, path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise

    def take(self, keys: Sequence[str]) -> Tensor:
        """The rows of `keys`, stacked; raises InputError where one was removed or damaged since it was put there."""
        rows = [self.get(key) for key in keys]
        if any(row is None for row in rows):
            raise InputError(f"A row of the cache in {self.folder} is gone or damaged. Start the same command again: it makes it anew.")
        return torch.stack([row for row in rows if row is not None])

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]


@dataclass
class TextCache:
    """Text embeddings, computed once. `encode` maps n texts to tensors (n, ...), one for each of `names`; rows are kept on the CPU, up
    to `capacity` texts. A call gives the tensors by name, on `device` but for those `on_cpu`, whose numbers the host reads.

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
    on_cpu: tuple[str, ...] = ()

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
        where = {name: "cpu" if name in self.on_cpu else self.device for name in self.names}
        return {name: torch.stack([found[text][i] for text in texts]).to(where[name]) for i, name in enumerate(self.names)}

    def _shelved(self, text: str) -> tuple[Tensor, ...] | None:
        rows = [] if self.shelf is None else [self.shelf.get(digest(name, text)) for name in self.names]
        whole = tuple(row for row in rows if row is not None)
        return whole if len(whole) == len(self.names) else None
