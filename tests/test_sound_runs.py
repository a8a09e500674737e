"""Sound through the command line: every method on both twins, and a speech model trained, sampled, paired, evaluated and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffalign
from diffalign import registry, tiny
from diffalign.pipelines.tiny_sound import audioldm2
from diffalign.sound import read_wav, rounded, write_wav

FLOWS = ("flow-grpo", "flow-grpo-fast", "dance-grpo")
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
FEW = ["--steps", 2, "--batch-size", 2, "--accumulate", 1, "--sample-steps", 3, "--eval-size", 2, "--guidance-scale", 2, "--lora.rank", 2]


def methods_on_twins() -> list[tuple[str, str]]:
    """Each method with a twin whose kernel it takes, and one of each class of methods with both; HIVE edits pictures."""
    rows = {name: entry for name, entry in registry.METHODS.items() if name != "hive"}
    diffusion = [(name, "AudioLDM2Pipeline") for name in rows if name not in FLOWS]
    first = {entry.target: name for name, entry in reversed(rows.items())}
    return [*diffusion, *((name, "LongCatAudioDiTPipeline") for name in rows if name in (*FLOWS, *first.values()))]


@pytest.mark.parametrize(("name", "pipeline_class"), methods_on_twins())
def test_every_method_trains_the_twins(
    name: str, pipeline_class: str, tmp_path: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "DENOISING", 3)  # steps on the twins mean nothing: as few as every method takes
    monkeypatch.setattr(tiny, "SHOWN", 1)
    needs = registry.find("methods", name)[0].needs
    flags = ["--pipeline", "nobody/nothing", "--pipeline-class", pipeline_class, "--tiny", "--lora.rank", 2]
    flags += ["--data", "hf:nobody/nothing"] if needs.data in ("pairs", "labels") else ["--prompts", "hf:nobody/nothing/p.jsonl"]
    outcome = run_cli("train", "--method", name, *flags, "--reward", "loudness", "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 0 for line in lines)
    weights = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    assert any(bool(weight.any()) for key, weight in weights.items() if "lora_B" in key)
    assert "loudness" in json.loads((tmp_path / "run" / "eval.json").read_text())["rewards"]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a speech model and its prompts."""
    folder = tmp_path_factory.mktemp("speech")
    audioldm2(speech=True).save_pretrained(folder / "model")
    lines = [{"prompt": "a calm voice", "transcript": f"number {word}"} for word in NUMBERS]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_a_speech_model_from_prompts_to_pairs_and_back(speech: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    same = ["--pipeline", speech / "model", "--prompts", speech / "p.jsonl"]
    flags = [*same, *FEW, "--method", "draft", "--method.inference_steps", 3, "--reward", "loudness", "--eval-rewards", "silence"]
    outcome = run_cli("train", *flags, "--output", "run")
    assert outcome.status == 0, outcome.err
    run = tmp_path / "run"
    assert "Again: diffalign sample" in outcome.err
    assert "--prompt 'a calm voice' --transcript 'number " in outcome.err
    kept = [json.loads(line) for line in (run / "prompts" / "train.jsonl").read_text().splitlines()]
    assert {"prompt", "transcript"} == set(kept[0])
    for stem in ("step-000000", "step-000002", "before-after-before", "before-after-after"):
        heard = read_wav(run / "samples" / f"{stem}-0.wav")
        assert (heard.sample_rate, len(heard.waveform)) == (16000, 5120)
        assert heard.waveform.std() > 1e-4
    assert Image.open(run / "samples" / "before-after.png").size == (60 + 132, 40 + 2 * 68), "two mel spectrograms"
    assert set(json.loads((run / "eval.json").read_text())["rewards"]) == {"loudness", "silence"}

    outcome = run_cli("sample", "run", "--prompt", "a voice", "--transcript", "seven", "--transcript", "eight", "--output", "out")
    assert outcome.status == 0, outcome.err
    written = [Path(line) for line in outcome.out.splitlines()]
    assert [path.suffix for path in written] == [".png", *[".wav"] * 4]
    assert len({path.read_bytes() for path in written[1:]}) == 4, "two prompts, before and after"
    for words, says in (
        (["--transcript", "café"], 'the prompt "café" cannot be said: its tokenizer lacks'),
        (["--prompt", "rain"], "the prompt 'rain' has none"),
        ([], "No prompts: give --prompt TEXT, for speech --transcript TEXT"),
        (["--prompt", "a", "--prompt", "b", "--transcript", "x", "--transcript", "y", "--transcript", "z"], "3 transcripts for 2 prompts"),
    ):
        outcome = run_cli("sample", "run", *words)
        assert outcome.status == 2
        assert says in outcome.err

    making = ["--reward", "loudness", "--sample-steps", 3, "--batch-size", 4, "--pairs", 4]
    outcome = run_cli("pairs", "--pipeline", "run", *making, "--output", "pairs")
    assert outcome.status == 0, outcome.err
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert pairs[0]["chosen"].startswith("sounds/")
    assert pairs[0]["transcript"].startswith("number ")
    chosen = read_wav(tmp_path / "pairs" / pairs[0]["chosen"])
    assert torch.equal(chosen.waveform, rounded(chosen.waveform))
    outcome = run_cli("score", "--reward", "loudness", tmp_path / "pairs" / pairs[0]["chosen"], "--prompt", "a calm voice")
    assert float(outcome.out.split("\t")[0]) == pytest.approx(pairs[0]["chosen_score"], rel=1e-4), "of the file, as its bits are"
    again = run_cli("pairs", "--pipeline", "run", *making, "--output", "pairs")
    assert again.status == 0, again.err

    flags = [*same[:2], *FEW, "--method", "diffusion-dpo", "--data", "pairs", "--output", "run2"]
    outcome = run_cli("train", *flags)
    assert outcome.status == 0, outcome.err
    assert "sounds embedded anew" in outcome.err

    assert run_cli("train", "--resume", "run", "--steps", 3).status == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    outcome = run_cli("eval", "run", "--reward", "silence", "--limit", 1)
    assert outcome.status == 0, outcome.err
    assert (run / "eval-after-0.wav").is_file()
    outcome = run_cli("export", "run")
    assert outcome.status == 2
    assert "no programme reads a kohya file of a AudioLDM2Pipeline" in outcome.err


def test_data_at_another_rate_and_of_another_length(speech: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    (tmp_path / "d").mkdir()
    for name, size in (("a", 8000), ("b", 300)):
        write_wav(tmp_path / "d" / f"{name}.wav", torch.linspace(-1, 1, size), 8000)
    line = {"transcript": "one", "chosen": "a.wav", "rejected": "b.wav"}
    (tmp_path / "d" / "pairs.jsonl").write_text(json.dumps(line))
    flags = ["--pipeline", speech / "model", *FEW[:-2], "--method", "diffusion-dpo", "--eval-size", 0]
    outcome = run_cli("train", *flags, "--data", "d", "--output", "run")
    assert outcome.status == 0, outcome.err
    assert "2 sounds embedded anew; of 2 sounds 2 resampled to 16000 Hz, 1 cut to 0.32 s" in outcome.err
    (tmp_path / "d" / "b.wav").write_bytes(b"no sound")
    outcome = run_cli("train", *flags, "--data", "d", "--output", "other")
    assert outcome.status == 2
    assert "b.wav" in outcome.err
    assert "is no .wav file" in outcome.err


@pytest.mark.parametrize(
    ("name", "reward", "says"),
    [
        ("AudioLDM2Pipeline", "jpeg-compressibility", "jpeg-compressibility judges pictures, and this pipeline makes sound"),
        ("LongCatAudioDiTPipeline", "hps-v2.1", "hps-v2.1 judges pictures, and this pipeline makes sound"),
        ("StableDiffusionPipeline", "loudness", "loudness judges sound, and this pipeline makes pictures"),
    ],
)
def test_a_reward_of_other_media_is_refused_before_anything_is_loaded(
    name: str, reward: str, says: str, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": name}))  # there is nothing that could be loaded
    (tmp_path / "p.txt").write_text("a dog\n")
    same = ["--pipeline", "model", "--prompts", "p.txt"]
    right = "silence" if "makes sound" in says else "jpeg-compressibility"
    for words in (
        ["train", "--method", "ddpo", "--reward", reward],
        ["check", "--method", "ddpo", "--reward", reward],
        ["train", "--method", "ddpo", "--reward", right, "--eval-rewards", reward],
        ["train", "--method", "ddpo", "--reward", right, "--guard", reward],
        ["pairs", "--reward", reward, "--output", "pairs"],
    ):
        outcome = run_cli(words[0], *same, *words[1:])
        assert outcome.status == 2
        assert says in outcome.err
    outcome = run_cli("train", *same, "--method", "hive", "--data", "shapes-edit", "--reward", right)
    assert ("hive is for image, and this pipeline makes audio" in outcome.err) == (right == "silence")


def test_a_composed_reward_with_metadata_under_a_guard(speech: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    voices = ("calm", "loud")
    lines = [
        {"prompt": f"a {voices[i % 2]} voice", "transcript": word, "metadata": {"voice": voices[i % 2]}} for i, word in enumerate(NUMBERS)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts = [{"name": "silence", "weight": 2.0}, {"name": "loudness", "target": -30.0, "when": {"voice": "calm"}}]
    (tmp_path / "c.yaml").write_text(json.dumps({"reward": {"parts": parts}, "guard": {"rewards": ["loudness"], "size": 2, "every": 1}}))
    flags = ["--pipeline", speech / "model", "--prompts", "p.jsonl", *FEW, "--method", "ddpo", "--config", "c.yaml", "--output", "run"]
    flags += ["--method.inference_steps", 3, "--method.batches", 2]
    outcome = run_cli("train", *flags)
    assert outcome.status == 0, outcome.err
    run = tmp_path / "run"
    found = json.loads((run / "eval.json").read_text())
    assert {"compose", "compose/silence"} <= set(found["rewards"])
    assert [json.loads(line)["step"] for line in (run / "guard.jsonl").read_text().splitlines()] == [0, 2], "ddpo: two updates a round"
    assert found["guard"] is not None
    kept = [json.loads(line) for line in (run / "prompts" / "train.jsonl").read_text().splitlines()]
    assert {"prompt", "transcript", "metadata"} == set(kept[0])
    read_wav(run / "samples" / "step-000002-0.wav")

    words = ["--pipeline", "run", "--sample-steps", 3, "--batch-size", 4, "--output", "pairs"]
    outcome = run_cli("pairs", *words)
    assert outcome.status == 0, outcome.err
    made = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    calm = next(row for row in made if row["prompt"] == "a calm voice")
    one = tmp_path / "pairs" / calm["chosen"]
    outcome = run_cli("score", "--reward", "silence", "loudness", "--reward.loudness.target", -30, "--reward.silence.weight", 2, one)
    assert outcome.status == 0, outcome.err
    total, _, *raw = outcome.out.strip().split("\t")
    assert float(total) == pytest.approx(calm["chosen_score"], rel=1e-3)
    assert [each.split()[0] for each in raw] == ["silence", "loudness"]


def test_rewards_are_trained_on_pictures_alone(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    for name, level in (("a", 0.5), ("b", 0.1)):
        write_wav(tmp_path / f"{name}.wav", level * torch.ones(100), 8000)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"transcript": "one", "chosen": "a.wav", "rejected": "b.wav"}))
    for words in (["train", "--model", "shapes-clip", "--output", "made"], ["eval", "--reward", "shapes-clip"]):
        outcome = run_cli("reward", words[0], "--data", tmp_path, *words[1:])
        assert outcome.status == 2
        assert "is a sound, and what is asked for here looks at pictures" in outcome.err


def test_a_live_pipeline_is_trained_from_python(tmp_path: Path) -> None:
    @diffalign.reward(differentiable=True, modality="audio", sample_rate=8000)
    def brief(media: torch.Tensor, prompts: Any) -> torch.Tensor:
        assert media.shape[1] == 2560
        assert prompts.spoken[0] in NUMBERS
        return -media[:, 1280:].square().mean(1)

    pipe = audioldm2(speech=True)
    prompts = [diffalign.SpokenPrompt("a voice", word) for word in NUMBERS]
    small: dict[str, Any] = dict(steps=1, batch_size=2, sample_steps=2, inference_steps=2, eval_size=2, guidance_scale=2.0)
    run = diffalign.align(pipe, method="draft", reward=brief, prompts=prompts, output=tmp_path / "run", **small)
    assert run.pipeline is pipe
    assert pipe("a voice", transcription="one", num_inference_steps=2).audios.shape == (1, 5120)
    again = diffalign.load(tmp_path / "run", pipe=audioldm2(speech=True))
    made = [p("a voice", transcription="one", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).audios
            for p in (pipe, again.pipeline)]  # fmt: skip
    assert torch.equal(*made)
