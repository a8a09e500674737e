"""The code of docs/rewards/your-own.md, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diffalign
from diffalign import checkpoint, registry
from diffalign.types import LearnedReward, StatefulReward

PAGE = Path(diffalign.__file__).parents[1] / "docs" / "rewards" / "your-own.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL) if PAGE.is_file() else []
NAMES = ["red", "Contrast", "Head", "Brighter"]
SMALL: dict[str, Any] = {
    "method": "draft", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "lr_schedule": "constant", "inference_steps": 2, "k": 1,
    "sample_steps": 2, "guidance_scale": 1.0, "eval_size": 2, "eval_rewards": [], "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`file.py:Name` of a block."""
    file = tmp_path_factory.mktemp("own") / f"{request.param.lower()}_reward.py"
    file.write_text(BLOCKS[NAMES.index(request.param)])
    return f"{file}:{request.param}"


def test_the_page_says_what_is_run_and_each_is_short() -> None:
    assert len(BLOCKS) == len(NAMES)
    for name, block in zip(NAMES, BLOCKS, strict=True):
        code = [line for line in block.splitlines() if line.strip() and not re.match(r"from |import ", line)]
        assert len(code) <= 20, name
        assert re.search(rf"^(def|class) {name}\b", block, re.MULTILINE), name


def test_it_trains(named: str, files: Path, tmp_path: Path) -> None:
    name = named.rpartition(":")[2]
    reward: Any = {"name": named}
    if name == "Head":
        save_file({"weight": torch.tensor([1.0, 0.0, 0.0])}, tmp_path / "head.safetensors")
        reward["checkpoint"] = str(tmp_path / "head.safetensors")
    if name == "Contrast":
        reward["most"] = 0.2
    run = diffalign.align(files / "model", reward=reward, prompts=files / "prompts.txt", output=tmp_path / "run", **SMALL)
    assert run.evaluation["rewards"].keys() == {name}
    assert "checkpoint" not in run.config["reward"] or Path(run.config["reward"]["checkpoint"]).is_file()
    found, _ = registry.find("rewards", named)
    made = found(**{k: v for k, v in reward.items() if k != "name"}) if isinstance(found, type) else found
    assert isinstance(made, LearnedReward) == (name == "Head")
    assert isinstance(made, StatefulReward) == (name == "Brighter")
    if name == "Brighter":
        usual = checkpoint.newest(run.path / "checkpoints")[0]["memory"]["reward"]["usual"]
        first, second = (row["reward"] for row in run.metrics)
        assert usual == pytest.approx(0.1 * first + 0.1 * second, rel=1e-5)
        assert usual != 0
        longer = diffalign.resume(run.path, steps=3)
        later = checkpoint.newest(run.path / "checkpoints")[0]["memory"]["reward"]["usual"]
        assert later == pytest.approx(usual + 0.1 * longer.metrics[2]["reward"], rel=1e-5)
        from diffalign.api import evaluate_run

        assert evaluate_run(longer)["rewards"] == longer.evaluation["rewards"]


def test_it_is_a_part_and_has_a_twin(named: str, files: Path, tmp_path: Path) -> None:
    parts = [named, {"name": f"{files}/rewards.py:plain", "weight": 0}]
    given = {**SMALL, "method": "ddpo", "batches": 1, "updates": 1, "steps": 1, "tiny": True}
    given.pop("k")
    run = diffalign.align(files / "model", reward=parts, prompts=files / "prompts.txt", output=tmp_path / "run", **given)
    assert f"reward/{named.rpartition(':')[2]}" in run.metrics[0]
