"""From a name, a folder, a Hub id or a live diffusers pipeline to a policy."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffalign import registry
from diffalign.errors import InputError, nearest
from diffalign.settings import Settings

OPTIONS = (
    "image_guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "vae_precision",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(settings: Settings) -> torch.device:
    """The device that was asked for, or the first of cuda, mps and cpu."""
    if settings.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        number = torch.zeros(1, device=settings.device)
        number.item()  # 'meta' and its like hold no numbers
        return number.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device '{settings.device}' cannot be used here: {str(error).splitlines()[0]}") from error


def adapter_of(class_name: str) -> Any:
    """The policy class for a diffusers pipeline class; raises InputError for one that has no adapter."""
    rows = registry.table("pipelines")
    if class_name not in rows:
        why = registry.UNSUITED.get(class_name, nearest(class_name, rows))
        raise InputError(
            f"{class_name} has no adapter. {why} Supported: {', '.join(sorted(rows))}. "
            "An adapter is one file: see 'A pipeline' in docs/design.md."
        )
    return registry.find("pipelines", class_name)[0]


def _index(source: str, revision: str | None) -> tuple[str, str]:
    """Where to load from, and the pipeline's class name: from model_index.json, before any weights."""
    path = registry.locate(source)
    if path is not None:
        index = path / "model_index.json"
    else:
        from huggingface_hub import hf_hub_download

        try:
            index = Path(hf_hub_download(source, "model_index.json", revision=revision))
        except Exception as error:
            raise InputError(
                f"The model '{source}' could not be fetched ({type(error).__name__}). It is neither a folder here nor reachable on the "
                "Hub: check the name, the revision, the network, and your login for a gated model (hf auth login)."
            ) from error
    try:
        return source if path is None else str(path), json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is damaged: it names no pipeline class. Fetch or save the model again.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' and diffusers' loading bars, and their notices about packages that nobody asked for."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging  # only now: importing it gives the notices

    diffusers_level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        diffusers_logging.set_verbosity(diffusers_level)
        if bars:
            transformers_logging.enable_progress_bar()
            diffusers_logging.enable_progress_bar()


def load_pipeline(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline from `shapes`, a folder or a Hub id; safetensors only. Raises InputError where it cannot.

    Its VAE is in fp32, the rest in `dtype`.
    """
    where, class_name = _index(source, revision)
    adapter_of(class_name)
    with quiet():
        import diffusers

        pipeline_class = getattr(diffusers, class_name)
    try:
        if registry.locate(source) is None:
            where = pipeline_class.download(source, revision=revision, use_safetensors=True)
        parts = json.loads((Path(where) / "model_index.json").read_text())
        # diffusers saves Stable Diffusion 3 without T5, but loads it so only where it is told that nothing is there
        absent = dict.fromkeys(name for name, part in parts.items() if part == [None, None])
        with quiet():
            dtypes = {"default": dtype, "vae": torch.float32}
            return pipeline_class.from_pretrained(where, dtype=dtypes, use_safetensors=True, **absent)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"The model in {where} does not load: {reason} Fetch or save it again.") from error


def network_of(pipe: Any) -> str:
    """The name under which a pipeline holds its denoising network."""
    return "transformer" if "transformer" in pipe.components else "unet"


def make_policy(settings: Settings, pipe: Any = None, train: bool = True) -> Any:
    """The policy of the settings, on its device; with `train`, its LoRA attached or its weights set free.

    `pipe` is a live pipeline to use in place of the settings' name. Weights that train, or trained, stay fp32 in every precision: with
    `full` the network's are only cast as it runs.
    """
    device = device_of(settings)
    if settings.precision == "fp16" and device.type == "cpu":
        raise InputError("fp16 needs a GPU: on a CPU use --precision fp32 (or bf16).")
    if settings.vae_precision == "fp16" and device.type == "cpu":
        raise InputError("vae_precision fp16 needs a GPU: on a CPU use --vae-precision fp32 (or bf16).")
    precision = "fp32" if settings.full else settings.precision
    pipe = load_pipeline(settings.pipeline, settings.revision, DTYPES[precision]) if pipe is None else pipe
    adapter = adapter_of(type(pipe).__name__)
    policy = adapter.of(
        pipe,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        height=settings.height,
        width=settings.width,
        precision=precision,
        device=device,
        **_own_options(adapter, settings, type(pipe).__name__),
    )
    if settings.full:
        policy.dtype = DTYPES[settings.precision]
    return prepare_to_train(policy, settings) if train else policy


def _own_options(adapter: Any, settings: Settings, name: str) -> dict[str, Any]:
    """The settings that not every adapter takes; raises InputError for one that was given and that this one does not take.

    `image_guidance_scale` has a value always, and is left out where there is no picture to be guided towards.
    """
    taken = inspect.signature(adapter.of).parameters
    for option in OPTIONS[1:]:
        if option not in taken and vars(settings)[option] != vars(Settings())[option]:
            raise InputError(f"{option}: the adapter of {name} takes none. Drop it.")
    return {option: vars(settings)[option] for option in OPTIONS if option in taken}


def prepare_to_train(policy: Any, settings: Settings) -> Any:
    """The policy with its LoRA attached, or its weights set free."""
    if settings.full:
        policy.unfreeze()
    else:
        policy.adapt(settings.lora, settings.seed)
    return policy
