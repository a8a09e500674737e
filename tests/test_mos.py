"""UTMOS against its network in plain torch, in the layout of the published checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_networks import spread
from original_speech import UTMOS
from torch import Tensor

from diffalign.contract import CheckedReward
from diffalign.errors import InputError
from diffalign.registry import find
from diffalign.rewards.mos import FILE, MOS, URL, Judge, architecture, encoder_source
from diffalign.rewards.weights import Source, convert
from diffalign.types import Prompts

THREE = Prompts(("a", "b", "c"))


def sounds(count: int, samples: int) -> Tensor:
    return torch.rand(count, samples, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    network = spread(UTMOS(), 0.2)
    path = tmp_path_factory.mktemp("mos") / FILE
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize("samples", [4000, 4321])  # 12 frames, and 13: fairseq pads to an even number behind a mask, which changes nothing
def test_scores_and_gradients_are_the_originals(samples: int, original: tuple[Any, Path]) -> None:
    network, path = original
    ours, theirs = sounds(3, samples).requires_grad_(), sounds(3, samples).requires_grad_()
    wanted, found = network(theirs), MOS(checkpoint=path)(ours, THREE)
    assert wanted.std() > 1e-3
    assert torch.allclose(found, wanted, atol=1e-5)
    slope, right = (torch.autograd.grad(x.sum(), y)[0] for x, y in ((found, ours), (wanted, theirs)))
    assert right.abs().max() > 1e-4
    assert torch.allclose(slope, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))


def test_chunks_precision_silence_and_prompts(original: tuple[Any, Path]) -> None:
    reward, media = MOS(checkpoint=original[1]), sounds(3, 4000)
    whole = reward(media, THREE)
    assert not whole.requires_grad
    assert torch.allclose(replace(reward, batch_size=2)(media, THREE), whole, atol=1e-5)
    assert torch.allclose(torch.cat([reward(media[i : i + 1], THREE[i : i + 1]) for i in range(3)]), whole, atol=1e-5)
    assert torch.equal(reward(media, Prompts(("x",) * 3)), whole)
    half = replace(reward, precision="bf16")(media, THREE)
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    assert torch.allclose(half, whole, atol=0.1)
    silence = torch.zeros(1, 4000, requires_grad=True)
    score = reward(silence, THREE[:1])
    assert score.isfinite().all()
    assert torch.autograd.grad(score.sum(), silence)[0].isfinite().all()
    for wrong, says in ((torch.full((1, 4000), float("nan")), "takes numbers"), (sounds(1, 399), "too short, 399 samples at 16000 Hz")):
        with pytest.raises(InputError, match=says):
            reward(wrong, THREE[:1])


def test_a_gradient_reaches_the_sound_through_an_lstm_in_training_and_nothing_trains(original: tuple[Any, Path]) -> None:
    """cuDNN differentiates an LSTM only where it says that it trains; without dropout that changes nothing."""
    networks = MOS(checkpoint=original[1]).networks
    assert networks["judge"].blstm.training
    assert networks["judge"].blstm.dropout == 0
    assert not networks["encoder"].training
    assert not any(p.requires_grad for p in networks.parameters())


def test_the_names_and_shapes_at_full_size_are_the_published_networks() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    with torch.device("meta"):
        state = UTMOS(768, 3072, 12, 512, 128, 16, 128, 512, 2048).state_dict()
        config = architecture(state, Path("x.pt"))
        networks = {"encoder": (Wav2Vec2Model(config), encoder_source), "judge": (Judge(768, 128, 128, 512, 2048), Source)}
    found = convert(state, networks, Path("x.pt"))  # all of them, and no other
    assert sum(tensor.numel() for tensors in found.values() for tensor in tensors.values()) == sum(x.numel() for x in state.values())
    base = Wav2Vec2Config()  # transformers' defaults are wav2vec 2.0 base
    for name in (
        "conv_kernel",
        "conv_stride",
        "conv_dim",
        "num_attention_heads",
        "num_conv_pos_embeddings",
        "num_conv_pos_embedding_groups",
    ):
        ours, theirs = (list(x) if isinstance(x, list | tuple) else x for x in (getattr(config, name), getattr(base, name)))
        assert ours == theirs, name


def test_a_wrong_checkpoint_is_named(original: tuple[Any, Path], tmp_path: Path) -> None:
    state = original[0].state_dict()
    wrong = {
        "it lacks wav2vec2.post_extract_proj.weight": {"x": torch.ones(1)},
        r"1 missing: blstm\.bias_hh_l0": {key: value for key, value in state.items() if key != "blstm.bias_hh_l0"},
        "1 unexpected: extra": {**state, "extra": torch.ones(1)},
        r"1 of another shape: judge_emb \(2, 6\)": {**state, "judge_emb": torch.ones(2, 6)},
        "100 wide, not 768": {**state, "wav2vec2.post_extract_proj.weight": torch.ones(100, 24)},
    }
    for says, weights in wrong.items():
        torch.save(weights, tmp_path / "wrong.pt")
        with pytest.raises(InputError, match=says):
            MOS(checkpoint=tmp_path / "wrong.pt").open()
    with pytest.raises(InputError, match="its sha256 is"):
        MOS(checkpoint=tmp_path / "wrong.pt", sha256="0" * 64).open()
    with pytest.raises(InputError, match=r"There is no file .*none\.pt: --reward\.checkpoint takes the path of utmos22"):
        MOS(checkpoint=tmp_path / "none.pt").open()


def test_the_download_is_kept_where_torch_hub_keeps_it(original: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(url: str, path: str, progress: bool) -> None:
        asked.append(url)
        Path(path).write_bytes(original[1].read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    for _ in range(2):
        MOS().open()
    assert asked == [URL]
    assert (tmp_path / "hub" / "checkpoints" / FILE).is_file()

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "other"))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(InputError, match=r"could not be fetched \(OSError\).*download https://github.com/tarepan/SpeechMOS/releases"):
        MOS().open()


def test_the_twin_has_the_layout_of_the_original(tmp_path: Path) -> None:
    made, preset = find("rewards", "mos")
    twin = made(**preset, batch_size=1).tiny(tmp_path / "twin")
    assert type(twin) is MOS
    assert set(torch.load(tmp_path / "twin" / FILE, weights_only=True)) == set(UTMOS().state_dict())
    assert (tmp_path / "twin" / FILE).stat().st_size < 6e6
    opened: Any = twin
    checked = CheckedReward(opened, "mos")
    checked.open()
    media = sounds(2, 8000).requires_grad_()
    assert torch.autograd.grad(checked(media, replace(THREE[:2], sample_rate=16000)).sum(), media)[0].any()
