"""Dry runs: what is cut and what stays, what is made up, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import diffalign
from diffalign import registry, tiny
from diffalign.config import resolve
from diffalign.contract import CheckedReward, FunctionReward, as_reward
from diffalign.data import PicturePrompt, read_prompts
from diffalign.errors import InputError
from diffalign.models import class_of, open_pipeline
from diffalign.registry import Entry
from diffalign.rewards.hps import HPS
from diffalign.settings import Settings
from diffalign.types import PromptField

HUB = {"pipeline": "nobody/nothing", "tiny": True}


@pytest.mark.parametrize("name", sorted(registry.PIPELINES))
def test_the_twin_is_of_the_class_and_always_the_same(name: str) -> None:
    settings = Settings(**HUB, pipeline_class=name)
    before = torch.get_rng_state()
    pipe, again = open_pipeline(settings), open_pipeline(settings)
    assert type(pipe).__name__ == name
    assert torch.equal(torch.get_rng_state(), before)
    parts = [part for part in pipe.components if isinstance(pipe.components[part], torch.nn.Module)]
    assert {"vae", "text_encoder"} < {*parts}
    for part in parts:
        weights, others = (getattr(p, part).state_dict() for p in (pipe, again))
        assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
        assert sum(weight.numel() for weight in weights.values()) < 1_000_000


def test_the_class_that_is_named_is_held_against_the_models_own(files: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    (tmp_path / "r.py").write_text("def never(images, prompts):\n    raise SystemError('the reward was asked')\n")
    flags = ["--pipeline", files / "model", "--reward", "r.py:never", "--prompts", "animals", "--method", "ddpo"]
    outcome = run_cli("train", *flags, "--pipeline-class", "StableDiffusionXLPipeline")
    assert outcome.status == 2
    assert "is a StableDiffusionPipeline, and pipeline_class says StableDiffusionXLPipeline" in outcome.err
    assert class_of(Settings(pipeline=str(files / "model"), pipeline_class="StableDiffusionPipeline")) == "StableDiffusionPipeline"
    with pytest.raises(InputError, match="pipeline_class says FluxPipeline"):  # what is here is looked at in a dry run too
        class_of(Settings(pipeline=str(files / "model"), pipeline_class="FluxPipeline", tiny=True))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pipeline_class": "StableDifusionPipeline"}, "has no adapter. Did you mean 'StableDiffusionPipeline'"),
        ({}, "is not on this machine"),  # without a class the index is asked, and there is no network
    ],
)
def test_a_class_that_is_wrong_or_cannot_be_known(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        diffalign.align("nobody/nothing", method="ddpo", reward="jpeg-compressibility", prompts="animals", tiny=True, **given)


def test_an_adapter_without_a_twin_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bare_adapter")
    vars(module)["Bare"] = type("Bare", (), {"of": staticmethod(lambda pipe, **options: None)})
    monkeypatch.setitem(sys.modules, "bare_adapter", module)
    monkeypatch.setitem(registry.PIPELINES, "BarePipeline", Entry("bare_adapter:Bare", "Of another package."))
    with pytest.raises(InputError, match="The adapter of BarePipeline makes no tiny twin"):
        open_pipeline(Settings(**HUB, pipeline_class="BarePipeline"))


def test_a_live_pipeline_has_no_twin(files: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(Settings(**HUB, pipeline_class="StableDiffusionPipeline"))
    with pytest.raises(InputError, match="a live pipeline has no twin"):
        diffalign.align(pipe, method="ddpo", reward="jpeg-compressibility", prompts=["a dog"], output=tmp_path / "run", tiny=True)


def test_what_is_cut_and_what_stays() -> None:
    method = {"name": "refl", "inference_steps": 40, "first": 30, "last": 39, "phi": 0.5, "pretrain_batches": 8}
    given = {"steps": 500, "accumulate": 16, "height": 512, "lora": {"rank": 3, "init": "x"}, "learning_rate": 0.5, "log": ["wandb"]}
    plan = resolve({**HUB, "method": method, "reward": "hps-v2", **given, "precision": "bf16", "device": "cpu", "ema": 0.9})
    small = tiny.cut(plan)
    assert vars(small.method) == {
        **vars(plan.method), "inference_steps": 10, "first": 7, "last": 9, "pretrain_batches": 1,
    }  # fmt: skip
    s = small.settings
    assert (s.steps, s.batch_size, s.accumulate, s.eval_size, s.sample_steps, s.data_limit) == (2, 2, 2, 2, 4, 12)
    assert (s.height, s.lora.init, s.log, s.precision) == (None, None, [], "fp32")
    assert (s.learning_rate, s.lora.rank, s.ema, s.guidance_scale) == (0.5, 3, 0.9, 7.5)
    assert tiny.cut(small) == small
    few = resolve({**HUB, "method": {"name": "ddpo", "inference_steps": 3, "batches": 1}, "reward": "hps-v2", "steps": 1, "batch_size": 1})
    assert vars(tiny.cut(few).method) == vars(few.method)
    assert (tiny.cut(few).settings.steps, tiny.cut(few).settings.sample_steps) == (1, 3)


def test_what_the_twin_cannot_have_is_said_and_an_embedded_model_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"method": "ddpo", "reward": "jpeg-compressibility", "height": 64, "width": 48, "lora": {"init": "x"}}
    tiny.cut(resolve({**HUB, **given}))
    assert "leaves out height 64, width 48, lora.init x: its tiny model is of another size" in capsys.readouterr().err
    s = tiny.cut(resolve({**given, "pipeline": "shapes", "tiny": True})).settings
    assert (s.height, s.width, s.lora.init) == (64, 48, "x")
    assert "leaves out" not in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "says"), [("--prompts", "no prompt file .*mistyped"), ("--data", "mistyped")])
def test_a_path_that_is_missing_is_an_error_in_a_dry_run_too(flag: str, says: str, run_cli: Callable[..., Any]) -> None:
    method = "ddpo" if flag == "--prompts" else "diffusion-dpo"
    reward = ["--reward", "hps-v2"] if method == "ddpo" else []
    outcome = run_cli(
        "train",
        "--method",
        method,
        *reward,
        "--pipeline",
        "nobody/nothing",
        "--tiny",
        flag,
        "mistyped",
        "--pipeline-class",
        "StableDiffusionPipeline",
    )
    assert outcome.status == 2
    assert re.search(says, outcome.err)


def test_rewards_with_weights_are_opened_as_their_twins() -> None:
    checked = CheckedReward(as_reward(HPS(batch_size=3)), "hps-v2", tiny=True)
    checked.open()
    twin = checked.reward
    assert isinstance(twin, HPS)
    assert twin.batch_size == 3
    assert sum(p.numel() for p in twin.towers.network.parameters()) < 2_000_000
    checked.open()
    assert checked.reward is twin
    own = CheckedReward(FunctionReward(lambda x, p: x.mean((1, 2, 3))), "mine", tiny=True)
    before = own.reward
    own.open()
    assert own.reward is before


def test_what_is_here_is_read_and_what_is_not_is_made_up(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a boat\n")
    settings = Settings(**HUB)
    here = ("animals", "shapes", "shapes-edit", str(tmp_path / "p.txt"), str(tmp_path), None)
    assert [tiny.made(settings, source) for source in here] == [False] * 6
    assert tiny.made(settings, "hf:nobody/nothing/p.txt")
    assert not tiny.made(settings, str(tmp_path / "missing"))
    assert not tiny.made(replace(settings, tiny=False), "hf:nobody/nothing/p.txt")
    assert all(isinstance(prompt, str) for prompt in tiny.prompts(()))
    both: list[tuple[PromptField, ...]] = [("image",), ("image", "mask")]
    for takes in both:
        made = tiny.prompts(takes)
        assert made == tiny.prompts(takes)
        assert all(isinstance(prompt, PicturePrompt) and (prompt.open_both()[1] is not None) == ("mask" in takes) for prompt in made)
    with pytest.raises(InputError, match="makes up no trajectories"), tiny.data("trajectories", ()):
        pass


@pytest.mark.parametrize(
    ("method", "kind", "pipeline_class"),
    [
        ("kto", "labels", "StableDiffusionPipeline"),
        ("refl", "pictures", "StableDiffusionPipeline"),
        ("diffusion-dpo", "pairs", "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_data_that_is_missing_is_made_up(method: str, kind: str, pipeline_class: str, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    flags = ["--pipeline", "nobody/nothing", "--pipeline-class", pipeline_class, "--data", "hf:nobody/nothing", "--tiny"]
    reward = ["--reward", "hps-v2", "--prompts", "hf:nobody/nothing/p.txt"] if method == "refl" else []
    outcome = run_cli("train", "--method", method, *flags, *reward, "--eval-size", 0, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert "data made up in the place of hf:nobody/nothing" in outcome.err
    assert f": 12 {kind} of " in outcome.err
    if method == "refl":
        assert "prompts made up in the place of" in outcome.err


def test_a_dry_run_is_a_run_like_any_other(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a boat"}\n')
    flags = ["--pipeline", "nobody/nothing", "--pipeline-class", "StableDiffusionPipeline", "--prompts", "p.jsonl", "--method", "draft"]
    outcome = run_cli("train", *flags, "--reward", "pickscore", "--tiny", "--output", "run", "--height", 512, "--width", 512)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "run" / "prompts" / "train.jsonl").read_text() == '{"prompt": "a boat"}\n'
    refused = run_cli("train", "--resume", "run", "--tiny")
    assert refused.status == 2
    assert "goes on as one without being told" in refused.err
    outcome = run_cli("train", "--resume", "run", "--steps", 3)
    assert outcome.status == 0, outcome.err
    run = diffalign.load(tmp_path / "run")
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert run_cli("sample", "run", "--prompt", "a boat", "--steps", 2).status == 0
    assert run_cli("eval", "run", "--reward", "hps-v2", "pickscore").status == 0
    assert {*json.loads((tmp_path / "run" / "eval.json").read_text())["rewards"]} == {"hps-v2", "pickscore"}
    pictures = run.pipeline("a boat", num_inference_steps=2, output_type="pt").images
    assert pictures.shape == (1, 3, 16, 16)


def test_the_check_of_a_dry_run(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    flags = ["--pipeline", "nobody/nothing", "--pipeline-class", "StableDiffusionPipeline", "--prompts", "animals", "--method", "draft"]
    outcome = run_cli("check", *flags, "--reward", "aesthetic", "--tiny")
    assert outcome.status == 0, outcome.out + outcome.err
    assert "tiny: A dry run" in outcome.out
    assert "gradient: non-zero in" in outcome.out


def test_an_embedded_model_is_its_own_twin(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    outcome = run_cli("train", "--tiny", "--print-config")
    assert "\ntiny: true\n" in outcome.out
    assert "\nsteps: 2\n" in outcome.out
    outcome = run_cli("train", "--tiny", "--output", "run", "--eval-size", 0)
    assert outcome.status == 0, outcome.err
    assert diffalign.load(tmp_path / "run").plan.settings.pipeline == "shapes"


def test_the_animals_and_lists_in_json(tmp_path: Path) -> None:
    animals = read_prompts("animals")
    assert len(animals) == len(set(animals)) == 45
    assert animals[:3] == ["cat", "dog", "horse"]
    assert animals == read_prompts("animals", "heldout")
    config = resolve({"prompts": "animals", "data": "animals", "method": "refl"}).config()
    assert (config["prompts"], config["data"]) == ("animals", str(Path("animals").absolute()))  # a list, and a folder of that name
    file = tmp_path / "p.json"
    file.write_text('["a dog", {"prompt": " a cat "}]')
    assert read_prompts(str(file)) == ["a dog", "a cat"]
    for text, says in (('{"a": 1}', "is no list"), ("[", "is no JSON"), ("[1]", "entry 1: expected an object"), ("[]", "holds no prompts")):
        file.write_text(text)
        with pytest.raises(InputError, match=says):
            read_prompts(str(file))
