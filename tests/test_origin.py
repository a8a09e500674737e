"""What made a run and of what: one rule for every method, with data and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import run_folders

from diffalign.console import evaluated
from diffalign.errors import InputError
from diffalign.origin import check_finished, evaluation_of, origin_of, reached

REWARD = {"name": "shapes-clip"}


@pytest.mark.parametrize(
    ("config", "method", "of", "judges", "prompts"),
    [
        ({"method": {"name": "draft"}, "reward": REWARD}, "draft", "shapes-clip", ("shapes-clip",), True),
        ({"method": {"name": "diffusion-dpo"}, "reward": REWARD, "data": "/d/p"}, "diffusion-dpo", "/d/p", (), False),
        ({"method": {"name": "d3po"}, "reward": REWARD, "data": "/d/p"}, "d3po", "/d/p", (), False),
        ({"method": {"name": "d3po"}, "reward": REWARD}, "d3po", "shapes-clip", ("shapes-clip",), True),
        (
            {"method": {"name": "hive"}, "reward": REWARD, "data": "shapes-edit"},
            "hive",
            "shapes-clip and shapes-edit",
            ("shapes-clip",),
            False,
        ),
        ({"method": {"name": "refl"}, "reward": REWARD, "data": "/d/p"}, "refl", "shapes-clip and /d/p", ("shapes-clip",), True),
        (
            {"method": {"name": "ddpo"}, "reward": {"name": "compose", "parts": [{"name": "a"}, {"name": "/b.py:c"}]}},
            *("ddpo", "compose", ("a", "/b.py:c"), True),
        ),
        ({"steps": 3}, "", "", (), True),
        (
            {
                "method": {"name": "draft"},
                "reward": REWARD,
                "merged": {"runs": [{"run": "/r/a", "weight": 0.5}, {"run": "/r/b", "weight": -1}], "methods": ["ddpo"], "rewards": ["x"]},
            },
            *("merge", "a x 0.5, b x -1", ("x",), False),
        ),
    ],
)
def test_what_a_run_was_made_of(config: dict[str, Any], method: str, of: str, judges: tuple[str, ...], prompts: bool) -> None:
    found = origin_of(config)
    assert (found.method, found.of, found.judges, found.prompts) == (method, of, judges, prompts)


def test_how_far_a_run_came(tmp_path: Path) -> None:
    run = run_folders.make(tmp_path / "run")
    rows, config = run.metrics, run.config
    fired = [{"step": 2, "fired": {"measure": "m"}}]
    assert reached(run, config, rows, []).kind == "finished"
    assert (reached(run, config, rows[:2], []).kind, reached(run, config, rows[:2], fired).kind) == ("unfinished", "guarded")
    assert reached(run, config, rows, fired).kind == "finished", "it went on from there"
    assert reached(run, {**config, "merged": {"runs": []}}, [], []).kind == "merged"
    (run.path / "lora").rmdir()
    for said in (config, {**config, "merged": {"runs": []}}):
        assert reached(run, said, rows[:2], fired).kind == "unfinished", "without weights nothing is whole"
    with pytest.raises(InputError, match=f"is unfinished, at step 4 of 4: diffalign train --resume {run.path}"):
        check_finished(run)


def test_an_evaluation_that_does_not_say_so_is_asked_what_was_trained_on(tmp_path: Path) -> None:
    run = run_folders.make(tmp_path / "run", prompts=["a", "b"])
    assert evaluation_of(run)["trained_on"] == 16, "the training prompts themselves, with other noise"
    run.write_prompts("train", ["a", "c"])
    assert evaluation_of(run)["trained_on"] == 1
    run.write_prompts("train", ["c"])
    assert evaluation_of(run)["trained_on"] == 0


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"prompts": 8}, "8 held-out prompts"),
        ({"prompts": 8, "draws": 3, "trained_on": 0}, "8 held-out prompts, 3 samples of each"),
        ({"prompts": 8, "draws": 1, "trained_on": 8}, "8 training prompts"),
        ({"prompts": 8, "draws": 2, "trained_on": 3}, "8 prompts, 3 of them trained on, 2 samples of each"),
    ],
)
def test_what_an_evaluation_is_of(evaluation: dict[str, Any], said: str) -> None:
    assert evaluated(evaluation) == said
