"""ImageReward: the loader against BLIP in plain torch, at a reduced size and in the checkpoint's own layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_networks import MEAN, STD, smooth, spread
from original_networks import ImageReward as Original
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer

from diffalign.errors import InputError
from diffalign.rewards import image_reward, tiny
from diffalign.rewards.image_reward import ImageReward
from diffalign.types import Prompts

PROMPTS = Prompts(("a dog", "red cat on a mat", "a dog", "x", "", "[ENC] a"))


@pytest.fixture(scope="module")
def network() -> Original:
    return spread(Original(), 0.2)


@pytest.fixture(scope="module")
def reward(network: Original, tmp_path_factory: pytest.TempPathFactory) -> ImageReward:
    folder = tmp_path_factory.mktemp("image-reward")
    tiny.bert_tokenizer(folder)
    torch.save(network.state_dict(), folder / "ImageReward.pt")
    return ImageReward(checkpoint=folder / "ImageReward.pt", tokenizer=folder)


def tokens(text: str) -> list[int]:
    """[CLS], a token for the first letter of a word and others for the rest, [SEP], cut to 35; [ENC] is the last of the vocabulary."""
    spelled: list[int] = []
    for word in text.split():
        spelled += [78] if word == "[ENC]" else [5 + tiny.LETTERS.index(c) + 36 * (i > 0) for i, c in enumerate(word)]
    return [2, *spelled[:33], 3]


def expected(network: Original, pictures: Tensor, prompts: Prompts) -> Tensor:
    """The original's score: shortest side to 224, the middle cut out as torchvision does, normalised."""
    height, width = pictures.shape[-2:]
    height, width = (224, int(224 * width / height)) if height <= width else (int(224 * height / width), 224)
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    resized = F.interpolate(pictures, (height, width), mode="bicubic", antialias=True)
    pixels = (resized[..., top : top + 224, left : left + 224] - MEAN) / STD
    rows = [tokens(text) for text in prompts.text]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (35 - len(row)) for row in rows])
    return network(pixels, ids, mask)


@pytest.mark.parametrize("size", [(48, 40), (100, 167), (300, 260)])
def test_scores_and_gradients_are_the_originals(size: tuple[int, int], network: Original, reward: ImageReward) -> None:
    pictures = smooth(6, *size)
    ours, theirs = pictures.clone().requires_grad_(), pictures.clone().requires_grad_()
    found, wanted = reward(ours, PROMPTS), expected(network, theirs, PROMPTS)
    assert found.shape == (6,)
    assert wanted.std() > 0.01  # else any constant would do
    assert torch.allclose(found, wanted, atol=1e-5)
    slope, right = torch.autograd.grad(found.sum(), ours)[0], torch.autograd.grad(wanted.sum(), theirs)[0]
    assert right.abs().max() > 1e-6
    assert torch.allclose(slope, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))


def test_the_prompt_and_the_picture_matter(reward: ImageReward) -> None:
    same = smooth(1, 48, 40).expand(6, -1, -1, -1)
    scores = reward(same, PROMPTS)
    assert torch.allclose(scores[0], scores[2], atol=1e-6)
    assert (scores[0] - scores[1]).abs() > 1e-3
    others = reward(smooth(6, 48, 40), Prompts(("a dog",) * 6))
    assert others.std() > 1e-4


def test_chunks_give_what_the_whole_gives_with_its_gradient(reward: ImageReward) -> None:
    whole, parts = smooth(6, 48, 40).requires_grad_(), smooth(6, 48, 40).requires_grad_()
    scores, same = reward(whole, PROMPTS), replace(reward, batch_size=4)(parts, PROMPTS)
    assert torch.allclose(scores, same, atol=1e-5)
    slopes = [torch.autograd.grad((x * torch.arange(6.0)).sum(), media)[0] for x, media in ((scores, whole), (same, parts))]
    assert torch.allclose(slopes[0], slopes[1], atol=1e-4 * float(slopes[0].abs().max()))


def test_no_graph_is_kept_where_none_is_asked_for(reward: ImageReward) -> None:
    assert not reward(smooth(2, 48, 40), PROMPTS[:2]).requires_grad
    with torch.no_grad():
        assert not reward(smooth(2, 48, 40).requires_grad_(), PROMPTS[:2]).requires_grad
    assert not any(p.requires_grad for p in reward.judge.networks.parameters())
    assert not any(module.training for module in reward.judge.networks.values())


def test_bf16_is_close_and_answers_in_fp32(reward: ImageReward) -> None:
    half = replace(reward, precision="bf16")
    scores, whole = half(smooth(6, 48, 40), PROMPTS), reward(smooth(6, 48, 40), PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, whole, atol=0.1 * float(whole.max() - whole.min()))
    assert not torch.equal(scores, whole)


def test_a_long_prompt_is_cut_at_35_tokens_and_said_once(network: Original, reward: ImageReward, caplog: pytest.LogCaptureFixture) -> None:
    fresh = replace(reward)
    prompts, pictures = Prompts(("abc " * 20, "a dog")), smooth(2, 48, 40)
    assert torch.allclose(fresh(pictures, prompts), expected(network, pictures, prompts), atol=1e-5)
    fresh(pictures, prompts)
    (record,) = caplog.records
    assert record.getMessage().startswith("image-reward reads 35 tokens of a prompt: 1 of 2 prompts are longer")


def test_a_tokenizer_that_has_the_two_tokens_already_is_used_as_it_is(reward: ImageReward, tmp_path: Path) -> None:
    reward.judge.words.tokenizer.save_pretrained(tmp_path)
    same = replace(reward, tokenizer=tmp_path)
    assert torch.equal(same(smooth(6, 48, 40), PROMPTS), reward(smooth(6, 48, 40), PROMPTS))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", None, "1 missing: blip.text_encoder.encoder.layer.1.crossatt"),
        ("mlp.layers.7.bias", None, "1 missing: mlp.layers.7.bias"),
        ("mlp.layers.7.weight", None, "do not end in one number"),
        ("blip.visual_encoder.pos_embed", None, "is no checkpoint of ImageReward: it lacks blip.visual_encoder.pos_embed, and has"),
        ("blip.itm_head.weight", torch.zeros(2), "1 unexpected: blip.itm_head.weight"),
        ("blip.visual_encoder.norm.bias", torch.zeros(3), r"1 of another shape: blip.visual_encoder.norm.bias \(3,\)"),
        ("blip.text_encoder.embeddings.word_embeddings.weight", torch.zeros(79, 100), "encoders are 128 and 100 wide, not 1024 and 768"),
    ],
)
def test_a_wrong_checkpoint_is_named_with_its_keys(
    key: str, value: Any, says: str, network: Original, reward: ImageReward, tmp_path: Path
) -> None:
    state = {**network.state_dict(), key: value}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "changed.pt")
    with pytest.raises(InputError, match=says):
        replace(reward, checkpoint=tmp_path / "changed.pt").open()


def test_a_tokenizer_of_another_model_is_refused(reward: ImageReward, tmp_path: Path) -> None:
    BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"])}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 6 tokens and the network 79: they do not belong together"):
        replace(reward, tokenizer=tmp_path).open()
    with pytest.raises(InputError, match=r"There is no folder .*none: --reward.tokenizer takes one with the files of google-bert"):
        replace(reward, tokenizer=tmp_path / "none").open()


def test_the_twin_has_the_layout_of_the_original(tmp_path: Path) -> None:
    twin = ImageReward(batch_size=3).tiny(tmp_path)
    assert twin.batch_size == 3
    state = torch.load(tmp_path / "ImageReward.pt", weights_only=True)
    original = Original(text=64, patch=16, head_sizes=(64, 32, 16, 8, 4, 1))
    faults = original.load_state_dict(state, strict=False)
    assert faults.unexpected_keys == []
    assert all("_proj." in key or "position_ids" in key for key in faults.missing_keys)  # of BLIP's pretraining: not used
    pictures, prompts = smooth(2, 64, 64), PROMPTS[:2]
    assert torch.allclose(twin(pictures, prompts), expected(original.eval(), pictures, prompts), atol=1e-5)
    assert twin(pictures.clone().requires_grad_(), prompts).requires_grad


def test_the_full_size_is_read_off_the_shapes() -> None:
    """ImageReward as it was published: 446.7 million weights in 620 tensors. Only shapes are made."""
    with torch.device("meta"):
        original = Original(
            vision=1024, text=768, tokens=30524, patch=16, layers=24, text_layers=12, wide=4, head_sizes=(768, 1024, 128, 64, 16, 1)
        )
        state = {key: value for key, value in original.state_dict().items() if not image_reward.re.match(image_reward.UNUSED, key)}
    assert len(state) == 620
    unused = 256 * (1024 + 1) + 256 * (768 + 1)  # the two projections of BLIP's pretraining
    assert sum(tensor.numel() for tensor in state.values()) + unused == pytest.approx(446.7e6, rel=1e-4)
    vision, text = image_reward.architecture(state, Path("full.pt"))
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.image_size) == (1024, 24, 16, 224)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.vocab_size) == (768, 12, 12, 30524)
    assert text.encoder_hidden_size == 1024
