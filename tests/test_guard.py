"""The guard against reward hacking: its rule on numbers worked out by hand, and trainings that it ends, or leaves alone to the byte."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from test_distributed import torchrun

import diffalign
from diffalign import guard as rule
from diffalign.api import evaluate_run
from diffalign.compare import compare_runs
from diffalign.config import resolve
from diffalign.errors import InputError
from diffalign.flags import nested
from diffalign.guard import Guard, Measured, Reference, State, decide, goes_on, hold_against, paired
from diffalign.guarding import check_guard, guard_rewards, trained_on
from diffalign.rewards.shapes import ShapesCLIP
from diffalign.session import resume

WATCHED = '''"""Rewards of the tests that guards watch."""

def dull(images, prompts):
    """The opposite of `red`, which the trainings are on."""
    return images[:, 1].mean((1, 2)) - images[:, 0].mean((1, 2))

def kl(images, prompts):
    return images.mean((1, 2, 3))

class Loud:
    differentiable, modality, sample_rate = False, "audio", None
    def __call__(self, media, prompts):
        return media.mean(1)
'''
LEAST: dict[str, Any] = {"rewards": ["a"], "unit": "reward", "drop": 1.0, "patience": 2}


# --- the rule, by hand ---


def test_the_paired_interval() -> None:
    """Differences 0, 1, 2, 5: their mean is 2, their variance 14 / 3, the mean's standard error sqrt(14 / 12)."""
    mean, (low, high) = paired([1, 2, 3, 6], [1, 1, 1, 1])
    assert mean == 2
    assert (low, high) == (pytest.approx(2 - 1.96 * math.sqrt(14 / 12)), pytest.approx(2 + 1.96 * math.sqrt(14 / 12)))


@pytest.mark.parametrize(
    ("values", "failed", "within"),
    [
        ([0, 1, 0, 1], False, True),  # fell by 0.5
        ([-1, -1, -1, -1], True, False),  # by 2, to a hair: the differences are -1, -2, -3, -2
        ([-3, 2, -3, 2], False, False),  # by 1.5, but some have risen: 1.96 standard errors are 3.22
        ([0, 1, 2, 1], False, True),
    ],
)
def test_a_measure_fails_where_its_fall_is_proven(values: Sequence[float], failed: bool, within: bool) -> None:
    found = hold_against(Reference(20, [0, 1, 2, 1], 1.0), values, allowed=1.0)
    assert (found.failed, found.within) == (failed, within)
    assert (found.reference, found.reference_step, found.limit) == (1, 20, -1)
    assert found.difference == sum(values) / 4 - 1


def measured(step: int, score: float = 0.0, trained: float | None = 0.0, diversity: float = 1.0, kl: float = 0.0) -> Measured:
    """Two prompts, two samples: of the reward a -1 and 1 around the score for both, so that its standard deviation is sqrt(4 / 3)."""
    return Measured(step, {"a": [[score - 1, score + 1], [score - 1, score + 1]]}, [diversity, diversity], kl, trained)


def run_through(guard: Guard, *evaluations: Measured) -> list[State]:
    states, state = list[State](), State(guard.size)
    for evaluation in evaluations:
        state, _ = decide(guard, state, evaluation)
        states.append(state)
    return states


def test_failures_count_in_a_row() -> None:
    guard = Guard(**LEAST)
    states = run_through(guard, *(measured(i, score) for i, score in enumerate([0, -2, -0.5, -2, -2])))
    assert [state.failures["a"] for state in states] == [0, 1, 0, 1, 2]
    assert [state.fired is None for state in states] == [True, True, True, True, False]
    fired = states[-1].fired
    assert fired is not None
    assert (fired.step, fired.measure, fired.failures, fired.finding.difference) == (4, "a", 2, -2)
    assert rule.in_words(fired) == "at step 4 a is -2, 2 [2, 2] below its 0 of step 0, where 1 is allowed, at 2 evaluations in a row"


def test_a_reward_is_held_against_its_best_evaluation_in_standard_deviations_of_the_first() -> None:
    guard = Guard(**{**LEAST, "unit": "std", "patience": 1})
    states = run_through(guard, measured(0), measured(5, 3), measured(10, 1.9), measured(15, 1.84))
    assert [state.references["a"].step for state in states] == [0, 5, 5, 5]
    assert states[-1].fired is not None, "one standard deviation is sqrt(4 / 3) = 1.155, and 3 - 1.84 = 1.16"
    assert states[-2].fired is None
    (own,) = run_through(replace(guard, unit="reward"), measured(0), measured(5, 3), measured(10, 1.9))[-1:]
    assert own.fired is not None, "1.1 is above 1"


def test_what_seems_to_have_fallen_is_no_new_reference() -> None:
    """The reward rose, but at the price of the diversity."""
    states = run_through(Guard(**LEAST), measured(0), measured(5, 3, diversity=0.4), measured(10, 2.5))
    assert [state.references["a"].step for state in states] == [0, 0, 10]
    assert [state.best for state in states] == [0, 0, 0], "the trained reward has not risen"


def test_the_best_evaluation() -> None:
    doubtful = Measured(15, {"a": [[-9, -9], [6, 6]]}, [1, 1], 0.0, 9.0)
    states = run_through(Guard(**LEAST), measured(0), measured(5, 0, 2.0), measured(10, -2, 3.0), doubtful, measured(20, 0, 1.0))
    assert [state.best for state in states] == [0, 5, 5, 5, 5]
    assert states[3].failures["a"] == 0, "its fall by 1.5 is not proven, but seems to be one"
    states = run_through(Guard(**LEAST), measured(0, 0, None), measured(5, 0, None), measured(10, -2, None))
    assert [state.best for state in states] == [0, 5, 5], "without a trained reward it is the last that was within its limits"


def test_diversity_and_kl() -> None:
    guard = Guard(**{**LEAST, "diversity_drop": 0.25, "kl": 2.0, "patience": 1})
    (_, kept), (_, lost) = (run_through(guard, measured(0), measured(5, diversity=d)) for d in (0.76, 0.74))
    assert kept.fired is None
    assert lost.fired is not None
    assert (lost.fired.measure, lost.fired.finding.difference, lost.fired.finding.limit) == ("diversity", pytest.approx(-0.26), -0.25)
    (_, near), (_, far) = (run_through(guard, measured(0), measured(5, kl=k)) for k in (2.0, 2.1))
    assert near.fired is None
    assert far.fired is not None
    assert rule.in_words(far.fired) == "at step 5 the KL to the base model is 2.1, above 2, at one evaluation"
    assert run_through(replace(guard, kl=None), measured(0), measured(5, kl=1e6))[-1].fired is None


def test_a_guard_that_has_fired_goes_on_under_other_settings_alone() -> None:
    guard = Guard(**LEAST)
    state = run_through(guard, measured(0), measured(1, -2), measured(2, -2))[-1]
    assert State.of(json.loads(json.dumps(state.plain()))) == state
    assert goes_on(guard, state) == state
    assert goes_on(replace(guard, action="stop"), state) == state
    for other in (replace(guard, drop=3), replace(guard, patience=5), replace(guard, rewards=["a", "b"])):
        assert goes_on(other, state) == replace(state, fired=None, failures={})
    with pytest.raises(InputError, match="size is 8, and 32 when the run began"):
        goes_on(replace(guard, size=8), state)


def test_how_often_it_evaluates() -> None:
    assert [Guard().steps_between(steps) for steps in (5, 50, 500)] == [1, 5, 50]
    assert Guard(rewards=["a"], every=20).steps_between(500) == 20


# --- trainings ---


@pytest.fixture(scope="module")
def here(files: Path) -> Path:
    (files / "watched.py").write_text(WATCHED)
    return files


def train(here: Path, output: Path, steps: int, **given: Any) -> diffalign.Run:
    call: dict[str, Any] = {
        "reward": f"{here / 'rewards.py'}:red", "prompts": here / "prompts.txt", "inference_steps": 3, "k": 1, "batch_size": 2, "ema": 0.5,
        "learning_rate": 0.01, "eval_size": 4, "sample_every": 100, "seed": 5, "steps": steps, "output": output, **given,
    }  # fmt: skip
    return diffalign.align(here / "model", **call)


def guard_of(here: Path, **given: Any) -> dict[str, Any]:
    """At step 2 `dull` has fallen by 0.0028, at step 4 by 0.0064, at step 6 by more, each to a thousandth."""
    return {"rewards": [f"{here / 'watched.py'}:dull"], "every": 2, "size": 8, "drop": 0.004, "unit": "reward", **given}


def bytes_of(run: Path, folder: str = "lora") -> bytes:
    return (run / folder / "pytorch_lora_weights.safetensors").read_bytes()


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The lines of guard.jsonl but for the time that they took."""
    lines = [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


@pytest.fixture(scope="module")
def runs(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two/ and six/: as many steps without a guard; guarded/: of 12 steps as many as the guard let, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    train(here, folder / "two", 2)
    train(here, folder / "six", 6)
    train(here, folder / "guarded", 12, guard=guard_of(here), checkpoint_every=1, keep_checkpoints=99)
    return folder


def test_a_silent_guard_changes_no_byte(here: Path, runs: Path, tmp_path: Path) -> None:
    run = train(here, tmp_path / "silent", 6, guard=guard_of(here, drop=9.0, every=1))
    assert bytes_of(run.path) == bytes_of(runs / "six")
    same = ("step", "loss", "reward", "grad_norm", "reward_queries", "network_calls", "network_samples")
    plain = diffalign.load(runs / "six")
    assert [[row[name] for name in same] for row in run.metrics] == [[row[name] for name in same] for row in plain.metrics]
    assert run.evaluation["rewards"] == plain.evaluation["rewards"]
    assert [row["step"] for row in rows_of(run.path)] == [*range(7)]
    assert run.evaluation["guard"]["fired"] is None
    assert not (run.path / "best").exists()
    assert "guard" not in plain.evaluation


def test_a_silent_guard_changes_no_round(here: Path, tmp_path: Path) -> None:
    """Of a method that takes several steps in a round: the guard evaluates between two of them."""
    call: dict[str, Any] = {
        "method": "ddpo", "reward": "jpeg-compressibility", "batches": 1, "samples": 2, "updates": 2, "advantage": "group",
        "learning_rate": 1e-3, "inference_steps": 2, "batch_size": 2, "eval_size": 0, "steps": 6,
    }  # fmt: skip
    guard = {"rewards": [f"{here / 'watched.py'}:dull"], "every": 3, "size": 2, "drop": 99.0, "diversity_drop": 1.0}
    ways: dict[str, dict[str, Any]] = {"plain": {}, "guarded": {"guard": guard}}
    plain, guarded = (
        diffalign.align(here / "model", prompts=here / "prompts.txt", output=tmp_path / name, **call, **more) for name, more in ways.items()
    )
    assert bytes_of(plain.path) == bytes_of(guarded.path)
    assert [row["step"] for row in rows_of(guarded.path)] == [0, 4, 6], "step 3 is within a round"


def test_it_ends_a_training_with_the_weights_of_the_best_evaluation(here: Path, runs: Path) -> None:
    run = diffalign.load(runs / "guarded")
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6], "of 12"
    rows = rows_of(run.path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert [row["measures"]["dull"]["failures"] for row in rows] == [0, 0, 1, 2]
    assert rows[1]["trained"] > rows[0]["trained"]
    assert bytes_of(run.path) == bytes_of(runs / "two"), "as if it had ended there"
    assert (run.path / "samples" / "step-000006.png").is_file()
    found = run.evaluation["guard"]
    assert (found["step"], found["best_step"], found["weights_of_step"], found["fired"]["measure"]) == (6, 2, 2, "dull")
    first, at_six = rows[0]["measures"]["dull"]["value"], rows[3]["measures"]["dull"]
    assert at_six["difference"] == pytest.approx(at_six["value"] - first)
    assert at_six["interval"][0] < at_six["difference"] < at_six["interval"][1] < at_six["limit"] == -0.004
    assert run.evaluation["rewards"]["red"] == diffalign.load(runs / "two").evaluation["rewards"]["red"], "evaluated with those weights"


def test_stop_keeps_the_last_weights(here: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(here, tmp_path / "stopped", 12, guard=guard_of(here, action="stop"))
    said = " ".join(capsys.readouterr().err.split())
    assert bytes_of(run.path) == bytes_of(runs / "six")
    assert bytes_of(run.path, "best") == bytes_of(runs / "two")
    assert "The guard ended the training: at step 6 dull is " in said
    assert "The run's weights are the last ones; those of step 2, the guard's best evaluation, are in best/." in said
    assert run.evaluation["guard"]["weights_of_step"] == 6


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_resumed_run_decides_as_one_that_was_not_stopped(step: int, runs: Path, tmp_path: Path) -> None:
    """The guard's lines may be ahead of the checkpoint, and end in half a line."""
    cut = tmp_path / "cut"
    shutil.copytree(runs / "guarded", cut)
    for later in [*(cut / "checkpoints").iterdir()]:
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    shutil.rmtree(cut / "lora")
    with (cut / "guard.jsonl").open("a") as file:
        file.write('{"step": 8, "tra')
    resume(cut)
    assert rows_of(cut) == rows_of(runs / "guarded")
    assert bytes_of(cut) == bytes_of(runs / "guarded")


def test_a_reward_that_learns_gives_no_number_to_choose_weights_by(here: Path, tmp_path: Path) -> None:
    """Its scale moves with its statistics, and before the first round there are none: the last evaluation within the limits is the best."""
    parts = [{"name": f"{here / 'rewards.py'}:red", "normalise": "running"}]
    run = train(here, tmp_path / "run", 2, reward=parts, guard=guard_of(here, drop=9.0, every=1))
    assert [(row["trained"], row["best_step"]) for row in rows_of(run.path)] == [(None, 0), (None, 1), (None, 2)]


def test_a_guard_that_is_added_evaluates_once_however_often_the_run_is_killed(here: Path, runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "two", copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "guard": guard_of(here, drop=9.0)}))
    line = '{"step": 2, "seconds": 1, "of": "the resumed run that was killed"}\n'
    (copy / "guard.jsonl").write_text(line)
    resume(copy, steps=3)
    assert [row["step"] for row in rows_of(copy)] == [2, 3]
    assert "killed" not in (copy / "guard.jsonl").read_text()
    (copy / "guard.jsonl").write_text("{damaged\n" + line)
    with pytest.raises(InputError, match=r"guard.jsonl is damaged: .* Mend or delete that line"):
        resume(copy)


def test_a_run_that_the_guard_has_ended_is_resumed_under_other_settings(
    here: Path, runs: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "guarded", copy)
    shutil.rmtree(copy / "lora")
    outcome = run_cli("train", "--resume", copy)
    assert outcome.status == 0, outcome.err
    assert "The guard ended the training: at step 6" in outcome.err
    assert bytes_of(copy) == bytes_of(runs / "guarded"), "written again, and no step taken"
    outcome = run_cli("train", "--resume", copy, "--steps", 20)
    assert outcome.status == 2
    assert "The guard ended this run: at step 6 dull is" in outcome.err
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "guard": {**config["guard"], "drop": 0.5}, "steps": 8}))
    run = resume(copy)
    assert [row["step"] for row in run.metrics] == [*range(1, 9)]
    assert run.evaluation["guard"]["fired"] is None
    train(here, tmp_path / "eight", 8)
    assert bytes_of(copy) == bytes_of(tmp_path / "eight"), "it went on from the last weights, not from the best"


def test_what_is_said_of_it(runs: Path, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    run = diffalign.load(runs / "guarded")
    record, plain = compare_runs([run.path, runs / "two"], limit=0)["runs"]
    assert record["steps"] == 6
    assert record["guard"] == run.evaluation["guard"]
    assert plain["guard"] is None
    outcome = run_cli("compare", run.path, runs / "two", "--limit", 0, "--output", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "ended it at step 6: dull" in " ".join(outcome.out.split())
    assert "guarded: The guard ended the training: at step 6 dull is" in outcome.err
    assert "weights are those of step 2, the guard's best evaluation." in outcome.err
    evaluate_run(run, ["jpeg-compressibility"], output=tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text())["guard"] == run.evaluation["guard"]


def test_an_unfinished_run_is_not_taken_for_one_that_its_guard_has_ended(runs: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(runs / "guarded", cut)
    (cut / "metrics.jsonl").write_text("".join((cut / "metrics.jsonl").read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(InputError, match="is unfinished, at step 5 of 12"):
        compare_runs([cut], limit=0)


def test_on_shapes_it_ends_what_brightness_does_to_the_pictures(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """From the command line: a reward that any washed out picture earns, and the checker, which says what is in it."""
    (tmp_path / "bright.py").write_text(
        "import diffalign\n@diffalign.reward(differentiable=True)\ndef bright(images, prompts): return images.mean((1, 2, 3))\n"
    )
    outcome = run_cli(
        "train", "--reward", "bright.py:bright", "--steps", 20, "--batch-size", 8, "--learning-rate", 4e-3, "--lr-schedule", "constant",
        "--method.inference-steps", 4, "--method.k", 1, "--guard", "shapes-checker", "--guard.every", 3, "--guard.size", 16,
        "--eval-size", 32, "--eval-rewards", "shapes-checker", "--output", "run",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    run = diffalign.load(tmp_path / "run")
    found, rows = run.evaluation["guard"], rows_of(run.path)
    assert found["fired"] is not None, outcome.err
    assert found["step"] < 20
    fallen, kept = rows[-1]["measures"]["shapes-checker"], run.evaluation["rewards"]["shapes-checker"]
    assert fallen["difference"] < -0.15
    assert kept["difference"] > fallen["difference"] / 2


# --- several processes ---

WORK = """
import json, sys
import diffalign
for name, call in json.loads(sys.argv[1]).items():
    diffalign.align(batch_size=2, output=f"two/{name}", fsdp=name == "full", **call)
"""


def test_two_processes_decide_as_one_also_with_a_network_that_they_share_out(here: Path, tmp_path: Path) -> None:
    call: dict[str, Any] = {
        "pipe": str(here / "model"), "reward": f"{here / 'rewards.py'}:red", "prompts": str(here / "prompts.txt"), "inference_steps": 2,
        "eval_prompts": str(here / "prompts.txt"), "k": 1, "steps": 6, "guidance_scale": 1.0, "eval_size": 2, "device": "cpu",
        "sample_every": 100, "learning_rate": 0.01, "guard": guard_of(here, every=1, drop=0.003),
    }  # fmt: skip
    full = {**call, "full": True, "learning_rate": 1e-4, "guard": {**call["guard"], "action": "stop"}}
    calls, best = {"lora": call, "full": full}, {"lora": (4, 2), "full": (3, 1)}
    for name, one in calls.items():
        diffalign.align(**one, batch_size=4, output=tmp_path / "one" / name)
    (tmp_path / "work.py").write_text(WORK)
    done = torchrun("work.py", json.dumps(calls), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("The guard ended the training") == 2, "one process speaks"
    for name in calls:
        ours, theirs = (diffalign.load(tmp_path / part / name).evaluation["guard"] for part in ("two", "one"))
        assert (ours["step"], ours["best_step"]) == (theirs["step"], theirs["best_step"]) == best[name]
    for folder, file in (("lora/lora", "pytorch_lora_weights"), *((f"full/{f}", "diffusion_pytorch_model") for f in ("model", "best"))):
        first, second = (load_file(tmp_path / part / folder / f"{file}.safetensors") for part in ("one", "two"))
        assert max(float((second[key] - weight).abs().max()) for key, weight in first.items()) < 1e-5, folder
    last, kept = (load_file(tmp_path / "two" / "full" / f / "diffusion_pytorch_model.safetensors") for f in ("model", "best"))
    assert max(float((kept[key] - weight).abs().max()) for key, weight in last.items()) > 1e-4


# --- what is refused ---

WRONG = [
    (["--guard", "shapes-chekcer"], "no reward 'shapes-chekcer'. Did you mean 'shapes-checker'?"),
    (["--guard", "jpeg-compressibility", "--guard.drop", "-0.1"], "guard.drop is -0.1: give 0 or more"),
    (["--guard", "jpeg-compressibility", "--guard.drop", "nan"], "guard.drop is nan"),
    (["--guard", "jpeg-compressibility", "--guard.diversity-drop", "1.5"], "guard.diversity_drop is 1.5: give a share"),
    (["--guard", "jpeg-compressibility", "--guard.kl", "-1"], "guard.kl is -1.0: give nats"),
    (["--guard", "jpeg-compressibility", "--guard.every", "0"], "guard.every is 0: give 1 or more"),
    (["--guard", "jpeg-compressibility", "--guard.size", "0"], "guard.size is 0: give 2 or more"),
    (["--guard", "jpeg-compressibility", "--guard.patience", "0"], "guard.patience is 0: give 1 or more"),
    (["--guard", "jpeg-compressibility", "--guard.action", "pray"], "guard.action is pray: give rollback or stop"),
    (["--guard", "jpeg-compressibility", "--guard.evry", "3"], "no setting 'guard.evry'. Did you mean 'guard.every'?"),
    (["--guard.drop", "0.1"], "guard.drop is set, and no reward is watched: --guard NAME"),
    (["--guard", "--steps", "3"], "guard is empty: name the rewards"),
    (["--guard", "FILES/rewards.py:red"], "rewards.py:red is what is trained on, or a part of it, and cannot watch over itself"),
    (["--guard", "FILES/watched.py:kl"], "two measures would be called kl in its log"),
    (["--guard", "FILES/watched.py:Loud"], "guard: Loud judges sound, and this pipeline makes pictures"),
    (["--guard", "FILES/watched.py:dull", "--eval-prompts", "FILES/empty.txt"], "empty.txt"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=lambda value: "-".join(value)[:60] if isinstance(value, list) else "")
def test_bad_input(flags: list[str], message: str, here: Path, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    (here / "empty.txt").write_text("\n")
    given = [flag.replace("FILES", str(here)) for flag in flags]
    named = ["--pipeline", here / "model", "--reward", f"{here / 'rewards.py'}:red", "--prompts", here / "prompts.txt", "--output", "run"]
    outcome = run_cli("train", *named, *given)
    assert outcome.status == 2, outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists(), "before anything is made"


def test_the_trained_reward_with_other_fields_is_another_reward() -> None:
    call: dict[str, Any] = {"method": "ddpo", "reward": {"name": "jpeg-compressibility"}, "guard": ["jpeg-compressibility"]}
    with pytest.raises(InputError, match="what is trained on"):
        guard_rewards(resolve(call))
    (watched,) = guard_rewards(resolve({**call, "reward": {"name": "jpeg-compressibility", "sign": 1}}))
    assert watched.name == "jpeg-compressibility"
    preferences = {"method": "diffusion-dpo", "reward": "jpeg-compressibility", "data": "pairs", "guard": ["jpeg-compressibility"]}
    assert len(guard_rewards(resolve(preferences))) == 1, "this method trains on pairs, and leaves the reward to the evaluation"


@pytest.mark.parametrize(
    ("reward", "watched", "same"),
    [
        ({"name": "clip", "precision": "bf16", "batch_size": 2, "revision": "abc"}, "clip", True),
        ({"name": "clip", "model": "google/siglip-base-patch16-224"}, "clip", False),
        (["clip", "aesthetic"], "aesthetic", True),
        ([{"name": "clip"}, {"name": "aesthetic", "weight": 0, "normalise": "none"}], "aesthetic", False),
        (["clip", {"name": "hps-v2", "version": "v2.1"}], "hps-v2.1", True),
        (["shapes-checker", "clip"], "shapes-all-right", False),
        (["clip", "FILES/watched.py:dull"], "FILES/../{name}/watched.py:dull", True),
        (["clip", "FILES/watched.py:dull"], "FILES/watched.py:kl", False),
    ],
)
def test_what_is_trained_on_may_not_watch_over_itself(reward: Any, watched: str, same: bool, here: Path) -> None:
    given = json.loads(json.dumps(reward).replace("FILES", str(here)))
    plan = resolve({"method": "ddpo", "reward": given if isinstance(given, dict) else {"name": "compose", "parts": given}})
    assert trained_on(plan, watched.replace("FILES", str(here)).format(name=here.name)) is same
    if same:
        guarded = replace(plan, settings=replace(plan.settings, guard=Guard([watched.replace("FILES", str(here)).format(name=here.name)])))
        with pytest.raises(InputError, match="or a part of it, and cannot watch over itself"):
            guard_rewards(guarded)


def test_a_reward_object_that_is_trained_on_may_not_watch_over_itself_either() -> None:
    live = resolve({"method": "ddpo"}, diffalign.compose([ShapesCLIP(), lambda images, prompts: images.mean((1, 2, 3))]))
    assert trained_on(live, "shapes-clip")
    assert not trained_on(live, "shapes-checker")


def test_there_must_be_prompts_to_watch_on() -> None:
    plan = resolve({"method": "draft", "guard": ["shapes-checker"]})
    policy = SimpleNamespace(modality="image")
    check_guard(guard_rewards(plan), policy, ["a dog"])
    check_guard([], policy, [])
    with pytest.raises(InputError, match="no prompts are held out"):
        check_guard(guard_rewards(plan), policy, [])


def test_a_short_name_in_files_and_in_python() -> None:
    assert nested({"guard": "a"})["guard"] == nested({"guard": ["a"]})["guard"] == {"rewards": ["a"]}
    assert nested({"guard": {"rewards": ["a"], "drop": 1}})["guard"] == {"rewards": ["a"], "drop": 1}


def test_check_and_a_dry_run_take_it(here: Path, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run_cli("check", "--guard", "shapes-chekcer")
    assert outcome.status == 2
    named = ["--pipeline", "some/model", "--pipeline-class", "StableDiffusionPipeline", "--prompts", here / "prompts.txt"]
    rewards = ["--reward", "clip", "--guard", "aesthetic", "--guard.patience", 1, "--guard.drop", 0]
    outcome = run_cli("train", *named, *rewards, "--tiny", "--output", "run")
    assert outcome.status == 0, outcome.err
    run = diffalign.load(tmp_path / "run")
    assert [row["step"] for row in run.metrics] == [1, 2], "a dry run takes all of its steps"
    assert [row["step"] for row in rows_of(run.path)] == [0, 1, 2]
