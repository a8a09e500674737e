"""`diffalign pairs`: what it writes, that it goes on where it stopped, and that the offline methods read it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

import diffalign
from diffalign import examples, pairs
from diffalign.api import score_files
from diffalign.contract import FunctionReward
from diffalign.errors import InputError
from diffalign.making import Making
from diffalign.models import make_policy
from diffalign.settings import Settings
from diffalign.types import Prompts

FAST: dict[str, Any] = {"sample_steps": 2, "guidance_scale": 1.0}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of pairs but its lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def red(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


def test_the_command_writes_what_the_offline_methods_read(files: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    outcome = run_cli(
        "pairs", "--pipeline", files / "model", "--reward", f"{files}/rewards.py:red", "--prompts", files / "prompts.txt",
        "--samples", 3, "--batch-size", 4, "--sample-steps", 2, "--guidance-scale", 1, "--seed", 5, "--output", tmp_path / "made",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert outcome.out.strip() == str(tmp_path / "made")
    ranks, best = rows(tmp_path / "made" / "ranks.jsonl"), rows(tmp_path / "made" / "pairs.jsonl")
    assert [row["prompt"] for row in ranks] == tiny.PROMPTS
    assert {name for row in ranks for name in row["images"]} == {f"images/{i:06d}-{j}.png" for i in range(1, 13) for j in range(3)}
    assert [yaml.safe_load((tmp_path / "made" / "pairs.yaml").read_text())[key] for key in ("samples", "seed")] == [3, 5]
    for ranked, pair in zip(ranks, best, strict=True):
        assert ranked["scores"] == sorted(ranked["scores"], reverse=True)
        assert pair == {
            "prompt": ranked["prompt"], "chosen": ranked["images"][0], "rejected": ranked["images"][2],
            "chosen_score": ranked["scores"][0], "rejected_score": ranked["scores"][2],
        }  # fmt: skip
    scored = dict(score_files(f"{files}/rewards.py:red", [tmp_path / "made" / name for name in ranks[7]["images"]], "x"))
    assert list(scored.values()) == pytest.approx(ranks[7]["scores"], abs=1e-6)  # of the file, not of what was rounded into it
    policy = make_policy(Settings(pipeline=str(files / "model"), guidance_scale=1.0), train=False)
    given: dict[str, Any] = {"reward": None, "limit": None, "skip": False, "seed": 0, "say": print}
    train, held = examples.read(str(tmp_path / "made"), "pairs", policy, **given)
    assert len(train) + len(held) == 12
    every, held = examples.read(str(tmp_path / "made" / "ranks.jsonl"), "pairs", policy, **given)
    assert len(every) + len(held) == 36


def test_an_interrupted_command_goes_on_to_the_same_files(files: Path, tmp_path: Path) -> None:
    """Stopped within a batch and after a line was cut short, with batches that do not divide the samples of a prompt."""
    calls = 0

    def stopping(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return red(images, prompts)

    given: dict[str, Any] = {"pairs": 17, "samples": 3, "batch_size": 5, "prompts": tiny.PROMPTS, **FAST}
    named = FunctionReward(red)
    whole = diffalign.make_pairs(files / "model", reward=named, output=tmp_path / "whole", **given)
    stopping.__name__ = "red"
    with pytest.raises(KeyboardInterrupt):
        diffalign.make_pairs(files / "model", reward=FunctionReward(stopping), output=tmp_path / "parts", **given)
    done = rows(tmp_path / "parts" / "ranks.jsonl")
    assert 0 < len(done) < 17
    with (tmp_path / "parts" / "ranks.jsonl").open("ab") as file:  # killed within a line, and within a letter of it
        file.write('{"prompt": "ein Stück'.encode()[:-3])
    with (tmp_path / "parts" / "pairs.jsonl").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 5)
    parts = diffalign.make_pairs(files / "model", reward=named, output=tmp_path / "parts", **given)
    assert contents(parts) == contents(whole)
    assert len(rows(parts / "pairs.jsonl")) == 17
    assert rows(parts / "ranks.jsonl")[12]["prompt"] == tiny.PROMPTS[0]  # round again
    assert (parts / "images/000001-0.png").read_bytes() != (parts / "images/000013-0.png").read_bytes()  # with other noise
    before = contents(parts)
    diffalign.make_pairs(files / "model", reward=named, output=parts, **given)
    assert contents(parts) == before
    diffalign.make_pairs(files / "model", reward=named, output=parts, **{**given, "pairs": 19})
    more = contents(parts)
    assert len(rows(parts / "pairs.jsonl")) == 19
    assert all(more[name] == data for name, data in before.items() if name.startswith("images"))


def test_another_folder_is_refused(files: Path, tmp_path: Path) -> None:
    model, out = files / "model", tmp_path / "out"
    given: dict[str, Any] = {"reward": red, "prompts": ["a dog"], "output": out, **FAST}
    diffalign.make_pairs(model, **given)
    before = contents(out)
    others = [
        {"seed": 1},
        {"sample_steps": 3},
        {"samples": 3},
        {"prompts": ["a cat"]},
        {"reward": lambda images, prompts: red(images, prompts)},
    ]
    for other in others:
        with pytest.raises(InputError, match=r"was made with other settings: \w+ was .*Choose another --output"):
            diffalign.make_pairs(model, **{**given, **other})
    assert contents(out) == before
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another diffalign pairs is at work"):
            diffalign.make_pairs(model, **{**given, "pairs": 5})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for folder in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(InputError, match="exists already, and was not made by diffalign pairs"):
            diffalign.make_pairs(model, **{**given, "output": folder})
    (out / "ranks.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="is damaged"):
        diffalign.make_pairs(model, **given)


def test_samples_that_tie_are_no_pair(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cats(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        return red(images, prompts) * torch.tensor(["cat" in text for text in prompts.text])

    out = diffalign.make_pairs(files / "model", reward=cats, prompts=["a dog", "a cat", "a cow"], output=tmp_path / "a", pairs=2, **FAST)
    assert [row["prompt"] for row in rows(out / "ranks.jsonl")] == ["a dog", "a cat", "a cow", "a dog", "a cat"]
    assert [row["prompt"] for row in rows(out / "pairs.jsonl")] == ["a cat", "a cat"]
    assert "2 pairs; 3 prompts whose samples score the same have none" in " ".join(capsys.readouterr().err.split())
    for name, pairs_wanted in (("b", None), ("c", 5)):  # a constant reward ends, also where it is asked for pairs
        with pytest.raises(InputError, match=r"no two samples differ in reward\. Is .* constant"):
            diffalign.make_pairs(
                files / "model", reward=lambda images, prompts: torch.zeros(len(images)), prompts=["a dog"], output=tmp_path / name,
                pairs=pairs_wanted, batch_size=50, **FAST,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 1}, "samples is 1: give 2 or more"),
        ({"pairs": 0}, "pairs is 0: give 1 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"prompts": None}, "No prompts: give --prompts FILE"),
        ({"prompts": []}, "non-empty list"),
        ({"reward": None}, "pairs need a reward: --reward NAME"),
        ({"reward": "nothing"}, "There is no reward 'nothing'"),
        ({"pipe": "./nowhere"}, "There is no model './nowhere'"),
        ({"stepps": 3}, "There is no setting 'stepps'"),
        ({"reward": FunctionReward(red, modality="audio")}, "judges sound"),
    ],
)
def test_bad_input_leaves_nothing_behind(given: dict[str, Any], message: str, files: Path, tmp_path: Path) -> None:
    good: dict[str, Any] = {"pipe": files / "model", "reward": red, "prompts": ["a dog"], "output": tmp_path / "out"}
    with pytest.raises(InputError, match=message):
        diffalign.make_pairs(**{**good, **given})
    assert not (tmp_path / "out").exists()


def test_bad_flags(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    for flags, message in (
        (["--reward", "shapes-clip"], "output"),
        (["--output", "x", "--sampels", "3"], "Did you mean 'samples'?"),
        (["--output", "x", "--prompts", "none.txt"], "There is no prompt file none.txt"),
    ):
        outcome = run_cli("pairs", *flags)
        assert outcome.status == 2
        assert message in outcome.err
        assert "Traceback" not in outcome.err
    helped = run_cli("pairs", "--help")
    assert helped.status == 0
    assert "--sample-steps" in helped.out
    assert "example: diffalign pairs" in helped.out
    assert not list(tmp_path.iterdir())


def test_what_pairs_and_trainings_are_both_told_means_the_same() -> None:
    """The fields are written in both, since words and defaults differ; what a name means must not."""
    training, making = ({f.name: f for f in fields(kind)} for kind in (Settings, Making))
    shared = training.keys() & making.keys()
    assert {"guidance_scale", "audio_seconds", "vae_precision", "attention", "device", "seed"} <= shared
    otherwise = {name for name in shared if training[name].default != making[name].default}
    assert otherwise == {"batch_size", "sample_steps"}
    assert {name for name in shared if training[name].type != making[name].type} == {"sample_steps"}


def test_a_run_is_a_model_too(files: Path, tmp_path: Path) -> None:
    """Its weights sample, with its settings, prompts and reward."""
    run = diffalign.align(
        files / "model", reward=f"{files}/rewards.py:red", prompts=str(files / "prompts.txt"), steps=2, inference_steps=2, eval_size=0,
        learning_rate=0.1, guidance_scale=2.0, batch_size=2, output=tmp_path / "run",
    )  # fmt: skip
    out = diffalign.make_pairs(tmp_path / "run", output=tmp_path / "out", pairs=2)
    made = yaml.safe_load((out / "pairs.yaml").read_text())
    assert (made["sample_steps"], made["guidance_scale"], made["batch_size"]) == (2, 2.0, 2)
    assert made["reward"]["name"] == f"{files}/rewards.py:red"
    live = diffalign.make_pairs(
        run.pipeline, reward=red, prompts=tiny.PROMPTS, output=tmp_path / "live", pairs=2, sample_steps=2, guidance_scale=2.0, batch_size=2
    )
    base = diffalign.make_pairs(
        files / "model",
        reward=red,
        prompts=tiny.PROMPTS,
        output=tmp_path / "base",
        pairs=2,
        sample_steps=2,
        guidance_scale=2.0,
        batch_size=2,
    )
    pictures = {folder: (folder / "images/000001-0.png").read_bytes() for folder in (out, live, base)}
    assert pictures[out] == pictures[live] != pictures[base]


def test_the_embedded_model_brings_its_settings(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run_cli("pairs", "--pairs", 12, "--output", tmp_path / "shapes")
    assert outcome.status == 0, outcome.err
    made = yaml.safe_load((tmp_path / "shapes" / "pairs.yaml").read_text())
    assert (made["sample_steps"], made["guidance_scale"], made["prompts"]["source"]) == (10, 1.0, "shapes")
    assert made["reward"]["name"] == "shapes-clip"
    assert len(rows(tmp_path / "shapes" / "pairs.jsonl")) == 12


def test_memory_and_speed_settings_make_the_same_pairs_and_leave_a_live_pipeline_as_it_came(files: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"reward": red, "prompts": tiny.PROMPTS[:4], **FAST}
    pipe = tiny.stable_diffusion()
    strides = [p.stride() for p in (*pipe.unet.parameters(), *pipe.vae.parameters())]
    kind = type(next(iter(pipe.unet.attn_processors.values())))
    during, sizes = list[Any](), list[int]()
    hooks = [
        pipe.unet.register_forward_pre_hook(lambda network, _: during.append(type(next(iter(network.attn_processors.values()))))),
        pipe.vae.decoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0]))),
    ]
    knobs: dict[str, Any] = {"attention": "eager", "channels_last": True, "vae_batch_size": 3}
    saving = diffalign.make_pairs(pipe, output=tmp_path / "saving", **given, **knobs)
    for hook in hooks:
        hook.remove()
    assert kind not in during
    assert max(sizes) == 3
    assert [p.stride() for p in (*pipe.unet.parameters(), *pipe.vae.parameters())] == strides
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {kind}
    plain = diffalign.make_pairs(tiny.stable_diffusion(), output=tmp_path / "plain", **given)
    assert [row["prompt"] for row in rows(saving / "pairs.jsonl")] == [row["prompt"] for row in rows(plain / "pairs.jsonl")]
    one, other = (np.asarray(Image.open(folder / "images/000001-0.png")).astype(int) for folder in (saving, plain))
    assert abs(one - other).max() <= 1
    longer = diffalign.make_pairs(tiny.stable_diffusion(), output=tmp_path / "saving", **given, pairs=6)
    assert len(rows(longer / "pairs.jsonl")) == 6, "another machine's settings go on with the folder"
    with pytest.raises(InputError, match="vae_precision was 'fp32', and is 'bf16'"):
        diffalign.make_pairs(tiny.stable_diffusion(), output=tmp_path / "saving", **given, vae_precision="bf16")
    with pytest.raises(InputError, match="offload brings what rests to the CPU"):
        diffalign.make_pairs(files / "model", output=tmp_path / "off", **given, offload=True, device="cpu")


def test_the_place_in_a_batch_and_the_noise_are_the_prompts_own(files: Path) -> None:
    """What makes going on exact: prompt number 3 is the same from wherever its command starts."""
    policy = make_policy(Settings(pipeline=str(files / "model"), guidance_scale=1.0), train=False)
    making = Making(samples=2, sample_steps=2, batch_size=3)
    from diffalign.contract import CheckedReward

    def third(first: int) -> pairs.Outcome:
        blocks = pairs.rank(policy, CheckedReward(FunctionReward(red), "red"), ["a", "b", "c"], making, first)
        return next(outcome for block in blocks for outcome in block if outcome.number == 3)

    one, other = third(0), third(3)
    assert one.prompt == other.prompt == "a"
    for drawn, again in zip(one.samples, other.samples, strict=True):
        assert torch.equal(drawn.medium, again.medium)
        assert drawn.score == again.score
    assert not torch.equal(one.samples[0].medium, one.samples[1].medium)
