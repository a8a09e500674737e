"""The Python API: `align` trains, `load` opens what was trained; and what the command line does with a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from diffalign import registry, tiny
from diffalign.composing import given_reward, make_reward
from diffalign.config import Plan, resolve
from diffalign.console import say
from diffalign.contract import CheckedReward, judged, short_name
from diffalign.data import SpokenPrompt, check_fit, check_prompts, read_prompts
from diffalign.errors import InputError
from diffalign.guarding import check_guard, guard_outcome, guard_rewards
from diffalign.inputs import (
    check_judges,
    check_media,
    check_parts,
    check_read,
    check_reward,
    eval_rewards,
    given_prompts,
    named_rewards,
    open_data,
    prompt_lists,
)
from diffalign.loop import STATE
from diffalign.media import read_image
from diffalign.models import class_of, make_policy, modality_of, prepare_to_train
from diffalign.pages import leave_report
from diffalign.preflight import Finding, preflight
from diffalign.run import Run
from diffalign.session import evaluate_into, start
from diffalign.settings import LIVE
from diffalign.sound import CLIPPED, Sound, is_wav, read_wav
from diffalign.types import Prompts, StatefulReward


def align(
    pipe: Any = "shapes",
    *,
    method: str = "draft",
    reward: Any = None,
    prompts: str | Path | Sequence[str | SpokenPrompt | tuple[str, *tuple[str | Path, ...]]] | None = None,
    eval_prompts: str | Path | Sequence[str | SpokenPrompt | tuple[str, *tuple[str | Path, ...]]] | None = None,
    output: str | Path | None = None,
    **given: Any,
) -> Run:
    """Align a diffusion model with a reward, and return the finished run.

    `pipe` is a live diffusers pipeline (trained in place), a Hub id, a folder, or 'shapes'. `reward` is a name, a callable
    `(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`, a mapping as in config.yaml, or several of these in a list or in `compose(...)`.
    `prompts` is a list, or what `--prompts` takes; of an editing pipeline a list of `(instruction, picture file)`, for inpainting of
    `(text, picture file, mask file)`, for speech of `SpokenPrompt(text, transcript)`. Everything else is a setting (`steps=`,
    `learning_rate=`, `lora={"rank": 8}`, ...) or a field of the method (`k=`, `inference_steps=`, ...), as in config.yaml.

    Raises InputError for anything that cannot work, where possible before a model is loaded.
    """
    pipe = str(pipe) if isinstance(pipe, Path) else pipe
    live = None if isinstance(pipe, str) else pipe
    named_reward, object_reward = given_reward(reward)
    method_class, _ = registry.find("methods", method)
    method_fields = {f.name for f in fields(method_class)}
    settings = {k: v for k, v in given.items() if k not in method_fields}
    nested: dict[str, Any] = {"method": {"name": method, **{k: v for k, v in given.items() if k in method_fields}}, **settings}
    nested["pipeline"] = LIVE if live is not None else pipe
    if named_reward is not None:
        nested["reward"] = named_reward
    sources = {"prompts": prompts, "eval_prompts": eval_prompts}
    nested |= {name: str(value) for name, value in sources.items() if isinstance(value, str | Path)}
    plan = resolve(nested, object_reward)
    plan = tiny.cut(plan) if plan.settings.tiny else plan
    lists = [None if value is None or isinstance(value, str | Path) else check_prompts(list(value)) for value in sources.values()]
    return start(plan, output, live, *lists)


def load(path: str | Path, pipe: Any = None) -> Run:
    """Open a run folder: `.pipeline` is the trained diffusers pipeline, `.metrics` and `.evaluation` what was measured.

    `pipe` is the base pipeline of a run that was made from a live object; its LoRA is loaded into it.
    """
    return Run.open(path, None if pipe is None else Run.open(path).load_into(pipe))


def evaluate_run(
    run: Run,
    rewards: Sequence[str] | None = None,
    prompts: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    output: str | Path | None = None,
    draws: int | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run on held-out prompts, by default as its training did at its end; write what was found, and return it."""
    plan = run.plan
    made = None if run.live is not None or plan.settings.pipeline == LIVE else modality_of(class_of(plan.settings))
    checked = named_rewards(rewards, dry=plan.settings.tiny, made=made) if rewards else _own_rewards(run)
    if not checked:
        raise InputError(f"{run.path} was trained on a reward given as a Python object: name others with --reward NAME.")
    texts = read_prompts(prompts, "heldout") if prompts else run.read_prompts("heldout")
    limit = plan.settings.eval_size if limit is None else limit
    if limit < 1:
        raise InputError(f"--limit is {limit}: give 1 or more.")
    if draws is not None and draws < 1:
        raise InputError(f"--draws is {draws}: give 1 or more samples of each prompt.")
    target = Path(output).expanduser() if output else run.path / "eval.json"
    if target.suffix != ".json" or not target.parent.is_dir():
        raise InputError(f"--output {target}: give a .json file in a folder that exists.")
    if seed is not None and seed < 0:
        raise InputError(f"--seed is {seed}: give a whole number from 0.")
    seed = plan.settings.seed + 1 if seed is None else seed
    before: dict[str, Any] = {}
    with suppress(InputError):
        before = run.evaluation
    check_fit(texts[:limit], run.policy)
    check_judges(checked, run.policy.modality)
    check_read(checked, texts[:limit], run.policy)
    kept = {"pairs": before.get("pairs"), "guard": guard_outcome(run)}
    results = evaluate_into(
        plan,
        run.policy,
        checked,
        texts[:limit],
        seed,
        target,
        target.with_suffix(".png"),
        trained=run.read_prompts("train"),
        draws=draws,
        **kept,
    )
    say(f"Written: {target} and {target.with_suffix('.png')}")
    if target == run.path / "eval.json":
        leave_report(run)
    return results


def _own_rewards(run: Run) -> list[CheckedReward]:
    """The rewards that the run's training evaluates on; raises InputError where one of them is gone."""
    try:
        rewards = eval_rewards(resolve(run.config))
        if rewards and isinstance(rewards[0].reward, StatefulReward):  # as the training left it
            memory = run.source.newest_checkpoint()[0]["memory"]
            if STATE in memory:
                rewards[0].reward.restore(memory[STATE])
        return rewards
    except InputError as error:
        raise InputError(f"A reward of {run.path} cannot be had: {error} Put it back, or name others with --reward NAME.") from error


def score_files(
    reward: str,
    files: Sequence[Path],
    prompt: str | None = None,
    source: Path | None = None,
    fields: Mapping[str, Any] | None = None,
    transcript: str | None = None,
) -> Iterator[tuple[Path, float]]:
    """`(file, score)` of each picture, or of each .wav file for a reward of sound; they may differ in size, length and sample rate.

    `source` is what was edited, for a reward of edits; `transcript` what is said in all the sounds. `fields` are the reward's. Raises
    InputError for files that cannot be used, before the first is scored.
    """
    for file, score, _ in score_files_by_part(reward, files, prompt, source, fields, transcript):
        yield file, score


def score_files_by_part(
    reward: str,
    files: Sequence[Path],
    prompt: str | None = None,
    source: Path | None = None,
    fields: Mapping[str, Any] | None = None,
    transcript: str | None = None,
) -> Iterator[tuple[Path, float, dict[str, float]]]:
    """`(file, score, raw scores)` as `score_files` has them, the last by part of a composed reward: of those that are for the prompt."""
    made, _ = make_reward(reward, fields or {})
    checked = CheckedReward(made, short_name(reward), noted={})
    checked.check_settled("diffalign score is none")
    if judged(made) is None:
        checked.open()  # only now it is known what it judges
    if checked.modality == "audio":
        if source is not None:
            raise InputError(f"--image: {reward} judges sound. Drop it.")
        sounds = [read_wav(file) for file in files]
        for rate in checked.hears:
            for file, sound in zip(files, sounds, strict=True):
                sound.length_at(rate, str(file))
        _open_to_score(checked, prompt, transcript)
        for file, score in _score_sounds(checked, files, sounds, prompt, transcript):
            yield file, score, _of_parts(checked)
        return
    if transcript is not None:
        raise InputError(f"--transcript: {reward} judges pictures. Drop it.")
    for file in (*files, *([source] if source else [])):
        if file.is_file() and is_wav(file.read_bytes()[:12]):
            raise InputError(f"{file} is a sound, and {reward} judges pictures. Choose another reward: diffalign list rewards.")
    pictures = [read_image(file) for file in files]
    before = None if source is None else read_image(source)[None]
    _open_to_score(checked, prompt, transcript)
    for file, picture in zip(files, pictures, strict=True):
        with torch.no_grad():
            score = float(checked(picture[None], Prompts((prompt or "",), before)))
        yield file, score, _of_parts(checked)


def _open_to_score(reward: CheckedReward, prompt: str | None, transcript: str | None) -> None:
    reward.open()
    if prompt is None and transcript is None:
        say("No --prompt: scored as if the prompt were empty.")


def _of_parts(reward: CheckedReward) -> dict[str, float]:
    """What each part of a composed reward gave the file that was scored last, where it was asked."""
    parts = {name: float(calls.pop()) for name, calls in (reward.noted or {}).items()}
    return {name: value for name, value in parts.items() if not math.isnan(value)}


def _score_sounds(
    reward: CheckedReward, files: Sequence[Path], sounds: Sequence[Sound], prompt: str | None, transcript: str | None
) -> Iterator[tuple[Path, float]]:
    for wanted, names in reward.hears.items():
        others = sorted({sound.sample_rate for sound in sounds} - {wanted})
        if others:
            who = f"{', '.join(names)} {'hears' if len(names) == 1 else 'hear'}"
            say(f"Resampled to the {wanted} Hz that {who}: the files have {', '.join(map(str, others))} Hz.")
    for file, sound in zip(files, sounds, strict=True):
        if sound.clipped > CLIPPED:
            say(f"{file} is clipped: {sound.clipped:.1%} of its samples are at full scale. What was above is lost, and not scored.")
        said = None if transcript is None else (transcript,)
        with torch.no_grad():
            yield file, float(reward(sound.waveform[None], Prompts((prompt or "",), transcript=said, sample_rate=sound.sample_rate)))


def check(plan: Plan) -> Iterator[Finding]:
    """The preflight of a plan: see `diffalign.preflight`."""
    check_media(plan, modality_of(class_of(plan.settings)))
    if plan.settings.tiny:
        yield Finding("tiny", None, tiny.in_words(plan.settings))
    given = given_prompts(plan.settings)
    check_parts(plan, *given)
    if plan.reward is not None:
        plan.reward.open()
    guards = guard_rewards(plan)
    policy = make_policy(plan.settings, train=False)
    data = open_data(plan, policy)
    prompts, held_out = prompt_lists(plan.settings, *given, data)
    check_fit([*prompts, *held_out], policy)
    check_reward(plan, policy, prompts)
    check_guard(guards, policy, held_out)
    with plan.reward.rehearsal() if plan.reward is not None else nullcontext():
        yield from preflight(plan, prepare_to_train(policy, plan.settings), prompts, data[0] if data else None)
