"""LAION's aesthetic predictors: CLIP's unit features through the MLP and the linear head, in the layouts of their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_networks import head, smooth, spread
from torch import nn
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.rewards import tiny
from diffalign.rewards.aesthetic import Aesthetic
from diffalign.types import Prompts

PROMPTS = Prompts(("a", "b", "c", "d", "e", "f"))


class Predictor(nn.Module):
    """The authors' MLP, narrower: `layers`, five linear ones with dropout after the first three."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = head((32, 24, 16, 12, 8, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_clip(tmp_path_factory.mktemp("aesthetic"), tiny.clip("quick_gelu"))
    torch.save(spread(Predictor(), 0.5).state_dict(), folder / "mlp.pth")
    torch.save({"weight": torch.randn(1, 32), "bias": torch.ones(1)}, folder / "linear.pth")
    return folder


def features(folder: Path, pictures: torch.Tensor) -> torch.Tensor:
    """CLIP's own picture features of length 1, through the whole model and transformers' normalisation."""
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (CLIPImageProcessorPil().image_mean, CLIPImageProcessorPil().image_std))
    model: Any = CLIPModel.from_pretrained(folder).eval()
    return F.normalize(model.get_image_features(pixel_values=(pictures - mean) / std).pooler_output, dim=-1)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_scores_and_gradients_are_the_originals(kind: str, folder: Path) -> None:
    ours, theirs = smooth(6, 224, 224).requires_grad_(), smooth(6, 224, 224).requires_grad_()
    weights = torch.load(folder / f"{kind}.pth", weights_only=True)
    if kind == "mlp":
        predictor = Predictor().eval()
        predictor.load_state_dict(weights)
        wanted = predictor.layers(features(folder, theirs))[:, 0]
    else:
        wanted = features(folder, theirs) @ weights["weight"][0] + weights["bias"]
    found = Aesthetic(checkpoint=folder / f"{kind}.pth", clip=folder)(ours, PROMPTS)
    assert found.shape == (6,)
    assert wanted.std() > 1e-3
    assert torch.allclose(found, wanted, atol=1e-5)
    slope, right = torch.autograd.grad(found.sum(), ours)[0], torch.autograd.grad(wanted.sum(), theirs)[0]
    assert right.abs().max() > 0
    assert torch.allclose(slope, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))


def test_no_prompt_is_read_and_chunks_are_the_whole(folder: Path) -> None:
    reward = Aesthetic(checkpoint=folder / "mlp.pth", clip=folder)
    scores = reward(smooth(6, 60, 101), PROMPTS)
    assert not scores.requires_grad
    assert torch.equal(scores, reward(smooth(6, 60, 101), Prompts(("other",) * 6)))
    assert torch.allclose(replace(reward, batch_size=4)(smooth(6, 60, 101), PROMPTS), scores, atol=1e-5)
    half = replace(reward, precision="bf16")(smooth(6, 60, 101), PROMPTS)
    assert half.dtype == torch.float32
    assert torch.allclose(half, scores, atol=0.2)
    assert not torch.equal(half, scores)


def test_a_wrong_head_is_named(folder: Path, tmp_path: Path) -> None:
    weights = torch.load(folder / "mlp.pth", weights_only=True)
    wrong = {
        r"is no checkpoint of LAION's aesthetic predictor: it lacks layers.0.weight, and has model.x": {"model.x": torch.ones(1)},
        r"1 missing: layers.7.bias": {key: value for key, value in weights.items() if key != "layers.7.bias"},
        r"1 unexpected: extra": {**weights, "extra": torch.ones(1)},
        r"do not end in one number": {key: value for key, value in weights.items() if "7" not in key},
        r"reads 16 features and this CLIP has 32": {"weight": torch.ones(1, 16), "bias": torch.ones(1)},
        r"1 of another shape: weight \(2, 32\)": {"weight": torch.ones(2, 32), "bias": torch.ones(1)},
    }
    for says, state in wrong.items():
        torch.save(state, tmp_path / "wrong.pth")
        with pytest.raises(InputError, match=says):
            Aesthetic(checkpoint=tmp_path / "wrong.pth", clip=folder).open()


def test_the_twin_has_the_layout_of_the_original(tmp_path: Path) -> None:
    twin = Aesthetic(batch_size=3).tiny(tmp_path)
    assert set(torch.load(tmp_path / "aesthetic-model.pth", weights_only=True)) == set(Predictor().state_dict())
    pictures = smooth(2, 64, 64).requires_grad_()
    assert torch.autograd.grad(twin(pictures, PROMPTS[:2]).sum(), pictures)[0].abs().max() > 0
