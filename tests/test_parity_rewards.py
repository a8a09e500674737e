"""Our readers against the original packages, by numbers that those computed: see scripts/parity_rewards.py, which writes them.

The checkpoints are made here again by the same recipe, uniform numbers drawn with numpy alone, in the layout of the original networks.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_networks import ImageReward as OriginalImageReward
from original_networks import OpenCLIP
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPTokenizer

from diffalign.media import read_image
from diffalign.rewards.common import Words
from diffalign.rewards.hps import HPS
from diffalign.rewards.image_reward import ImageReward
from diffalign.rewards.weights import quiet
from diffalign.types import Prompts

NUMBERS = json.loads((Path(__file__).parent / "parity_rewards.json").read_text())
ROOT = Path(__file__).parents[1]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> Any:
    return script("parity_recipe")


@pytest.fixture(scope="module")
def pictures(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(len(recipe.SIZES)):
        Image.fromarray(recipe.picture(i)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def state_of(recipe: Any, network: torch.nn.Module) -> dict[str, Tensor]:
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items() if value.is_floating_point()}
    return {name: torch.from_numpy(value) for name, value in recipe.weights(shapes).items()}


@pytest.fixture(scope="module")
def hps(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> HPS:
    folder, small, said = tmp_path_factory.mktemp("hps"), recipe.SMALL["hpsv2"], NUMBERS["hpsv2"]
    torch.save({"epoch": 0, "state_dict": state_of(recipe, OpenCLIP(**small, wide=4))}, folder / "checkpoint.pt")
    with quiet():
        pairs: Any = [(first, second) for first, second, _ in said["merges"]]
        CLIPTokenizer(vocab=recipe.clip_vocabulary(said["merges"]), merges=pairs, model_max_length=77).save_pretrained(folder)
    return HPS(checkpoint=folder / "checkpoint.pt", tokenizer=folder)


@pytest.fixture(scope="module")
def image_reward(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> ImageReward:
    folder, small = tmp_path_factory.mktemp("image-reward"), recipe.SMALL["image-reward"]
    vocabulary = recipe.wordpieces(len(recipe.WORDPIECES))
    sizes = (small["text"], 1024, 128, 64, 16, 1)
    network = OriginalImageReward(**small, tokens=len(vocabulary) + 2, wide=4, head_sizes=sizes)
    state = {name: value for name, value in state_of(recipe, network).items() if "_proj." not in name}
    torch.save(state, folder / "checkpoint.pt")
    with quiet():
        BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=512).save_pretrained(folder)
    return ImageReward(checkpoint=folder / "checkpoint.pt", tokenizer=folder)


def test_the_numbers_tell_pictures_and_prompts_apart() -> None:
    for package, versions in (("hpsv2", "1.2.0"), ("image-reward", "1.5")):
        said = NUMBERS[package]
        assert said["versions"][package] == versions
        assert np.ptp(said["files"]) > 0.1
        assert all(row[0] > 1e-3 for row in said["slopes"])  # the gradients' norms


def close(values: Tensor, said: list[float], within: float) -> None:
    """Norm, largest value and ten others, to `within` of the largest."""
    flat = values.detach().double().flatten()
    found = [float(flat.norm()), float(flat.abs().max()), *flat[:: len(flat) // 10][:10].tolist()]
    assert found == pytest.approx(said, abs=within * said[1], rel=within)


def test_hps_is_hpsv2s(recipe: Any, hps: HPS, pictures: list[Path]) -> None:
    said, towers = NUMBERS["hpsv2"], hps.towers
    assert hps.tokenizer is not None
    read = Words(CLIPTokenizer.from_pretrained(hps.tokenizer), 77, "hps", unescape=True)(recipe.PROMPTS)
    assert [row[row > 0].tolist() for row in read.input_ids * read.attention_mask] == said["ids"]
    for i, (file, prompt) in enumerate(zip(pictures, recipe.PROMPTS, strict=True)):
        picture = read_image(file)[None]
        assert float(hps(picture, Prompts((prompt,)))) == pytest.approx(said["files"][i], abs=1e-6)
        pixels = towers.view(picture).requires_grad_()
        close(pixels, said["pixels"][i], 1e-6)
        score = (F.normalize(towers.look(pixels), dim=-1) * towers.texts([prompt])["features"]).sum()
        assert float(score) == pytest.approx(said["scores"][i], abs=1e-6)
        close(torch.autograd.grad(score, pixels)[0], said["slopes"][i], 1e-5)


def pillow(file: Path) -> Tensor:
    """The picture as the package's transform has it: Pillow's resizing, torchvision's centre."""
    with Image.open(file) as opened:
        width, height = opened.size
        size = (224, int(224 * height / width)) if width <= height else (int(224 * width / height), 224)
        resized = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    top, left = (round((side - 224) / 2) for side in resized.shape[:2])
    return torch.from_numpy(resized[top : top + 224, left : left + 224].copy()).permute(2, 0, 1)[None]


def test_image_reward_is_image_rewards(recipe: Any, image_reward: ImageReward, pictures: list[Path]) -> None:
    said, judge = NUMBERS["image-reward"], image_reward.judge
    ids = judge.words(recipe.PROMPTS).input_ids
    assert [row[row > 0].tolist() for row in ids] == said["ids"]
    for i, (file, prompt) in enumerate(zip(pictures, recipe.PROMPTS, strict=True)):
        pixels = judge.view(pillow(file)).requires_grad_()  # 224 already: normalised alone
        close(pixels, said["pixels"][i], 1e-6)
        read = judge.tokens([prompt])
        score = judge.rate(pixels, *(read[name] for name in judge.tokens.names)).sum()
        assert float(score) == pytest.approx(said["scores"][i], abs=1e-6)
        assert float(score) == pytest.approx(said["files"][i], abs=1e-6)
        close(torch.autograd.grad(score, pixels)[0], said["slopes"][i], 1e-4)
        # our own way from the file, which rounds nothing and cuts nothing off
        assert float(image_reward(read_image(file)[None], Prompts((prompt,)))) == pytest.approx(said["files"][i], abs=0.02)


def test_the_script_passes_nothing_that_is_off(recipe: Any) -> None:
    parity = script("parity_rewards")
    fine = {"ids": 0, "scores": 1e-7, "slopes": 1e-6, "backend": 0.0}
    assert parity.beyond(fine) == []
    for name, off in (("ids", 1), ("scores", 2e-6), ("slopes", 2e-5), ("backend", 1e-7)):
        assert parity.beyond({**fine, name: off}) == [name]
        assert parity.beyond({**fine, name: float("nan")}) == [name]
    for pair in ((0.0, float("nan")), (float("nan"), 0.0)):
        assert math.isnan(parity.larger(*pair))
    assert parity.larger(1.0, 2.0) == parity.larger(2.0, 1.0) == 2.0


@pytest.mark.parametrize("page", ["hps.md", "image-reward.md"])
def test_the_pages_hold_the_tables(page: str) -> None:
    text = (ROOT / "docs" / "rewards" / page).read_text()
    table = text.partition("<!-- parity -->")[2].partition("<!-- /parity -->")[0]
    assert re.search(r"\| score, from the same pixels \| \d", table)
    assert "The package's side: " in table
