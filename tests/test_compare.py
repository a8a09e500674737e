"""`diffalign compare`: what the table says is what the runs' folders and the network say, and what cannot be compared is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from PIL import Image

import diffalign
from diffalign.cli import main
from diffalign.compare import compare_runs
from diffalign.evaluate import diversity, kl_to_base

STEPS = 3


def train(files: Path, output: Path, **flags: Any) -> Path:
    chosen = {
        "pipeline": files / "model", "reward": f"{files / 'rewards.py'}:red", "prompts": files / "prompts.txt", "method.inference_steps": 2,
        "steps": STEPS, "batch_size": 2, "guidance_scale": 2, "learning_rate": 0.03, "lora.rank": 2, "output": output, **flags,
    }  # fmt: skip
    assert main(["train", *(f"--{name}={value}" for name, value in chosen.items())]) == 0
    return output


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first/, of another seed second/, and ddpo/ on another reward."""
    folder = tmp_path_factory.mktemp("runs")
    train(files, folder / "first")
    train(files, folder / "second", seed=1)
    train(files, folder / "ddpo", method="ddpo", reward="jpeg-compressibility", **{"method.batches": 1, "method.updates": 1})
    return folder


def test_the_record_of_a_run(runs: Path) -> None:
    compared = compare_runs([runs / "first", runs / "ddpo", runs / "first" / ".." / "first"], limit=3)
    first, ddpo = compared["runs"]
    assert (first["run"], first["method"], first["reward"], first["steps"], first["seed"]) == ("first", "draft", "red", STEPS, 0)
    run = diffalign.load(runs / "first")
    assert first["evaluation"] == run.evaluation
    assert (first["reward_queries"], ddpo["reward_queries"]) == (2 * STEPS, 2 * STEPS)
    assert first["network_samples"] == 2 * 2 * 2 * STEPS, "2 samples, 2 steps, both branches of the guidance"
    assert ddpo["network_samples"] == 2 * 2 * (2 + 2) * STEPS, "sampled, and replayed"
    assert first["seconds"] == run.metrics[-1]["seconds"]
    prompts = run.read_prompts("heldout")[:3]
    chosen: dict[str, Any] = dict(steps=2, seed=1, batch_size=2)
    assert first["kl_to_base"] == kl_to_base(run.policy, prompts, **chosen) > 0
    assert first["diversity"]["after"] == diversity(run.policy, prompts, samples=4, **chosen)
    assert first["diversity"]["before"] == pytest.approx(ddpo["diversity"]["before"])
    assert first["diversity"]["before"] != first["diversity"]["after"]
    assert compared["notes"] == []


def test_the_command(runs: Path, run_cli: Any, tmp_path: Path) -> None:
    outcome = run_cli("compare", runs / "first", runs / "second", runs / "ddpo", "--limit", 2, "--output", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    for word in ("first", "second", "draft", "ddpo", "red", "jpeg-compressibility", "queries", "diversity", "held out"):
        assert word in outcome.out
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    for record in written["runs"]:
        assert f"{record['kl_to_base']:.3g}" in outcome.out
        (held_out,) = record["evaluation"]["rewards"].values()
        assert f"{held_out['before']:.3f} -> {held_out['after']:.3f}" in outcome.out
    assert Image.open(tmp_path / "out" / "compare.png").height > 600, "a row of plots for each of the two rewards"


def test_no_model_is_loaded_without_kl_and_diversity(runs: Path, run_cli: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "first", copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "pipeline": "some/model"}))
    (copy / "prompts" / "heldout.jsonl").write_text('{"prompt": "a hen"}\n')
    outcome = run_cli("compare", runs / "first", copy, "--limit", 0)
    assert outcome.status == 0, outcome.err
    assert "base models differ" in outcome.err
    assert "held-out prompts differ" in outcome.err
    assert "kl_to_base" not in json.loads((tmp_path / "compare" / "compare.json").read_text())["runs"][0]


def test_a_run_that_was_not_evaluated_is_marked(files: Path, runs: Path, run_cli: Any, tmp_path: Path) -> None:
    train(files, tmp_path / "plain", eval_size=0)
    outcome = run_cli("compare", tmp_path / "plain", runs / "first", "--limit", 0)
    assert outcome.status == 0
    assert "not evaluated" in outcome.out
    assert "has no held-out evaluation: diffalign eval" in outcome.err


def test_bad_input(runs: Path, run_cli: Any, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "first", unfinished)
    (unfinished / "metrics.jsonl").write_text("".join((unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]))
    weightless = tmp_path / "weightless"
    shutil.copytree(runs / "first", weightless, ignore=shutil.ignore_patterns("lora"))
    (tmp_path / "file").touch()
    for arguments, message in (
        ([], "no runs to compare"),
        ([tmp_path], "is no run"),
        ([tmp_path / "nothing"], "is no run"),
        ([runs / "first", unfinished], f"at step 2 of 3: diffalign train --resume {unfinished}"),
        ([weightless], f"diffalign train --resume {weightless}"),
        ([runs / "first", "--limit", -1], "--limit is -1"),
        ([runs / "first", "--limit", 0, "--output", tmp_path / "file"], "cannot be written"),
    ):
        outcome = run_cli("compare", *arguments)
        assert outcome.status == 2, outcome.out
        assert message in outcome.err
        assert "Traceback" not in outcome.err


def test_a_run_of_a_live_pipeline_is_given_as_an_object(tmp_path: Path) -> None:
    run = diffalign.align(
        tiny.stable_diffusion(), reward="jpeg-compressibility", method="ddpo", prompts=tiny.PROMPTS, output=tmp_path / "live", steps=1,
        batch_size=2, inference_steps=2, batches=1, updates=1,
    )  # fmt: skip
    (record,) = compare_runs([run], limit=2)["runs"]
    assert record["kl_to_base"] > 0
    with pytest.raises(diffalign.InputError, match="live pipeline object"):
        compare_runs([run.path], limit=2)
