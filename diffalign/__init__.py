"""diffalign: align diffusion models with rewards and preferences."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffalign._links import check_links

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffalign.api import align, load
    from diffalign.composing import compose
    from diffalign.contract import reward
    from diffalign.data import SpokenPrompt
    from diffalign.errors import InputError
    from diffalign.hub import push
    from diffalign.merging import merge
    from diffalign.models import make_policy
    from diffalign.pairs import make_pairs
    from diffalign.registry import model_folder
    from diffalign.reward_training import train_reward
    from diffalign.run import Run
    from diffalign.sampling import ddim, flow_sde, rollout, transition
    from diffalign.session import resume

__all__ = [
    "InputError",
    "Run",
    "SpokenPrompt",
    "align",
    "compose",
    "ddim",
    "flow_sde",
    "load",
    "make_pairs",
    "make_policy",
    "merge",
    "model_folder",
    "push",
    "resume",
    "reward",
    "rollout",
    "train_reward",
    "transition",
]

check_links()

_HOMES = {
    "InputError": "errors",
    "Run": "run",
    "SpokenPrompt": "data",
    "align": "api",
    "compose": "composing",
    "ddim": "sampling",
    "flow_sde": "sampling",
    "load": "api",
    "make_pairs": "pairs",
    "make_policy": "models",
    "merge": "merging",
    "model_folder": "registry",
    "push": "hub",
    "resume": "session",
    "reward": "contract",
    "rollout": "sampling",
    "train_reward": "reward_training",
    "transition": "sampling",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffalign.{_HOMES[name]}"), name)
