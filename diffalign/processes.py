"""The processes of one training: how they start, what they tell each other, and which of them speaks when one fails."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffalign.errors import InputError
from diffalign.models import device_of, device_type
from diffalign.settings import Settings

BUCKET = 1 << 24  # numbers of one all-reduce
PATIENCE = timedelta(days=1)  # while one process embeds data or evaluates; the launcher ends all of them when one dies

T = TypeVar("T")


def started() -> int:
    """How many processes a launcher such as torchrun has started for this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Accelerated:
    """The collectives of `accelerate`, as methods see them."""

    accelerator: Any

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    def gather(self, x: Tensor) -> Tensor:
        return self.accelerator.gather(x)


def make_accelerator(settings: Settings) -> Any:
    """accelerate's Accelerator: processes, trackers, and the gradient scaler of fp16; the policy casts by itself.

    Raises InputError where several processes were started and would not work together, or all on one GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    count = started()
    if count > 1 and settings.device is not None and ":" in settings.device:
        raise InputError(f"device is {settings.device}, and {count} processes were started: each takes its own, so leave the number out.")
    if settings.fsdp and count == 1:
        raise InputError(
            "fsdp shares the network out among processes, and this is one: start 2 or more with torchrun, or drop --fsdp. (To resume a run "
            "without it, write fsdp: false into its config.yaml.)"
        )
    # accelerate has one precision for the whole process and no public way to another one; this is what its own tests use. Without it a
    # second training with another precision, or one in a script that has an Accelerator of its own, is refused.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="fp16" if settings.precision == "fp16" else "no",
        cpu=device_type(settings) == "cpu",
        log_with=list(settings.log) or None,
        project_dir="runs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)] if count > 1 else None,
    )
    if accelerator.num_processes != count:
        raise InputError(
            f"{count} processes were started, accelerate joins {accelerator.num_processes}: each would train by itself. Start them "
            "with torchrun, on GPUs or with --device cpu."
        )
    device_of(settings)  # only now is the process on the GPU that is its own
    return accelerator


def mesh_of(settings: Settings) -> Any:
    """All the processes in a row, for `diffalign.fsdp`; None where nothing is shared out."""
    if not settings.fsdp:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type(settings), (started(),))


def all_of(value: T) -> list[T]:
    """The value of every process, in every process."""
    from accelerate.utils import gather_object

    return gather_object([value])


def one_for_all(value: str) -> str:
    """The first process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def least_of_all(value: int) -> int:
    """The smallest of all processes."""
    return min(all_of(value))


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Any) -> None:
    """The mean of each gradient over the processes, in its place; a process that has none counts as zero."""
    if accelerator.num_processes == 1:
        return
    bucket: list[nn.Parameter] = []
    for i, parameter in enumerate(parameters, 1):
        bucket.append(parameter)
        if i < len(parameters) and sum(p.numel() for p in bucket) < BUCKET:
            continue
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        means = accelerator.reduce(flat, reduction="mean").split([p.numel() for p in bucket])
        for p, mean in zip(bucket, means, strict=True):
            p.grad = mean.view_as(p).clone()
        bucket = []


def average_metrics(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of what the processes have noted under each name; of the losses, which are parts of a sum, the mean of the sums."""
    noted = all_of({name: (sum(values), len(values)) for name, values in sums.items()})
    names = dict.fromkeys(name for of_one in noted for name in of_one)  # a process without samples of a kind has no metric of it
    totals = {name: [of_one.get(name, (0.0, 0)) for of_one in noted] for name in names}
    return {
        name: sum(total for total, _ in parts) / (len(noted) if name == "loss" else sum(count for _, count in parts))
        for name, parts in totals.items()
    }


def failed_before() -> bool:
    """Whether another process of this training has failed already, as far as the launcher's store says."""
    store = _store()
    try:
        return store is not None and store.check([_failed()])
    except RuntimeError:
        return False


def first_to_fail() -> bool:
    """Note that this process fails; whether it is the first, whose message is the one to read. Where nobody knows it is."""
    store = _store()
    try:
        return store is None or store.add(_failed(), 1) == 1
    except RuntimeError:
        return True


def _failed() -> str:
    return f"diffalign/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> torch.distributed.TCPStore | None:
    """The key-value store at which the processes have met; None with a single process, or where it is gone."""
    if started() == 1 or "MASTER_ADDR" not in os.environ:
        return None
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return torch.distributed.TCPStore(*where, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    except (RuntimeError, ValueError, KeyError):
        return None
