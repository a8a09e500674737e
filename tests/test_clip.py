"""CLIP, SigLIP and PickScore in transformers' layout, and open_clip where it is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_networks import smooth
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.media import to_pil
from diffalign.rewards import tiny
from diffalign.rewards.clip import CLIP, OpenCLIP, _open_clip_view
from diffalign.rewards.common import View
from diffalign.rewards.pickscore import PickScore
from diffalign.types import Prompts

PROMPTS = Prompts(("a dog", "a red cat on a mat", "a dog", "x", "", "abc " * 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("clip"), tiny.clip("quick_gelu"))


def siglip(folder: Path) -> Any:
    """A tiny SigLIP as its repositories have it, but for the tokenizer: a spelling one in the place of SentencePiece."""
    from transformers import SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    text = dict(vocab_size=74, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
                projection_size=32, bos_token_id=72, eos_token_id=73, pad_token_id=0)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16)
    model = tiny.seeded(lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).eval()
    tiny.clip_tokenizer(folder)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return model


def through_transformers(model: Any, processor: Any, tokenizer: Any, length: int, pictures: Tensor) -> Tensor:
    """The cosine by the model's own forward, from 8-bit pictures and its own processor."""
    files = [Image.fromarray(np.array(to_pil(picture))) for picture in pictures]
    pixels = processor(images=files, return_tensors="pt").pixel_values
    ids = tokenizer(list(PROMPTS.text), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    out = model(input_ids=ids, pixel_values=pixels)
    return (F.normalize(out.image_embeds, dim=-1) * F.normalize(out.text_embeds, dim=-1)).sum(-1)


def in_8_bit(pictures: Tensor) -> Tensor:
    return (pictures * 255).round() / 255


@pytest.mark.parametrize("size", [(224, 224), (60, 101), (300, 227)])
def test_clip_is_transformers_own_call_but_for_8_bit_resizing(folder: Path, size: tuple[int, int]) -> None:
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = in_8_bit(smooth(6, *size))
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    wanted = through_transformers(CLIPModel.from_pretrained(folder).eval(), processor, tokenizer, 77, pictures)
    found = CLIP(checkpoint=folder)(pictures, PROMPTS)
    assert wanted.std() > 0.01
    assert torch.allclose(found, wanted, atol=1e-5 if size == (224, 224) else 1e-3)


def test_siglip_is_transformers_own_call_with_its_own_preparation(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model = siglip(tmp_path)
    # the type of the tokenizer comes from the folder, as that of real SigLIP models does
    reward, pictures = CLIP(checkpoint=tmp_path), in_8_bit(smooth(6, 64, 64))
    assert reward.resolution == 64
    processor, tokenizer = SiglipImageProcessorPil.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    wanted = through_transformers(model, processor, tokenizer, 16, pictures)
    assert torch.allclose(reward(pictures, PROMPTS), wanted, atol=1e-5)
    wide = in_8_bit(smooth(6, 50, 90))
    wanted = through_transformers(model, processor, tokenizer, 16, wide)
    assert torch.allclose(reward(wide, PROMPTS), wanted, atol=2e-3)
    assert reward.towers.view == View(64, "squash", "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("size", [(224, 224), (60, 101)])
def test_pickscore_is_the_scaled_cosine(size: tuple[int, int], tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    reward = PickScore().tiny(tmp_path)
    pictures = in_8_bit(smooth(6, *size))
    model = CLIPModel.from_pretrained(tmp_path).eval()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    cosine = through_transformers(model, processor, tokenizer, 77, pictures)
    found = reward(pictures, PROMPTS)
    assert model.logit_scale.exp() > 10
    assert torch.allclose(found, model.logit_scale.exp() * cosine, atol=1e-4 if size == (224, 224) else 2e-2)
    logits = model(
        input_ids=tokenizer(["a dog"], padding="max_length", max_length=77, return_tensors="pt").input_ids,
        pixel_values=processor(images=[to_pil(pictures[0])], return_tensors="pt").pixel_values,
    ).logits_per_image
    assert found[0] == pytest.approx(float(logits.detach()), abs=1e-4 if size == (224, 224) else 2e-2)


@pytest.mark.parametrize("make", [CLIP, PickScore])
def test_the_gradient_is_that_of_finite_differences(make: Any, tmp_path: Path) -> None:
    reward = make().tiny(tmp_path)
    for network in (reward.towers.network,):
        network.double()
    reward.towers.__dict__.pop("dtype", None)
    pictures = smooth(3, 60, 101).double().requires_grad_()
    (slope,) = torch.autograd.grad(reward(pictures, PROMPTS[:3]).sum(), pictures)
    direction = slope / slope.norm()
    step = 0.05
    with torch.no_grad():
        up, down = (reward((pictures + sign * step * direction).clamp(0, 1), PROMPTS[:3]).sum() for sign in (1, -1))
    assert slope.abs().max() > 0
    assert float(up - down) / (2 * step) == pytest.approx(float(slope.norm()), rel=0.05)


@pytest.mark.parametrize("make", [CLIP, PickScore])
def test_chunks_precision_and_graph(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = make().tiny(tmp_path)
    whole, parts = smooth(6, 60, 101).requires_grad_(), smooth(6, 60, 101).requires_grad_()
    scores, same = reward(whole, PROMPTS), replace(reward, batch_size=4)(parts, PROMPTS)
    scale = float(scores.detach().abs().max())
    assert torch.allclose(scores, same, atol=1e-6 * max(1, scale))
    slopes = [torch.autograd.grad((x * torch.arange(6.0)).sum(), media)[0] for x, media in ((scores, whole), (same, parts))]
    assert torch.allclose(slopes[0], slopes[1], atol=1e-5 * float(slopes[0].abs().max()))
    assert not reward(smooth(2, 60, 101), PROMPTS[:2]).requires_grad
    half = replace(reward, precision="bf16")(smooth(6, 60, 101), PROMPTS)
    assert half.dtype == torch.float32
    assert torch.allclose(half, scores.detach(), atol=0.03 * scale)
    assert not torch.equal(half, scores)
    assert "reads 77 tokens of a prompt: 1 of 5 prompts" in caplog.records[0].getMessage()


def test_a_folder_that_is_no_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model is ViT-L-14: give a Hub id user/model, or a folder"):
        CLIP(model="ViT-L-14")
    with pytest.raises(InputError, match=r"There is no folder .*nowhere: --reward.checkpoint takes one with the files of openai/clip-vit"):
        CLIP(checkpoint=tmp_path / "nowhere").open()
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(InputError, match="is of the type 'bert': this reward takes clip and siglip"):
        CLIP(checkpoint=copy).open()
    (copy / "config.json").write_text(json.dumps({**config, "projection_dim": 16}))
    with pytest.raises(
        InputError, match=r"weights of another shape than its config.json says: text_projection.weight \(32, 64\), not \(16, 64\)"
    ):
        CLIP(checkpoint=copy).open()
    deeper = {**config, "text_config": {**config["text_config"], "num_hidden_layers": 3}}
    (copy / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(InputError, match=r"lacks 16 weights: text_model.encoder.layers.2"):
        CLIP(checkpoint=copy).open()
    (copy / "config.json").write_text(json.dumps(config))
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="does not load"):
        CLIP(checkpoint=copy).open()
    (copy / "model.safetensors").write_bytes(weights)
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**processor, "size": {"shortest_edge": 256}}))
    with pytest.raises(InputError, match="prepares pictures in a way that this reward does not know"):
        CLIP(checkpoint=copy).open()


@pytest.mark.parametrize(
    ("said", "view"),
    [
        ({"resize_mode": "shortest", "size": 224}, View(224, "crop", rounds=True)),
        ({"resize_mode": "longest", "size": (336, 336)}, View(336, "pad", rounds=True)),
        ({"resize_mode": "squash", "size": 384, "interpolation": "bilinear"}, View(384, "squash", "bilinear", rounds=True)),
        ({"resize_mode": "shortest", "size": (224, 256)}, None),
        ({"resize_mode": "shortest", "size": 224, "interpolation": "random"}, None),
    ],
)
def test_open_clips_preparation_in_our_words(said: dict[str, Any], view: View | None) -> None:
    usual = {"mean": View().mean, "std": View().std, "interpolation": "bicubic", "fill_color": 0}
    if view is not None:
        assert _open_clip_view({**usual, **said}) == view
    else:
        with pytest.raises(InputError, match="in a way that this reward does not know"):
            _open_clip_view({**usual, **said})


def test_open_clip_is_its_own_call(tmp_path: Path) -> None:
    open_clip: Any = pytest.importorskip("open_clip", exc_type=ImportError)
    reward = OpenCLIP(batch_size=4).tiny(tmp_path)
    model, prepare = open_clip.create_model_from_pretrained("tiny", pretrained=str(tmp_path / "tiny.pt"))
    pictures = in_8_bit(smooth(6, 224, 224))
    pixels = torch.stack([prepare(to_pil(picture)) for picture in pictures])
    ids = open_clip.get_tokenizer("tiny")(list(PROMPTS.text))
    wanted = (model.encode_image(pixels, normalize=True) * model.encode_text(ids, normalize=True)).sum(-1)
    ours = pictures.clone().requires_grad_()
    found = reward(ours, PROMPTS)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.autograd.grad(found.sum(), ours)[0].abs().max() > 0
    assert reward.resolution == 224
    with pytest.raises(InputError, match=r"open_clip knows no model 'ViT-B-33'\. Did you mean 'ViT-B-32"):
        OpenCLIP(model="ViT-B-33").open()
    with pytest.raises(InputError, match="has no weights 'laion3b' of ViT-B-32"):
        OpenCLIP(pretrained="laion3b").open()
