"""How much memory is in use at the highest: of the process, of the device's allocator, or of the tensors that live, counted."""

from __future__ import annotations

import ctypes
import gc
import platform
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the process so far, in MB of 10^6 bytes: on this device where it is a GPU of CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource  # not on Windows

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def forget_peak(device: torch.device) -> None:
    """From now on `peak_memory_mb` is the peak from now on; of resident memory only Linux can do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors on a device, those that are there already and those that operations make, until each is freed.

    What a kernel takes for itself alone is not seen, and a compiled network runs uncompiled in it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.bytes, self.peak = device, 0, 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        gc.collect()
        for thing in gc.get_objects():
            # by the type: asking some lazy modules for their class loads them. Others hold no memory of their own, as torch.compile's fakes
            if type(thing) in (Tensor, nn.Parameter):
                self.count(thing)

    def count(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.storages or storage.device != self.device:  # the storage's: the compiler's fake tensors lie about theirs
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            self.bytes -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return out


@dataclass
class Reading:
    """Bytes of the tensors on the device at the highest."""

    peak: int = 0


@contextmanager
def highest(device: torch.device) -> Iterator[Reading]:
    """The peak of all tensors on the device while the block runs: what CUDA's allocator says, elsewhere what `Living` counts."""
    reading = Reading()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield reading
        reading.peak = torch.cuda.max_memory_allocated(device)
    else:
        with Living(device) as living:
            yield reading
        reading.peak = living.peak


@dataclass
class Taken:
    """Bytes, and what they are of."""

    peak: float = 0.0
    what: str = "taken"


@contextmanager
def taken(device: torch.device) -> Iterator[Taken]:
    """What the block takes of memory at the highest: on CUDA the allocator's word; elsewhere what the process grows by, and the tensors
    that were there. Only Linux tells what a process has now: on others it is what it grows by above its highest."""
    import resource  # not on Windows

    real = Taken()
    if device.type == "cuda":
        with highest(device) as reading:
            yield real
        real.peak, real.what = reading.peak, "allocated"
        return
    held = Living(device).bytes
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of freed memory would be filled first, unseen
    forget_peak(device)
    try:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        before = peak_memory_mb(device) * 1e6
    yield real
    real.peak = held + peak_memory_mb(device) * 1e6 - before
