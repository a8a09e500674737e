"""The proof of `scripts/train_reward_shapes.py`, short and for one seed: a reward is trained here, and a model on it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_reward_shapes.py"


def test_a_reward_is_trained_on_the_checkers_pairs_and_draft_on_it_raises_the_checker(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("train_reward_shapes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.prove(tmp_path, seed=0, short=True)
    assert script.missed(found, short=True) == []
    assert found["pairs"]["pairs"] == 60
    assert found["draft"]["trained"]["difference"] > 0
