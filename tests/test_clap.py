"""CLAP's spectrograms against ClapFeatureExtractor's, and its score against transformers' own call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_networks import spread
from torch import Tensor

from diffalign.contract import CheckedReward
from diffalign.errors import InputError
from diffalign.registry import find
from diffalign.rewards import tiny
from diffalign.rewards.clap import CLAP, View
from diffalign.types import Prompts, SoundReward

THREE = Prompts(("a dog barks", "rain", "calm"))


def sounds(count: int, samples: int) -> Tensor:
    """Noise with a tone in it, of another level each."""
    noise = torch.rand(count, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1
    level = torch.linspace(0.02, 0.5, count)[:, None]
    return level * noise + 0.4 * torch.sin(torch.arange(samples) * torch.linspace(0.05, 0.6, count)[:, None])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ClapModel

    folder = tiny.save_clap(tmp_path_factory.mktemp("clap"))
    spread(ClapModel.from_pretrained(folder), 0.3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("samples", [9000, 30000, 48000])
def test_spectrograms_are_the_extractors(padding: str, samples: int, tmp_path: Path) -> None:
    from transformers import ClapFeatureExtractor

    said = ClapFeatureExtractor(feature_size=64, max_length_s=1, truncation="rand_trunc", padding=padding)
    said.save_pretrained(tmp_path)
    media = sounds(3, samples)
    wanted: Any = said(list(media.numpy()), sampling_rate=48000, return_tensors="pt")["input_features"]
    found = View.of(tmp_path)(media)
    assert found.shape == wanted.shape == (3, 1, 101, 64)
    assert (found - wanted).abs().max() < 2e-3  # dB; silence is -100 in both
    assert wanted.std() > 5


def test_the_middle_of_what_is_longer(folder: Path) -> None:
    view, media = View.of(folder), sounds(1, 50001)
    assert torch.equal(view.fit(media), media[:, 1000:49000])
    assert torch.equal(view.fit(media[:, :30000])[:, 30000:], torch.zeros(1, 18000))
    assert torch.equal(view.fit(media[:, :20000])[:, 20000:40000], media[:, :20000])


def test_scores_are_transformers_own(folder: Path) -> None:
    from transformers import ClapModel, ClapProcessor

    network: Any = ClapModel.from_pretrained(folder).eval()
    processor: Any = ClapProcessor.from_pretrained(folder)
    media = sounds(3, 48000)
    heard = processor.feature_extractor(list(media.numpy()), sampling_rate=48000, return_tensors="pt")["input_features"]
    read = processor.tokenizer(list(THREE.text), padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = network(input_features=heard.float(), **read)
    wanted = (outputs.logits_per_audio / network.logit_scale_a.exp()).diagonal()
    found = CLAP(checkpoint=folder)(media, THREE)
    assert wanted.std() > 1e-2
    assert torch.allclose(found, wanted, atol=1e-4)
    with_words = replace(THREE, transcript=("one", "two", "three"))
    assert torch.equal(CLAP(checkpoint=folder)(media, with_words), found)  # it judges what the text describes


def test_the_gradient_is_that_of_small_steps(folder: Path) -> None:
    reward, media = CLAP(checkpoint=folder), sounds(1, 30000).requires_grad_()
    slope = torch.autograd.grad(reward(media, THREE[:1]).sum(), media)[0]
    assert slope.isfinite().all()
    step = 3e-3 * slope / slope.norm()
    up, down = (float(reward((media + sign * step).detach(), THREE[:1])) for sign in (1, -1))
    assert (up - down) / 2 == pytest.approx(float((slope * step).sum()), rel=0.1)


def test_chunks_precision_and_silence(folder: Path) -> None:
    reward, media = CLAP(checkpoint=folder), sounds(3, 20000)
    whole = reward(media, THREE)
    assert not whole.requires_grad
    assert torch.allclose(replace(reward, batch_size=2)(media, THREE), whole, atol=1e-5)
    half = replace(reward, precision="bf16")(media, THREE)
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    assert torch.allclose(half, whole, atol=0.1)
    silence = torch.zeros(1, 20000, requires_grad=True)
    score = reward(silence, THREE[:1])
    assert score.isfinite().all()
    assert torch.autograd.grad(score.sum(), silence)[0].isfinite().all()
    with pytest.raises(InputError, match="takes numbers in"):
        reward(torch.full((1, 20000), float("nan")), THREE[:1])


def test_what_is_not_known_is_refused(folder: Path, tmp_path: Path) -> None:
    import json

    tiny.save_clap(tmp_path / "fusion", truncation="fusion")
    with pytest.raises(InputError, match=r"truncation fusion .* models without fusion"):
        CLAP(checkpoint=tmp_path / "fusion").open()
    tiny.save_clap(tmp_path / "bins", feature_size=16)
    with pytest.raises(InputError, match="sees 8 mel bins, and its extractor makes others"):
        CLAP(checkpoint=tmp_path / "bins").open()
    fused = tiny.save_clap(tmp_path / "fused")
    config = json.loads((fused / "config.json").read_text())
    config["audio_config"]["enable_fusion"] = True
    (fused / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="fuses views of long sounds"):
        CLAP(checkpoint=fused).open()
    with pytest.raises(InputError, match="of the type 'wav2vec2': this reward takes clap"):
        CLAP(checkpoint=tiny.save_recogniser(tmp_path / "other")).open()


def test_the_twin_scores_with_a_gradient(tmp_path: Path) -> None:
    made, preset = find("rewards", "clap")
    twin = made(**preset, batch_size=1).tiny(tmp_path)
    assert type(twin) is CLAP
    assert isinstance(made(), SoundReward)  # which reads the rate: no weights are loaded for that
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6e6
    opened: Any = twin
    checked = CheckedReward(opened, "clap")
    checked.open()
    assert checked.sample_rate == 48000
    media = sounds(2, 4000).requires_grad_()  # half a second at 8 kHz
    scores = checked(media, replace(THREE[:2], sample_rate=8000))
    assert (scores.abs() <= 1).all()
    assert torch.autograd.grad(scores.sum(), media)[0].any()
    assert np.isfinite(scores.detach().numpy()).all()
