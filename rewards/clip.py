"""CLIP score (Hessel et al., EMNLP 2021, arXiv 2104.08718, without its factor and clipping): CLIP and SigLIP models, and open_clip's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.errors import InputError, nearest
from diffalign.rewards import tiny
from diffalign.rewards.clips import RESAMPLING, open_towers
from diffalign.rewards.common import DTYPES, Precision, Towers, View, check_fields
from diffalign.rewards.weights import TOKENIZER, WEIGHTS, snapshot
from diffalign.types import Modality, Prompts


@dataclass(frozen=True)
class CLIP:
    """Cosine of the picture's and the prompt's features under a CLIP or SigLIP model in transformers' layout."""

    model: str = "openai/clip-vit-large-patch14"
    """Hub id of the model."""
    checkpoint: Path | None = None
    """A folder with the model, its tokenizer and its processor, in place of the download."""
    revision: str = "main"
    """Revision of the model on the Hub: a commit is always the same."""
    precision: Precision = "fp32"
    """Of the networks; cosines are fp32."""
    batch_size: int = 8
    """Pictures that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "image"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)
        if Path(self.model).expanduser().is_dir() or self.model.count("/") != 1:
            raise InputError(f"model is {self.model}: give a Hub id user/model, or a folder with --reward.checkpoint FOLDER.")

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to (B,) in [-1, 1]; the gradient reaches the images."""
        return self.towers.cosine(media, prompts, self.batch_size)

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.towers

    @property
    def resolution(self) -> int:
        """Pixels of the network's square pictures; opens the model."""
        return self.towers.view.size

    @cached_property
    def towers(self) -> Towers:
        """The networks, frozen, with what they read."""
        folder = snapshot(self.model, self.revision, self.checkpoint, "checkpoint", [*WEIGHTS, *TOKENIZER])
        return open_towers(folder, DTYPES[self.precision])

    def tiny(self, folder: Path) -> CLIP:
        """The same reward with a tiny random CLIP, which is written into `folder` as the real one lies on the Hub."""
        return replace(self, checkpoint=tiny.save_clip(folder, tiny.clip("quick_gelu")))


@dataclass(frozen=True)
class OpenCLIP:
    """Cosine of the picture's and the prompt's features under a model of open_clip."""

    model: str = "ViT-B-32"
    """open_clip's name of the architecture."""
    pretrained: str = "laion2b_s34b_b79k"
    """open_clip's tag of the weights, or a local checkpoint file."""
    precision: Precision = "fp32"
    """Of the networks; cosines are fp32."""
    batch_size: int = 8
    """Pictures that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "image"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to (B,) in [-1, 1]; the gradient reaches the images."""
        return self.towers.cosine(media, prompts, self.batch_size)

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.towers

    @property
    def resolution(self) -> int:
        """Pixels of the network's square pictures; opens the model."""
        return self.towers.view.size

    @cached_property
    def towers(self) -> Towers:
        """The networks, frozen, with what they read."""
        import open_clip  # pyright: ignore[reportMissingImports]

        name = self.model
        if name.endswith(".json"):
            path = Path(name).expanduser()
            if not path.is_file():
                raise InputError(f"There is no file {path}: model is open_clip's name of an architecture, or the path of its JSON file.")
            open_clip.add_model_config(path)
            name = path.stem
        if name not in open_clip.list_models():
            raise InputError(f"open_clip knows no model '{name}'. {nearest(name, open_clip.list_models())}")
        local = Path(self.pretrained).expanduser()
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not local.is_file() and self.pretrained not in tags:
            known = nearest(self.pretrained, tags) if tags else "It has none."
            raise InputError(f"open_clip has no weights '{self.pretrained}' of {name}: name one of its tags, or a local file. {known}")
        try:
            weights = str(local) if local.is_file() else self.pretrained
            model = open_clip.create_model(name, pretrained=weights, weights_only=True).to(DTYPES[self.precision])
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise InputError(f"open_clip's {name} with '{self.pretrained}' does not load: {' '.join(str(error).split())[:300]}") from error
        model.eval().requires_grad_(False)

        def read(texts: list[str]) -> Tensor:
            return model.encode_text(tokenizer(texts).to(next(model.parameters()).device))

        return Towers(model, model.encode_image, read, _open_clip_view(open_clip.get_model_preprocess_cfg(model)), lambda texts: None)

    def tiny(self, folder: Path) -> OpenCLIP:
        """The same reward with tiny random weights; they and the architecture's JSON file are written into `folder`."""
        import json

        import open_clip  # pyright: ignore[reportMissingImports]

        folder.mkdir(parents=True, exist_ok=True)
        vision = {"image_size": 224, "layers": 2, "width": 128, "patch_size": 32}
        text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
        (folder / "tiny.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
        open_clip.add_model_config(folder / "tiny.json")
        torch.save(tiny.seeded(lambda: open_clip.create_model("tiny")).state_dict(), folder / "tiny.pt")
        return replace(self, model=str(folder / "tiny.json"), pretrained=str(folder / "tiny.pt"))


def _open_clip_view(said: dict[str, Any]) -> View:
    """How an open_clip model wants its pictures. Raises InputError for what is not known here."""
    size = said["size"]
    height, width = (size, size) if isinstance(size, int) else size
    hows: dict[str, Any] = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    how = hows.get(said["resize_mode"])
    if height != width or how is None or said["interpolation"] not in RESAMPLING.values() or (how == "pad" and said["fill_color"] != 0):
        raise InputError(f"This model prepares pictures in a way that this reward does not know: {said}.")
    return View(height, how, said["interpolation"], tuple(said["mean"]), tuple(said["std"]), rounds=True)
