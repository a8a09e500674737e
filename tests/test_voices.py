"""Speaker similarity and SpeechBERTScore against transformers' own calls and the formula, one recording after the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_networks import spread
from torch import Tensor
from torch.nn import functional as F

from diffalign.contract import CheckedReward
from diffalign.errors import InputError
from diffalign.registry import find
from diffalign.rewards import tiny
from diffalign.rewards.recordings import Recordings
from diffalign.rewards.voices import SpeakerSimilarity, SpeechBERTScore
from diffalign.sound import read_wav, write_wav
from diffalign.types import Prompts, SoundReward

THREE = Prompts(("one", "two", "three"))
LENGTHS = {"one": 5000, "two": 8000, "three": 6321}


def sounds(count: int, samples: int, seed: int = 0) -> Tensor:
    return torch.rand(count, samples, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sv` and `bert`, networks; recordings of several lengths, and `list.jsonl`."""
    folder = tmp_path_factory.mktemp("voices")
    tiny.save_ear(folder / "sv", spread(tiny.wav2vec2("WavLM", "ForXVector"), 0.3))
    tiny.save_ear(folder / "bert", spread(tiny.wav2vec2("Hubert", num_hidden_layers=3), 0.3))
    for i, (name, length) in enumerate(LENGTHS.items(), 1):
        write_wav(folder / f"{name}.wav", sounds(1, length, i)[0], 16000)
    rows = [{"prompt": name, "reference": f"{name}.wav"} for name in LENGTHS]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recorded(folder: Path) -> list[Tensor]:
    return [read_wav(folder / f"{name}.wav").waveform[None] for name in LENGTHS]


def test_the_speaker_vectors_are_transformers_own(folder: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor, WavLMForXVector

    network: Any = WavLMForXVector.from_pretrained(folder / "sv").eval()
    hear: Any = Wav2Vec2FeatureExtractor.from_pretrained(folder / "sv")

    def vector(waveform: Tensor) -> Tensor:
        inputs = hear(waveform[0].numpy(), sampling_rate=16000, return_tensors="pt").input_values
        return F.normalize(network(inputs).embeddings, dim=-1)[0]

    media = sounds(3, 7000)
    with torch.no_grad():
        wanted = torch.stack([vector(ours[None]) @ vector(theirs) for ours, theirs in zip(media, recorded(folder), strict=True)])
    reward = SpeakerSimilarity(checkpoint=folder / "sv", reference=folder / "list.jsonl", batch_size=2)
    found = reward(media, THREE)
    assert wanted.std() > 1e-3
    assert torch.allclose(found, wanted, atol=1e-5)
    own = reward(read_wav(folder / "two.wav").waveform[None], THREE[1:2])
    assert own.tolist() == pytest.approx([1.0], abs=1e-5)


@pytest.mark.parametrize("measure", ["precision", "recall", "f1"])
@pytest.mark.parametrize("layer", [0, 2, None])
def test_speech_bert_score_is_the_formula(measure: Any, layer: int | None, folder: Path) -> None:
    from transformers import HubertModel

    network: Any = HubertModel.from_pretrained(folder / "bert").eval()

    def frames(waveform: Tensor) -> Tensor:
        outputs = network(waveform, output_hidden_states=True)
        return F.normalize(outputs.last_hidden_state if layer is None else outputs.hidden_states[layer], dim=-1)[0]

    media, wanted = sounds(3, 7000), list[float]()
    with torch.no_grad():
        for ours, theirs in zip(media, recorded(folder), strict=True):
            cosines = frames(ours[None]) @ frames(theirs).T
            precision, recall = float(cosines.max(1).values.mean()), float(cosines.max(0).values.mean())
            wanted.append({"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}[measure])
    fields: dict[str, Any] = dict(checkpoint=folder / "bert", reference=folder / "list.jsonl", layer=layer, measure=measure)
    assert SpeechBERTScore(**fields, batch_size=2)(media, THREE).tolist() == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 1e-4


@pytest.mark.parametrize(("make", "network", "fields"), [(SpeakerSimilarity, "sv", {}), (SpeechBERTScore, "bert", {"layer": 2})])
def test_gradient_chunks_precision_and_silence(make: Any, network: str, fields: dict[str, Any], folder: Path) -> None:
    reward = make(checkpoint=folder / network, reference=folder / "one.wav", **fields)
    media = sounds(3, 7000).requires_grad_()
    scores = reward(media, THREE)
    slope = torch.autograd.grad(scores.sum(), media)[0]
    assert slope.abs().max() > 0
    with torch.no_grad():
        whole = reward(media, THREE)
        assert not whole.requires_grad
        assert torch.allclose(replace(reward, batch_size=2)(media, THREE), whole, atol=1e-5)
        half = replace(reward, precision="bf16")(media, THREE)
        step = 0.1 * slope / slope.norm()
        assert reward((media + step).clamp(-1, 1), THREE).sum() > whole.sum()
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    assert torch.allclose(half, whole, atol=0.2)
    silence = torch.zeros(1, 7000, requires_grad=True)
    score = reward(silence, THREE[:1])
    assert score.isfinite().all()
    assert torch.autograd.grad(score.sum(), silence)[0].isfinite().all()
    assert not any(p.requires_grad for p in reward.features.network.parameters())


def test_a_recording_is_heard_once(folder: Path) -> None:
    reward, heard = SpeakerSimilarity(checkpoint=folder / "sv", reference=folder / "list.jsonl"), list[int]()
    features = reward.features
    of = features.of
    features.of = lambda media: heard.append(media.shape[1]) or of(media)
    for _ in range(2):
        reward(sounds(3, 7000), THREE)
    assert heard == [5000, 8000, 6321, 7000, 7000]
    write_wav(folder / "anew.wav", sounds(1, 5000)[0], 16000)
    own = Recordings(folder / "anew.wav")
    first = features.recorded(own, THREE[:1], torch.device("cpu"))[0]
    write_wav(folder / "anew.wav", sounds(1, 6000, 5)[0], 16000)
    assert not torch.equal(features.recorded(own, THREE[:1], torch.device("cpu"))[0], first), "another file by the same name"


def test_f1_of_cosines_below_zero_is_zero() -> None:
    class As:
        @staticmethod
        def of(media: Tensor) -> Tensor:
            return media

    score = SpeechBERTScore(measure="f1")
    score.__dict__["features"] = As
    theirs = torch.tensor([[[-1.0, 0.0], [-1.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]])
    media = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)
    found = score._score(media, theirs, torch.tensor([2, 2]))
    assert found.tolist() == pytest.approx([0, 1])
    assert torch.autograd.grad(found.sum(), media)[0].isfinite().all()


def test_what_is_too_short_or_unknown_is_refused(folder: Path, tmp_path: Path) -> None:
    reward = SpeakerSimilarity(checkpoint=folder / "sv", reference=folder / "one.wav")
    assert reward(sounds(1, 2576), THREE[:1]).isfinite().all()
    with pytest.raises(InputError, match=r"too short, 0\.16 s: 15 frames, and 16 are needed"):
        reward(sounds(1, 2575), THREE[:1])
    write_wav(tmp_path / "short.wav", sounds(1, 1600)[0], 16000)
    with pytest.raises(InputError, match="too short"):
        replace(reward, reference=tmp_path / "short.wav").check_prompts(THREE[:1], 1.0)
    with pytest.raises(InputError, match="too short"):
        reward.check_prompts(THREE[:1], 0.1)
    reward.check_prompts(THREE[:1], 1.0)
    with pytest.raises(InputError, match="too short"):
        replace(reward, reference=tmp_path / "short.wav")(sounds(1, 7000), THREE[:1])
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (SpeakerSimilarity, dict(checkpoint=folder / "bert"), "of the type 'hubert': this reward takes wavlm"),
        (SpeakerSimilarity, dict(checkpoint=folder / "sv", reference=folder / "gone.wav"), "There is no file .*gone.wav"),
        (SpeechBERTScore, dict(checkpoint=folder / "bert"), r"layer is 14, and the model in .* has 3"),
    ]
    for make, fields, says in wrong:
        with pytest.raises(InputError, match=says):
            make(**fields).open()
    made: Any = SpeechBERTScore
    for field, value in (("measure", "mean"), ("layer", -1), ("batch_size", 0)):
        with pytest.raises(InputError, match=f"{field} is {value}"):
            made(**{field: value})
    with pytest.raises(InputError, match=r"has no recording to compare with: --reward\.reference"):
        SpeakerSimilarity(checkpoint=folder / "sv")(sounds(1, 7000), THREE[:1])


@pytest.mark.parametrize("name", ["speaker-similarity", "speech-bert-score"])
def test_every_row_has_a_twin_of_its_class_that_scores_with_a_gradient(name: str, folder: Path, tmp_path: Path) -> None:
    made, preset = find("rewards", name)
    twin = made(**preset, reference=folder / "one.wav").tiny(tmp_path)
    assert type(twin) is made
    assert isinstance(made(), SoundReward)  # which reads the rate: no weights are loaded for that
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6e6
    checked = CheckedReward(twin, name)
    checked.open()
    media = sounds(2, 4000).requires_grad_()
    scores = checked(media, replace(THREE[:2], sample_rate=8000))
    low, high = twin.range
    assert ((scores >= low - 1e-6) & (scores <= high + 1e-6)).all()
    assert torch.autograd.grad(scores.sum(), media)[0].any()
