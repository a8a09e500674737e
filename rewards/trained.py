"""A reward that `diffalign reward train` has trained: from preferences (Bradley-Terry), or from ratings of several aspects."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign import shapes
from diffalign.cache import TextCache
from diffalign.errors import InputError, nearest
from diffalign.reward_model import CONFIG, Architecture, Card, RewardModel, prepare, read_config, restore
from diffalign.reward_model import WEIGHTS as FILE
from diffalign.rewards import tiny
from diffalign.rewards.clips import open_towers
from diffalign.rewards.common import DTYPES, Precision, Towers, View, check_fields, check_pictures, in_chunks
from diffalign.rewards.weights import TOKENIZER, WEIGHTS, read_weights, snapshot
from diffalign.types import Modality, Prompts

SHAPES = "shapes-clip"  # the embedded base model
SHAPES_FOLDER = Path(shapes.__file__).parent / "assets" / "shapes" / "scorer"
SHAPES_VIEW = View(shapes.PIXELS, "squash", "area", (0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class Trained:
    """A head, and perhaps a LoRA, on a CLIP model: mean 0 and standard deviation 1 over the pictures that it was trained on."""

    checkpoint: Path | None = None
    """Folder that diffalign reward train has made."""
    base: Path | None = None
    """Folder of the base model, in place of the Hub id or folder that the training had."""
    aspect: str | None = None
    """Of a reward trained on ratings: this aspect alone, as a rating in the data's units, in place of the weighted mix."""
    precision: Precision = "fp32"
    """Of the base model; the head is fp32."""
    batch_size: int = 8
    """Pictures that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "image"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to (B,); the gradient reaches the images."""
        if self.aspect is not None:
            return self.rate(media, prompts)[:, self.card.architecture.aspects.index(self.aspect)]
        return self.card.mix(self._outputs(media, prompts))

    def rate(self, media: Tensor, prompts: Prompts) -> Tensor:
        """(B, K) ratings of the K `aspects`, in the units of the data; of a reward trained on preferences its own scale, K = 1."""
        return self.card.ratings(self._outputs(media, prompts))

    @property
    def aspects(self) -> tuple[str, ...]:
        """The names of what `rate` gives."""
        return self.card.architecture.aspects

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.model

    @property
    def resolution(self) -> int:
        """Pixels of the network's square pictures; opens the model."""
        return self.towers.view.size

    @cached_property
    def card(self) -> Card:
        """What the folder says of the reward. Raises InputError for a folder that is none, and an aspect that it does not have."""
        card = read_config(self._folder())
        if self.aspect is not None and self.aspect not in card.architecture.aspects:
            raise InputError(f"{self._folder()} has no aspect '{self.aspect}'. {nearest(self.aspect, card.architecture.aspects)}")
        return card

    @cached_property
    def towers(self) -> Towers:
        """The base model. Raises InputError where it is not the one that the reward was trained on."""
        said = self.card.base
        found, facts = open_base(str(self.base or said["model"]), said["revision"], self.precision)
        if facts["sha256"] != said["sha256"]:
            raise InputError(
                f"{self._folder()} was trained on {said['model']}, whose weights have the sha256 {said['sha256'][:16]}..., and those of "
                f"{facts['model']} have {facts['sha256'][:16]}...: it is another base model. Give the one: --reward.base FOLDER."
            )
        return found

    @cached_property
    def model(self) -> RewardModel:
        """The networks, frozen."""
        model = _prepared(self.card.architecture, self.towers, seed=0)
        path = self._folder() / FILE
        if not path.is_file():
            raise InputError(f"There is no file {path}: the folder is not whole. Copy it anew, or train the reward again.")
        return restore(model, read_weights(path), path)

    @cached_property
    def texts(self) -> TextCache:
        """Features of texts: every one is read once."""
        return TextCache(lambda texts: (self.model.read(texts),), names=("features",))

    def _outputs(self, media: Tensor, prompts: Prompts) -> Tensor:
        check_pictures(media, prompts)
        model, view = self.model.to(media.device), self.towers.view
        self.towers.note(prompts.text)
        with torch.no_grad():
            read = self.texts(prompts.text)["features"].to(media.device)
        return in_chunks(lambda pictures, texts: model.rate(model.see(view(pictures)), texts), self.batch_size, media, read)

    def _folder(self) -> Path:
        if self.checkpoint is None:
            raise InputError("The reward 'trained' needs the folder that diffalign reward train has made: --reward.checkpoint DIR.")
        folder = self.checkpoint.expanduser()
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}: --reward.checkpoint takes one that diffalign reward train has made.")
        return folder

    def tiny(self, folder: Path) -> Trained:
        """The same reward on a tiny random CLIP with a random head, both written into `folder`."""
        base, own = tiny.save_clip(folder / "base", tiny.clip()), folder / "trained"
        architecture = Architecture((self.aspect or "preference",))
        model, facts = self.begin(architecture, str(base))
        own.mkdir()
        draws = torch.Generator().manual_seed(0)
        save_file({name: torch.randn(p.shape, generator=draws) for name, p in model.trained().items()}, own / FILE)
        (own / CONFIG).write_text(json.dumps(Card(architecture, facts, (1.0,), (0.0,), (1.0,)).to_json()))
        return replace(self, checkpoint=own, base=None)

    @staticmethod
    def begin(
        architecture: Architecture, model: str, revision: str = "main", precision: Precision = "fp32", seed: int = 0
    ) -> tuple[RewardModel, dict[str, str]]:
        """A reward at the start of its training, every output the base's scaled cosine, and what its card says of the base."""
        towers, facts = open_base(model, revision, precision)
        return _prepared(architecture, towers, seed), facts


def _prepared(architecture: Architecture, towers: Towers, seed: int) -> RewardModel:
    network: Any = towers.network
    with torch.no_grad():
        width = towers.read([""]).shape[-1]
    return prepare(architecture, towers, width=width, scale=float(network.logit_scale.float().exp()), seed=seed)


def open_base(model: str, revision: str, precision: Precision) -> tuple[Towers, dict[str, str]]:
    """A base model by its name: shapes-clip (embedded), a folder or a Hub id; and its name, revision and checksum."""
    folder, view, name = Path(model).expanduser(), None, model
    if model == SHAPES:
        folder, view = SHAPES_FOLDER, SHAPES_VIEW
    elif folder.is_dir():
        name = str(folder.absolute())
    elif model.count("/") == 1 and not model.startswith((".", "/", "~")):
        folder = snapshot(model, revision, None, "base", [*WEIGHTS, *TOKENIZER])
        revision = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else revision
    else:
        raise InputError(f"There is no base model '{model}': give {SHAPES}, a Hub id user/model, or the folder of a CLIP or SigLIP model.")
    found = open_towers(folder, DTYPES[precision], view)
    return found, {"model": name, "revision": revision, "sha256": _sha256(folder)}


def _sha256(folder: Path) -> str:
    """One checksum of all weights of a folder."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    sums: list[str] = []
    for path in files:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()
