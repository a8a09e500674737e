"""Stored trajectories: D3PO on pairs that were sampled before and judged since, from `diffalign pairs --trajectories` on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from by_hand import total, value
from PIL import Image
from torch import Tensor
from toy import Network, Toy, a_context, diffusion, move, nearness

from diffalign import examples, trajectories
from diffalign.cli import main
from diffalign.errors import InputError
from diffalign.methods.d3po import D3PO
from diffalign.models import make_policy
from diffalign.rounds import sample_round
from diffalign.sampling import ddim, replay, rollout
from diffalign.settings import Settings
from diffalign.types import Examples, Prompts, Taken, Trajectory

PROMPTS = Prompts(("0", "0.5", "-1"))


@pytest.mark.parametrize("random_steps", [None, 1])
def test_from_labels_the_loss_is_that_of_the_same_samples_with_the_reward(random_steps: int | None):
    """On what a round has sampled, its pairs written out as labels say the same as the reward: loss and gradient."""
    policy = move(Toy(diffusion(), Network()), 0.05)
    method = D3PO(inference_steps=3, batches=1, updates=1, random_steps=random_steps)
    own = list(method.losses(policy, nearness, PROMPTS, a_context(PROMPTS)))

    shape: dict[str, Any] = {"batches": 1, "samples": 2, "steps": 3, "random_steps": random_steps}
    round_ = sample_round(policy, nearness, PROMPTS, a_context(PROMPTS), kernel=ddim(1.0), **shape)
    states, first = round_.trajectory.states.transpose(0, 1).chunk(2), round_.scores[:3] > round_.scores[3:]
    better, worse = (torch.where(first[:, None, None], *pair) for pair in (states, states[::-1]))
    taken = Taken(round_.trajectory.schedule, round_.trajectory.actions, eta=1.0, guidance_scale=1.0)
    pairs = Examples(PROMPTS, better, worse, taken=taken)
    judged = list(method.losses(policy, None, pairs, a_context(PROMPTS)))

    assert value(judged) == pytest.approx(value(own), abs=1e-12)
    assert torch.allclose(total(judged, policy), total(own, policy), atol=1e-12)
    assert "reward" in own[0].metrics
    assert "reward" not in judged[0].metrics


def test_only_the_first_random_steps_are_trained_on_where_all_were_random():
    policy = Toy(diffusion(), Network())
    trajectory = rollout(policy, policy.encode(PROMPTS), steps=3, kernel=ddim(1.0), rng=torch.Generator().manual_seed(0))
    states = trajectory.states.transpose(0, 1)
    pairs = Examples(PROMPTS, states, states.flip(0), taken=Taken(trajectory.schedule, trajectory.actions, 1.0, 1.0))
    assert trajectory.actions.all()
    policy.graphs.clear()
    method = D3PO(inference_steps=3, batches=1, updates=1, random_steps=1)
    list(method.losses(policy, None, pairs, a_context(PROMPTS)))
    one = sum(policy.graphs)
    policy.graphs.clear()
    list(D3PO(inference_steps=3, batches=1, updates=1).losses(policy, None, pairs, a_context(PROMPTS)))
    assert sum(policy.graphs) == 3 * one


FLAGS = ["--trajectories", "--random-steps", 2, "--batch-size", 5, "--sample-steps", 3, "--guidance-scale", 2]


def command(files: Path, output: Path, *more: object) -> list[str]:
    where = ["pairs", "--pipeline", files / "model", "--reward", f"{files}/rewards.py:red", "--prompts", files / "prompts.txt"]
    return [str(word) for word in (*where, *FLAGS, "--output", output, *more)]


@pytest.fixture(scope="module")
def folder(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pairs") / "made"
    assert main(command(files, made)) == 0
    return made


def the_policy(files: Path, guidance_scale: float = 2.0) -> Any:
    return make_policy(Settings(pipeline=str(files / "model"), guidance_scale=guidance_scale), train=False)


def read(folder: Path, policy: Any, **given: Any) -> Any:
    chosen: dict[str, Any] = {"reward": None, "limit": None, "skip": False, "seed": 0, "say": lambda _: None, **given}  # pyright: ignore
    return examples.read(str(folder), "trajectories", policy, **chosen)


def test_the_command_keeps_what_was_sampled(folder: Path, files: Path):
    """The picture is the decoded last state; each step lands where the base model's distribution says that random steps land."""
    policy = the_policy(files)
    train, held = read(folder, policy)
    assert len(train) + len(held) == len(tiny.PROMPTS)
    batch = train.take(range(4))
    assert batch.x_0.shape == batch.rejected.shape == (4, 4, *batch.x_0.shape[2:])
    row = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    stored = trajectories.load(folder / row["chosen"].replace(".png", ".safetensors"))
    with torch.no_grad():
        picture = policy.decode(stored.states[-1:])
    assert torch.allclose(picture[0], pixels(folder / row["chosen"]), atol=0.5 / 255 + 1e-4)
    taken = train.taken
    assert taken.actions.tolist() == [True, True, False]
    states = batch.x_0.transpose(0, 1)
    trajectory = Trajectory(states, torch.zeros(3, 4), taken.actions, taken.schedule, policy.encode(batch.prompts))
    with torch.no_grad():
        for step in range(3):
            now = replay(policy, trajectory, torch.full((4,), step), torch.arange(4), ddim(taken.eta * taken.actions[step]))
            if not taken.actions[step]:
                assert torch.allclose(now.x_s, now.action.mean, atol=1e-4)
                continue
            z = (now.x_s - now.action.mean) / now.action.std.float().view(-1, 1, 1, 1)
            assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
            assert abs(float(z.std()) - 1) < 0.2


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) / 255


def test_the_noise_of_the_first_step_is_not_that_of_the_first_state(folder: Path, files: Path):
    policy = the_policy(files)
    for source in read(folder, policy):
        batch, taken = source.take(range(len(source))), source.taken
        for side in (batch.x_0, batch.rejected):
            states = side.transpose(0, 1)
            trajectory = Trajectory(states, torch.zeros(3, len(side)), taken.actions, taken.schedule, policy.encode(batch.prompts))
            with torch.no_grad():
                now = replay(policy, trajectory, torch.zeros(len(side), dtype=torch.int64), torch.arange(len(side)), ddim(taken.eta))
            z = (now.x_s - now.action.mean).flatten(1)
            for noise, start in zip(z, states[0].flatten(1), strict=True):
                assert abs(float(torch.corrcoef(torch.stack([noise, start]))[0, 1])) < 0.4


def test_the_same_command_writes_the_same_bytes(folder: Path, files: Path, tmp_path: Path, run_cli: Callable[..., Any]):
    """Also where it was stopped between the samples of a batch."""
    assert run_cli(*command(files, tmp_path / "again", "--pairs", 3)).status == 0
    assert run_cli(*command(files, tmp_path / "again")).status == 0
    names = sorted(p.relative_to(folder) for p in (folder / "images").iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert sum(name.suffix == ".safetensors" for name in names) == 2 * len(tiny.PROMPTS)


def test_d3po_trains_on_labels_without_a_reward(folder: Path, files: Path, tmp_path: Path, run_cli: Callable[..., Any]):
    outcome = run_cli(
        "train", "--method", "d3po", "--pipeline", files / "model", "--data", folder, "--prompts", files / "prompts.txt", "--steps", 2,
        "--guidance-scale", 2, "--batch-size", 4, "--method.batches", 2, "--method.updates", 1, "--sample-steps", 2,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "rounds of 4 pairs x 2 batches" in outcome.err
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert [row["reward_queries"] for row in metrics] == [0, 0]


def a_copy(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Of the folder; and the trajectory of its first chosen picture."""
    shutil.copytree(folder, tmp_path / "copy")
    chosen = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])["chosen"]
    return tmp_path / "copy", (tmp_path / "copy" / chosen).with_suffix(".safetensors")


def spoil(path: Path, **tensors: Tensor) -> None:
    path.write_bytes(safetensors.torch.save({**safetensors.torch.load(path.read_bytes()), **tensors}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "There is no trajectory .*--trajectories keeps them"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "holds no trajectory, or a damaged one"),
    "not a number": (lambda path: spoil(path, states=torch.full((4, 4, 8, 8), torch.nan)), "holds no trajectory: shapes, types or numbers"),
    "too few states": (lambda path: spoil(path, states=torch.zeros(3, 4, 8, 8)), "holds no trajectory: shapes, types or numbers"),
    "no states": (lambda path: path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)})), "holds no trajectory"),
}


@pytest.mark.parametrize("name", [*DAMAGE])
def test_what_is_damaged_is_named_or_left_out(name: str, folder: Path, files: Path, tmp_path: Path):
    damage, message = DAMAGE[name]
    copy, path = a_copy(folder, tmp_path)
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        read(copy, the_policy(files))
    assert path.name in str(caught.value)
    train, held = read(copy, the_policy(files), skip=True)
    assert len(train) + len(held) == len(tiny.PROMPTS) - 1


def test_another_guidance_or_model_is_refused(folder: Path, files: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"sampled with guidance 2, and the training has 1: --guidance-scale 2"):
        read(folder, the_policy(files, guidance_scale=1.0))
    copy, path = a_copy(folder, tmp_path)
    spoil(path, states=torch.zeros(4, 4, 4, 4))
    with pytest.raises(InputError, match=r"another way|latents of shape"):
        read(copy, the_policy(files))


def test_bad_flags(files: Path, tmp_path: Path, run_cli: Callable[..., Any]):
    for flags, says in ((["--random-steps", 1], "and --trajectories"), (["--trajectories", "--random-steps", 99], "give 1 to")):
        outcome = run_cli("pairs", "--reward", f"{files}/rewards.py:red", "--output", tmp_path / "x", *flags)
        assert (outcome.status, says in outcome.err) == (2, True), outcome.err
    outcome = run_cli("train", "--method", "d3po", "--pipeline", files / "model", "--prompts", files / "prompts.txt")
    assert outcome.status == 2
    assert "needs a reward" in outcome.err
    assert "diffalign pairs --trajectories" in outcome.err


def test_changed_data_is_not_resumed(folder: Path, files: Path, tmp_path: Path, run_cli: Callable[..., Any]):
    """The order of the examples is in the checkpoint as numbers: they would mean others, or the same ones judged the other way."""
    copy, _ = a_copy(folder, tmp_path)
    flags = ["--pipeline", files / "model", "--prompts", files / "prompts.txt", "--steps", 1, "--guidance-scale", 2, "--batch-size", 4]
    rounds = ["--method.batches", 1, "--method.updates", 1, "--sample-steps", 2, "--eval-size", 0]
    outcome = run_cli("train", "--method", "d3po", "--data", copy, *flags, *rounds, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert f"with {copy}: 11 examples" in outcome.err
    swapped = [json.loads(line) for line in (copy / "pairs.jsonl").read_text().splitlines()]
    for row in swapped:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        row["chosen_score"], row["rejected_score"] = row["rejected_score"], row["chosen_score"]
        row["chosen_score"] = row["rejected_score"] + 1
    (copy / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    outcome = run_cli("train", "--resume", tmp_path / "run", "--steps", 2)
    assert outcome.status == 2
    assert "not those that the run was made with" in outcome.err
