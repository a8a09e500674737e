"""Rewards beside recordings: SI-SDR against numbers by hand, STOI and PESQ through their packages' calls, and the recordings themselves."""

from __future__ import annotations

import json
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.contract import CheckedReward
from diffalign.errors import InputError
from diffalign.rewards.compared import SISDR, Compared, beside, si_sdr
from diffalign.rewards.recordings import Recordings
from diffalign.rewards.voices import SpeakerSimilarity, SpeechBERTScore
from diffalign.sound import write_wav
from diffalign.types import Prompts

TWO = Prompts(("one", "two"))


def tone(frequency: float, samples: int = 1600, level: float = 0.4) -> Tensor:
    return level * torch.sin(2 * torch.pi * frequency * torch.arange(samples) / 16000)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, frequency in (("one", 400.0), ("two", 1000.0)):
        write_wav(tmp_path / f"{name}.wav", tone(frequency), 16000)
    rows = [{"prompt": "one", "reference": "one.wav"}, {"prompt": "two", "reference": "two.wav"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return tmp_path


def test_si_sdr_is_the_ratio_of_what_lies_along_and_across() -> None:
    recording = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    sounds = torch.tensor([[0.3, 0.1], [-0.3, 0.03], [0.5, 0.5], [0.0, 0.2]])
    assert si_sdr(sounds, recording).tolist() == pytest.approx([9.5424251, 20.0, 0.0, -80.0], abs=1e-5)  # 20 log10 of 3, 10, 1
    assert torch.allclose(si_sdr(7 * sounds, 0.1 * recording), si_sdr(sounds, recording))
    assert si_sdr(recording, recording).tolist() == pytest.approx([80.0] * 4)
    assert si_sdr(torch.zeros(1, 2), recording[:1]).tolist() == pytest.approx([-80.0])  # 0 / 0: the worst, where an epsilon would say 0 dB


def test_its_gradient_is_that_of_small_steps_and_finite_at_the_ends() -> None:
    recording = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double()
    sounds = (recording + torch.randn(3, 40, generator=torch.Generator().manual_seed(1))).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: si_sdr(x, recording), sounds)
    for media in (recording.clone(), torch.zeros(3, 40).double()):
        slope = torch.autograd.grad(si_sdr(media.requires_grad_(), recording).sum(), media)[0]
        assert slope.isfinite().all()


def test_the_reward_compares_each_sound_with_its_own_recording(files: Path) -> None:
    reward: Any = SISDR(reference=files / "list.jsonl")
    reward.open()
    media = torch.stack([tone(400.0, level=0.1), tone(400.0)]).requires_grad_()
    scores = CheckedReward(reward, "si-sdr")(media, replace(TWO, sample_rate=16000))
    assert scores[0] > 60  # what 16 bits leave
    assert scores[1] < -60  # another tone of whole periods lies across it
    assert scores.dtype == torch.float32
    assert torch.autograd.grad(scores.sum(), media)[0].any()
    for_all = SISDR(reference=files / "one.wav")(media, TWO)
    assert (for_all > 60).all()
    carried = replace(TWO, metadata=({"reference": str(files / "two.wav")}, {"reference": files / "one.wav"}))
    assert torch.equal(SISDR()(media, carried) > 60, torch.tensor([False, True]))
    with torch.no_grad():
        assert not reward(media, TWO).requires_grad


def test_recordings_are_brought_to_the_rate_and_the_length_of_the_sounds(files: Path) -> None:
    write_wav(files / "slow.wav", torch.sin(2 * torch.pi * 400 * torch.arange(4000) / 8000) * 0.4, 8000)
    media = torch.sin(2 * torch.pi * 400 * torch.arange(8000) / 16000)[None] * 0.4
    reward = SISDR(reference=files / "slow.wav")
    assert reward(media, TWO[:1]) > 30
    assert torch.equal(beside(torch.zeros(1, 2000), TWO[:1], Recordings(files / "one.wav"), 16000)[0, 1600:], torch.zeros(400))
    with pytest.raises(InputError, match=r"The recording of 'one' is 0\.50 s long, and the sounds are 0\.25: make them as long"):
        reward(media[:, :4000], TWO[:1])


def test_recordings_are_held_against_the_sounds_length_and_rate_before_anything_is_made(files: Path) -> None:
    write_wav(files / "odd.wav", tone(400.0), 44101)
    write_wav(files / "long.wav", tone(400.0, 3 * 8192), 8000)
    for make in (SISDR, Compared):
        make(reference=files / "one.wav").check_prompts(TWO, 0.1)
        with pytest.raises(InputError, match=r"The recording of 'one' is 0\.10 s long, and the sounds are 0\.10: make"):
            make(reference=files / "one.wav").check_prompts(TWO, 0.0999)
        with pytest.raises(InputError, match=r"The recording of 'one' is 3\.07 s long, and the sounds are 1\.02: make"):
            make(reference=files / "long.wav").check_prompts(TWO, 1.024)
    for make in (SISDR, Compared, SpeakerSimilarity, SpeechBERTScore):
        with pytest.raises(InputError, match=r"The recording .*odd\.wav, at 44101 Hz, is not brought to 16000 Hz"):
            make(reference=files / "odd.wav").check_prompts(TWO, 1.0)


def test_recordings_that_cannot_be_had_are_named_before_anything_is_scored(files: Path) -> None:
    write_wav(files / "silent.wav", torch.zeros(100), 16000)
    (files / "noise.wav").write_bytes(b"RIFF")
    lists = {
        "gone": ('{"prompt": "one", "reference": "gone.wav"}', "There is no file .*gone.wav"),
        "out": ('{"prompt": "one", "reference": "../x.wav"}', r"line 1: the path '\.\./x\.wav' leads out of"),
        "absolute": ('{"prompt": "one", "reference": "/x.wav"}', "leads out of"),
        "none": ('\n{"prompt": "one"}', 'line 2: expected an object with the key "reference"'),
        "words": ("one two", "line 1: expected an object"),
        "number": ('{"prompt": 1, "reference": "one.wav"}', "line 1: prompt, transcript and reference are texts"),
        "twice": (
            '{"prompt": "one", "reference": "one.wav"}\n{"prompt": "one", "reference": "two.wav"}', "line 2: the prompt 'one' has another"
        ),
        "empty": ("\n", "names no recordings"),
    }  # fmt: skip
    for name, (text, says) in lists.items():
        (files / f"{name}.jsonl").write_text(text)
        with pytest.raises(InputError, match=says):
            SISDR(reference=files / f"{name}.jsonl").open()
    for name, says in (
        ("other.wav", "There is no file .*other.wav"),
        ("other.jsonl", r"There is no file .*other\.jsonl: --reward\.reference takes a \.wav file, or a \.jsonl file"),
        ("silent.wav", "is silent: there is nothing to compare with"),
        ("noise.wav", r"noise\.wav is no \.wav file"),
    ):
        with pytest.raises(InputError, match=says):
            SISDR(reference=files / name).open()
    with pytest.raises(InputError, match=r"has no line for the prompt 'three'"):
        SISDR(reference=files / "list.jsonl")(torch.rand(1, 1600), Prompts(("three",)))
    for reward in (SISDR, Compared, SpeakerSimilarity, SpeechBERTScore):
        with pytest.raises(InputError, match=r"has no line for the prompt 'three'"):
            reward(reference=files / "list.jsonl").check_prompts(Prompts(("one", "three")), 1.0)
    with pytest.raises(InputError, match="is silent: there is nothing to compare with"):
        SISDR().check_prompts(Prompts(("one",), metadata=({"reference": str(files / "silent.wav")},)), 1.0)
    for prompts in (TWO, replace(TWO, metadata=({}, {}))):
        with pytest.raises(InputError, match=r"The prompt 'one' has no recording to compare with: --reward\.reference takes"):
            SISDR()(torch.rand(2, 1600), prompts)


def test_a_clipped_recording_is_said_once(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_wav(files / "clipped.wav", torch.ones(1600), 16000)
    for _ in range(2):
        SISDR(reference=files / "clipped.wav").open()
    assert [record.message.partition("clipped.wav ")[2] for record in caplog.records] == ["is clipped: 100.0% of it is at full scale."]


def test_a_list_tells_prompts_apart_by_their_transcripts(files: Path) -> None:
    rows = [{"prompt": "calm", "transcript": word, "reference": f"{word}.wav"} for word in ("one", "two")]
    (files / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Recordings(files / "said.jsonl").paths(Prompts(("calm", "calm"), transcript=("two", "one")))
    assert [path.name for path in found] == ["two.wav", "one.wav"]


def test_stoi_and_pesq_are_their_packages_calls(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stoi(x: Any, y: Any, fs_sig: int, extended: bool = False) -> float:
        asked.append((x, y, fs_sig, extended))
        if y.max() > 0.9:
            warnings.warn("Not enough STFT frames", RuntimeWarning, stacklevel=2)
        return 0.5

    def pesq(fs: int, ref: Any, deg: Any, mode: str) -> float:
        asked.append((ref, deg, fs, mode))
        return 3.0

    for module, function in (("pystoi", stoi), ("pesq", pesq)):
        made = types.ModuleType(module)
        vars(made)[module.removeprefix("py")] = function
        vars(made)["pesq" if module == "pesq" else "stoi"] = function
        monkeypatch.setitem(sys.modules, module, made)
    media = torch.stack([tone(400.0, level=0.1), tone(700.0)])
    chosen: dict[str, Any] = dict(reference=files / "list.jsonl")
    calls: list[tuple[dict[str, Any], int, Any]] = [
        ({"measure": "stoi"}, 16000, False), ({"measure": "estoi"}, 16000, True), ({"measure": "pesq"}, 16000, "wb"),
        ({"measure": "pesq", "sample_rate": 8000}, 8000, "nb"), ({"measure": "stoi", "sample_rate": 10000}, 10000, False),
    ]  # fmt: skip
    for fields, rate, last in calls:
        asked.clear()
        reward = Compared(**chosen, **fields)
        reward.open()
        scores = reward(media, TWO)
        assert scores.tolist() == [3.0 if fields["measure"] == "pesq" else 0.5] * 2
        assert [(fs, mode) for _, _, fs, mode in asked] == [(rate, last)] * 2
        for (recording, sound, _, _), wanted, kept in zip(
            asked, beside(media, TWO, Recordings(files / "list.jsonl"), rate), media, strict=True
        ):
            assert (recording == wanted.double().numpy()).all()  # the recording comes first, or after the rate: it is not symmetric
            assert (sound == kept.double().numpy()).all()
        low, high = reward.range
        assert all(low <= score <= high for score in scores.tolist())
    asked.clear()
    assert Compared(measure="pesq", **chosen)(torch.zeros(1, 1600), TWO[:1]).tolist() == pytest.approx([0.999])
    assert not asked
    with pytest.raises(InputError, match=r"stoi cannot be measured for 'one' \(RuntimeWarning: Not enough STFT frames\)"):
        Compared(**chosen)(torch.ones(1, 1600), TWO[:1])


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (Compared, {"measure": "mcd"}, "measure is mcd: give stoi, estoi or pesq"),
        (Compared, {"measure": "pesq", "sample_rate": 22050}, "PESQ is defined at 8000 and 16000 Hz"),
        (Compared, {"sample_rate": 0}, "sample_rate is 0"),
        (SISDR, {"sample_rate": 0}, "sample_rate is 0"),
    ]
    for make, fields, says in wrong:
        with pytest.raises(InputError, match=says):
            make(**fields)
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(InputError, match=r"stoi needs a package that is not installed .*pip install 'diffalign\[speech-metrics\]'"):
        Compared().open()
    with pytest.raises(InputError, match="takes numbers in"):
        SISDR()(torch.full((1, 100), float("nan")), TWO[:1])
