"""The authors' packages as back ends: with fakes of their interface here, and with the packages themselves in scripts/parity_rewards.py."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_networks import smooth

from diffalign import registry
from diffalign.contract import CheckedReward
from diffalign.errors import InputError
from diffalign.media import to_pil, to_tensor
from diffalign.rewards import tiny
from diffalign.rewards.hps import HPS
from diffalign.rewards.image_reward import ImageReward
from diffalign.types import LearnedReward, Prompts

TWO = Prompts(("a dog", "cats"))
# Scores: a weight of the checkpoint, times the picture's mean, plus the length of the prompt.
HPSV2 = """
import torch

opened = []

class Model(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, image, text):
        assert not torch.is_grad_enabled() and not self.training
        seen = torch.stack([image.mean((1, 2, 3)) * self.weight, torch.ones(len(image))], 1)
        return {"image_features": seen, "text_features": torch.stack([torch.ones(len(text)), text[:, 0].float()], 1)}

def create_model_and_transforms(name, pretrained=None, precision="fp32", device="cpu", light_augmentation=False, aug_cfg=None,
                                output_dict=None):
    assert (name, precision, light_augmentation, output_dict) == ("ViT-H-14", "amp", True, True)
    state = torch.load(pretrained)["state_dict"]
    if list(state) != ["weight"]:
        raise RuntimeError("Error(s) in loading state_dict for CLIP: Missing key(s)")
    opened.append(pretrained)
    from torchvisionless import to_tensor
    return Model(state["weight"]), None, to_tensor

def get_tokenizer(name):
    return lambda texts: torch.tensor([[len(text)] for text in texts])
"""
IMAGE_REWARD = """
import json, os
import torch

opened = []

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("position_ids", torch.zeros(1))
        self.device = None

    def score(self, prompt, image):
        assert not torch.is_grad_enabled() and self.device == torch.device("cpu")
        from torchvisionless import to_tensor
        return (to_tensor(image).mean() * self.weight + len(prompt)).item()

def load(name, device="cuda", download_root=None, med_config=None):
    assert os.path.isabs(name) and device == "cpu" and os.path.isfile("bert-base-uncased/tokenizer_config.json")
    assert json.load(open(med_config))["vocab_size"] == 30524
    print("load checkpoint from", name)
    model = Model()
    model.load_state_dict(torch.load(name), strict=False)
    opened.append(name)
    return model
"""
HELPER = "import numpy, torch\nto_tensor = lambda image: torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255\n"


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with packages of these names: files as `site/MODULE/__init__.py`."""
    site = tmp_path / "site"
    for name, text in (("hpsv2", ""), ("hpsv2/src", ""), ("hpsv2/src/open_clip", HPSV2), ("ImageReward", IMAGE_REWARD)):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(text)
    (site / "torchvisionless.py").write_text(HELPER)
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("hpsv2", "ImageReward", "torchvisionless")}
    for name in kept:
        del sys.modules[name]
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    yield site
    for name in [n for n in sys.modules if n.partition(".")[0] in ("hpsv2", "ImageReward", "torchvisionless")]:
        del sys.modules[name]
    sys.modules.update(kept)


def made(name: str, folder: Path, **fields: Any) -> Any:
    """The reward with the package behind it, and a checkpoint of one weight, 3."""
    weights = {"weight": torch.tensor(3.0)}
    torch.save({"state_dict": weights} if name == "hps-v2" else weights, folder / "one.pt")
    if name == "hps-v2":
        return HPS(checkpoint=folder / "one.pt", backend="package", **fields)
    tiny.bert_tokenizer(folder)
    return ImageReward(checkpoint=folder / "one.pt", tokenizer=folder, backend="package", **fields)


NAMES = ("hps-v2", "image-reward")
MODULES = {"hps-v2": "hpsv2.src.open_clip", "image-reward": "ImageReward"}


@pytest.mark.parametrize("name", NAMES)
def test_the_package_scores_8_bit_pictures_and_opens_its_checkpoint_once(
    name: str, fakes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward, here = made(name, tmp_path), Path.cwd()
    assert isinstance(reward, LearnedReward)
    assert not reward.differentiable
    assert "original" not in vars(reward)  # constructing imports and loads nothing
    checked, pictures = CheckedReward(reward, name), smooth(2, 40, 64)
    checked.open()
    scores = checked(pictures.requires_grad_(), TWO)
    wanted = [float(to_tensor(to_pil(x)).mean()) * 3 + len(text) for x, text in zip(pictures, TWO.text, strict=True)]
    assert scores.tolist() == pytest.approx(wanted, rel=1e-6)
    assert not scores.requires_grad
    assert torch.equal(checked(pictures, TWO), scores)
    assert len(sys.modules[MODULES[name]].opened) == 1
    assert Path.cwd() == here
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"takes numbers in \[0, 1\]"):
        reward(pictures * 2, TWO)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_is_not_the_packages_is_refused(name: str, fakes: Path, tmp_path: Path) -> None:
    reward = made(name, tmp_path)
    whole = reward.checkpoint.read_bytes()
    reward.checkpoint.write_bytes(whole[:200])
    with pytest.raises(InputError, match=r"one.pt is damaged"):
        reward.open()
    torch.save({"state_dict": {"other": torch.zeros(1)}}, reward.checkpoint)
    says = {"hps-v2": r"does not open .*one.pt \(RuntimeError: Error", "image-reward": r"one.pt is not .* Keys 1 missing: weight\."}[name]
    with pytest.raises(InputError, match=says):
        reward.open()
    reward.checkpoint.write_bytes(whole)
    with pytest.raises(InputError, match="is not what was asked for: its sha256 is"):
        replace(reward, sha256="0" * 64).open()


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_absent_is_said_with_the_command_before_anything_is_fetched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, module = {"hps-v2": ("hpsv2", "hps"), "image-reward": ("image-reward", "image_reward")}[name]
    monkeypatch.setattr(f"diffalign.rewards.{module}.fetch", lambda *_: pytest.fail("fetched"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n in ("hpsv2", "ImageReward") else real(n, *rest))
    with pytest.raises(InputError) as raised:
        made(name, tmp_path).open()
    text = str(raised.value)
    command = {"hps-v2": "pip install 'diffalign[hpsv2]'.", "image-reward": "pip install image-reward==1.5, in an environment"}[name]
    assert text.startswith(f"--reward.backend package needs {package}, which is not installed: {command}")
    assert "--reward.backend native" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        (
            "image-reward",
            "from transformers.modeling_utils import apply_chunking_to_forward",
            r"image-reward is installed and cannot be imported \(ImportError: cannot import name 'apply_chunking_to_forward'.*\): it was "
            r"written for transformers 4, and transformers 5 is here\. Leave it: --reward.backend native reads the same checkpoint; or "
            r"score in an environment of its own",
        ),
        ("image-reward", "raise ModuleNotFoundError(\"No module named 'clip'\")", r"needs OpenAI's CLIP: pip install clip-anytorch"),
        ("image-reward", "raise ImportError('No module named pkg_resources')", r"pip install --no-deps 'setuptools<70'"),
        (
            "hps-v2",
            "open('/nowhere/bpe_simple_vocab_16e6.txt.gz')",
            r"lacks CLIP's vocabulary.*: python -c \"import hpsv2, open_clip, shutil",
        ),
        ("hps-v2", "raise ModuleNotFoundError(\"No module named '_tkinter'\")", r"apt install python3-tk"),
        ("hps-v2", "raise RuntimeError('operator torchvision::nms does not exist')", r"torchvision must be the build of your torch"),
        (
            "hps-v2",
            "raise ValueError('never seen')",
            r"cannot be imported \(ValueError: never seen\)\. Or leave it: --reward.backend native",
        ),
    ],
)
def test_a_package_that_cannot_be_imported_is_said_in_one_line_with_the_mend(
    name: str, code: str, says: str, fakes: Path, tmp_path: Path
) -> None:
    (fakes / MODULES[name].replace(".", "/") / "__init__.py").write_text(code + "\n")
    with pytest.raises(InputError, match=says) as raised:
        made(name, tmp_path).open()
    assert "\n" not in str(raised.value)


def test_fields_that_the_package_has_no_place_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"backend is other: give native or package\."):
        HPS(backend="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"backend is package, which knows no tokenizer and no bf16: drop it, or"):
        HPS(backend="package", tokenizer=tmp_path, precision="bf16")
    with pytest.raises(InputError, match="knows no bf16"):
        ImageReward(backend="package", precision="bf16")
    for reward in (HPS(backend="package"), ImageReward(backend="package")):
        with pytest.raises(InputError, match=r"--tiny needs --reward.backend native"):
            reward.tiny(tmp_path)


@pytest.mark.parametrize("name", [*NAMES, "hps-v2.1"])
@pytest.mark.parametrize("method", ["draft", "alignprop", "refl"])
def test_a_method_that_needs_a_gradient_refuses_the_package_before_a_model_loads(
    name: str, method: str, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.models.load_pipeline", lambda *_, **__: pytest.fail("a pipeline was loaded"))
    outcome = run_cli("train", "--method", method, "--reward", name, "--reward.backend", "package", "--output", "run")
    assert outcome.status == 2
    assert (
        f"{method} follows the reward's gradient, and the package's own scores of {name} have none: --reward.backend native" in outcome.err
    )
    assert outcome.err.count("\n") == 1
    assert registry.find("rewards", name)[0]().differentiable


def test_a_training_and_a_score_through_the_package(fakes: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    made("hps-v2", tmp_path)
    words = ["--reward", "hps-v2", "--reward.backend", "package", "--reward.checkpoint", tmp_path / "one.pt"]
    to_pil(smooth(1, 60, 40)[0]).save(tmp_path / "a.png")
    outcome = run_cli("score", "a.png", *words, "--prompt", "a dog")
    assert outcome.status == 0, outcome.err
    assert float(outcome.out.split("\t")[0]) == pytest.approx(float(to_tensor(to_pil(smooth(1, 60, 40)[0])).mean()) * 3 + 5, rel=1e-5)
    small = ["--steps", 1, "--batch-size", 2, "--eval-size", 2, "--sample-steps", 2, "--method.inference-steps", 2, "--method.batches", 1]
    outcome = run_cli("train", "--method", "ddpo", *words, *small, "--output", "run")
    assert outcome.status == 0, outcome.err
