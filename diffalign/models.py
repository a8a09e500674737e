"""From a name, a folder, a Hub id or a live diffusers pipeline to a policy."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from diffalign import knobs, registry, sources
from diffalign.errors import InputError, nearest
from diffalign.notices import quiet
from diffalign.settings import Settings
from diffalign.types import Modality

OPTIONS = (
    "image_guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "audio_seconds",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "vae_precision",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(settings: Settings) -> torch.device:
    """The device that was asked for, or the first of cuda, mps and cpu; raises InputError for one that does not work.

    It is tried, which takes memory of the GPU that the process is on: of several processes each must be on its own by then.
    """
    if settings.device is None:
        return torch.device(device_type(settings))
    try:
        number = torch.zeros(1, device=settings.device)
        number.item()  # 'meta' and its like hold no numbers
        return number.device
    except (RuntimeError, AssertionError) as error:
        raise _unusable(settings, error) from error


def device_type(settings: Settings) -> str:
    """What kind of device `device_of` gives; the device itself is left alone. Raises InputError for a name that is none."""
    if settings.device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.device(settings.device).type
    except RuntimeError as error:
        raise _unusable(settings, error) from error


def _unusable(settings: Settings, error: Exception) -> InputError:
    return InputError(f"The device '{settings.device}' cannot be used here: {str(error).splitlines()[0]}")


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


def modality_of(class_name: str) -> Modality | None:
    """What a pipeline of this class makes; None where its adapter says so only of a live one. Raises InputError as `adapter_of`."""
    return getattr(adapter_of(class_name), "modality", None)


def class_named(name: str) -> Any:
    """A pipeline class of diffusers by its name; raises InputError for one without an adapter, before diffusers is imported."""
    adapter_of(name)
    with quiet(pipelines=True):
        import diffusers

        return getattr(diffusers, name)


def load_pipeline(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline from `shapes`, a folder or a Hub id. Raises InputError where it cannot, with what to do about it.

    Its VAE is in fp32, the rest in `dtype`. Weights are safetensors, or .bin files that torch loads weights-only.
    """
    pipeline_class = class_named(sources.class_of(source, revision))
    where = sources.folder_of(source, revision, pipeline_class)
    try:
        absent = dict.fromkeys(sources.absent(where))
        with quiet(pipelines=True):
            return pipeline_class.from_pretrained(str(where), dtype={"default": dtype, "vae": torch.float32}, **absent)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in reason:
            raise  # nothing is wrong with the files
        mend = "Install the package that is missing." if isinstance(error, ImportError) else "Fetch or save it again."
        raise InputError(f"The model in {where} does not load: {reason} {mend}") from error


def class_of(settings: Settings, pipe: Any = None) -> str:
    """Name of the diffusers class of the settings' model, or of the live `pipe`, from its index: no weights are fetched.

    Of a Hub model in a dry run it is what the settings say. Raises InputError where they say something else than the model.
    """
    said = settings.pipeline_class
    if pipe is None and settings.tiny and said is not None and registry.locate(settings.pipeline) is None:
        return said
    found = sources.class_of(settings.pipeline, settings.revision) if pipe is None else type(pipe).__name__
    if said not in (None, found):
        raise InputError(f"The model '{settings.pipeline}' is a {found}, and pipeline_class says {said}: mend the one or the other.")
    return found


def open_pipeline(settings: Settings, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of the settings, as `load_pipeline` has it; in a dry run its tiny twin, always with the same random weights.

    Embedded models are their own twins. Raises InputError where it cannot, and for an adapter that makes no twin.
    """
    name = class_of(settings)
    if not settings.tiny or settings.pipeline in registry.MODELS:
        return load_pipeline(settings.pipeline, settings.revision, dtype)
    make = getattr(adapter_of(name), "tiny", None)
    if make is None:
        raise InputError(
            f"The adapter of {name} makes no tiny twin, which a dry run trains: it lacks a function tiny() that gives such a pipeline "
            "with random weights. See 'A pipeline' in docs/design.md, or leave --tiny out."
        )
    with quiet(pipelines=True), torch.random.fork_rng(devices=[]):
        return make()


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
    knobs.check_device(settings, device)
    precision = "fp32" if settings.full else settings.precision
    ours = pipe is None
    pipe = open_pipeline(settings, DTYPES[precision]) if ours else pipe
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
    try:
        knobs.install(policy, settings)
    except InputError:
        policy.release()
        raise
    if ours and settings.tiny and settings.pipeline not in registry.MODELS and policy.modality == "audio":
        policy.unspeakable = _sayable
    parts = sources.pickled(Path(pipe.name_or_path)) if ours and pipe.name_or_path else []
    if parts:
        policy.notes = (*policy.notes, f"The weights of {', '.join(parts)} are .bin files: loaded weights-only, nothing in them was run.")
    return prepare_to_train(policy, settings) if train else policy


def _sayable(transcript: str) -> None:
    """Whatever a tiny twin is to say: its tokenizer is not the model's."""


def _own_options(adapter: Any, settings: Settings, name: str) -> dict[str, Any]:
    """The settings that not every adapter takes; raises InputError for one that was given and that this one does not take."""
    taken = inspect.signature(adapter.of).parameters
    for option in OPTIONS:
        if option not in taken and vars(settings)[option] != vars(Settings())[option]:
            raise InputError(f"{option}: the adapter of {name} takes none. Drop it.")
    return {option: vars(settings)[option] for option in OPTIONS if option in taken}


def prepare_to_train(policy: Any, settings: Settings, mesh: Any = None) -> Any:
    """The policy with its LoRA attached, or its weights set free; on a `mesh` of processes these are shared out.

    Raises InputError for a policy that cannot do so.
    """
    if mesh is not None:
        if "mesh" not in inspect.signature(policy.unfreeze).parameters:
            raise InputError(f"fsdp: the adapter of {type(policy.pipe).__name__} does not share its network out. Drop --fsdp.")
        policy.unfreeze(mesh)
    elif settings.full:
        policy.unfreeze()
    else:
        policy.adapt(settings.lora, settings.seed)
    knobs.install_for_training(policy, settings)
    return policy
