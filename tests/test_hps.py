"""HPS v2 and v2.1: the loader against open_clip's network in plain torch, at a reduced size and in the checkpoint's own layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_networks import MEAN, STD, OpenCLIP, smooth, spread
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffalign import registry
from diffalign.errors import InputError
from diffalign.media import to_pil
from diffalign.rewards import hps, tiny
from diffalign.rewards.common import Words
from diffalign.rewards.hps import HPS
from diffalign.types import Prompts

PROMPTS = Prompts(("a dog", "a red cat on a mat", "a dog", "x", "", "&#97; dog"))  # open_clip unescapes HTML: the last is the first


@pytest.fixture(scope="module")
def network() -> OpenCLIP:
    return spread(OpenCLIP())


@pytest.fixture(scope="module")
def reward(network: OpenCLIP, tmp_path_factory: pytest.TempPathFactory) -> HPS:
    folder = tmp_path_factory.mktemp("hps")
    tiny.clip_tokenizer(folder)
    torch.save({"epoch": 3, "state_dict": network.state_dict()}, folder / "hps.pt")
    return HPS(checkpoint=folder / "hps.pt", tokenizer=folder)


def tokens(text: str) -> list[int]:
    """The tiny tokenizer spells: one token for a letter, another where it ends a word; start, end, and open_clip's zeros up to 77."""
    words = text.replace("&#97;", "a").split()
    spelled = [tiny.LETTERS.index(c) + 36 * (i == len(word) - 1) for word in words for i, c in enumerate(word)]
    whole = [72, *spelled[:75], 73]
    return whole + [0] * (77 - len(whole))


def expected(network: OpenCLIP, pictures: Tensor, prompts: Prompts) -> Tensor:
    """The original's score: longest side to 224, black around it, normalised; the cosine."""
    height, width = pictures.shape[-2:]
    scale = 224 / max(height, width)
    height, width = round(height * scale), round(width * scale)
    fitted = torch.zeros(len(pictures), 3, 224, 224)
    top, left = (224 - height) // 2, (224 - width) // 2
    resized = F.interpolate(pictures, (height, width), mode="bicubic", antialias=True)
    fitted = F.pad(resized, (left, 224 - width - left, top, 224 - height - top))
    return network.cosine((fitted - MEAN) / STD, torch.tensor([tokens(text) for text in prompts.text]))


@pytest.mark.parametrize("size", [(48, 40), (32, 67), (300, 260)])
def test_scores_and_gradients_are_the_originals(size: tuple[int, int], network: OpenCLIP, reward: HPS) -> None:
    pictures = smooth(6, *size)
    ours, theirs = pictures.clone().requires_grad_(), pictures.clone().requires_grad_()
    found, wanted = reward(ours, PROMPTS), expected(network, theirs, PROMPTS)
    assert found.shape == (6,)
    assert wanted.std() > 0.01  # else any constant would do
    assert torch.allclose(found, wanted, atol=1e-5)
    (slope,), (right) = torch.autograd.grad(found.sum(), ours), torch.autograd.grad(wanted.sum(), theirs)[0]
    assert right.abs().max() > 1e-4
    assert torch.allclose(slope, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))


def test_the_prompt_matters_and_equal_prompts_are_equal(reward: HPS) -> None:
    same = smooth(1, 48, 40).expand(6, -1, -1, -1)
    scores = reward(same, PROMPTS)
    assert scores[0] == scores[2] == scores[5]
    assert (scores[0] - scores[1]).abs() > 1e-3


def test_chunks_give_what_the_whole_gives_with_its_gradient(reward: HPS) -> None:
    whole, parts = smooth(6, 48, 40).requires_grad_(), smooth(6, 48, 40).requires_grad_()
    chunked = replace(reward, batch_size=4)
    scores, same = reward(whole, PROMPTS), chunked(parts, PROMPTS)
    assert torch.allclose(scores, same, atol=1e-6)
    slopes = [torch.autograd.grad((x * torch.arange(6.0)).sum(), media)[0] for x, media in ((scores, whole), (same, parts))]
    assert torch.allclose(slopes[0], slopes[1], atol=1e-5 * float(slopes[0].abs().max()))


def test_no_graph_is_kept_where_none_is_asked_for(reward: HPS) -> None:
    assert not reward(smooth(2, 48, 40), PROMPTS[:2]).requires_grad
    with torch.no_grad():
        assert not reward(smooth(2, 48, 40).requires_grad_(), PROMPTS[:2]).requires_grad
    assert not any(p.requires_grad for p in reward.towers.network.parameters())
    assert not reward.towers.network.training


def test_bf16_is_close_and_answers_in_fp32(reward: HPS) -> None:
    half = replace(reward, precision="bf16")
    scores = half(smooth(6, 48, 40), PROMPTS)
    assert half.towers.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, reward(smooth(6, 48, 40), PROMPTS), atol=0.02)
    assert not torch.equal(scores, reward(smooth(6, 48, 40), PROMPTS))


def test_a_long_prompt_is_cut_at_77_tokens_and_said_once(network: OpenCLIP, reward: HPS, caplog: pytest.LogCaptureFixture) -> None:
    fresh = replace(reward)
    prompts, pictures = Prompts(("abc" * 40, "a dog")), smooth(2, 48, 40)
    assert torch.allclose(fresh(pictures, prompts), expected(network, pictures, prompts), atol=1e-5)
    fresh(pictures, Prompts(("cba" * 40, "a dog")))
    (record,) = caplog.records
    assert record.getMessage().startswith("hps-v2.0 reads 77 tokens of a prompt: 1 of 2 prompts are longer")


def test_every_text_is_read_once_and_in_batches_of_one_size(reward: HPS, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, calls = replace(reward), list[int]()
    read = fresh.towers.read
    monkeypatch.setattr(fresh.towers, "read", lambda texts: (calls.append(len(texts)), read(texts))[1])
    fresh(smooth(6, 48, 40), PROMPTS)
    fresh(smooth(3, 48, 40), PROMPTS[[3, 1, 0]])
    assert calls == [8]


def test_safetensors_and_a_bare_state_dict_load_too(network: OpenCLIP, reward: HPS, tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "hps.safetensors")
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    scores = reward(smooth(2, 48, 40), PROMPTS[:2])
    for name in ("hps.safetensors", "bare.pt"):
        assert torch.equal(replace(reward, checkpoint=tmp_path / name)(smooth(2, 48, 40), PROMPTS[:2]), scores)


def changed(network: OpenCLIP, tmp_path: Path, **values: Any) -> Path:
    """A checkpoint with other values under some keys, None for none."""
    state = {**network.state_dict(), **{key.replace("__", "."): value for key, value in values.items()}}
    torch.save({"state_dict": {key: value for key, value in state.items() if value is not None}}, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"ln_final__bias": None}, r"changed.pt is not the checkpoint of this reward. Keys 1 missing: ln_final.bias\."),
        (
            {"visual__transformer__resblocks__1__attn__in_proj_weight": None},
            r"1 missing: visual.transformer.resblocks.1.attn.in_proj_weight",
        ),
        ({"score_head__weight": torch.zeros(1)}, r"1 unexpected: score_head.weight"),
        ({"ln_final__bias": torch.zeros(3)}, r"1 of another shape: ln_final.bias \(3,\)"),
        ({"visual__conv1__weight": None}, r"is no checkpoint of open_clip's CLIP: it lacks visual.conv1.weight, and has"),
        ({"visual__conv1__weight": torch.zeros(64, 3, 56, 56)}, r"is no ViT-H-14: its networks are 64 and 128 wide, not 1280 and 1024"),
    ],
)
def test_a_wrong_checkpoint_is_named_with_its_keys(values: Any, says: str, network: OpenCLIP, reward: HPS, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        replace(reward, checkpoint=changed(network, tmp_path, **values)).open()


def test_a_tokenizer_of_another_model_is_refused(reward: HPS, tmp_path: Path) -> None:
    tiny.bert_tokenizer(tmp_path)
    with pytest.raises(InputError, match="tokens and the network 74"):
        replace(reward, tokenizer=tmp_path).open()


def test_the_twin_has_the_layout_of_the_original(tmp_path: Path) -> None:
    twin = HPS(version="v2.1", batch_size=3).tiny(tmp_path)
    assert (twin.version, twin.batch_size) == ("v2.1", 3)
    state = torch.load(tmp_path / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    layers = 12 * (2 + 2) + 8 + 6  # as 12 (32 + 24) + 8 + 6 = 686 keys of ViT-H-14
    assert len(state) == layers
    original = OpenCLIP(text=64, out=32, patch=32, layers=2)
    original.load_state_dict(state)
    pictures, prompts = smooth(2, 64, 64), PROMPTS[:2]
    assert torch.allclose(twin(pictures, prompts), expected(original.eval(), pictures, prompts), atol=1e-5)
    before = torch.get_rng_state()
    HPS().tiny(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_the_full_size_is_read_off_the_shapes() -> None:
    """ViT-H-14 as it was published: 986.1 million weights in 686 tensors. Only shapes are made."""
    from transformers import CLIPModel

    with torch.device("meta"):
        original = OpenCLIP(vision=1280, text=1024, out=1024, tokens=49408, patch=14, layers=32, text_layers=24, wide=4)
        state = original.state_dict()
        config = hps.architecture(state, Path("full.pt"))
        ours = CLIPModel(config)
    assert len(state) == 686
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(986.1e6, rel=1e-4)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.image_size) == (1280, 32, 16, 224)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.eos_token_id) == (1024, 24, 16, 49407)
    assert config.projection_dim == 1024
    assert sum(p.numel() for p in ours.parameters()) == sum(tensor.numel() for tensor in state.values())


def test_the_registry_has_both_versions() -> None:
    assert [registry.find("rewards", name)[1].get("version", "v2.0") for name in ("hps-v2", "hps-v2.1")] == ["v2.0", "v2.1"]
    with pytest.raises(InputError, match=r"version is v3: give v2.0 or v2.1\."):
        HPS(version="v3")  # type: ignore[arg-type]


def test_open_clip_itself_with_its_tokenizer_gives_the_same(tmp_path: Path) -> None:
    open_clip: Any = pytest.importorskip("open_clip", exc_type=ImportError)
    from transformers import CLIPTokenizer

    vision = {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 56}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    (tmp_path / "small.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "small.json")
    # HPS's own preparation is that of open_clip's mode "longest"
    model, _, prepare = open_clip.create_model_and_transforms("small", image_resize_mode="longest")
    spread(model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "hps.pt")
    tokenizer = open_clip.get_tokenizer("small")
    words = {**{word: i for word, i in tokenizer.encoder.items() if i < 49406}, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    CLIPTokenizer(vocab=words, merges=list(tokenizer.bpe_ranks), model_max_length=77).save_pretrained(tmp_path)
    texts = ("A photo of a dog, 4k, trending on artstation!", "tom &amp; jerry  (1940)", "ein Käse für 3€", "long " * 90, "", "it's 12:30")
    pictures = (smooth(6, 160, 224) * 255).round() / 255
    reward = HPS(checkpoint=tmp_path / "hps.pt", tokenizer=tmp_path)
    found = Words(CLIPTokenizer.from_pretrained(tmp_path), 77, "hps", unescape=True)(texts)
    assert torch.equal(found.input_ids * found.attention_mask, tokenizer(list(texts)))  # padding is never looked at
    pixels = torch.stack([prepare(to_pil(picture)) for picture in pictures])
    with torch.no_grad():
        wanted = (model.encode_image(pixels, normalize=True) * model.encode_text(tokenizer(list(texts)), normalize=True)).sum(-1)
    assert wanted.std() > 0.01
    assert torch.allclose(reward(pictures, Prompts(texts)), wanted, atol=1e-5)
