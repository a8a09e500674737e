"""Samples of several models for people to compare: the same prompts and the same noise, a folder a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Generator, Tensor

from diffalign.cache import digest
from diffalign.checkpoint import occupied
from diffalign.console import say, say_notes
from diffalign.data import PicturePrompt, Prompt, batch_of, check_fit, known_as, rate_of, read_prompts
from diffalign.errors import InputError
from diffalign.gathering import note, noted
from diffalign.making import OF_THE_MACHINE, Making, is_run, preset_of, settings_of
from diffalign.media import to_pil
from diffalign.models import make_policy
from diffalign.run import Run
from diffalign.sampling import ddim, rollout
from diffalign.sound import write_wav
from diffalign.types import Policy

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
    done = {name.rpartition(".")[0] for name in noted(path) if (path / name).is_file()}
    missing = [(i, j) for j in range(samples) for i in range(len(prompts)) if _stem(i, j) not in done]
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
    batches = [missing[start : start + making.batch_size] for start in range(0, len(missing), making.batch_size)]
    for count, batch in enumerate(batches, 1):
        own = [prompts[i] for i, _ in batch]
        media = _sample(policy, own, [_seed(making.seed, i, j) for i, j in batch], making.sample_steps)
        files = [path / f"{_stem(i, j)}.{'wav' if rate_of(policy) else 'png'}" for i, j in batch]
        for file, medium in zip(files, media, strict=True):
            if (rate := rate_of(policy)) is not None:
                write_wav(file, medium, rate)
            else:
                to_pil(medium).save(file)
        note(path, own, files)
        if count % 10 == 0 or count == len(batches):
            say(f"{path}: {count:,} of {len(batches):,} batches")


@torch.no_grad()
def _sample(policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int) -> Tensor:
    """Media of the prompts on the CPU, deterministic given each one's seed, whatever else is in the batch."""
    condition = policy.encode(batch_of(prompts, policy))
    noise = [policy.prior(condition[i : i + 1], Generator().manual_seed(seed)) for i, seed in enumerate(seeds)]
    return policy.decode(rollout(policy, condition, steps=steps, kernel=ddim(0.0), start=torch.cat(noise)).final).cpu()


def _seed(seed: int, i: int, j: int) -> int:
    """Of the j-th sample of the i-th prompt; not of the model or its batches: all start from the same noise."""
    return int(digest(f"{seed} {i} {j}")[:15], 16)


def _stem(i: int, j: int) -> str:
    return f"samples/{i + 1:06d}-{j}"


def _settings(making: Making, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides what the samples are; more of each may be made later."""
    own = {key: value for key, value in asdict(making).items() if key not in ("pairs", "samples", "prompts", "batch_size", *OF_THE_MACHINE)}
    return {**own, "prompts": digest(*map(known_as, prompts))}


def _check(path: Path, making: Making, prompts: Sequence[Prompt]) -> None:
    """Raise InputError for a folder that was made otherwise."""
    if not occupied(path):
        return
    try:
        before = yaml.safe_load((path / MADE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} exists already, and was not made by diffalign label: choose another --output.") from error
    if other := [key for key, value in _settings(making, prompts).items() if not isinstance(before, dict) or before.get(key) != value]:
        raise InputError(
            f"{path} was made with other settings ({', '.join(other)}): choose another --output, or the same settings to go on."
        )
