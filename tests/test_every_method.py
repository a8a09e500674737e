"""Every registered method through the command line on the embedded model that it is for: two steps, and weights that have moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import diffalign
from diffalign import registry
from diffalign.config import resolve

SMALL = {"batch_size": 4, "steps": 2, "eval_size": 4, "sample_steps": 2, "accumulate": 1, "sample_every": 100}
ROUND = {"batches": 1, "samples": 2, "policy_steps": 1, "forwards": 1, "value_steps": 1, "updates": 1, "pretrain_batches": 1}
FLOWS = ("flow-grpo", "flow-grpo-fast", "dance-grpo")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs for the methods on pairs and on labels."""
    folder = tmp_path_factory.mktemp("pairs") / "made"
    return diffalign.make_pairs("shapes", reward="shapes-clip", output=folder, pairs=12, sample_steps=2, batch_size=4)


def embedded_models() -> list[tuple[str, str]]:
    """Each method with the model that it is for, and all but those of edits with the flow too."""
    needs = {name: registry.find("methods", name)[0].needs for name in registry.METHODS}
    first = [(name, "shapes-edit" if needs[name].data == "edits" else "shapes") for name in registry.METHODS if name not in FLOWS]
    return [*first, *((name, "shapes-flow") for name in registry.METHODS if needs[name].data != "edits")]


@pytest.mark.parametrize(("name", "pipeline"), embedded_models())
def test_it_trains_on_its_embedded_model(name: str, pipeline: str, pairs: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    found, _ = registry.find("methods", name)
    fields = vars(resolve({"method": name, "pipeline": pipeline}).method)
    flags: dict[str, Any] = {
        **SMALL,
        **{f"method.{field}": value for field, value in ROUND.items() if field in fields},
    }
    if pipeline == "shapes-flow" and "batches" in fields:
        flags["method.inference_steps"] = 4  # it has no settings for most of them, and their own 50 steps take long
    if found.needs.data in ("pairs", "labels"):
        flags["data"] = pairs
    words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value)]
    outcome = run_cli("train", "--method", name, "--pipeline", pipeline, *words, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in rows)
    (lora,) = (tmp_path / "run" / "lora").glob("*.safetensors")
    assert any(bool(weight.any()) for key, weight in load_file(lora).items() if "lora_B" in key or "lora.up" in key)
    assert "before" in next(iter(json.loads((tmp_path / "run" / "eval.json").read_text())["rewards"].values()))


def test_an_evaluation_keeps_what_was_measured_on_the_data(pairs: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    words = [word for flag, value in SMALL.items() for word in (f"--{flag.replace('_', '-')}", value)]
    outcome = run_cli("train", "--method", "diffusion-dpo", "--data", pairs, *words, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    before = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert 0 <= before["pairs"]["implicit_accuracy"] <= 1
    assert run_cli("eval", tmp_path / "run", "--limit", 2).status == 0
    after = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert after["prompts"] == 2
    assert after["pairs"] == before["pairs"]


def test_what_was_trained_on_is_not_called_held_out(pairs: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """Four pairs, of which none can be held out, one of whose prompts is among those of the evaluation too."""
    asked = [json.loads(line)["prompt"] for line in (pairs / "pairs.jsonl").read_text().splitlines()][:4]
    (tmp_path / "held.txt").write_text(f"{asked[0]}\ntwo small green squares on a yellow background\n")
    words = [word for flag, value in SMALL.items() for word in (f"--{flag.replace('_', '-')}", value)]
    flags = ["--data-limit", 4, "--eval-prompts", "held.txt", "--eval-rewards", "[shapes-checker]", "--output", "run"]
    outcome = run_cli("train", "--method", "diffusion-dpo", "--data", pairs, *words, *flags)
    assert outcome.status == 0, outcome.err
    assert "1 of 2 held-out prompts are among those trained on" in outcome.err
    assert "2 prompts, 1 of them trained on" in outcome.out + outcome.err
    run = diffalign.load(tmp_path / "run")
    assert run.read_prompts("train") == asked, "not the prompts that the model brings along"
    assert (run.evaluation["trained_on"], run.evaluation["pairs"]["trained_on"]) == (1, 4)
    assert not (run.path / "curve.png").exists(), "no step had a reward"
    page = (run.path / "report.html").read_text()
    assert f"diffusion-dpo on shapes with {pairs}" in page
    assert "Of 4 pairs that it was trained on" in page
    assert "not trained on" not in page
    assert run_cli("push", "run", "anna/x", "--dry-run", "out").status == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data | made: 4 examples of " in card
    assert "of 4 pairs that it was trained on" in card
    assert "On 2 prompts, 1 of them trained on" in card
    assert "| prompts |" not in card
    assert "type: prompts" in card
    assert "heldout and train" in card
    (tmp_path / "held.txt").write_text(f"{asked[0]}\n")
    assert run_cli("eval", "run", "--prompts", "held.txt").status == 0
    assert run_cli("push", "run", "anna/x", "--dry-run", "again").status == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "1 training prompts" in card
    assert "split: train" in card
    assert "Held-out scores" not in card


@pytest.mark.parametrize("method", ["d3po", "raft"])
def test_the_check_of_a_constant_reward_says_so(method: str, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    (tmp_path / "r.py").write_text("def constant(images, prompts):\n    return images.mean((1, 2, 3)) * 0\n")
    outcome = run_cli("check", "--method", method, "--reward", "r.py:constant", "--batch-size", 4)
    assert "no two samples of a prompt differ in reward" in outcome.out + outcome.err
    assert outcome.status == 1  # as for every check that fails


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method", "diffusion-dpo", "--pipeline", "shapes-edit"], "This pipeline edits pictures, and the prompt"),
        (
            ["--method", "hive", "--pipeline", "shapes", "--data", "shapes-edit", "--reward", "shapes-clip"],
            "hive trains pipelines that edit",
        ),
    ],
)
def test_data_of_the_wrong_kind_of_pipeline(flags: list[str], says: str, pairs: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    outcome = run_cli("train", *flags, *([] if "--data" in flags else ["--data", pairs]), "--output", tmp_path / "run")
    assert outcome.status == 2
    assert says in outcome.err
    assert not (tmp_path / "run").exists()
