"""`diffalign doctor`: what is installed, what can be used, and what would be downloaded."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator

from diffalign.registry import MODELS
from diffalign.run import versions

EXTRAS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "xformers": "xformers",
    "bitsandbytes": "bitsandbytes",
    "open-clip": "open_clip_torch",
    "siglip": "sentencepiece",
    "hpsv2": "hpsv2",
}


def report() -> Iterator[str]:
    """Lines for a person."""
    import torch

    for name, version in versions().items():
        yield f"{name:15} {version}"
    yield f"threads         {torch.get_num_threads()} of {os.cpu_count()} cores (OMP_NUM_THREADS)"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            yield f"device          cuda:{i} {properties.name}, {properties.total_memory / 1e9:.0f} GB, {bf16}"
    elif torch.backends.mps.is_available():
        yield "device          mps"
    else:
        yield "device          cpu only: fine for 'shapes'; Stable Diffusion wants a GPU"
    for extra, package in EXTRAS.items():
        try:
            state = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            state = f"not installed (pip install 'diffalign[{extra}]')"
        yield f"extra           {extra}: {state}"
    for name, path in MODELS.items():
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6
        yield f"model           {name}: embedded, {size:.1f} MB, nothing is downloaded"
    from huggingface_hub.constants import HF_HUB_CACHE

    offline = "; HF_HUB_OFFLINE is set, so nothing will be" if os.environ.get("HF_HUB_OFFLINE") else ""
    yield f"downloads       models named by a Hub id go to {HF_HUB_CACHE}{offline}"
    yield f"disk            {shutil.disk_usage('.').free / 1e9:.0f} GB free here"
