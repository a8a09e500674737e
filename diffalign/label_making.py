"""Samples of several models for people to compare: the same prompts and the same noise, a folder a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from diffalign.cache import digest
from diffalign.console import say, say_notes
from diffalign.data import PicturePrompt, Prompt, check_fit, known_as, rate_of, read_prompts
from diffalign.errors import InputError
from diffalign.evaluate import sample
from diffalign.gathering import note, noted
from diffalign.making import OF_THE_MACHINE, Making, is_run, preset_of, settings_of
from diffalign.media import to_pil
from diffalign.models import make_policy
from diffalign.run import Run
from diffalign.sound import write_wav

MADE = "samples.yaml"


def settle(pipelines: Sequence[str], folder: Path, given: Mapping[str, Any]) -> dict[Path, tuple[Making, list[Prompt]]]:
    """The folder of each pipeline (a name, a Hub id, a folder or a run), how its samples are made, and of which prompts.

    `given` are fields of `Making` that override what the pipeline brings along. Raises InputError for what cannot work, and for a folder
    that was made otherwise; nothing is loaded.
    """
    found = dict[Path, tuple[Making, list[Prompt]]]()
    for pipeline in pipelines:
        known = {key: value for key, value in preset_of(pipeline).items() if key != "reward"}
        making = Making(**{**known, "pipeline": pipeline, "samples": 2, **given})
        if making.prompts is None:
            raise InputError("No prompts: give --prompts FILE (one a line), or --prompts shapes.")
        prompts = list(dict.fromkeys(read_prompts(making.prompts)))
        if any(isinstance(prompt, PicturePrompt) for prompt in prompts):
            raise InputError("These prompts come with pictures: diffalign label samples models that make pictures or sounds from text.")
        name = Path(pipeline.rstrip("/")).name or pipeline
        path = folder / name
        if path in found:
            raise InputError(f"Two pipelines are named {name}: rename one's folder, or sample them apart and give both folders.")
        _check(path, making, prompts)
        found[path] = (making, prompts)
    return found


def make(path: Path, making: Making, prompts: Sequence[Prompt], samples: int) -> None:
    """Make what is missing of `samples` of each prompt in the folder `path`: what a kill has left is gone on with."""
    wanted = [(j, start) for j in range(samples) for start in range(0, len(prompts), making.batch_size)]
    done = {name.rpartition(".")[0] for name in noted(path)}
    missing = [(j, start) for j, start in wanted if not {_stem(i, j) for i in _rows(start, making, prompts)} <= done]
    if not missing:
        return
    pipe = Run.open(making.pipeline).pipeline if is_run(making.pipeline) else None
    policy = make_policy(settings_of(making), pipe, train=False)
    say_notes(policy)
    check_fit(prompts, policy)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "samples").mkdir(exist_ok=True)
        draft = path / f"{MADE}.draft"
        draft.write_text(yaml.safe_dump(_settings(making, prompts), sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(draft, path / MADE)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another --output.") from error
    for count, (j, start) in enumerate(missing, 1):
        own = _rows(start, making, prompts)
        seed = int(digest(f"{making.seed} {j} {start}")[:15], 16)  # not of the model: all start from the same noise
        with torch.no_grad():
            media = sample(policy, [prompts[i] for i in own], steps=making.sample_steps, seed=seed, batch_size=making.batch_size)
        files = [path / f"{_stem(i, j)}.{'wav' if rate_of(policy) else 'png'}" for i in own]
        for file, medium in zip(files, media, strict=True):
            if (rate := rate_of(policy)) is not None:
                write_wav(file, medium, rate)
            else:
                to_pil(medium).save(file)
        note(path, [prompts[i] for i in own], files)
        if count % 10 == 0 or count == len(missing):
            say(f"{path}: {count:,} of {len(missing):,} batches")


def _rows(start: int, making: Making, prompts: Sequence[Prompt]) -> range:
    return range(start, min(start + making.batch_size, len(prompts)))


def _stem(i: int, j: int) -> str:
    return f"samples/{i + 1:06d}-{j}"


def _settings(making: Making, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides what the samples are; more of each may be made later."""
    own = {key: value for key, value in asdict(making).items() if key not in ("pairs", "samples", "prompts", *OF_THE_MACHINE)}
    return {**own, "prompts": digest(*map(known_as, prompts))}


def _check(path: Path, making: Making, prompts: Sequence[Prompt]) -> None:
    """Raise InputError for a folder that was made otherwise."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        before = yaml.safe_load((path / MADE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} exists already, and was not made by diffalign label: choose another --output.") from error
    if other := [key for key, value in _settings(making, prompts).items() if not isinstance(before, dict) or before.get(key) != value]:
        raise InputError(
            f"{path} was made with other settings ({', '.join(other)}): choose another --output, or the same settings to go on."
        )
