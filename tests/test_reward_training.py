"""Training a reward: its losses by hand, that it learns, what its folder holds, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign import reward_training
from diffalign.config import resolve
from diffalign.contract import CheckedReward, FunctionReward, check_gradient
from diffalign.errors import InputError
from diffalign.guarding import trained_on
from diffalign.inputs import named_rewards
from diffalign.judged import Judged
from diffalign.media import read_image
from diffalign.objectives.regression import rating_error
from diffalign.reward_eval import evaluate_rewards, marks_of, open_rewards
from diffalign.reward_objectives import BradleyTerry, ratings_of
from diffalign.reward_training import train_reward
from diffalign.rewards import tiny
from diffalign.rewards.shapes import ShapesCLIP
from diffalign.rewards.trained import Trained
from diffalign.types import LearnedReward, Prompts

COLOURS = ("red", "green", "blue", "white")
QUICK: dict[str, Any] = {"model": "shapes-clip", "steps": 40, "batch_size": 16, "learning_rate": 1e-2, "held_out": 0.25}


def draw(path: Path, seed: int, light: float) -> None:
    """A picture of 32 x 32 pixels around a grey of `light`."""
    noise = np.random.default_rng(seed).normal(light, 0.1, (32, 32, 3)).clip(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise * 255).astype(np.uint8)).save(path)


def prompt(i: int) -> str:
    return f"a {COLOURS[i % 4]} square on a black background {i}"


def pairs(folder: Path, count: int = 40) -> Path:
    """Pairs of which the lighter picture is preferred: with these prompts the cosine prefers the other."""
    rows = list[str]()
    for i in range(count):
        draw(folder / f"{i}-dark.png", 2 * i, 0.35)
        draw(folder / f"{i}-light.png", 2 * i + 1, 0.65)
        rows.append(json.dumps({"prompt": prompt(i), "chosen": f"{i}-light.png", "rejected": f"{i}-dark.png"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder


def rated(folder: Path, count: int = 60) -> Path:
    """Ratings: how light the picture is on a scale from 1 to 5, and one that says the contrary."""
    rows = list[str]()
    for i in range(count):
        light = (i * 7 % 20) / 20
        draw(folder / f"{i}.png", i, light)
        ratings = {"light": 1 + 4 * light, "dark": 10 - 10 * light} if i % 3 else {"light": 1 + 4 * light}
        rows.append(json.dumps({"prompt": prompt(i), "image": f"{i}.png", "ratings": ratings}))
    (folder / "labels.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_reward(data, tmp_path_factory.mktemp("trained") / "light", **QUICK)


def test_bradley_terry_by_hand() -> None:
    """Scores 2 and 1, then 0 and 3: -log sigmoid(1) and -log sigmoid(-3)."""
    scores = {"a": 2.0, "b": 1.0, "c": 0.0, "d": 3.0}
    batch = [Judged("x", ("a", "b")), Judged("y", ("c", "d"))]

    def rate(rows: Sequence[Judged], which: int) -> torch.Tensor:
        return torch.tensor([[scores[row.pictures[which]]] for row in rows])

    losses, margins = BradleyTerry().loss(rate, batch)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))])
    assert margins.tolist() == [[1.0], [-3.0]]
    assert BradleyTerry().measure(margins, batch) == {"accuracy": 0.5}
    smoothed, _ = BradleyTerry(label_smoothing=0.25).loss(rate, batch)
    assert smoothed[0] == pytest.approx(0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1)))


def test_rating_error_by_hand() -> None:
    """(1 - 3)^2 and (2 - 2)^2: mean 2; one aspect alone, 9; none, 0. What was not rated has no gradient."""
    nan = float("nan")
    predicted = torch.tensor([[1.0, 2.0], [4.0, 7.0], [1.0, 1.0]], requires_grad=True)
    error = rating_error(predicted, torch.tensor([[3.0, 2.0], [1.0, nan], [nan, nan]]))
    assert error.tolist() == [2.0, 9.0, 0.0]
    (slope,) = torch.autograd.grad(error.sum(), predicted)
    assert slope.tolist() == [[-2.0, 0.0], [6.0, 0.0], [0.0, 0.0]]


def test_ratings_are_standardised_over_the_training_data() -> None:
    given = ((("light", 1.0),), (("light", 5.0), ("dark", 2.0)), (("dark", 8.0),))
    rows = [Judged("xyz"[i], (str(i),), ratings) for i, ratings in enumerate(given)]
    objective = ratings_of(rows, ["light", "dark"])
    assert (objective.mean, objective.std) == ((3.0, 5.0), (2.0, 3.0))
    assert objective.targets(rows)[0, 0] == -1
    assert objective.targets(rows)[0, 1].isnan()
    with pytest.raises(InputError, match="rates 'light' the same everywhere"):
        ratings_of(rows[:1], ["light"])


def test_it_learns_the_contrary_of_what_the_cosine_says(data: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    held = config["held_out"]
    assert held["at_start"]["accuracy"] < 0.5
    assert held["accuracy"] == 1.0
    assert held["pairs"] == held["prompts"] == 10
    assert config["data"]["pairs"] == 30
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(41))
    assert lines[-1]["heldout_loss"] < lines[0]["heldout_loss"]
    assert lines[-1]["learning_rate"] < 1e-3 < lines[1]["learning_rate"]


def test_the_folder_is_a_reward_with_mean_0_and_deviation_1(data: Path, folder: Path) -> None:
    reward = Trained(checkpoint=folder)
    assert isinstance(reward, LearnedReward)
    reward.open()
    known = json.loads((folder / "split.json").read_text())
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    (whole,) = open_rewards([str(folder)])
    results = evaluate_rewards(data, [whole], known=marks_of([str(folder)]), split="train")
    assert results["pairs"] == 30
    assert results["rewards"]["light"]["mean"] == pytest.approx(0, abs=1e-4)
    assert results["rewards"]["light"]["std"] == pytest.approx(1, abs=1e-4)
    held = evaluate_rewards(data, [whole], known=marks_of([str(folder)]), split="heldout")
    assert held["pairs"] == len(known["heldout"]["prompts"]) == 10
    assert held["rewards"]["light"]["accuracy"] == json.loads((folder / "config.json").read_text())["held_out"]["accuracy"]
    media = torch.stack([read_image(data / row["chosen"]) for row in rows[:4]])
    prompts = Prompts(tuple(row["prompt"] for row in rows[:4]))
    assert torch.equal(Trained(checkpoint=folder)(media, prompts), reward(media, prompts))
    assert torch.allclose(Trained(checkpoint=folder, batch_size=3)(media, prompts), reward(media, prompts), atol=1e-5)


def test_the_gradient_is_that_of_finite_differences(folder: Path) -> None:
    media, prompts = (torch.rand(2, 3, 40, 40) * 0.8 + 0.1).requires_grad_(), Prompts((prompt(0), prompt(1)))
    reward = Trained(checkpoint=folder)
    (slope,) = torch.autograd.grad(reward(media, prompts).sum(), media)
    step = 0.02 * slope / slope.norm()
    with torch.no_grad():
        rise = float((reward(media + step, prompts) - reward(media - step, prompts)).sum())
    assert rise == pytest.approx(0.04 * float(slope.norm()), rel=0.02)


def test_the_same_seed_gives_the_same_reward(data: Path, folder: Path, tmp_path: Path) -> None:
    again = train_reward(data, tmp_path / "again", **QUICK)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    other = train_reward(data, tmp_path / "other", **QUICK, seed=1)
    assert (other / "split.json").read_text() != (folder / "split.json").read_text()


def test_before_training_it_is_the_base_models_scaled_cosine() -> None:
    from diffalign.reward_model import Architecture

    model, facts = Trained.begin(Architecture(("preference",), hidden=7), "shapes-clip")
    media, texts = torch.rand(3, 3, 32, 32), ("a red circle", "two blue squares", "x")
    with torch.no_grad():
        found = model.rate(model.see(model.base.view(media)), model.read(texts))[:, 0]
    scorer = ShapesCLIP()
    assert torch.allclose(found, scorer(media, Prompts(texts)) * scorer.model.logit_scale.exp(), atol=1e-4)
    assert facts["model"] == "shapes-clip"


@pytest.mark.parametrize(
    "tower",
    [{"train_tower": "lora", "train_text": True}, {"train_tower": "full", "hidden": 4}, {"train_tower": "lora", "precision": "bf16"}],
)
def test_towers_train_and_are_kept(tower: dict[str, Any], data: Path, tmp_path: Path) -> None:
    given = {**QUICK, "steps": 3, "learning_rate": 1e-3, "data_limit": 12, **tower}
    made = train_reward(data, tmp_path / "made", **given)
    weights = load_file(made / "model.safetensors")
    names = [name for name in weights if name.startswith("network.")]
    assert all("lora_" in name for name in names) == (tower["train_tower"] == "lora")
    assert any("text_model" in name for name in names) == ("train_text" in tower)
    assert not any("position_ids" in name or "logit_scale" in name for name in names)
    moved = [name for name in names if "lora_B" in name or "vision_model.encoder.layers.0.mlp.fc1.weight" in name]
    assert moved
    assert all(weights[name].any() for name in moved)
    config = json.loads((made / "config.json").read_text())
    (reward,) = open_rewards([str(made)])
    held = evaluate_rewards(data, [reward], known=marks_of([str(made)]), split="heldout", limit=3)
    if config["held_out"]["step"]:
        assert held["pairs"] == 3


def test_a_huggingface_folder_with_a_lora(data: Path, tmp_path: Path) -> None:
    base = tiny.save_clip(tmp_path / "clip", tiny.clip())
    given = {"steps": 2, "batch_size": 4, "data_limit": 8, "train_tower": "lora", "held_out": 0.25}
    made = train_reward(data, tmp_path / "made", model=str(base), **given)
    media, prompts = torch.rand(2, 3, 60, 80), Prompts(("a dog", "a cat"))
    scores = Trained(checkpoint=made)(media, prompts)
    base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"There is no base model '.*clip': give shapes-clip, a Hub id"):
        Trained(checkpoint=made).open()
    assert torch.equal(Trained(checkpoint=made, base=tmp_path / "moved")(media, prompts), scores)
    other = tiny.clip()
    torch.nn.init.normal_(other.visual_projection.weight)
    tiny.save_clip(tmp_path / "other", other)
    with pytest.raises(InputError, match=r"it is another base model. Give the one: --reward.base FOLDER"):
        Trained(checkpoint=made, base=tmp_path / "other").open()


def test_ratings_of_several_aspects(tmp_path: Path) -> None:
    data = rated(tmp_path / "data")
    made = train_reward(data, tmp_path / "made", **{**QUICK, "steps": 120}, loss="ratings", aspects=["light=1", "dark=-0.5"])
    config = json.loads((made / "config.json").read_text())
    assert config["architecture"]["aspects"] == ["light", "dark"]
    assert config["weights"] == [1.0, -0.5]
    assert config["held_out"]["spearman"]["light"] > 0.8
    reward = Trained(checkpoint=made)
    media, prompts = torch.stack([torch.full((3, 32, 32), light) for light in (0.2, 0.5, 0.8)]), Prompts((prompt(0),) * 3)
    ratings, mixed = reward.rate(media, prompts), reward(media, prompts)
    assert (ratings[1:, 0] > ratings[:-1, 0]).all()
    assert (ratings[1:, 1] < ratings[:-1, 1]).all()
    assert ratings[0, 0] == pytest.approx(1.8, abs=1.0)  # in the data's units
    assert ratings[2, 1] == pytest.approx(2, abs=2.0)
    standard = (ratings - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    wanted = (standard @ torch.tensor([1.0, -0.5]) - config["centre"]) / config["spread"]
    assert torch.allclose(mixed, wanted, atol=1e-4)
    assert torch.equal(Trained(checkpoint=made, aspect="dark")(media, prompts), ratings[:, 1])
    with pytest.raises(InputError, match=r"has no aspect 'ligt'. Did you mean 'light'"):
        Trained(checkpoint=made, aspect="ligt").open()
    results = evaluate_rewards(data, open_rewards([str(made), "jpeg-compressibility"]))
    assert results["ratings"] == 60
    assert results["rewards"]["made"]["aspects"]["dark"]["own"]["pictures"] == 40
    assert results["rewards"]["made"]["aspects"]["light"]["own"]["spearman"] > 0.8
    assert results["rewards"]["made"]["aspects"]["dark"]["reward"]["spearman"] < -0.8
    assert "own" not in results["rewards"]["jpeg-compressibility"]["aspects"]["light"]


def test_pictures_of_a_frozen_tower_are_embedded_once(data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_reward(data, tmp_path / "made", **{**QUICK, "steps": 1})
    assert "0 pictures embedded anew" in capsys.readouterr().err


def test_patience_and_the_best_weights(data: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the reward: the start stays the best."""
    ruin = {**QUICK, "learning_rate": 50.0, "steps": 30, "evaluate_every": 2, "patience": 3, "lr_schedule": "constant"}
    made = train_reward(data, tmp_path / "made", **ruin, label_smoothing=0.4)
    held = json.loads((made / "config.json").read_text())["held_out"]
    lines = (made / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 + held["step"] + 6
    assert held["loss"] == min(json.loads(line).get("heldout_loss", math.inf) for line in lines)


def test_ctrl_c_saves_the_best_until_then(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = reward_training._steps

    def stopped(*given: Any) -> Any:
        for row in steps(*given):
            if row.step == 9:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(reward_training, "_steps", stopped)
    with pytest.raises(KeyboardInterrupt, match="Interrupted after step 8"):
        train_reward(data, tmp_path / "made", **QUICK)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["held_out"]["step"] == 8
    Trained(checkpoint=tmp_path / "made").open()


def test_what_fails_leaves_no_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reward_training, "save_file", broken)
    with pytest.raises(InputError, match=r"could not be written \(.*No space.*\): make room"):
        train_reward(data, tmp_path / "made", **{**QUICK, "steps": 1})
    assert not list(tmp_path.iterdir())


def test_a_killed_training_leaves_nothing_half_written(data: Path, tmp_path: Path) -> None:
    """Killed in the middle it leaves a hidden draft, which the next one clears away."""
    import os
    import signal
    import subprocess
    import sys
    import time

    words = ["reward", "train", "--data", str(data), "--model", "shapes-clip", "--steps", "100000", "--output", str(tmp_path / "made")]
    run = subprocess.Popen([sys.executable, "-m", "diffalign", *words], stderr=subprocess.DEVNULL)
    metrics = tmp_path / ".made.draft" / "metrics.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert run.poll() is None
        time.sleep(0.2)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert metrics.is_file()
    assert not (tmp_path / "made").exists()
    train_reward(data, tmp_path / "made", **{**QUICK, "steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_one_training_at_a_time_writes_a_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is refused at once, and leaves the first one alone; what comes to be meanwhile is not overwritten."""
    fit = reward_training._fit

    def with_another(*given: Any) -> Any:
        with pytest.raises(InputError, match="is being written by another process"):
            reward_training.fit(given[0], tmp_path / "made")
        stopped = fit(*given)
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "theirs").write_text("x")
        return stopped

    monkeypatch.setattr(reward_training, "_fit", with_another)
    with pytest.raises(InputError, match="left alone: the result is in ") as refused:
        train_reward(data, tmp_path / "made", **{**QUICK, "steps": 1})
    Trained(checkpoint=Path(str(refused.value).rpartition(" is in ")[2][:-1])).open()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["theirs"]
    assert not list(tmp_path.glob(".*"))


def test_prompts_that_are_cut_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = pairs(tmp_path / "data", 8)
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    lines[3]["prompt"] = "a red square " * 100
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train_reward(folder, tmp_path / "made", **{**QUICK, "steps": 2})
    (said,) = [message for message in caplog.messages if "is not read" in message]
    assert "1 of 8 prompts are longer" in said


def test_the_folder_is_a_name_wherever_rewards_are_named(folder: Path, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1, 0.5)
    picture = read_image(tmp_path / "a.png")[None]
    wanted = float(Trained(checkpoint=folder)(picture, Prompts(("a red square",))))
    (tmp_path / "mine").symlink_to(folder)
    outcome = run_cli("score", "--reward", "mine", "a.png", "--prompt", "a red square")
    assert outcome.status == 0, outcome.err
    assert float(outcome.out.split("\t")[0]) == pytest.approx(wanted, rel=1e-4)
    outcome = run_cli("score", "--reward", "mine", "jpeg-compressibility", "a.png", "--prompt", "a red square")
    assert "\tmine " in outcome.out
    plan = resolve({"reward": "mine", "guard": [str(folder)], "eval_rewards": [str(folder)]})
    assert (plan.config()["reward"]["name"], plan.config()["reward"]["checkpoint"]) == (str(tmp_path / "mine"),) * 2
    assert trained_on(resolve({"reward": str(folder)}), str(folder))
    assert trained_on(resolve({"reward": {"name": "trained", "checkpoint": str(folder), "precision": "bf16"}}), str(folder))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    assert not trained_on(plan, str(other))
    assert [reward.name for reward in named_rewards([str(folder), "mine", "./mine"])] == [folder.name, "mine", "./mine"]


def rows(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _refusals() -> list[tuple[Callable[[Path], Any], str]]:
    def write(text: str, name: str = "pairs.jsonl") -> Callable[[Path], Any]:
        return lambda folder: (folder / name).write_text(text)

    pair = {"prompt": "a", "chosen": "0-light.png", "rejected": "0-dark.png"}
    return [
        (lambda folder: (folder / "pairs.jsonl").unlink(), "holds no pairs: expected pairs.jsonl"),
        (write(""), "is empty: it holds no pairs"),
        (write(rows(pair, {**pair, "rejected": "1-dark.png"})), "The data is of one prompt: nothing can be held out"),
        (write(rows({**pair, "chosen_score": 1, "rejected_score": 1})), "no pairs are left. Left out: ties 1"),
        (write(rows({**pair, "chosen": "nowhere.png"})), "There is no picture .*nowhere.png.*--bad-pictures skip"),
        (lambda folder: (folder / "0-dark.png").write_bytes(b"\x89PNG"), "is no picture that can be read.*--bad-pictures skip"),
        (write(rows({**pair, "image": "1-dark.png"}, {**pair, "prompt": "b", "image": "1-dark.png"})), "is of edits: this reward reads"),
    ]


@pytest.mark.parametrize(("damage", "message"), _refusals())
def test_data_that_cannot_be_used(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    damage(pairs(tmp_path / "data", 3))
    with pytest.raises(InputError, match=message):
        train_reward(tmp_path / "data", tmp_path / "made", **{**QUICK, "steps": 1})
    assert not (tmp_path / "made").exists()


def test_bad_pictures_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pairs(tmp_path / "data", 6)
    (data / "0-dark.png").write_bytes(b"\x89PNG")
    (data / "1-dark.png").unlink()
    for name, tower in (("frozen", {}), ("lora", {"train_tower": "lora"})):
        made = train_reward(data, tmp_path / name, **{**QUICK, "steps": 1}, bad_pictures="skip", **tower)
        config = json.loads((made / "config.json").read_text())
        assert config["data"]["pairs"] + config["held_out"]["pairs"] == 4
        assert "pictures that cannot be read 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"held_out": 1.0}, "held_out is 1.0: give a share between 0 and 1"),
        ({"steps": 0}, "steps is 0: give 1 or more"),
        ({"learning_rate": math.nan}, "learning_rate is nan: give a number above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"train_text": True}, "train_tower says, which is none"),
        ({"train_tower": "full", "precision": "bf16"}, "trains the tower in fp32"),
        ({"aspects": ["light"]}, "aspects are of ratings: --loss ratings"),
        ({"train_tower": "lora", "lora_rank": 100_000}, "lora_rank is 100000, and a layer is 96 wide: give 96 or less"),
        ({"model": "nowhere"}, "There is no base model 'nowhere'"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train_reward(data, tmp_path / "made", **{**QUICK, **given})


def test_aspects_that_nobody_rated_and_weights_that_are_none(tmp_path: Path) -> None:
    data = rated(tmp_path / "data", 6)
    for aspects, message in (
        (["ligt"], r"The data rates no aspect 'ligt'. Did you mean 'light'"),
        (["light=much"], "'light=much' has no weight: give NAME, or NAME=NUMBER"),
        (["light=0"], "'light=0' has no weight"),
    ):
        with pytest.raises(InputError, match=message):
            train_reward(data, tmp_path / "made", **{**QUICK, "steps": 1}, loss="ratings", aspects=aspects)


def test_an_output_that_exists_is_left_alone(data: Path, folder: Path, tmp_path: Path) -> None:
    before = (folder / "config.json").read_bytes()
    with pytest.raises(InputError, match="exists already: choose another --output"):
        train_reward(data, folder, **QUICK)
    assert (folder / "config.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        train_reward(data, tmp_path / "file", **QUICK)


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json: give a folder that diffalign reward train has made"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), r"is of no reward that .* has made \(format 'clip'"),
        (lambda f: (f / "model.safetensors").unlink(), "There is no file .*model.safetensors: the folder is not whole"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 9), "is damaged or cut short"),
        (lambda f: save_file({"head.x": torch.zeros(1)}, f / "model.safetensors"), r"3 missing: head.cosine.bias.*1 unexpected: head.x"),
        (
            lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"hidden": 0', '"hidden": 5', 1)),
            "does not fit its config.json. Keys 2 missing",
        ),
        (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"spread"', '"x"', 1)), "damaged .*KeyError"),
        (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"hidden"', '"wide"', 1)), "architecture has"),
    ],
)
def test_a_folder_that_is_no_trained_reward(change: Callable[[Path], Any], message: str, folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path / "copy")
    Trained(checkpoint=copy).open()
    change(copy)
    with pytest.raises(InputError, match=message):
        Trained(checkpoint=copy).open()


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The reward 'trained' needs the folder .*: --reward.checkpoint DIR"):
        Trained().open()
    with pytest.raises(InputError, match="There is no folder"):
        Trained(checkpoint=tmp_path / "nowhere").open()


# Testing rewards


def test_rewards_side_by_side(data: Path, folder: Path) -> None:
    constant = CheckedReward(FunctionReward(lambda media, prompts: torch.zeros(len(media))), "constant")
    dark = CheckedReward(FunctionReward(lambda media, prompts: -media.mean((1, 2, 3))), "dark")
    results = evaluate_rewards(data, [*open_rewards([str(folder)]), dark, constant], batch_size=7)
    assert (results["pairs"], results["prompts"], results["pictures"]) == (40, 40, 80)
    own, worst, tied = (results["rewards"][name] for name in ("light", "dark", "constant"))
    assert own["accuracy"] == 1.0
    assert worst["accuracy"] == 0.0
    assert worst["interval"] == [0.0, 0.0]
    assert (worst["scale"], worst["calibration_error"]) == (0.0, 0.5)  # all pairs at confidence 1/2, and none right
    assert (tied["accuracy"], tied["ties"], tied["calibration_error"]) == (0.5, 40, 0.0)
    assert results["agreement"]["light"]["dark"] == {"kendall_tau_b": -1.0, "prompts": 40}
    assert results["agreement"]["dark"]["constant"] == {"kendall_tau_b": None, "prompts": 0}
    assert dark.queries == 80


def test_pictures_of_several_sizes_and_edits(tmp_path: Path) -> None:
    """The reward is told what was edited, in the size of what it judges."""
    pairs(tmp_path, 2)
    Image.new("RGB", (20, 10), "white").save(tmp_path / "wide.png")
    about = {"image": "1-light.png"}
    (tmp_path / "pairs.jsonl").write_text(
        rows(
            {"prompt": "a", "chosen": "wide.png", "rejected": "0-dark.png", **about},
            {"prompt": "b", "chosen": "0-dark.png", "rejected": "1-dark.png", **about},
        )
    )
    seen = list[tuple[int, ...]]()

    def like_the_source(media: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        assert prompts.image is not None
        assert prompts.image.shape == media.shape
        seen.append(tuple(media.shape))
        return -(media - prompts.image).abs().mean((1, 2, 3))

    results = evaluate_rewards(tmp_path, [CheckedReward(FunctionReward(like_the_source), "like")])
    assert sorted(seen) == [(1, 3, 10, 20), (3, 3, 32, 32)]
    assert results["pictures"] == 3


def test_what_cannot_be_tested(data: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--split tells what a trained reward has seen"):
        marks_of(["shapes-clip"])
    with pytest.raises(InputError, match="fields are of one reward, and 2 are named"):
        open_rewards(["clip", "pickscore"], {"precision": "bf16"})
    with pytest.raises(InputError, match="There is no reward 'shapes-clp'"):
        open_rewards(["shapes-clp"])
    copy = _copy(folder, tmp_path / "copy")
    (copy / "split.json").unlink()
    with pytest.raises(InputError, match=r"split.json is missing or damaged"):
        marks_of([str(copy)])
    other = pairs(tmp_path / "other", 2)
    (other / "pairs.jsonl").write_text((other / "pairs.jsonl").read_text().replace("square", "circle"))
    for i in range(2):
        draw(other / f"{i}-dark.png", 1000 + i, 0.3)
        draw(other / f"{i}-light.png", 2000 + i, 0.7)
    with pytest.raises(InputError, match="no pairs are left in the split 'train'"):
        evaluate_rewards(other, open_rewards([str(folder)]), known=marks_of([str(folder)]), split="train")


def test_a_trained_reward_passes_the_preflight_of_gradients(folder: Path) -> None:
    import tiny as pipelines

    from diffalign.pipelines.stable_diffusion import StableDiffusion

    policy = StableDiffusion.of(pipelines.stable_diffusion(), guidance_scale=1.0)
    (reward,) = open_rewards([str(folder)])
    check_gradient(reward.reward, reward.name, policy, Prompts(("a", "b")))


def test_the_command_line(data: Path, folder: Path, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    made = run_cli("reward", "train", "--data", data, "--model", "shapes-clip", "--steps", 2, "--data-limit", 8, "--output", "made")
    assert made.status == 0
    assert made.out.strip() == "made"
    assert "Accuracy on 1 pairs of 1 held-out prompts" in made.err
    tested = run_cli("reward", "eval", "--data", data, "--reward", folder, "shapes-clip", "--split", "heldout", "--output", "found.json")
    assert tested.status == 0
    assert "heldout" in tested.out
    assert "Kendall's tau-b" in tested.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["rewards"]) == {"light", "shapes-clip"}
    one = run_cli("reward", "eval", "--data", data, "--reward", folder, "--reward.batch_size", 3, "--limit", 4)
    assert one.status == 0
    for words, message in (
        (["reward", "trian"], "There is no command 'reward trian'. Did you mean 'train'?"),
        (["reward", "train", "--data", data, "--output", "x", "--step", 3], "There is no setting 'step'. Did you mean 'steps'?"),
        (["reward", "train", "--data", data, "--output", folder], "exists already"),
        (["reward", "train", "--data", data, "--model", "shapes-clip", "--output", "/proc/x"], "/proc/x cannot be written (No such file"),
        (["reward", "eval", "--data", tmp_path, "--reward", "nothing", "--output", "none/a.json"], "give a file in a folder that exists"),
        (["reward", "eval", "--data", data, "--reward", "shapes-clip", "--limit", 0], "limit is 0: give 1 or more"),
        (["reward", "eval", "--data", tmp_path, "--reward", "shapes-clip"], "holds no pairs"),
        (
            ["reward", "eval", "--data", data, "--reward", "shapes-clip", "--reward.checkpoin", "x"],
            "There is no setting 'reward.checkpoin'",
        ),
    ):
        failed = run_cli(*words)
        assert failed.status == 2
        assert message in failed.err
    assert run_cli("reward").status == 2
    for words in (["reward", "--help"], ["reward", "train", "--help"], ["reward", "eval", "--help"]):
        helped = run_cli(*words)
        assert helped.status == 0
        assert "example" in helped.out
    assert "--train-text" in run_cli("reward", "train", "--help").out
