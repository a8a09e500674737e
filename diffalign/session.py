"""One training in its run folder: from a plan to weights, pictures and an evaluation, through checkpoints and signals."""

from __future__ import annotations

import datetime
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from diffalign import registry
from diffalign.config import Plan, Settings
from diffalign.console import comparison, console, say, watch
from diffalign.contract import CheckedReward, as_reward, check_gradient, short_name
from diffalign.data import hold_out, read_prompts
from diffalign.errors import InputError
from diffalign.evaluate import evaluate, sample
from diffalign.loop import Training, make_accelerator, prepare, train
from diffalign.media import grid
from diffalign.models import device_of, make_policy
from diffalign.run import Run
from diffalign.types import Prompts

PICTURES = 8


class Stopped(Exception):
    """A signal asked the training to stop; the run is saved and can be resumed."""

    def __init__(self, signum: int, step: int, path: Path) -> None:
        super().__init__(f"signal {signum} at step {step}; the run in {path} can be resumed")
        self.signum, self.step, self.path = signum, step, path


def start(
    plan: Plan,
    output: str | Path | None,
    live: Any = None,
    prompts: list[str] | None = None,
    eval_prompts: list[str] | None = None,
) -> Run:
    """Train a plan from its beginning, in a new run folder. Lists given here stand for the settings' files."""
    settings = plan.settings
    if live is not None:
        _check_live(live)
    train_prompts, held_out = prompt_lists(settings, prompts, eval_prompts)
    rewards = eval_rewards(plan)
    policy = make_policy(settings, live)
    check_reward(plan, policy, train_prompts)
    for steps in {plan.sample_steps, vars(plan.method).get("inference_steps", plan.sample_steps)}:
        policy.path.schedule(steps)
    run = Run.create(Path(output).expanduser() if output else _fresh_name(plan), plan.config(), live)
    (run.path / "prompts").mkdir()
    for name, texts in (("train", train_prompts), ("heldout", held_out)):
        (run.path / "prompts" / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return _drive(plan, run, policy, rewards, resume=False)


def resume(path: str | Path, steps: int | None = None, live: Any = None) -> Run:
    """Go on with a run from its newest whole checkpoint; with `steps`, to another number of optimiser steps."""
    run = Run.open(path, live)
    plan = run.plan
    if steps is not None:
        plan = replace(plan, settings=replace(plan.settings, steps=steps))
        (run.path / "config.yaml").write_text(yaml.safe_dump({**run.config, "steps": steps}, sort_keys=False))
    run.newest_checkpoint()  # before the model is loaded
    return _drive(plan, run, make_policy(plan.settings, live), eval_rewards(plan), resume=True)


def _drive(plan: Plan, run: Run, policy: Any, rewards: list[CheckedReward], resume: bool) -> Run:
    settings, reward = plan.settings, plan.reward
    assert reward is not None
    prompts, held_out = (read_prompts(str(run.path / "prompts" / f"{name}.txt")) for name in ("train", "heldout"))
    accelerator = make_accelerator(settings.precision, device_of(settings), list(settings.log), run.path)
    training = prepare(policy, settings, prompts, accelerator)
    if resume:
        state, damaged = run.newest_checkpoint()
        for folder in damaged:
            say(f"The checkpoint {folder} is incomplete; going back to the one before.")
        training.restore(state)
        run.rewind_metrics(training.context.step)
        say(f"Resuming {run.path} at step {training.context.step}.")
    say(_in_words(plan, prompts, training, run))
    if settings.log:
        accelerator.init_trackers("diffalign", config={"run": str(run.path)})
    picture_every = settings.sample_every or max(1, settings.steps // 4)
    shown = (held_out * PICTURES)[:PICTURES]

    def pictures() -> None:
        with training.averaged():
            images = sample(policy, shown, steps=plan.sample_steps, seed=settings.seed, batch_size=settings.batch_size)
        name = f"samples/step-{training.context.step:06d}.png"
        run.save_picture(name, grid([(f"step {training.context.step}", images)], shown))

    if training.context.step == 0:
        pictures()
        run.save_checkpoint(0, training.state(), settings.keep_checkpoints)
    try:
        with _signals() as caught:
            due = False
            rows = train(training, policy, plan.method, reward, settings)
            for row in watch(rows, training.context.step, settings.steps):
                run.append_metrics(row.metrics)
                accelerator.log(row.metrics, step=row.step)
                if row.step % picture_every == 0 and row.step < settings.steps:
                    pictures()
                due = due or row.step % settings.checkpoint_every == 0 or row.step == settings.steps
                if row.boundary and (due or caught):
                    run.save_checkpoint(row.step, training.state(), settings.keep_checkpoints)
                    due = False
                    if caught and row.step < settings.steps:
                        raise Stopped(caught[0], row.step, run.path)
    except InputError as error:
        if training.context.step > 0:
            with training.averaged():
                run.save_weights(policy)
            raise InputError(f"{error}\nThe weights of step {training.context.step} are kept in {run.path}.") from error
        raise
    pictures()
    with training.averaged():
        run.save_weights(policy)
        if settings.eval_size:
            chosen, picture = held_out[: settings.eval_size], run.path / "samples" / "before-after.png"
            evaluate_into(plan, policy, rewards, chosen, settings.seed + 1, run.path / "eval.json", picture)
    accelerator.end_training()
    say(f'Run: {run.path}   Again: diffalign sample {run.path} --prompt "{shown[0]}"')
    return run


def evaluate_into(
    plan: Plan, policy: Any, rewards: list[CheckedReward], prompts: list[str], seed: int, output: Path, picture: Path
) -> None:
    results, before, after = evaluate(policy, rewards, prompts, steps=plan.sample_steps, seed=seed, batch_size=plan.settings.batch_size)
    output.write_text(json.dumps(results, indent=2) + "\n")
    side_by_side = grid([("before", before[:PICTURES]), ("after", after[:PICTURES])], prompts[:PICTURES])
    side_by_side.save(picture)
    console.print(comparison(results))


def prompt_lists(settings: Settings, prompts: list[str] | None, held: list[str] | None) -> tuple[list[str], list[str]]:
    if prompts is None:
        if settings.prompts is None:
            raise InputError("No prompts: give --prompts FILE (one a line), or --prompts shapes.")
        prompts = read_prompts(settings.prompts)
    if held is None and settings.eval_prompts is not None:
        held = read_prompts(settings.eval_prompts, "heldout")
    if held is not None:
        return prompts, held
    prompts, held = hold_out(prompts, settings.seed)
    if set(prompts) == set(held):
        say("Fewer than ten prompts: the evaluation uses the training prompts themselves, with other noise.")
    return prompts, held


def eval_rewards(plan: Plan) -> list[CheckedReward]:
    assert plan.reward is not None
    others = [name for name in plan.settings.eval_rewards or [] if name != plan.reward_name]
    return [CheckedReward(plan.reward.reward, plan.reward.name), *named_rewards(others)]


def named_rewards(names: Sequence[str]) -> list[CheckedReward]:
    found = [(name, *registry.find("rewards", name)) for name in dict.fromkeys(names)]
    return [
        CheckedReward(as_reward(thing(**preset) if isinstance(thing, type) else thing), short_name(name)) for name, thing, preset in found
    ]


def check_reward(plan: Plan, policy: Any, prompts: list[str]) -> None:
    assert plan.reward is not None
    if plan.reward.modality != policy.modality:
        raise InputError(f"{plan.reward_name} judges {plan.reward.modality}, and this pipeline makes {policy.modality}.")
    if plan.method.needs.differentiable_reward:
        check_gradient(plan.reward.reward, plan.reward.name, policy, Prompts(tuple(prompts[:2])))


def _check_live(pipe: Any) -> None:
    if type(pipe).__name__ not in registry.table("pipelines"):
        raise InputError(f"{type(pipe).__name__} has no adapter. Supported: {', '.join(sorted(registry.table('pipelines')))}.")


def _fresh_name(plan: Plan) -> Path:
    model = plan.settings.pipeline.rstrip("/").rsplit("/", 1)[-1].replace(" ", "-")
    base = f"{plan.method_name}-{model}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    names = (Path("runs") / (base + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 100))))
    return next(path for path in names if not path.exists())


def _in_words(plan: Plan, prompts: list[str], training: Training, run: Run) -> str:
    s, count = plan.settings, training.context.processes.count
    size = sum(p.numel() for p in training.parameters.values())
    what = "all weights" if s.full else f"a LoRA of rank {s.lora.rank}"
    return (
        f"{plan.method_name} on {s.pipeline} with {plan.reward_name}: {len(prompts)} prompts, {what} ({size:,} weights), "
        f"{s.steps} steps of {s.batch_size} samples x {s.accumulate} batches x {count} processes "
        f"= {s.batch_size * s.accumulate * count} a step, guidance {s.guidance_scale:g}, {s.precision}, seed {s.seed}. Into {run.path}"
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one dies at once."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, frame: Any) -> None:
        caught.append(signum)
        say("Stopping after this step, to save. Once more stops at once, and keeps the last checkpoint.")
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are not ours to take
        before.clear()
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
