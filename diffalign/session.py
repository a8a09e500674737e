"""One training in its run folder: from a plan to weights, pictures and an evaluation, through checkpoints and signals."""

from __future__ import annotations

import datetime
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffalign import examples, tiny
from diffalign.checkpoint import whole
from diffalign.config import Plan, check_needs, resolve
from diffalign.console import comparison, console, say, say_notes, watch
from diffalign.contract import CheckedReward, short_name
from diffalign.data import Prompt, check_fit, rate_of
from diffalign.errors import InputError
from diffalign.evaluate import PICTURES, evaluate, implicit_accuracy, sample, sheet
from diffalign.flags import flat
from diffalign.guard import closing
from diffalign.guarding import Guarding, check_guard, check_resumed, guard_outcome, guard_rewards, guarding, rewind_guard
from diffalign.inputs import (
    Data,
    check_judges,
    check_media,
    check_parts,
    check_read,
    check_reward,
    eval_rewards,
    given_prompts,
    open_data,
    prompt_lists,
)
from diffalign.loop import Training, prepare, train
from diffalign.lora import as_loaded
from diffalign.memory import Trial, within_budget
from diffalign.models import class_of, make_policy, modality_of, prepare_to_train
from diffalign.origin import trained_on
from diffalign.pages import reported
from diffalign.peaks import forget_peak
from diffalign.processes import least_of_all, make_accelerator, mesh_of, one_for_all
from diffalign.report import curve
from diffalign.rerun import again
from diffalign.run import Run
from diffalign.saving import Saving
from diffalign.settings import LIVE
from diffalign.signals import Stopped, noted
from diffalign.sound import write_all
from diffalign.sources import commit_of
from diffalign.streams import PromptList


def start(
    plan: Plan,
    output: str | Path | None,
    live: Any = None,
    prompts: list[Prompt] | None = None,
    eval_prompts: list[Prompt] | None = None,
) -> Run:
    """Train a plan from its beginning, in a new run folder. Lists given here stand for the settings' files."""
    check_needs(plan)
    settings = plan.settings
    if settings.fsdp and live is not None:
        raise InputError("fsdp: a live pipeline would be left in parts. Give its folder or Hub id, or leave fsdp out.")
    if settings.tiny and live is not None:
        raise InputError("tiny: a live pipeline has no twin. Give its folder or Hub id, or leave tiny out.")
    check_media(plan, modality_of(class_of(settings, live)))
    accelerator = make_accelerator(settings)
    path = Path(one_for_all(str(Path(output).expanduser() if output else _fresh_name(plan))))
    if accelerator.is_main_process:
        Run.refuse_existing(path)
    if settings.tiny:
        say(tiny.in_words(settings))
    if not tiny.made(settings, settings.data):
        examples.check(settings.data, plan.method.needs.data)
    prompts, eval_prompts = given_prompts(settings, prompts, eval_prompts)
    check_parts(plan, prompts, eval_prompts)
    rewards, guards = eval_rewards(plan), guard_rewards(plan)
    policy = make_policy(settings, live, train=False)
    with _given_back(policy, live):
        check_judges(rewards, policy.modality)
        data = open_data(plan, policy, accelerator)
        train_prompts, held_out = prompt_lists(settings, prompts, eval_prompts, data)
        check_fit([*train_prompts, *held_out], policy)
        check_reward(plan, policy, train_prompts)
        check_guard(guards, policy, held_out)
        check_read(rewards, held_out[: settings.eval_size], policy)
        check_parts(plan, None, held_out)
        for steps in {plan.sample_steps, vars(plan.method).get("inference_steps", plan.sample_steps)}:
            policy.path.schedule(steps)
        prepare_to_train(policy, settings, mesh_of(settings))
        plan = replace(plan, settings=replace(settings, lora=as_loaded(settings.lora, policy.module)))
        if settings.memory_budget is not None:  # before the settings are recorded: a resumed run has the same batches
            with plan.reward.rehearsal() if plan.reward is not None else nullcontext():
                plan, found = within_budget(Trial(plan, policy, train_prompts, data[0] if data else None), least_of_all)
            say(f"Memory budget {found}")
        if accelerator.is_main_process:
            commit = commit_of(policy.pipe.name_or_path) if live is None else None
            run = Run.create(path, {**plan.config(), "processes": accelerator.num_processes}, live, commit)
            taught = train_prompts if data is None or plan.method.needs.data_role == "besides" else data[0].prompts
            run.write_prompts("train", taught)
            run.write_prompts("heldout", held_out)
            seen = trained_on(held_out, taught)
            if seen and (eval_prompts is not None or set(held_out) != set(taught)):  # else it has been said
                say(f"{seen} of {len(held_out)} held-out prompts are among those trained on. Give others: --eval-prompts FILE.")
        accelerator.wait_for_everyone()
        run = Run.open(path, live)
        with run.alone() if accelerator.is_main_process else nullcontext(), reported(run, accelerator.is_main_process):
            return drive(plan, run, policy, rewards, guards, accelerator, data, resume=False)


def resume(path: str | Path, steps: int | None = None, pipe: Any = None, reward: Any = None) -> Run:
    """Go on with a run from its newest whole checkpoint; with `steps`, to another number of optimiser steps.

    A run that was made from a live pipeline or reward object wants it again: `pipe`, `reward`.
    """
    run = Run.open(path, pipe)
    if run.merged:
        raise InputError(f"{path} was merged, and no training of it can go on. Begin one: --lora.init {run.path / 'lora'}")
    plan = resolve(run.config, reward)
    if plan.reward is None and run.config["reward"]["name"] == LIVE:
        raise InputError(f"{path} was trained on a reward given as a Python object: diffalign.resume(folder, reward=...) wants it again.")
    check_needs(plan)
    if steps is not None:
        plan = replace(plan, settings=replace(plan.settings, steps=steps))
    state, _ = run.newest_checkpoint()  # before the model is loaded
    check_resumed(plan, state, steps)
    accelerator = make_accelerator(plan.settings)
    plan = _of_as_many(plan, state["batch_size"], accelerator.num_processes)
    rewards, guards = eval_rewards(plan), guard_rewards(plan)
    policy = make_policy(plan.settings, pipe, train=False)
    with _given_back(policy, pipe):
        data = open_data(plan, policy, accelerator)
        prepare_to_train(policy, plan.settings, mesh_of(plan.settings))
        if steps is not None and steps < state["step"]:
            raise InputError(f"{run.path} is at step {state['step']} already: give --steps {state['step']} or more.")
        with run.alone() if accelerator.is_main_process else nullcontext():  # before anything in the folder is touched
            if steps is not None and accelerator.is_main_process:
                run.write_config({**run.config, "steps": steps})
            with reported(run, accelerator.is_main_process):
                return drive(plan, run, policy, rewards, guards, accelerator, data, resume=True)


@contextmanager
def _given_back(policy: Any, live: Any) -> Iterator[None]:
    """A live pipeline can be called as before, however the block ends."""
    try:
        yield
    finally:
        if live is not None:
            policy.release()


def _of_as_many(plan: Plan, batch_size: int, processes: int) -> Plan:
    """The plan with the batch of its run, `batch_size` samples, shared by another number of processes."""
    if batch_size % processes:
        fit = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
        raise InputError(
            f"The run has {batch_size} samples in a batch of all its processes, which {processes} cannot share: resume it with {fit}."
        )
    return replace(plan, settings=replace(plan.settings, batch_size=batch_size // processes))


def drive(
    plan: Plan, run: Run, policy: Any, rewards: list[CheckedReward], guards: list[CheckedReward], accelerator: Any, data: Data, resume: bool
) -> Run:
    """Train to the end, to a signal, or to where the guard ends it; the first process writes, and every process takes part in the steps."""
    settings, main = plan.settings, accelerator.is_main_process
    prompts, held_out = run.read_prompts("train"), run.read_prompts("heldout")
    if data is None:
        training = prepare(policy, settings, PromptList(prompts, policy), accelerator)
    elif plan.method.needs.data_role == "besides":
        training = prepare(policy, settings, PromptList(prompts, policy), accelerator, data[0])
    else:
        training = prepare(policy, settings, data[0], accelerator)
    forget_peak(training.device)  # what was before, such as a budget's search, is no part of the training
    if resume:
        state, damaged = run.newest_checkpoint()
        for folder in damaged:
            say(f"The checkpoint {folder} is incomplete; going back to the one before.")
        training.restore(state)
        if main:
            run.rewind_metrics(training.context.step)
            rewind_guard(run, training.context.step, bool(training.guard))
        say(f"Resuming {run.path} at step {training.context.step}.")
    if main:
        say_notes(policy)
        say(_in_words(plan, prompts, training, run))
    if main and plan.method.needs.data_role == "besides" and data is None:
        say(f"No --data: {plan.method_name} takes samples of the base model in the place of {plan.method.needs.data}.")
    if settings.log:
        accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(run.path)
        accelerator.init_trackers("diffalign", config=_for_trackers({"run": str(run.path), **plan.config()}))
    shown = (held_out * PICTURES)[:PICTURES]
    try:
        guard = guarding(plan, run, policy, training, guards, held_out)
        if guard is None or not guard.fired:
            _steps(plan, run, policy, training, shown, guard)
    except InputError as error:
        if training.context.step == 0 or not main or settings.fsdp:  # to gather weights takes all processes, and one has failed
            raise
        with training.averaged(), suppress(OSError, SafetensorError):  # the disk itself may be the trouble
            run.save_weights(policy)
            raise InputError(f"{error}\nThe weights of step {training.context.step} are kept in {run.path}.") from error
        raise
    if training.average is not None:  # what is saved is what the pipeline now holds; the last checkpoint has the raw weights
        training.average.copy_to(training.parameters.values())
    if guard is not None:
        guard.settle()
    with policy.whole() if settings.fsdp else nullcontext():
        if main:
            run.save_weights(policy)
    watched = guard_outcome(run) if main else None
    if (main or settings.fsdp) and settings.eval_size and (rewards or data):
        chosen, files = held_out[: settings.eval_size], (run.path / "eval.json", run.path / "samples" / "before-after.png")
        try:
            results = evaluate_into(
                plan, policy, rewards, chosen, settings.seed + 1, *files, data, trained=prompts, guard=watched, write=main
            )
        except KeyboardInterrupt:
            say(f"The weights are saved. Evaluate them: diffalign eval {run.path}")
            raise
        except InputError as error:
            raise InputError(f"{error}\nThe weights are saved. Evaluate them: diffalign eval {run.path}") from error
        if main:
            console.print(comparison(results))
    if main:
        if watched is not None:
            say(closing(watched))
        if any(row.get("reward") is not None for row in run.metrics):  # methods on data ask no reward
            run.save_picture("curve.png", curve({run.path.name: run.metrics}))
        say(f"Run: {run.path}   Page: {run.path / 'report.html'}   Again: {again(run.path, shown[0], settings.pipeline == LIVE)}")
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()  # the run is whole when the first process has written it
    return Run(run.path, run.live, policy if run.live is not None else None)


def _steps(plan: Plan, run: Run, policy: Any, training: Training, shown: list[Prompt], guard: Guarding | None) -> None:
    """Take the steps that are left, or as many as the guard lets; rows, pictures and checkpoints as they fall due."""
    settings, accelerator, reward = plan.settings, training.accelerator, plan.reward
    main, picture_every = accelerator.is_main_process, settings.sample_every or max(1, settings.steps // 4)
    rate = rate_of(policy)
    samples = main or settings.fsdp  # a network that is shared out works in all processes, or in none

    def pictures() -> None:
        with training.averaged():
            suffix = plan.suffix if training.context.step else ""
            images = sample(policy, shown, steps=plan.sample_steps, seed=settings.seed, batch_size=settings.batch_size, suffix=suffix)
        step = training.context.step
        if main:
            path = run.save_picture(f"samples/step-{step:06d}.png", sheet([(f"step {step}", images)], shown, rate))
            if rate is not None:
                write_all(path.with_suffix(""), images, rate)

    saving = Saving(run, training, settings.keep_checkpoints, training.context.step)
    if training.context.step == 0:
        if samples:
            pictures()
        saving.checkpoint()
    due = False
    with noted() as caught:
        rows = saving.lasting(train(training, policy, plan.method, reward, settings))
        for row in watch(rows, training.context.step, settings.steps, main):
            if main:
                run.append_metrics(row.metrics)
                accelerator.log(row.metrics, step=row.step)
            fired = guard is not None and guard.after(row)
            last = fired or row.step == settings.steps
            if samples and (row.step % picture_every == 0 or last):
                pictures()
            due = due or row.step % settings.checkpoint_every == 0 or last
            stop = training.anywhere(bool(caught))
            if row.boundary and (due or stop):
                saving.checkpoint()
                due = False
                if fired:
                    return
                if stop and not last:
                    raise Stopped(caught[0] if caught else signal.SIGTERM, row.step, run.path)


def evaluate_into(
    plan: Plan,
    policy: Any,
    rewards: list[CheckedReward],
    prompts: list[Prompt],
    seed: int,
    output: Path,
    picture: Path,
    data: Data = None,
    *,
    trained: Sequence[Prompt],
    pairs: Any = None,
    guard: Any = None,
    write: bool = True,
    draws: int | None = None,
) -> dict[str, Any]:
    """Compare the policy with its base model, and write what `evaluate` found to `output` and the pictures to `picture`; sounds beside it.

    `trained` are the prompts of the training: how many of those of the evaluation are among them is written too, as `trained_on`.
    `pairs` is what was measured on the data before, `guard` what came of the run's guard; both stay. Where all processes work on one
    network, the first is to `write`. `draws` are by default the settings' eval_draws.
    """
    chosen = {"steps": plan.sample_steps, "seed": seed, "batch_size": plan.settings.batch_size, "draws": draws or plan.settings.eval_draws}
    results, before, after = evaluate(policy, rewards, prompts, suffix=plan.suffix, **chosen)
    if data is not None and plan.method.needs.data == "pairs":
        held = data[1]
        accuracy = implicit_accuracy(policy, held, seed=seed, batch_size=plan.settings.batch_size)
        pairs = {"count": len(held), "implicit_accuracy": accuracy, "trained_on": trained_on(held.prompts, data[0].prompts)}
    results["trained_on"] = trained_on(prompts, trained)
    results |= {name: value for name, value in {"pairs": pairs, "guard": guard}.items() if value}
    if not write:
        return results
    with whole(output) as draft:
        draft.write_text(json.dumps(results, indent=2) + "\n")
    rate, rows = rate_of(policy), {"before": before[:PICTURES], "after": after[:PICTURES]}
    sheet(list(rows.items()), prompts[:PICTURES], rate).save(picture)
    if rate is not None:
        for name, media in rows.items():
            write_all(picture.with_name(f"{picture.stem}-{name}"), media, rate)
    return results


def _for_trackers(config: dict[str, Any]) -> dict[str, Any]:
    """The settings as trackers take them: `lora.rank`, and text for what is neither number nor text."""
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat(config).items()}


def _fresh_name(plan: Plan) -> Path:
    model = plan.settings.pipeline.rstrip("/").rsplit("/", 1)[-1].replace(" ", "-")
    base = f"{short_name(plan.method_name)}-{model}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    names = (Path("runs") / (base + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 100))))
    return next(path for path in names if not path.exists())


def _in_words(plan: Plan, prompts: list[Prompt], training: Training, run: Run) -> str:
    s, count = plan.settings, training.context.processes.count
    size = sum(p.numel() for p in training.parameters.values())
    what = f"all weights{', sharded' * s.fsdp}" if s.full else f"a LoRA of rank {s.lora.rank}"
    source = training.stream.source
    seen = f"{plan.reward_name}: {len(prompts)} prompts" if isinstance(source, PromptList) else f"{s.data}: {len(source):,} examples"
    return (
        f"{plan.method_name} on {s.pipeline} with {seen}, {what} ({size:,} weights), "
        f"{s.steps} steps, {plan.batch_in_words(count)}, guidance {s.guidance_scale:g}, {s.precision}, seed {s.seed}. Into {run.path}"
    )
