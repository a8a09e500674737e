"""Sounds: .wav files and what is wrong with them, rates, log-mel spectrograms, the rewards of sound, and prompts with transcripts."""

from __future__ import annotations

import json
import math
import struct
import wave
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import diffalign
from diffalign import sound, types
from diffalign.cache import Shelf
from diffalign.columns import Picture
from diffalign.contract import CheckedReward, as_reward, check_modality
from diffalign.data import PicturePrompt, SpokenPrompt, batch_of, caption_of, check_fit, check_prompts, known_as, read_prompts, write_file
from diffalign.errors import InputError
from diffalign.intake import Intake
from diffalign.layouts import rows
from diffalign.pipelines.sound import check_said
from diffalign.records import Tally
from diffalign.rewards.jpeg import JPEGCompressibility
from diffalign.rewards.sound import Loudness, Silence
from diffalign.shards import everyones_prompts
from diffalign.sound import LogMel, decode_wav, read_wav, resample, write_wav
from diffalign.types import ALONE, Prompts, SoundReward


def sine(hz: float, rate: int, seconds: float = 0.5, amplitude: float = 0.5) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * hz * torch.arange(round(rate * seconds), dtype=torch.float64) / rate).float()


def wav(body: bytes, kind: int = 1, channels: int = 1, rate: int = 16000, bits: int = 16, extensible: bool = False) -> bytes:
    head = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    head += struct.pack("<HHIH14s", 22, bits, 4, kind, b"") if extensible else b""
    chunks = b"fmt " + struct.pack("<I", len(head)) + head + b"LIST" + struct.pack("<I", 3) + b"abc\0"
    chunks += b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


def test_a_sound_is_read_as_it_was_written(tmp_path: Path):
    waveform = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 1 / 32768, 0.123456, 2.0])
    write_wav(tmp_path / "a.wav", waveform, 22050)
    with wave.open(str(tmp_path / "a.wav")) as file:  # as others read it
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (1, 2, 22050, 8)
    found = read_wav(tmp_path / "a.wav")
    assert found.sample_rate == 22050
    assert torch.equal(found.waveform, sound.rounded(waveform))
    assert found.waveform.tolist()[:6] == [0.0, 0.5, -0.5, 32767 / 32768, -1.0, 1 / 32768]
    write_wav(tmp_path / "b.wav", found.waveform, 22050)
    assert (tmp_path / "b.wav").read_bytes() == (tmp_path / "a.wav").read_bytes()
    assert found.clipped == 3 / 8
    with pytest.raises(ValueError, match="NaN"):
        sound.wav_bytes(torch.tensor([float("nan")]), 16000)


@pytest.mark.parametrize("extensible", [False, True])
def test_every_width_of_samples(extensible: bool):
    values = [0.0, 0.5, -0.25, -1.0]
    packed = {
        (1, 8): bytes([128, 192, 96, 0]),
        (1, 16): struct.pack("<4h", 0, 16384, -8192, -32768),
        (1, 24): b"".join(int(v * 2**23).to_bytes(3, "little", signed=True) for v in values),
        (1, 32): struct.pack("<4i", *(int(v * 2**31) for v in values)),
        (3, 32): struct.pack("<4f", *values),
        (3, 64): struct.pack("<4d", *values),
    }
    for (kind, bits), body in packed.items():
        assert decode_wav(wav(body, kind, bits=bits, extensible=extensible), "x").waveform.tolist() == values


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"ID3 something else", "x.wav is no .wav file. Make one: ffmpeg"),
        (wav(b""), "x.wav is empty"),
        (wav(b"\0" * 8, channels=2), "x.wav has 2 channels, and sounds here have one"),
        (wav(struct.pack("<2f", 0.1, float("nan")), 3, bits=32), "x.wav holds NaN or infinity"),
        (wav(struct.pack("<2f", 0.1, 3.5), 3, bits=32), "x.wav holds samples up to 3.5, beyond full scale"),
        (wav(b"\0" * 100)[:-20], "x.wav is cut short: 80 of 100 bytes"),
        (wav(b"\0"), "x.wav is empty: it holds no whole sample"),
        (wav(b"\0" * 8, rate=0), "its sample rate is 0"),
        (wav(b"\0" * 8, rate=1), "its sample rate is 1 Hz. Fetch or make it again"),
        (wav(b"\0" * 8, rate=2_000_000), "its sample rate is 2000000 Hz"),
        (wav(b"\0" * 8, kind=85), r"a kind that is not read \(format 85, 16 bits\)"),
        (wav(b"\0" * 8)[:36], "a .wav file without samples"),
        (b"RIFF\x10\0\0\0WAVEdata\x04\0\0\0abcd", "a .wav file without a header"),
    ],
)
def test_what_is_wrong_with_a_file(data: bytes, says: str):
    with pytest.raises(InputError, match=says):
        decode_wav(data, "x.wav")


@pytest.mark.parametrize(("old", "new"), [(16000, 48000), (44100, 16000), (48000, 22050), (8000, 16000), (2000, 16000)])
def test_resampling_keeps_what_both_rates_hold(old: int, new: int):
    tone = sine(440, old)[None]
    found = resample(tone, old, new)
    assert found.shape == (1, math.ceil(tone.shape[1] * new / old))
    inner = slice(new // 20, -new // 20)
    torch.testing.assert_close(found[0, inner], sine(440, new)[: found.shape[1]][inner], rtol=0, atol=2e-3)
    assert resample(tone, old, old) is tone


def test_resampling_removes_what_the_lower_rate_cannot_hold_and_is_linear():
    high, low = sine(7000, 16000)[None], sine(500, 16000)[None]
    assert resample(high, 16000, 8000)[:, 200:-200].abs().max() < 5e-3
    both = resample(high + low, 16000, 8000)
    torch.testing.assert_close(both, resample(high, 16000, 8000) + resample(low, 16000, 8000), rtol=0, atol=1e-6)


def test_floats_a_rounding_beyond_full_scale_and_the_wav_of_a_pipe_are_taken():
    over = decode_wav(wav(struct.pack("<3f", 1.00001, -1.0009, 0.5), 3, bits=32), "x").waveform
    assert over.tolist() == [1, -1, 0.5]
    with pytest.raises(InputError, match=r"samples up to 1\.01, beyond"):
        decode_wav(wav(struct.pack("<f", 1.01), 3, bits=32), "x")
    body = struct.pack("<4h", 0, 16384, -8192, -32768)
    whole = wav(body)
    streamed = whole.replace(b"data" + struct.pack("<I", len(body)), b"data" + b"\xff" * 4)
    assert streamed != whole
    assert decode_wav(streamed, "x").waveform.tolist() == [0, 0.5, -0.25, -1]


def test_rates_whose_filters_would_fill_the_memory_are_refused():
    with pytest.raises(InputError, match=r"Sounds at 44101 Hz are not brought to 8000 Hz .*: ffmpeg -i IN\.wav -ar 8000"):
        resample(torch.zeros(1, 100), 44101, 8000)
    assert resample(torch.zeros(1, 100), 11025, 8000).shape == (1, 73)


def test_the_gradient_of_resampling_is_its_transpose():
    x = torch.randn(2, 61, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resample(x, 6, 4), (x,))


@pytest.mark.parametrize(("rate", "hop", "bins"), [(16000, 160, 64), (22050, 256, 80), (16000, 64, 16)])
def test_log_mel_spectrograms_are_transformers_own(rate: int, hop: int, bins: int):
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    mel = LogMel.of(rate, hop, bins)
    waveform = 0.1 * torch.randn(hop * 40) + sine(700, rate, hop * 40 / rate)
    edge = (mel.window - hop) // 2
    padded = np.pad(waveform.double().numpy(), edge, mode="reflect")
    bank = mel_filter_bank(mel.window // 2 + 1, bins, 0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    window = window_function(mel.window, "hann", periodic=True)
    theirs = spectrogram(padded, window, mel.window, hop, power=1.0, center=False, mel_filters=bank, mel_floor=1e-5, log_mel="log")
    ours = mel(waveform[None])[0]
    assert ours.shape == (40, bins)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.T).float(), rtol=0, atol=1e-3)
    assert ours.std() > 0.5


def test_the_window_of_a_vocoder_is_hifi_gans():
    assert LogMel.of(16000, 160, 64) == LogMel()
    assert [LogMel.of(rate, hop, 80).window for rate, hop in ((22050, 256), (48000, 480))] == [1024, 2048]


def test_silence_has_a_gradient_and_a_picture():
    silent = torch.zeros(1, 3200, requires_grad=True)
    assert LogMel()(silent).eq(math.log(1e-5)).logical_or(LogMel()(silent) > math.log(1e-5)).all()
    assert torch.autograd.grad(LogMel()(silent).sum(), silent)[0].isfinite().all()
    quiet, loud = sound.picture(torch.zeros(16000), 16000), sound.picture(sine(1000, 16000), 16000)
    assert quiet.shape == loud.shape == (3, 64, 128)
    assert 0 <= loud.min() <= loud.max() <= 1
    row = loud.sum((0, 2)).argmax()
    assert 20 < row < 64, "one kilohertz lies in the lower half"
    assert quiet.sum() < loud.sum()
    assert sound.picture(torch.zeros(5), 2000).shape == (3, 64, 128)


def test_loudness_is_minus_the_distance_in_decibels():
    square = torch.ones(1, 800)
    waves = torch.cat([square, 0.1 * square, 0.001 * square, sine(100, 800, 1.0, 1.0)[None], 0 * square])
    found = Loudness(target=-20.0)(waves, Prompts(("",) * 5))
    torch.testing.assert_close(found, -torch.tensor([20.0, 0.0, 40.0, 16.9897, 80.0]), rtol=0, atol=1e-3)
    quiet = (0.01 * square).requires_grad_()
    assert torch.autograd.grad(Loudness()(quiet, Prompts(("",))).sum(), quiet)[0].min() > 0, "louder is better"


def test_silence_counts_frames_at_its_own_rate():
    half = torch.cat([torch.zeros(1, 8000), torch.ones(1, 8000) * 0.1], 1)
    assert Silence()(half, Prompts(("",))).tolist() == [-0.5]
    assert Silence(below=-10.0)(half, Prompts(("",))).tolist() == [-1.0]
    assert Silence()(torch.ones(1, 7), Prompts(("",))).tolist() == [0.0], "shorter than a frame"
    checked = CheckedReward(as_reward(Silence()), "silence")
    at_4k = checked(half[:, ::4], Prompts(("",), sample_rate=4000))
    assert abs(float(at_4k) + 0.5) <= 0.04
    with pytest.raises(InputError, match="do not say at which rate"):
        checked(half, Prompts(("",)))


@pytest.mark.parametrize(
    "make", [lambda: Loudness(target=3), lambda: Silence(below=-100), lambda: Silence(frame=0), lambda: Silence(below=1)]
)
def test_fields_that_are_none(make: Callable[[], Any]):
    with pytest.raises(InputError, match=r"reward\."):
        make()


def test_pictures_are_no_sound():
    for reward in (Loudness(), Silence()):
        assert isinstance(reward, SoundReward)
        with pytest.raises(InputError, match="judges sounds"):
            reward(torch.zeros(1, 3, 8, 8), Prompts(("",)))


def test_a_reward_hears_its_own_rate_and_its_gradient_arrives():
    heard = list[tuple[int, int | None]]()

    @diffalign.reward(differentiable=True, modality="audio", sample_rate=8000)
    def level(media: Tensor, prompts: Prompts) -> Tensor:
        heard.append((media.shape[1], prompts.sample_rate))
        return media.square().mean(1)

    tone = sine(440, 16000)[None].requires_grad_()
    asked = Prompts(("a tone",), sample_rate=16000)
    score = CheckedReward(level, "level")(tone, asked)
    assert heard == [(4000, 8000)]
    assert asked.sample_rate == 16000
    assert float(score) == pytest.approx(0.125, rel=0.01)
    assert torch.autograd.grad(score.sum(), tone)[0].abs().max() > 1e-6
    CheckedReward(replace(level, sample_rate=None), "any")(tone, asked)
    assert heard[1] == (8000, 16000), "without a rate of its own it is told which it is"


def test_a_class_of_sound_that_says_no_rate_is_refused():
    @dataclass(frozen=True)
    class Mute:
        differentiable: ClassVar[bool] = False
        modality: ClassVar[str] = "audio"

        def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
            return media.mean(1)

    with pytest.raises(InputError, match="does not say at which rate"):
        as_reward(Mute())
    for fields, said in (
        (dict(sample_rate=0), "bad has sample_rate 0: give a whole number of Hz"),
        (dict(sample_rate="8000"), "bad has sample_rate '8000'"),
        (dict(sample_rate=-8000), "bad has sample_rate -8000"),
        (dict(sample_rate=8000.0), r"bad has sample_rate 8000\.0"),
        (dict(modality="video"), "bad has the modality 'video': give image or audio"),
    ):
        declared: Any = {"differentiable": False, "modality": "audio", **fields}

        @diffalign.reward(**declared)
        def bad(media: Tensor, prompts: Prompts) -> Tensor:
            return media.mean(1)

        with pytest.raises(InputError, match=said):
            as_reward(bad)
    with pytest.raises(InputError, match=r"loudness judges sound, and this pipeline makes pictures\. Choose another"):
        check_modality(as_reward(Loudness()), "loudness", "image")
    with pytest.raises(InputError, match=r"jpeg judges pictures, and this pipeline makes sound"):
        check_modality(as_reward(JPEGCompressibility()), "jpeg", "audio")
    with pytest.raises(InputError, match=r"Declare it: @diffalign\.reward"):
        check_modality(as_reward(lambda media, prompts: media.mean(1)), "mine", "audio")


def test_transcripts_are_sliced_joined_and_keyed():
    prompts = Prompts(("a", "a", "b"), transcript=("one", "two", "one"), sample_rate=16000)
    assert prompts[1:].transcript == ("two", "one")
    assert prompts[[2, 0]].transcript == ("one", "one")
    assert prompts[[0]].sample_rate == Prompts.join([prompts, prompts]).sample_rate == 16000
    assert Prompts.join([prompts[[1]], prompts[[0]]]).transcript == ("two", "one")
    assert len(set(prompts.keys)) == 3
    assert prompts.spoken == ("one", "two", "one")
    assert Prompts(("a", "b")).spoken == ("a", "b")
    assert Prompts(("a",), transcript=("one",)).transcript == ("one",)
    with pytest.raises(ValueError, match="2 texts and 1 transcripts"):
        Prompts(("a", "b"), transcript=("one",))
    assert everyones_prompts(prompts, ALONE, 3, torch.device("cpu")) is prompts


def test_prompt_files_with_transcripts(tmp_path: Path):
    lines = [{"prompt": "a calm voice", "transcript": " seven "}, {"transcript": "eight"}, {"prompt": "rain"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts(str(tmp_path / "p.jsonl"))
    assert prompts == [SpokenPrompt("a calm voice", "seven"), SpokenPrompt("", "eight"), "rain"]
    write_file(tmp_path / "again.jsonl", prompts)
    assert read_prompts(str(tmp_path / "again.jsonl")) == prompts
    assert check_prompts(prompts) == prompts
    assert [caption_of(p) for p in prompts] == ['a calm voice: "seven"', '"eight"', "rain"]
    assert len({known_as(p) for p in (SpokenPrompt("a", "b"), SpokenPrompt("a", "c"), "a")}) == 3
    for line, says in (
        ({"prompt": "a", "transcript": ""}, "line 1: the transcript is no text, or empty"),
        ({"prompt": "a", "transcript": 7}, "line 1: the transcript is no text, or empty"),
        ({"prompt": ""}, "line 1: the prompt is no text, or empty"),
        ({"transcript": "a", "image": "data:image/png;base64,aaaa"}, "no pipeline takes both"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(line))
        with pytest.raises(InputError, match=says):
            read_prompts(str(tmp_path / "bad.jsonl"))
    (tmp_path / "known.jsonl").write_text(json.dumps({"transcript": "one", "metadata": {"n": 1}}) + '\n{"transcript": "two"}')
    known = read_prompts(str(tmp_path / "known.jsonl"))
    assert known == [SpokenPrompt("", "one", (("n", 1),)), SpokenPrompt("", "two", ())], "all have metadata, or none"
    write_file(tmp_path / "again.jsonl", known)
    assert read_prompts(str(tmp_path / "again.jsonl")) == known
    assert batch_of(known).metadata == ({"n": 1}, {})
    with pytest.raises(InputError, match="SpokenPrompt"):
        check_prompts([SpokenPrompt("a", " ")])


@dataclass
class Speaker:
    """As much of a policy as prompts need."""

    takes: tuple[str, ...] = ("transcript",)
    modality: str = "audio"
    sample_rate: int = 16000
    samples: int = 800

    path = module = property(lambda self: None)

    def unspeakable(self, transcript: str) -> str | None:
        return "its tokenizer lacks 'é'" if "é" in transcript else None

    def __getattr__(self, name: str) -> Any:
        if name in ("encode", "prior", "predict", "decode", "embed", "reference", "save"):
            return lambda *_: None
        raise AttributeError(name)


def test_prompts_are_held_against_what_is_said():
    speaker: Any = Speaker()
    batch = batch_of([SpokenPrompt("calm", "one"), SpokenPrompt("", "two")], speaker)
    assert (batch.text, batch.transcript, batch.sample_rate) == (("calm", ""), ("one", "two"), 16000)
    with pytest.raises(InputError, match="says transcripts, and the prompt 'rain' has none"):
        batch_of([SpokenPrompt("calm", "one"), "rain"], speaker)
    with pytest.raises(InputError, match='the prompt calm: "café" cannot be said: its tokenizer lacks'):
        check_fit([SpokenPrompt("calm", "one"), SpokenPrompt("calm", "café")], speaker)
    with pytest.raises(InputError, match="takes no picture"):
        batch_of([PicturePrompt("a", b"")], speaker)
    mute: Any = Speaker(takes=())
    assert batch_of(["rain"], mute).transcript is None
    check_fit(["rain", SpokenPrompt("calm: one", "one")], mute)
    with pytest.raises(InputError, match="The prompt a café cannot be said: its tokenizer lacks"):
        check_fit(["rain", "a café"], mute)
    for prompt, says in (
        (SpokenPrompt("calm", "one"), "takes no transcript, and the prompt calm"),
        (SpokenPrompt("", "x"), "the text itself"),
    ):
        with pytest.raises(InputError, match=says):
            batch_of([prompt], mute)


def test_a_transcript_stands_in_the_text_in_whole_words():
    assert types.says("man: go", "go")
    assert types.says("Gone, GO now", "go  now")
    assert types.says("go", "go")
    assert types.says("女声说你好世界", "你好"), "which is written without blanks"
    assert not types.says("man: gone", "go")
    assert not types.says("man: ago", "go")
    mute: Any = Speaker(takes=())
    with pytest.raises(InputError, match="says the text itself"):
        check_said(Prompts(("man: gone",), transcript=("go",)), speech=False)
    with pytest.raises(InputError, match="the text itself"):
        check_fit([SpokenPrompt("man: gone", "go")], mute)


def test_the_character_that_caches_part_texts_with_is_refused(tmp_path: Path):
    for prompt in ("a\0b", SpokenPrompt("a", "b\0")):
        with pytest.raises(InputError, match=r"holds the character U\+0000"):
            check_prompts([prompt])
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a\0b"}))
    with pytest.raises(InputError, match=r"line 1: 'a.x00b' holds the character U\+0000"):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_sounds_on_their_way_into_a_training(tmp_path: Path):
    class Embeds(Speaker):
        module = torch.nn.Linear(1, 1)

        def embed(self, media: Tensor) -> Tensor:
            return media[:, None]

    write_wav(tmp_path / "odd.wav", sine(440, 44101), 44101)
    write_wav(tmp_path / "long.wav", torch.ones(1000), 8000)
    for _ in range(2):  # the second time the shelf has it
        intake = Intake(Embeds(), Shelf(tmp_path / "shelf"), None, Tally(skip=True), print)
        assert intake.take(Picture("odd.wav", tmp_path / "odd.wav")) is None
        assert intake.take(Picture("long.wav", tmp_path / "long.wav")) == intake.take(Picture("again.wav", tmp_path / "long.wav"))
        intake.finish()
        assert "odd.wav, at 44101 Hz, is not brought to 16000 Hz" in intake.tally.in_words()
        assert intake.in_words().endswith(
            "of 1 sounds 1 resampled to 16000 Hz, 1 cut to 0.05 s, 1 clipped (at full scale for more than 0.1%)"
        )
    assert intake.embedded == 0


def test_data_of_sounds(tmp_path: Path):
    for name in "abc":
        write_wav(tmp_path / f"{name}.wav", sine(440, 16000), 16000)
    files = {
        "pairs.jsonl": ("pairs", {"transcript": "one", "chosen": "a.wav", "rejected": "b.wav"}),
        "ranks.jsonl": ("pairs", {"prompt": "calm", "transcript": "one", "sounds": ["a.wav", "b.wav", "c.wav"], "scores": [3, 2, 1]}),
        "labels.jsonl": ("labels", {"prompt": "calm", "transcript": "one", "audio": "a.wav", "label": True}),
        "pictures.jsonl": ("pictures", {"prompt": "calm", "transcript": "one", "audio": "a.wav"}),
    }
    for name, (kind, line) in files.items():
        (tmp_path / name).write_text(json.dumps(line))
        (row,) = rows(str(tmp_path / name), kind, Tally(skip=False))  # pyright: ignore[reportArgumentType]
        assert row.transcript == "one"
        assert row.prompt == line.get("prompt", "")
        assert [Path(str(picture.path)).name for picture in row.pictures] == ["a.wav", "b.wav", "c.wav"][: len(row.pictures)]


def test_score_reads_sounds(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    write_wav(tmp_path / "a.wav", 0.1 * torch.ones(8000), 8000)
    write_wav(tmp_path / "b.wav", torch.ones(16000), 16000)
    outcome = run_cli("score", "--reward", "loudness", "a.wav", "b.wav", "--transcript", "seven")
    assert outcome.status == 0, outcome.err
    scores = dict(line.split("\t")[::-1] for line in outcome.out.splitlines())
    assert float(scores["a.wav"]) == pytest.approx(0, abs=0.01)
    assert float(scores["b.wav"]) == pytest.approx(-20, abs=0.01)
    assert "b.wav is clipped: 100.0% of its samples" in outcome.err
    assert "Resampled" not in outcome.err, "loudness takes any rate"
    outcome = run_cli("score", "--reward", "silence", "a.wav", "b.wav")
    assert outcome.status == 0, outcome.err
    assert "Resampled to the 16000 Hz that silence hears: the files have 8000 Hz" in outcome.err
    parts = ["compose", "--reward.parts", '[{"name": "silence"}, {"name": "digits-quality"}]']
    outcome = run_cli("score", "--reward", *parts, "b.wav")
    assert outcome.status == 0, outcome.err
    assert "Resampled to the 8000 Hz that digits-quality hears: the files have 16000 Hz" in outcome.err
    assert "that silence" not in outcome.err
    (tmp_path / "stereo.wav").write_bytes(wav(b"\0" * 8, channels=2))
    write_wav(tmp_path / "odd.wav", sine(440, 44101), 44101)
    for flags, said in (
        (["--reward", "silence", "stereo.wav"], "has 2 channels"),
        (["--reward", "silence", "odd.wav"], "odd.wav, at 44101 Hz, is not brought to 16000 Hz here"),
        (["--reward", *parts, "odd.wav"], "odd.wav, at 44101 Hz, is not brought to 8000 Hz here"),
        (["--reward", "silence", "none.wav"], "There is no file none.wav"),
        (["--reward", "silence", "a.wav", "--image", "x.png"], "--image: silence judges sound"),
        (["--reward", "jpeg-compressibility", "a.wav"], "a.wav is a sound, and jpeg-compressibility judges pictures"),
        (["--reward", "jpeg-compressibility", "a.wav", "--transcript", "x"], "--transcript: jpeg-compressibility judges pictures"),
    ):
        outcome = run_cli("score", *flags)
        assert outcome.status == 2
        assert said in outcome.err
        assert "Resampled" not in outcome.err
