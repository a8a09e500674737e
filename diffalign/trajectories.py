"""A sample's states on disk, beside its picture: `diffalign pairs --trajectories` writes them, and D3PO trains on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffalign.errors import InputError
from diffalign.types import Level, Schedule, Taken


@dataclass(frozen=True)
class Stored:
    """`states` (T+1, *latent) of one sample, noisy to clean, fp32, on the CPU; and how they were sampled."""

    states: Tensor
    taken: Taken

    def save(self, path: Path) -> None:
        """Write a safetensors file. The schedule is in it, so that the steps' distributions are those of the sampling."""
        levels = {"now": self.taken.schedule.now, "then": self.taken.schedule.then}
        tensors = {name: torch.stack([level.t, level.alpha, level.sigma]) for name, level in levels.items()}
        numbers = torch.tensor([self.taken.eta, self.taken.guidance_scale], dtype=torch.float64)
        tensors |= {"states": self.states.contiguous(), "actions": self.taken.actions, "eta_and_guidance_scale": numbers}
        path.write_bytes(safetensors.torch.save(tensors))


def beside(picture: Path) -> Path:
    """The file of the trajectory that ended in a picture."""
    return picture.with_suffix(".safetensors")


def load(path: Path) -> Stored:
    """Raises InputError, naming the file, where it is missing, damaged, no trajectory, or holds what is not finite."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        states, actions = tensors["states"], tensors["actions"]
        now, then = (Level(*tensors[name].double()) for name in ("now", "then"))
        eta, guidance_scale = tensors["eta_and_guidance_scale"].tolist()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no trajectory, or a damaged one: diffalign pairs --trajectories makes such files.") from error
    count = len(actions)
    fits = states.dtype == torch.float32 and states.ndim > 1 and len(states) == count + 1 and actions.dtype == torch.bool and count > 0
    if not fits or any(level.t.shape != (count,) for level in (now, then)) or not bool(states.isfinite().all()) or not 0 < eta <= 1:
        raise InputError(f"{path} holds no trajectory: shapes, types or numbers are not those that diffalign pairs --trajectories writes.")
    return Stored(states, Taken(Schedule(now, then), actions, eta, guidance_scale))
