"""Composed rewards in trainings: on the command line, in files, in logs and evaluations, resumed, and in two real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_distributed import torchrun
from tiny import PROMPTS

import diffalign
from diffalign import checkpoint
from diffalign.config import check_needs, resolve
from diffalign.data import TextPrompt, batch_of, read_file, read_prompts, write_file
from diffalign.errors import InputError
from diffalign.types import Prompts

SMALL: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "lr_schedule": "constant", "inference_steps": 2, "sample_steps": 2,
    "guidance_scale": 1.0, "eval_size": 4, "eval_rewards": [], "device": "cpu",
}  # fmt: skip


def parts_of(files: Path) -> list[dict[str, Any]]:
    red = {"name": f"{files}/rewards.py:red", "normalise": "running", "weight": 2.0, "when": "red|blue"}
    return [red, {"name": f"{files}/rewards.py:plain", "label": "bright", "normalise": "running"}]


def ddpo(files: Path, output: Path, **given: Any) -> Any:
    """A run whose parts have running statistics, of the tiny random model."""
    rounds = {"batches": 2, "samples": 2, "updates": 1, "advantage": "group"}
    settings = {**SMALL, **rounds, "reward": parts_of(files), "prompts": str(files / "prompts.txt"), **given}
    return diffalign.align(files / "model", method="ddpo", output=output, **settings)


def test_from_the_command_line_to_the_run_and_back(run_cli: Any, files: Path, tmp_path: Path) -> None:
    flags = ["--pipeline", files / "model", "--prompts", files / "prompts.txt", "--method.inference-steps", 2, "--sample-steps", 2]
    flags += ["--steps", 1, "--batch-size", 2, "--eval-size", 3, "--guidance-scale", 1, "--device", "cpu"]
    (tmp_path / "rewards.py").write_text((files / "rewards.py").read_text())
    rewards = ["--reward", "rewards.py:red", "jpeg-compressibility", "--reward.weights", "1", "-0.5", "--reward.combine", "min"]
    rewards += ["--reward.jpeg-compressibility.when", "red|grey"]
    outcome = run_cli("train", "--method", "draft", *flags, *rewards)
    assert outcome.status == 2
    assert "draft follows the reward's gradient, and these parts have none: jpeg-compressibility." in outcome.err
    ddpo_flags = ["--method", "ddpo", "--method.batches", 1, "--method.updates", 1, "--eval-rewards", "rewards.py:plain"]
    outcome = run_cli("train", *ddpo_flags, *flags, *rewards, "--output", "run")
    assert outcome.status == 0, outcome.err
    run = diffalign.load(tmp_path / "run")
    fields = {"label": "red", "weight": 1.0, "normalise": "none"}
    jpeg = {
        "name": "jpeg-compressibility",
        "sign": -1,
        "label": "jpeg-compressibility",
        "weight": -0.5,
        "normalise": "none",
        "when": "red|grey",
    }
    recorded = {"name": "compose", "combine": "min", "parts": [{"name": f"{tmp_path}/rewards.py:red", **fields}, jpeg]}
    assert run.config["reward"] == recorded
    table = run.evaluation["rewards"]
    held = [prompt for prompt in run.read_prompts("heldout") if "red" in str(prompt) or "grey" in str(prompt)]
    assert next(iter(table)) == "compose"
    assert list(table)[-1] == "plain"
    assert set(table) - {"compose/jpeg-compressibility"} == {"compose", "compose/red", "plain"}
    assert ("compose/jpeg-compressibility" in table) == bool(held)

    again = run_cli("train", "--config", "run/config.yaml", "--print-config")
    assert yaml.safe_load(again.out)["reward"] == recorded
    changed = run_cli("train", "--config", "run/config.yaml", "--reward.red.weight", "3", "--print-config")
    assert [part["weight"] for part in yaml.safe_load(changed.out)["reward"]["parts"]] == [3, -0.5]
    heavier = run_cli("train", "--config", "run/config.yaml", "--reward.weights", "4", "5", "--print-config")
    assert [part["weight"] for part in yaml.safe_load(heavier.out)["reward"]["parts"]] == [4, 5]
    other = run_cli("train", "--config", "run/config.yaml", "--reward", "jpeg-compressibility", "--print-config")
    assert yaml.safe_load(other.out)["reward"] == {"name": "jpeg-compressibility", "sign": -1}
    assert run_cli("train", "--resume", "run", "--steps", 2).status == 0

    picture = sorted((tmp_path / "run" / "samples").glob("*.png"))[0]
    scored = run_cli("score", *rewards[:6], picture, "--prompt", "a red dog")
    total, file, red, jpeg_score = scored.out.strip().split("\t")
    raw = {word.split()[0]: float(word.split()[1]) for word in (red, jpeg_score)}
    assert file == str(picture)
    assert float(total) == pytest.approx(raw["red"] - 0.5 * raw["jpeg-compressibility"], rel=1e-4)


def test_a_config_file_of_three_forms(run_cli: Any, tmp_path: Path) -> None:
    shapes = {"name": "shapes-clip", "folder": None, "label": "shapes-clip", "weight": 1.0, "normalise": "none"}
    texts = {
        "reward: [shapes-clip, aesthetic]": [1.0, 1.0],
        "reward:\n  parts: [shapes-clip, {name: aesthetic, weight: 0.1, at_least: 5, when: 'portrait|photo'}]": [1.0, 0.1],
        "reward:\n  name: compose\n  combine: min\n  weights: [2, 3]\n  parts: [{name: shapes-clip}, aesthetic]": [2, 3],
    }
    for text, weights in texts.items():
        (tmp_path / "config.yaml").write_text(text)
        out = yaml.safe_load(run_cli("train", "--config", "config.yaml", "--print-config").out)["reward"]
        assert [part["weight"] for part in out["parts"]] == weights
        assert out["parts"][0] == {**shapes, "weight": weights[0]}
    (tmp_path / "config.yaml").write_text("reward:\n  parts: [{name: aesthetic, precison: bf16}]")
    outcome = run_cli("train", "--config", "config.yaml")
    assert (outcome.status, outcome.err) == (2, "error: There is no setting 'precison' of the part aesthetic. Did you mean 'precision'?\n")
    (tmp_path / "config.yaml").write_text("reward:\n  combien: min\n  parts: [aesthetic]")
    assert "Did you mean 'reward.combine'?" in run_cli("train", "--config", "config.yaml").err
    for words in (["compose"], ["aesthetic", "shapes-clip", "--reward.weights", "1"]):
        assert run_cli("train", "--reward", *words).status == 2
    assert "compose" in run_cli("list", "rewards").out


def test_tiny_and_check_work_with_parts(run_cli: Any, files: Path) -> None:
    flags = ["--pipeline", files / "model", "--prompts", files / "prompts.txt", "--tiny", "--method", "draft", "--device", "cpu"]
    rewards = ["--reward", "aesthetic", f"{files}/rewards.py:red", "--reward.aesthetic.normalise", "running"]
    trained = run_cli("train", *flags, *rewards, "--output", "dry")
    assert trained.status == 0, trained.err
    assert {"reward/aesthetic", "reward/red"} <= json.loads((files.cwd() / "dry" / "metrics.jsonl").read_text().splitlines()[0]).keys()
    assert run_cli("eval", "dry").status == 0
    assert run_cli("check", *flags, *rewards).status == 0


def test_pairs_are_labelled_by_the_total(files: Path, tmp_path: Path) -> None:
    parts = [{"name": f"{files}/rewards.py:red", "weight": -1.0}, {"reward": lambda x, p: 100 * x[:, 2].mean((1, 2)), "label": "blue"}]
    folder = diffalign.make_pairs(
        files / "model", reward=parts, output=tmp_path / "pairs", prompts=["a dog"], sample_steps=2, batch_size=2, guidance_scale=1.0
    )
    from diffalign.media import read_image

    row = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    blue = [float(read_image(folder / row[which])[2].mean()) for which in ("chosen", "rejected")]
    assert blue[0] > blue[1]
    running = diffalign.compose([{**part, "normalise": "running"} for part in parts])
    with pytest.raises(InputError, match="and diffalign pairs is none"):
        diffalign.make_pairs(files / "model", reward=running, output=tmp_path / "other", prompts=["a dog"])


def test_running_statistics_are_those_of_all_scores_and_survive_a_stop(files: Path, tmp_path: Path) -> None:
    whole = ddpo(files, tmp_path / "whole")
    state = checkpoint.newest(whole.path / "checkpoints")[0]
    statistics = state["memory"]["reward"]["statistics"]
    assert statistics.keys() == {"red", "bright"}
    assert statistics["bright"][0] == 4 * 2 * 2 * 4, "every sample of four rounds"
    rows = whole.metrics
    assert statistics["bright"][1] == pytest.approx(np.mean([row["reward/bright"] for row in rows]), rel=1e-5)
    stopped = ddpo(files, tmp_path / "stopped", steps=2)
    resumed = diffalign.resume(stopped.path, steps=4)
    again = checkpoint.newest(resumed.path / "checkpoints")[0]
    assert again["memory"]["reward"] == state["memory"]["reward"], "to the last bit"
    for name, weight in state["parameters"].items():
        assert torch.equal(weight, again["parameters"][name])
    costs = {"seconds", "device_seconds", "peak_memory_mb"}
    for ours, theirs in zip(resumed.metrics, rows, strict=True):
        assert {k: v for k, v in ours.items() if k not in costs} == {k: v for k, v in theirs.items() if k not in costs}
    assert resumed.evaluation == whole.evaluation


def test_statistics_in_an_evaluation_are_frozen(files: Path, tmp_path: Path) -> None:
    from diffalign.api import evaluate_run

    run = ddpo(files, tmp_path / "run", steps=1)
    (mean_of_red, scale_of_red), (mean, scale) = (_moments(run, name) for name in ("red", "bright"))
    found = evaluate_run(run)["rewards"]
    assert found == run.evaluation["rewards"]
    held = run.read_prompts("heldout")[:4]
    own = sum("red" in str(prompt) or "blue" in str(prompt) for prompt in held) / len(held)
    for when in ("before", "after"):
        red = found["compose/red"][when] if own else 0.0
        expected = own * 2 * (red - mean_of_red) / scale_of_red + (found["compose/bright"][when] - mean) / scale
        assert found["compose"][when] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def _moments(run: Any, name: str) -> tuple[float, float]:
    count, mean, squares = checkpoint.newest(run.path / "checkpoints")[0]["memory"]["reward"]["statistics"][name]
    return mean, (squares / count) ** 0.5


def test_draft_raises_both_parts_on_shapes(files: Path, tmp_path: Path) -> None:
    reward = [{"name": "shapes-clip"}, {"name": f"{files}/rewards.py:red", "weight": 2.0}]
    run = diffalign.align(method="draft", reward=reward, steps=8, batch_size=8, eval_size=12, eval_rewards=[], output=tmp_path / "run")
    found = run.evaluation["rewards"]
    assert found["compose/shapes-clip"]["difference"] > 0
    assert found["compose/red"]["difference"] > 0
    assert found["compose"]["after"] == pytest.approx(found["compose/shapes-clip"]["after"] + 2 * found["compose/red"]["after"], abs=1e-5)
    for row in run.metrics:
        assert row["reward"] == pytest.approx(row["reward/shapes-clip"] + 2 * row["reward/red"], abs=1e-5)


def test_ddpo_logs_parts_without_a_gradient(tmp_path: Path) -> None:
    run = diffalign.align(
        method="ddpo", reward=["jpeg-compressibility", "shapes-checker"], steps=2, batch_size=4, samples=2, batches=1, eval_size=0,
        output=tmp_path / "run",
    )  # fmt: skip
    for row in run.metrics:
        assert row["reward/jpeg-compressibility"] < 0 <= row["reward/shapes-checker"] <= 1
        assert row["reward"] == pytest.approx(row["reward/jpeg-compressibility"] + row["reward/shapes-checker"], rel=1e-5)


def test_two_processes_have_the_statistics_of_one(files: Path, tmp_path: Path) -> None:
    rounds = {"method": "ddpo", "batches": 2, "updates": 1, "advantage": "global"}
    call = {**SMALL, **rounds, "steps": 2, "eval_size": 0, "reward": parts_of(files), "prompts": str(files / "prompts.txt")}
    (tmp_path / "work.py").write_text(WORK)
    done = torchrun("work.py", json.dumps({**call, "batch_size": 2}), str(files / "model"), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = diffalign.align(files / "model", output=tmp_path / "one", **call)
    both = diffalign.load(tmp_path / "two")
    assert both.config["processes"] == 2
    ours, theirs = (checkpoint.newest(run.path / "checkpoints")[0]["memory"]["reward"]["statistics"] for run in (both, alone))
    for name in ("red", "bright"):
        assert ours[name][0] == theirs[name][0] > 2
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    for two, one in zip(both.metrics, alone.metrics, strict=True):
        for metric in ("reward", "reward/red", "reward/bright", "loss"):
            assert two[metric] == pytest.approx(one[metric], rel=1e-3, abs=1e-4), metric


WORK = """
import json, sys
import diffalign
diffalign.align(sys.argv[2], output="two", **json.loads(sys.argv[1]))
"""


# --- prompts ---


def test_metadata_of_prompts_reach_the_parts(files: Path, tmp_path: Path) -> None:
    lines = [{"prompt": text, "metadata": {"style": "photo" if "dog" in text else "oil", "n": i}} for i, text in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"prompt": "a plain one"}])))
    prompts = read_prompts(str(tmp_path / "prompts.jsonl"))
    assert prompts[0] == TextPrompt(PROMPTS[0], (("style", "photo"), ("n", 0)))
    assert prompts[-1] == TextPrompt("a plain one")
    write_file(tmp_path / "again.jsonl", prompts)
    assert read_file(tmp_path / "again.jsonl", None) == prompts
    expected = Prompts((PROMPTS[0], "a plain one"), metadata=({"style": "photo", "n": 0}, {}))
    assert batch_of([prompts[0], prompts[-1]]) == expected
    photo = {"name": f"{files}/rewards.py:red", "when": {"style": "photo"}}
    oil = {"name": f"{files}/rewards.py:plain", "when": {"style": "oil"}}
    given = {**SMALL, "method": "ddpo", "steps": 1, "batch_size": 8, "batches": 1, "updates": 1, "prompts": tmp_path / "prompts.jsonl"}
    with pytest.raises(InputError, match="No part of the reward is for the prompt 'a plain one'"):
        diffalign.align(files / "model", reward=[photo, oil], output=tmp_path / "run", **given)
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = diffalign.align(files / "model", reward={"parts": [photo, {**oil, "label": "bright"}]}, output=tmp_path / "run", **given)
    assert {"reward/red", "reward/bright"} <= run.metrics[0].keys()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "metadata": "photo"}')
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 1: metadata is an object of texts and numbers"):
        read_prompts(str(tmp_path / "prompts.jsonl"))


def test_methods_that_score_their_data_first_take_no_running_statistics(files: Path) -> None:
    given = {"method": "hive", "pipeline": "shapes-edit", "reward": {"name": "compose", "parts": parts_of(files)}}
    with pytest.raises(InputError, match="hive scores its data before it begins"):
        check_needs(resolve(given))
