"""Preference pairs from a model and a reward: samples of a prompt, scored, written as the folder that the offline methods read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffalign import knobs
from diffalign.cache import digest
from diffalign.composing import given_reward
from diffalign.config import parse
from diffalign.console import console, say, say_notes
from diffalign.contract import CheckedReward, check_modality
from diffalign.data import PicturePrompt, Prompt, SpokenPrompt, batch_of, check_fit, check_prompts, known_as, rate_of, read_prompts, text_of
from diffalign.errors import InputError
from diffalign.inputs import check_read
from diffalign.making import OF_THE_MACHINE, Making, build_parser, is_run, settings_of, settle
from diffalign.models import class_of, make_policy, modality_of
from diffalign.ranks import Drawn, Outcome, Ranked, claim, count, ledger, rewrite, write
from diffalign.run import Run
from diffalign.sampling import noisy, rollout
from diffalign.settings import LIVE, Settings
from diffalign.sound import rounded
from diffalign.trajectories import Stored
from diffalign.types import Modality, Policy, Prompts, Taken

PATIENCE = 100  # prompts without a pair, and at least all of them once, until the reward is taken for a constant


def make_pairs(
    pipe: Any = "shapes",
    *,
    reward: Any = None,
    output: str | Path,
    prompts: str | Path | Sequence[str | SpokenPrompt] | None = None,
    **given: Any,
) -> Path:
    """Write preference pairs of a model's samples into the folder `output`, and return it; the same call again goes on.

    `pipe` is a live diffusers pipeline, a Hub id, a folder, a run's folder or 'shapes'; `reward` a name or a callable; `prompts` a
    list, or what `--prompts` takes; the rest are fields of `Making`. Raises InputError for what cannot work, and for a folder
    that was made with other settings.
    """
    live = None if isinstance(pipe, str | Path) else pipe
    flags = {"pipeline": str(pipe) if live is None else LIVE, "output": str(output), **given}
    if isinstance(prompts, str | Path):
        flags["prompts"] = str(prompts)
    named, live_reward = given_reward(reward)
    if named is not None:
        flags["reward"] = named
    parser = build_parser(flags["pipeline"], named["name"] if named else None)
    settled = settle(parse(parser, lambda: parser.parse_object(flags)), live_reward)
    texts = None if prompts is None or isinstance(prompts, str | Path) else check_prompts(list(prompts))
    return make(*settled, texts=texts, live=live)


def make(
    making: Making,
    reward: CheckedReward,
    reward_fields: Mapping[str, Any],
    folder: Path,
    texts: Sequence[Prompt] | None = None,
    live: Any = None,
) -> Path:
    """Make the pairs that are still missing in `folder`; `texts` stand for the settings' prompts, `live` for its pipeline."""
    if texts is None and making.prompts is None:
        raise InputError("No prompts: give --prompts FILE (one a line), or --prompts shapes.")
    prompts = _without_pictures(read_prompts(making.prompts or "") if texts is None else texts)
    settings = {
        **{key: value for key, value in asdict(making).items() if key not in ("pairs", *OF_THE_MACHINE)},
        "prompts": {"source": making.prompts if texts is None else None, "count": len(prompts), "sha256": digest(*map(known_as, prompts))},
        "reward": {"name": reward.name, **{k: str(v) if isinstance(v, Path) else v for k, v in reward_fields.items()}},
    }
    done = ledger(folder, settings)
    knobs.check(settings_of(making))
    if _missing(making, done, prompts):
        made = _made(making, live)
        if made is not None:
            check_modality(reward.reward, reward.name, made)
        reward.open()
        if made is not None:  # again: a reward may know only now what it judges
            check_modality(reward.reward, reward.name, made)
        with _policy(making, reward, prompts, live) as policy, claim(folder, settings):
            done = ledger(folder, settings)  # again, now that nobody else writes
            if done:
                say(f"{folder} has {count(done):,} pairs of {len(done):,} prompts already: going on.")
            rewrite(folder, done)
            rows = write(folder, rank(policy, reward, prompts, making, len(done)))
            for ranked in _watch(rows, making, _missing(making, done, prompts), max(PATIENCE, len(prompts))):
                done.append(ranked)
    if not count(done):
        raise InputError(f"{folder}: in {len(done):,} prompts no two samples differ in reward. Is {reward.name} constant?")
    ties = len(done) - count(done)
    say(f"{folder}: {count(done):,} pairs" + (f"; {ties:,} prompts whose samples score the same have none." if ties else "."))
    return folder


def _missing(making: Making, done: Sequence[Ranked], prompts: Sequence[Prompt]) -> int:
    """Pairs that are still to be made; where no number was asked for, prompts."""
    return max(0, len(prompts) - len(done) if making.pairs is None else making.pairs - count(done))


def _without_pictures(prompts: Sequence[Prompt]) -> list[Prompt]:
    if any(isinstance(prompt, PicturePrompt) for prompt in prompts):
        raise InputError("These prompts come with pictures to edit: diffalign pairs samples models that make pictures or sounds from text.")
    return list(prompts)


def _made(making: Making, live: Any) -> Modality | None:
    """What the pipeline makes, from its index; None where nobody knows yet."""
    if live is not None:
        return modality_of(type(live).__name__)
    settings = Run.open(making.pipeline).plan.settings if is_run(making.pipeline) else Settings(making.pipeline, making.revision)
    return None if settings.pipeline == LIVE else modality_of(class_of(settings))


@contextmanager
def _policy(making: Making, reward: CheckedReward, prompts: Sequence[Prompt], live: Any) -> Iterator[Policy]:
    """What is sampled; a live pipeline can be called as before, however the block ends."""
    pipe = Run.open(making.pipeline).pipeline if live is None and is_run(making.pipeline) else live
    policy = make_policy(settings_of(making), pipe, train=False)
    try:
        say_notes(policy)
        check_modality(reward.reward, reward.name, policy.modality)
        check_fit(prompts, policy)
        check_read([reward], prompts, policy)
        yield policy
    finally:
        if live is not None:
            policy.release()


def rank(policy: Policy, reward: CheckedReward, prompts: Sequence[Prompt], making: Making, first: int) -> Iterator[list[Outcome]]:
    """Outcomes of the prompts from number `first` on, without end, the prompts again and again; a list a forward.

    Sample n is one of prompt n // samples. It has its own noise, and stands at a fixed place of a batch of fixed size, so that
    it is the same whatever was made before in this process.
    """
    samples, size, number = making.samples, making.batch_size, first * making.samples
    open_: list[Drawn] = []
    for start in itertools.count(number // size * size, size):
        numbers = range(start, start + size)
        texts = batch_of([prompts[n // samples % len(prompts)] for n in numbers], policy)
        finished: list[Outcome] = []
        for n, drawn in zip(numbers, _sample(policy, reward, texts, making, numbers), strict=True):
            if n >= number:
                open_.append(drawn)
            if len(open_) == samples:
                asked = prompts[n // samples % len(prompts)]
                said = asked.transcript if isinstance(asked, SpokenPrompt) else None
                finished.append(Outcome(n // samples, text_of(asked), open_, said, rate_of(policy)))
                open_ = []
        yield finished


@torch.no_grad()
def _sample(policy: Policy, reward: CheckedReward, texts: Prompts, making: Making, numbers: range) -> list[Drawn]:
    """Samples, on the CPU: their pictures in [0, 1], rounded to 8 bits as their files are, or sounds in [-1, 1] to 16."""
    condition = policy.encode(texts)
    noise = torch.cat([policy.prior(condition[i : i + 1], _generator(making, str(n))) for i, n in enumerate(numbers)])
    eta, rng = float(making.trajectories), _generator(making, f"steps {numbers[0]}")  # its own: no noise may be used twice
    kernel = noisy(policy.path, eta)
    taken = rollout(policy, condition, steps=making.sample_steps, kernel=kernel, random_steps=making.random_steps, start=noise, rng=rng)
    media = policy.decode(taken.final)
    media = rounded(media) if rate_of(policy) else (media.clamp(0, 1) * 255).round() / 255
    stored: list[Stored | None] = [None] * len(numbers)
    if making.trajectories:
        how = Taken(taken.schedule, taken.actions, eta, condition.guidance_scale)
        stored = [Stored(states, how) for states in taken.states.float().cpu().unbind(1)]
    return [Drawn(*each) for each in zip(media.cpu(), reward(media, texts).tolist(), stored, strict=True)]


def _generator(making: Making, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest(f"{making.seed} {what}")[:15], 16))


def _watch(rows: Generator[Ranked], making: Making, wanted: int, patience: int) -> Iterator[Ranked]:
    """Pass rows on until so many are there, showing the rate and the time that is left; stop where the reward gives no pairs."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    what, began, done, ties, every = "prompts" if making.pairs is None else "pairs", time.monotonic(), 0, 0, max(1, wanted // 10)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, closing(rows):
        task = progress.add_task(what, total=wanted, rate="")
        while done < wanted:
            ranked = next(rows)
            yield ranked
            ties = 0 if ranked.pair is not None else ties + 1
            if making.pairs is not None and ties:
                if ties < patience:
                    continue
                say(f"The last {ties:,} prompts gave no pair.")
                return
            done += 1
            rate = f"{done / (time.monotonic() - began):.1f}/s"
            progress.update(task, completed=done, rate=rate)
            if not console.is_terminal and (done % every == 0 or done == wanted):
                say(f"{done:,}/{wanted:,} {what}  {rate}")
