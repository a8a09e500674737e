"""What is saved where a round fails: the boundary before it, so that the resumed run is the undisturbed one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_loop import make

import diffalign
from diffalign.contract import FunctionReward
from diffalign.errors import InputError
from diffalign.run import Run
from diffalign.saving import Saving
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward

SMALL = {"steps": 4, "batch_size": 2, "inference_steps": 2, "eval_size": 2, "learning_rate": 0.01, "checkpoint_every": 1000, "ema": 0.9}
ROUND = {"batches": 1, "samples": 2}


class Flaky:
    """Redness, that fails at the call of this number."""

    differentiable = True
    modality = "image"

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at, self.calls = fails_at, 0

    def __call__(self, images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise InputError("The reward is away.")
        return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


@pytest.mark.parametrize(
    ("method", "fields", "fails_at", "step"),
    [
        ("ddpo", {**ROUND, "updates": 1}, 6, 2),  # in the third round, between two rollouts
        ("ddpo", {**ROUND, "updates": 2, "steps": 6}, 6, 4),
        ("dpok", {"batches": 2, "policy_steps": 1, "value_steps": 1}, 6, 2),  # a value network in the memory
        ("draft", {"accumulate": 2}, 8, 3),  # the first of two batches has left its gradient; one call is the check's
    ],
)
def test_a_reward_that_fails_costs_nothing(
    method: str, fields: dict[str, Any], fails_at: int, step: int, files: Path, tmp_path: Path
) -> None:
    def train(name: str, reward: Flaky) -> Run:
        given: dict[str, Any] = {**SMALL, **fields, "prompts": str(files / "prompts.txt"), "output": tmp_path / name}
        return diffalign.align(str(files / "model"), method=method, reward=reward, **given)

    whole = train("whole", Flaky())
    reward = Flaky(fails_at)
    with pytest.raises(InputError, match=rf"The reward is away\.\nSaved at step {step}\. Go on: diffalign train --resume {tmp_path}/cut\n"):
        train("cut", reward)
    assert [p.name for p in sorted((tmp_path / "cut" / "checkpoints").iterdir())] == ["step-000000", f"step-{step:06d}"]
    again = diffalign.resume(tmp_path / "cut", reward=reward)
    same = ("step", "loss", "reward", "grad_norm", "reward_queries", "network_samples")
    assert [[row[k] for k in same] for row in again.metrics] == [[row[k] for k in same] for row in whole.metrics]
    weights = [(run.path / "lora" / "pytorch_lora_weights.safetensors").read_bytes() for run in (again, whole)]
    assert weights[0] == weights[1]


@dataclass(frozen=True)
class Fails:
    """A step a round; the round `at` changes all that a round may change, and fails, after a step or before it."""

    at: int
    late: bool = False
    needs: ClassVar[Needs] = Needs(reward=False)
    defaults: ClassVar[Mapping[str, Any]] = {}

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        seen = context.memory.setdefault("seen", [torch.zeros(1)])
        seen[0] += 1  # in place, as an optimiser's state
        torch.rand(3, generator=context.rng)
        context.batches(batch, 2)
        loss = sum((p.sum() for p in policy.module.parameters() if p.requires_grad), torch.zeros(()))
        if int(seen[0]) == self.at:
            if self.late:
                yield Loss(loss)
            raise InputError("It fails.")
        yield Loss(loss)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def run_until_it_fails(method: Fails, folder: Path) -> tuple[list[Any], str]:
    """The state at each boundary, and what is said of the failure."""
    training, rows = make(method, steps=6)
    saving, states = Saving(Run(folder), training, 2, 0), [copy.deepcopy(training.state())]
    with pytest.raises(InputError) as caught:
        states.extend(copy.deepcopy(training.state()) for _ in saving.lasting(rows))
    return states, str(caught.value)


def test_what_is_saved_is_the_boundary(tmp_path: Path) -> None:
    states, said = run_until_it_fails(Fails(3), tmp_path)
    assert said == f"It fails.\nSaved at step 2. Go on: diffalign train --resume {tmp_path}"
    found, _ = Run(tmp_path).newest_checkpoint()
    assert found["step"] == 2
    assert same(found, states[2])
    assert not same(found, states[1])


def test_where_a_step_was_taken_since_the_last_checkpoint_stays(tmp_path: Path) -> None:
    _, said = run_until_it_fails(Fails(3, late=True), tmp_path)
    assert said.startswith("It fails.\nSaved at step 0, of 3: steps were taken since, and the round's rest cannot be saved. Go on: ")
    assert not (tmp_path / "checkpoints").exists()


def test_a_failure_in_the_first_round_has_its_checkpoint_already(tmp_path: Path) -> None:
    _, said = run_until_it_fails(Fails(1), tmp_path)
    assert "Saved at step 0. Go on" in said
    assert not (tmp_path / "checkpoints").exists(), "it was the session's to write"


def test_a_disk_that_takes_nothing_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(OSError, match="checkpoints"):
        Saving(Run(tmp_path), make(Fails(9), steps=2)[0], 2, 0).checkpoint()
    _, said = run_until_it_fails(Fails(3), tmp_path)
    assert said.startswith("It fails.\nSaved at step 0, of 2")


def test_an_evaluation_that_fails_says_how_to_go_on(files: Path, tmp_path: Path) -> None:
    calls = list[int]()

    def late(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) > 2:
            raise InputError("The reward is away.")
        return images.mean((1, 2, 3))

    given: dict[str, Any] = {**SMALL, "steps": 2, "prompts": str(files / "prompts.txt"), "output": tmp_path / "run", "batches": 1}
    with pytest.raises(InputError, match=rf"away\.\nThe weights are saved\. Evaluate them: diffalign eval {tmp_path}/run$"):
        diffalign.align(str(files / "model"), method="ddpo", reward=FunctionReward(late), **given)
