"""The original packages' side of parity_rewards.py: runs inside the environment of `hpsv2` or `image-reward`, and needs no other.

    python parity_originals.py hpsv2|image-reward small|full FOLDER [backend]

writes into FOLDER the pictures, a checkpoint of random weights in the original layout, and what the package itself
makes of them: scores of the files by its own `score`, and scores with their gradient of the pixels that its own transform made of them.
With `backend`, after that, it writes what diffalign's rewards say of the same files with `backend="package"`.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
# The packages live in environments of their own.

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import parity_recipe as recipe
import torch
from PIL import Image


def main() -> None:
    package, size, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    kept = loadable_torchvision()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    files = [f"{i}.png" for i in range(len(recipe.SIZES))]
    for i, file in enumerate(files):
        Image.fromarray(recipe.picture(i)).save(file)
    started = time.perf_counter()
    if size == "small":
        {"hpsv2": smaller_hpsv2, "image-reward": smaller_image_reward}[package]()
    if sys.argv[4:] == ["backend"]:
        Path("backend.json").write_text(json.dumps(backend(package, files)))
        return
    found = {"hpsv2": hpsv2, "image-reward": image_reward}[package](files)
    del kept
    versions = {name: importlib.metadata.version(name) for name in (package, "torch", "torchvision", "transformers", "timm", "numpy")}
    arrays = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    torch.save(arrays, "original.pt")
    notes = {name: value for name, value in found.items() if not isinstance(value, torch.Tensor)}
    facts = {"versions": versions, "python": sys.version.split()[0], "seconds": round(time.perf_counter() - started), **notes}
    Path("original.json").write_text(json.dumps(facts, indent=1))


def loadable_torchvision() -> Any:
    """Where torchvision's compiled part does not fit this torch (a CPU torch beside the registry's torchvision), its two schemas.

    Without them torchvision cannot be imported. Of it the packages use the transforms alone, which are Python on torch and Pillow.
    """
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (compiled,) = Path(spec.submodule_search_locations[0]).glob("_C*.so")
    try:
        torch.ops.load_library(str(compiled))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def fill(model: torch.nn.Module) -> int:
    """The recipe's weights into the package's model; the number of weights."""
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    with torch.no_grad():
        for name, value in state.items():
            (drawn,) = recipe.weights({name: value.shape}).values()
            value.copy_(torch.from_numpy(drawn))
    model.eval().requires_grad_(False)
    return sum(value.numel() for value in state.values())


def with_gradient(score: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (n,) and their gradient (n, 3, H, W) at the pixels, one picture at a time, of `score` of (picture, number)."""
    scores, slopes = [], []
    for i, picture in enumerate(pixels):
        at = picture[None].clone().requires_grad_()
        value: Any = score(at, i)  # type: ignore[call-arg]
        slopes.append(torch.autograd.grad(value.sum(), at)[0])
        scores.append(value.detach().flatten())
    return torch.cat(scores), torch.cat(slopes)


def smaller_hpsv2() -> None:
    """ViT-H-14 becomes a small network, by the package's own way of adding an architecture."""
    from hpsv2.src.open_clip import add_model_config

    s, (head, text_head) = recipe.SMALL["hpsv2"], recipe.HEAD_WIDTHS["hpsv2"]
    vision = {"image_size": 224, "layers": s["layers"], "width": s["vision"], "head_width": head, "patch_size": s["patch"]}
    text = {"context_length": 77, "vocab_size": s["tokens"], "width": s["text"], "heads": s["text"] // text_head}
    config = {"embed_dim": s["out"], "vision_cfg": vision, "text_cfg": {**text, "layers": s["text_layers"]}}
    Path("ViT-H-14.json").write_text(json.dumps(config))
    add_model_config("ViT-H-14.json")


def hpsv2(files: list[str]) -> dict[str, Any]:
    from hpsv2 import img_score
    from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer
    from hpsv2.src.open_clip.tokenizer import _tokenizer

    # what initialize_model of the package does, without LAION's weights, which its score overwrites at once
    model, _, prepare = create_model_and_transforms(
        "ViT-H-14", None, precision="amp", device="cpu", jit=False, light_augmentation=True, aug_cfg={}, output_dict=True
    )
    count = fill(model)
    torch.save({"epoch": 0, "state_dict": model.state_dict()}, "checkpoint.pt")
    img_score.model_dict.update(model=model, preprocess_val=prepare)
    scored = [
        img_score.score(file, prompt, cp="checkpoint.pt", hps_version="v2.0")[0] for file, prompt in zip(files, recipe.PROMPTS, strict=True)
    ]
    ids = get_tokenizer("ViT-H-14")(list(recipe.PROMPTS))
    pixels = torch.stack([prepare(Image.open(file)) for file in files])

    def score(at: torch.Tensor, i: int) -> torch.Tensor:
        out = model(at, ids[i : i + 1])
        return (out["image_features"] * out["text_features"]).sum(-1)

    scores, slopes = with_gradient(score, pixels)  # type: ignore[arg-type]
    words = [word for prompt in recipe.PROMPTS for word in _words(_tokenizer, prompt)]
    return {
        "files": torch.tensor(np.array(scored)), "scores": scores, "slopes": slopes, "pixels": pixels, "ids": ids, "weights": count,
        "merges": recipe.merges_of(words, _tokenizer.bpe_ranks),
    }  # fmt: skip


def _words(tokenizer: Any, prompt: str) -> list[str]:
    """The words whose pieces the tokenizer looks for, as its own `encode` cuts them."""
    from hpsv2.src.open_clip.tokenizer import basic_clean, re, whitespace_clean

    found = re.findall(tokenizer.pat, whitespace_clean(basic_clean(prompt)).lower())
    return ["".join(tokenizer.byte_encoder[b] for b in word.encode("utf-8")) for word in found]


MED = {  # the published med_config.json
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2,
    "vocab_size": 30524, "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip


def smaller_image_reward() -> None:
    """The package's networks, for which it has one size, at another: its own classes with other numbers."""
    import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    del ImageReward
    s, (head, text_head) = recipe.SMALL["image-reward"], recipe.HEAD_WIDTHS["image-reward"]
    module: Any = sys.modules["ImageReward.ImageReward"]  # the name stands for the class of the same name elsewhere
    whole = module.MLP

    def create_vit(*_: Any) -> Any:
        sizes = {"embed_dim": s["vision"], "depth": s["layers"], "num_heads": s["vision"] // head}
        return VisionTransformer(img_size=224, patch_size=s["patch"], **sizes), s["vision"]

    blip_pretrain.create_vit, module.MLP = create_vit, lambda _: whole(s["text"])
    MED.update(hidden_size=s["text"], intermediate_size=4 * s["text"], num_attention_heads=s["text"] // text_head)
    MED.update(num_hidden_layers=s["text_layers"], vocab_size=len(recipe.WORDPIECES) + 2)


def image_reward(files: list[str]) -> dict[str, Any]:
    (folder := Path("bert-base-uncased")).mkdir(exist_ok=True)  # taken in place of the one on the Hub
    vocabulary = recipe.wordpieces(int(str(MED["vocab_size"])) - 2)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}))
    Path("med_config.json").write_text(json.dumps(MED))
    import ImageReward

    model = ImageReward.ImageReward(device="cpu", med_config="med_config.json")
    count = fill(model)
    torch.save(model.state_dict(), "checkpoint.pt")
    del model  # gigabytes
    with contextlib.redirect_stdout(None):  # the package's own way to a model
        model = ImageReward.load("checkpoint.pt", device="cpu", med_config="med_config.json").requires_grad_(False)
    scored = [model.score(prompt, file) for file, prompt in zip(files, recipe.PROMPTS, strict=True)]
    read = model.blip.tokenizer(list(recipe.PROMPTS), padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels = torch.stack([model.preprocess(Image.open(file)) for file in files])

    def score(at: torch.Tensor, i: int) -> torch.Tensor:
        return model.score_gard(read.input_ids[i : i + 1], read.attention_mask[i : i + 1], at)[:, 0]

    scores, slopes = with_gradient(score, pixels)  # type: ignore[arg-type]
    return {
        "files": torch.tensor(scored), "scores": scores, "slopes": slopes, "pixels": pixels, "ids": read.input_ids,
        "mask": read.attention_mask, "weights": count,
    }  # fmt: skip


def backend(package: str, files: list[str]) -> dict[str, Any]:
    from diffalign.contract import CheckedReward
    from diffalign.media import read_image
    from diffalign.rewards import packages
    from diffalign.rewards.hps import HPS
    from diffalign.rewards.image_reward import ImageReward
    from diffalign.types import Prompts

    checkpoint, tokenizer = Path("checkpoint.pt"), Path("bert-base-uncased")
    reward: Any = HPS(checkpoint=checkpoint, backend="package")
    if package == "image-reward":
        packages.MED.update(MED)
        reward = ImageReward(checkpoint=checkpoint, tokenizer=tokenizer, backend="package")
    checked = CheckedReward(reward, package)
    checked.open()
    opened = time.perf_counter()
    scores = [checked(read_image(Path(file))[None], Prompts((prompt,))) for file, prompt in zip(files, recipe.PROMPTS, strict=True)]
    assert not any(score.requires_grad for score in scores)
    return {"scores": torch.cat(scores).tolist(), "seconds_a_picture": (time.perf_counter() - opened) / len(files)}


if __name__ == "__main__":
    main()
