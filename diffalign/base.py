"""The model that a run trained, as others can have it: where to get it, its class, and its licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign import registry, sources
from diffalign.errors import InputError
from diffalign.models import class_named, network_of
from diffalign.run import Run
from diffalign.settings import LIVE

OWN_LICENCE = {"license": "apache-2.0"}  # of diffalign, and so of the models inside it


@dataclass(frozen=True)
class Base:
    """The model that a run trained, as others can have it. `source` is a Hub id, an embedded model's name, or a folder's last part."""

    kind: Literal["hub", "embedded", "folder", "object"]
    source: str
    pipeline_class: str
    network: str
    revision: str | None = None
    commit: str | None = None
    absent: tuple[str, ...] = ()
    licence: Mapping[str, str] = field(default_factory=dict[str, str])  # the card's license, license_name and license_link


def base_of(run: Run, base_model: str | None, licence: Mapping[str, str]) -> Base:
    """The run's base model, found without a network; `base_model` is its Hub id, where the run knows it as a folder or an object.

    Raises InputError for a `base_model` or a `licence` of a run on an embedded one.
    """
    settings, path = run.plan.settings, None
    commit = run.config.get("versions", {}).get("base_commit")
    embedded = settings.pipeline in registry.MODELS
    if settings.pipeline != LIVE:
        path = registry.locate(settings.pipeline) or _cached(settings.pipeline, commit or settings.revision)
    index = json.loads((path / "model_index.json").read_text()) if path is not None else {}
    found = type(run.live).__name__ if run.live is not None else index.get("_class_name", settings.pipeline_class)
    network = network_of(run.live) if run.live is not None else _network_in(index) or _network_of_weights(run)
    absent = _needed(found, sources.absent(path)) if path is not None else ()
    parts = found or "DiffusionPipeline", network
    if embedded and base_model is not None:
        raise InputError(f"--base-model: the run's is {settings.pipeline}, which comes with diffalign and is not on the Hub. Leave it out.")
    if embedded and licence:
        raise InputError(f"--license: {settings.pipeline} comes with diffalign, under {OWN_LICENCE['license']}. Leave it out.")
    if embedded:
        return Base("embedded", settings.pipeline, *parts, absent=absent, licence=OWN_LICENCE)
    if base_model is not None:
        return Base("hub", base_model, *parts, absent=absent, licence=licence)
    if settings.pipeline == LIVE:
        return Base("object", LIVE, *parts, licence=licence)
    if registry.locate(settings.pipeline) is not None:
        return Base("folder", Path(settings.pipeline).expanduser().absolute().name, *parts, absent=absent, licence=licence)
    return Base("hub", settings.pipeline, *parts, settings.revision, commit, licence=licence)


def _needed(pipeline_class: str, absent: list[str]) -> tuple[str, ...]:
    """Those of the parts that a pipeline was saved without of which diffusers has to be told."""
    optional = class_named(pipeline_class)._optional_components
    return tuple(part for part in absent if part not in optional)


def _cached(source: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "model_index.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _network_in(index: Mapping[str, Any]) -> str | None:
    return next((name for name in ("transformer", "unet") if name in index), None)


def _network_of_weights(run: Run) -> str:
    """What the trained network is called, by its layers: those of a UNet are down, mid and up blocks."""
    from safetensors import safe_open

    file = next(file for part in ("model", "lora") for file in sorted((run.path / part).glob("*.safetensors")))
    with safe_open(file, "pt") as opened:
        return "unet" if any("down_blocks" in name or "mid_block" in name for name in opened.keys()) else "transformer"  # noqa: SIM118
