"""CLIP and SigLIP models in transformers' layout, as towers: what the reward `clip` is, and what rewards are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffalign.errors import InputError
from diffalign.rewards.common import Towers, View, Words, towers
from diffalign.rewards.weights import load, load_tokenizer, quiet

RESAMPLING: dict[int, Any] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def open_towers(folder: Path, dtype: torch.dtype, view: View | None = None) -> Towers:
    """The networks of a folder, frozen, with what they read; `view` is how pictures are prepared where the folder does not say.

    Raises InputError for what is no CLIP or SigLIP model, or is not whole.
    """
    import transformers

    kinds = {
        "clip": (transformers.CLIPModel, transformers.CLIPTokenizer),
        "siglip": (transformers.SiglipModel, transformers.AutoTokenizer),
    }
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder} holds no model that transformers knows: {' '.join(str(error).split())[:200]}") from error
    if config.model_type not in kinds:
        raise InputError(f"The model in {folder} is of the type '{config.model_type}': this reward takes {' and '.join(kinds)}.")
    model_class, tokenizer_class = kinds[config.model_type]
    model = load(model_class, folder, dtype)
    size = config.text_config.vocab_size
    tokenizer = load_tokenizer(tokenizer_class, folder, size, at_least=size // 2)
    words = Words(tokenizer, config.text_config.max_position_embeddings, "clip")
    return towers(model, words, view or _view(folder))


def _view(folder: Path) -> View:
    """How the model's processor prepares pictures. Raises InputError for what is not known here."""
    from transformers import AutoImageProcessor

    try:
        with quiet():
            said = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"The picture processor in {folder} does not load: {' '.join(str(error).split())[:200]}") from error
    size, cut = said.size, said.crop_size if said.do_center_crop else None
    known = said.do_resize and said.do_rescale and said.do_normalize and int(said.resample) in RESAMPLING
    mode: Any = RESAMPLING.get(int(said.resample))
    mean, std = tuple(said.image_mean), tuple(said.image_std)
    if known and cut is not None and size.shortest_edge == cut.height == cut.width:
        return View(cut.height, "crop", mode, mean, std)
    if known and cut is None and size.height is not None and size.height == size.width:
        return View(size.height, "squash", mode, mean, std)
    raise InputError(f"The processor in {folder} prepares pictures in a way that this reward does not know: {said.to_dict()}.")
