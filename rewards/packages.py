"""The authors' own packages as back ends of their rewards: imported where they are asked for, opened once, without a gradient."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import InputError
from diffalign.media import to_pil
from diffalign.rewards.common import check_pictures
from diffalign.rewards.weights import quiet, read_weights
from diffalign.types import Prompts

Backend = Literal["native", "package"]
Scorer = Callable[[Image.Image, str, torch.device], float]  # of one picture, as the packages score

BPE = (
    "its wheel lacks CLIP's vocabulary, which open_clip_torch has (pip install open_clip_torch): python -c \"import hpsv2, open_clip, "
    "shutil; shutil.copy(open_clip.__path__[0] + '/bpe_simple_vocab_16e6.txt.gz', hpsv2.__path__[0] + '/src/open_clip')\""
)
TKINTER = "it imports turtle, so it needs Python's tkinter (apt install python3-tk)"
MENDS = {  # what the imports are known to fail with, and what helps
    "bpe_simple_vocab": BPE,
    "'turtle'": TKINTER,
    "tkinter'": TKINTER,
    "No module named 'clip'": "it needs OpenAI's CLIP: pip install clip-anytorch",
    "pkg_resources": "it imports CLIP, which needs pip install --no-deps 'setuptools<70'",
    "torchvision::": "torchvision must be the build of your torch",
    "from 'transformers": "it was written for transformers 4, and transformers 5 is here",
    "'transformers.": "it was written for transformers 4, and transformers 5 is here",
}
COMMANDS = {
    "hpsv2": "pip install 'diffalign[hpsv2]'",
    "image-reward": "pip install image-reward==1.5, in an environment with transformers 4, see docs/rewards/image-reward.md",
}
INSTEAD = {
    "hpsv2": "Or leave it: --reward.backend native reads the same checkpoint.",
    "image-reward": "Leave it: --reward.backend native reads the same checkpoint; or score in an environment of its own, see "
    "docs/rewards/image-reward.md.",
}


def check_backend(backend: str, **own: Any) -> None:
    """Raise InputError for no back end, and for fields, `own`, that the package has no place for."""
    if backend not in ("native", "package"):
        raise InputError(f"backend is {backend}: give native or package.")
    given = [name for name, value in own.items() if value]
    if backend == "package" and given:
        raise InputError(f"backend is package, which knows no {' and no '.join(given)}: drop it, or --reward.backend native.")


def refuse_twin(backend: str) -> None:
    """Raise InputError where a tiny twin is asked for of a package, which knows but one size."""
    if backend == "package":
        raise InputError("--tiny needs --reward.backend native: the package knows no network but the whole one.")


def imported(package: str, module: str) -> Any:
    """A module of an optional package. Raises InputError where it is not installed, or does not import."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise InputError(
            f"--reward.backend package needs {package}, which is not installed: {COMMANDS[package]}. Or leave it: --reward.backend native "
            "reads the same checkpoint."
        )
    try:
        with redirect_stdout(io.StringIO()):
            return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        why = next((mend for word, mend in MENDS.items() if word in said), "")
        raise InputError(f"{package} is installed and cannot be imported ({said}){why and ': ' + why}. {INSTEAD[package]}") from error


@torch.no_grad()
def score(scorer: Scorer, media: Tensor, prompts: Prompts) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] and B prompts to (B,), without a gradient: as 8-bit pictures, one by one, as the package takes them."""
    check_pictures(media, prompts)
    pictures = [to_pil(picture) for picture in media.clamp(0, 1)]
    found = [scorer(picture, text, media.device) for picture, text in zip(pictures, prompts.text, strict=True)]
    return torch.tensor(found, device=media.device)


MED = {  # the published med_config.json, which tells BLIP's text encoder how large it is
    "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-12, "vocab_size": 30524, "max_position_embeddings": 512,
    "pad_token_id": 0, "type_vocab_size": 2, "encoder_width": 768, "add_cross_attention": True, "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
}  # fmt: skip


def hps(checkpoint: Path) -> Scorer:
    """hpsv2's own network, picture transform and tokenizer with a checkpoint, called as `hpsv2.score` calls them.

    That function itself fetches LAION's weights, 4 GB that are then overwritten, and reads the checkpoint again at every call.
    """
    clip = imported("hpsv2", "hpsv2.src.open_clip")
    read_weights(checkpoint)  # what is damaged or dangerous is refused in the same words
    with refused(checkpoint):
        model, _, prepare = clip.create_model_and_transforms(
            "ViT-H-14", pretrained=str(checkpoint), precision="amp", device="cpu", light_augmentation=True, aug_cfg={}, output_dict=True
        )
    model.eval().requires_grad_(False)
    tokenize = clip.get_tokenizer("ViT-H-14")

    def one(picture: Image.Image, text: str, device: torch.device) -> float:
        model.to(device)
        with torch.autocast("cuda", enabled=device.type == "cuda"):  # in fp16 on a GPU, as the package has it
            found = model(prepare(picture)[None].to(device), tokenize([text]).to(device))
            return float(found["image_features"] @ found["text_features"].T)

    return one


def image_reward(checkpoint: Path, tokenizer: Path) -> Scorer:
    """ImageReward's own `load` and `score`, with a checkpoint and a folder with BERT's tokenizer."""
    package = imported("image-reward", "ImageReward")
    checkpoint, keys = checkpoint.absolute(), read_weights(checkpoint).keys()
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), quiet(), refused(checkpoint):
        (Path(folder) / "med_config.json").write_text(json.dumps(MED))
        (Path(folder) / "bert-base-uncased").symlink_to(tokenizer.absolute())
        with chdir(folder):  # the package names its tokenizer so, and takes a folder of that name first
            model = package.load(str(checkpoint), device="cpu", med_config="med_config.json")
    lacking = sorted(key for key in model.state_dict().keys() - keys if not key.endswith("position_ids"))
    if lacking:  # the package loads what there is, and leaves the rest as chance made it
        raise InputError(f"{checkpoint} is not the checkpoint of this reward. Keys {len(lacking)} missing: {', '.join(lacking[:4])}.")
    model.requires_grad_(False)

    def one(picture: Image.Image, text: str, device: torch.device) -> float:
        model.to(device).device = device
        return model.score(text, picture)

    return one


@contextmanager
def refused(checkpoint: Path) -> Iterator[None]:
    """What the packages say of a checkpoint that they do not take, as an InputError."""
    try:
        yield
    except (RuntimeError, KeyError, OSError, pickle.UnpicklingError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"The package does not open {checkpoint} ({said}).") from error
