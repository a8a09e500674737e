"""Preference pairs from a model and a reward: samples of a prompt, scored, written as the folder that the offline methods read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import torch
from jsonargparse import ArgumentParser, Namespace
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffalign import registry
from diffalign.cache import digest
from diffalign.composing import given_reward, make_reward
from diffalign.config import model_preset, parameters, parse
from diffalign.console import console, say, say_notes
from diffalign.contract import CheckedReward, as_reward, name_of
from diffalign.data import PicturePrompt, Prompt, check_prompts, read_prompts, text_of
from diffalign.errors import InputError
from diffalign.models import make_policy
from diffalign.ranks import Drawn, Outcome, Ranked, claim, count, ledger, rewrite, write
from diffalign.run import Run
from diffalign.sampling import noisy, rollout
from diffalign.settings import LIVE, Settings
from diffalign.trajectories import Stored
from diffalign.types import Policy, Prompts, Taken

PATIENCE = 100  # prompts without a pair, and at least all of them once, until the reward is taken for a constant


@dataclass(frozen=True)
class Making:
    """Making pairs."""

    pipeline: str = "shapes"
    """Model whose samples are compared: shapes (embedded), a Hub id, a folder in diffusers layout, or the folder of a run."""
    revision: str | None = None
    """Revision of a Hub model."""
    prompts: str | None = None
    """Prompts: a .txt or .jsonl file, shapes, or hf:user/dataset/file.txt."""
    pairs: int | None = None
    """Stop after so many pairs, going through the prompts again and again; by default once through the prompts."""
    samples: int = 2
    """Samples of each prompt: the best and the worst are a pair."""
    sample_steps: int = 50
    """Denoising steps of a sample."""
    trajectories: bool = False
    """Keep each sample's states beside its picture, and take random steps (eta 1): D3PO trains on these once people have judged."""
    random_steps: int | None = None
    """With trajectories: only so many of the first steps are random; by default all are."""
    batch_size: int = 8
    """Samples of one forward."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 for none."""
    true_cfg_scale: float = 1.0
    """Classifier-free guidance of models that are told guidance_scale (FLUX); 1 for none."""
    max_sequence_length: int | None = None
    """Tokens of the long text encoder of Stable Diffusion 3, FLUX and Z-Image; by default the pipeline's own."""
    negative_prompt: str | None = None
    """Prompt of the unconditional branch; by default the pipeline's own: the empty one, or none at all for SDXL."""
    height: int | None = None
    """Height of the pictures in pixels; by default the model's own."""
    width: int | None = None
    """Width of the pictures in pixels; by default the model's own."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network."""
    device: str | None = None
    """By default cuda, mps or cpu, the first there is."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        for name, least in {"samples": 2, "sample_steps": 1, "batch_size": 1}.items():
            if vars(self)[name] < least:
                raise InputError(f"{name} is {vars(self)[name]}: give {least} or more.")
        if self.random_steps is not None and not (self.trajectories and 1 <= self.random_steps <= self.sample_steps):
            raise InputError(f"random_steps is {self.random_steps}: give 1 to {self.sample_steps} (sample_steps), and --trajectories.")
        if self.pairs is not None and self.pairs < 1:
            raise InputError(f"pairs is {self.pairs}: give 1 or more.")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}: give a whole number from 0 to 2147483647.")


def make_pairs(
    pipe: Any = "shapes", *, reward: Any = None, output: str | Path, prompts: str | Path | Sequence[str] | None = None, **given: Any
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


def build_parser(pipeline: str, reward: str | None) -> ArgumentParser:
    """The parser of `diffalign pairs`: the fields of `Making` and of the named reward, with the model's or the run's defaults."""
    preset = _preset(pipeline)
    named = preset.pop("reward", None) or {}
    reward = reward or named.get("name")
    found, reward_fields = registry.find("rewards", reward) if reward else (None, {})
    parser = ArgumentParser(prog="diffalign pairs", exit_on_error=False, usage="diffalign pairs --reward NAME --output DIR [options]")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the pairs; the same command again goes on.")
    parser.add_class_arguments(Making, None)
    parser.add_argument("--reward.name", type=str | None, default=reward, help="See: diffalign list rewards.")
    for name, (kind, default, about) in parameters(found).items():
        parser.add_argument(f"--reward.{name}", type=kind, default=default, help=about)
    defaults = {**preset, **{f"reward.{key}": value for key, value in {**reward_fields, **_only(named, reward)}.items()}}
    parser.set_defaults(defaults)
    about = {p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(Making).params}
    for action in parser._actions:
        action.help = about.get(action.dest, action.help)
    return parser


def settle(parsed: Namespace, reward: Any = None) -> tuple[Making, CheckedReward, dict[str, Any], Path]:
    """(making, reward, the reward's fields, output) of parsed flags; `reward` is an object in the place of a name."""
    values: dict[str, Any] = parsed.as_dict()
    output, reward_fields = Path(values.pop("output")).expanduser(), values.pop("reward")
    name = reward_fields.pop("name")
    if reward is not None:
        checked, reward_fields = CheckedReward(as_reward(reward), name_of(reward)), {}
    elif name is None:
        raise InputError("pairs need a reward: --reward NAME. See: diffalign list rewards.")
    else:
        made, reward_fields = make_reward(name, reward_fields)
        checked = CheckedReward(made, name)
    checked.check_settled("diffalign pairs is none")
    return Making(**values), checked, reward_fields, output


def _preset(pipeline: str) -> dict[str, Any]:
    """What a model or a run brings along: fields of `Making`, and `reward` as {"name": ...}."""
    if _is_run(pipeline):
        run = Run.open(pipeline)
        known = {**run.config, "pipeline": pipeline, "sample_steps": run.plan.sample_steps, "device": None}
    else:
        if pipeline != LIVE:
            registry.locate(pipeline)
        known = model_preset(pipeline, "pairs")
    named = known.get("reward")
    named = {"name": named} if isinstance(named, str) else dict(named or {})
    own = {field.name for field in fields(Making)} - {"seed", "pairs", "samples"}
    return {**{key: value for key, value in known.items() if key in own}, "reward": {} if named.get("name") == LIVE else named}


def _only(named: Mapping[str, Any], reward: str | None) -> dict[str, Any]:
    """The fields of a run's reward, where it is the reward that is meant."""
    return {key: value for key, value in named.items() if key != "name"} if named.get("name") == reward else {}


def _is_run(pipeline: str) -> bool:
    path = Path(pipeline).expanduser()
    return (path / "config.yaml").is_file() and not (path / "model_index.json").is_file()


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
    prompts = _texts(read_prompts(making.prompts or "") if texts is None else texts)
    settings = {
        **{key: value for key, value in asdict(making).items() if key not in ("pairs", "device")},
        "prompts": {"source": making.prompts if texts is None else None, "count": len(prompts), "sha256": digest(*prompts)},
        "reward": {"name": reward.name, **{k: str(v) if isinstance(v, Path) else v for k, v in reward_fields.items()}},
    }
    done = ledger(folder, settings)
    if _missing(making, done, prompts):
        reward.open()
        policy = _policy(making, live)
        say_notes(policy)
        if reward.modality != "image" or policy.modality != "image":
            raise InputError(f"{reward.name} judges {reward.modality}, and this pipeline makes {policy.modality}: pairs are of pictures.")
        with claim(folder, settings):
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


def _missing(making: Making, done: Sequence[Ranked], prompts: Sequence[str]) -> int:
    """Pairs that are still to be made; where no number was asked for, prompts."""
    return max(0, len(prompts) - len(done) if making.pairs is None else making.pairs - count(done))


def _texts(prompts: Sequence[Prompt]) -> list[str]:
    texts = [text_of(prompt) for prompt in prompts if not isinstance(prompt, PicturePrompt)]
    if len(texts) < len(prompts):
        raise InputError("These prompts come with pictures to edit: diffalign pairs samples models that make pictures from text.")
    return texts


def _policy(making: Making, live: Any) -> Policy:
    names = ("pipeline", "revision", "guidance_scale", "true_cfg_scale", "max_sequence_length", "negative_prompt")
    names += ("height", "width", "precision", "device")
    pipe = Run.open(making.pipeline).pipeline if live is None and _is_run(making.pipeline) else live
    return make_policy(Settings(**{name: vars(making)[name] for name in names}), pipe, train=False)


def rank(policy: Policy, reward: CheckedReward, prompts: Sequence[str], making: Making, first: int) -> Iterator[list[Outcome]]:
    """Outcomes of the prompts from number `first` on, without end, the prompts again and again; a list a forward.

    Sample n is one of prompt n // samples. It has its own noise, and stands at a fixed place of a batch of fixed size, so that
    it is the same whatever was made before in this process.
    """
    samples, size, number = making.samples, making.batch_size, first * making.samples
    open_: list[Drawn] = []
    for start in itertools.count(number // size * size, size):
        numbers = range(start, start + size)
        texts = Prompts(tuple(prompts[n // samples % len(prompts)] for n in numbers))
        finished: list[Outcome] = []
        for n, drawn in zip(numbers, _sample(policy, reward, texts, making, numbers), strict=True):
            if n >= number:
                open_.append(drawn)
            if len(open_) == samples:
                finished.append(Outcome(n // samples, prompts[n // samples % len(prompts)], open_))
                open_ = []
        yield finished


@torch.no_grad()
def _sample(policy: Policy, reward: CheckedReward, texts: Prompts, making: Making, numbers: range) -> list[Drawn]:
    """Samples, their pictures in [0, 1], on the CPU, rounded to 8 bits as their files are."""
    condition = policy.encode(texts)
    noise = torch.cat([policy.prior(condition[i : i + 1], _generator(making, str(n))) for i, n in enumerate(numbers)])
    eta, rng = float(making.trajectories), _generator(making, f"steps {numbers[0]}")  # its own: no noise may be used twice
    kernel = noisy(policy.path, eta)
    taken = rollout(policy, condition, steps=making.sample_steps, kernel=kernel, random_steps=making.random_steps, start=noise, rng=rng)
    pictures = (policy.decode(taken.final).clamp(0, 1) * 255).round() / 255
    stored: list[Stored | None] = [None] * len(numbers)
    if making.trajectories:
        how = Taken(taken.schedule, taken.actions, eta, condition.guidance_scale)
        stored = [Stored(states, how) for states in taken.states.float().cpu().unbind(1)]
    return [Drawn(*each) for each in zip(pictures.cpu(), reward(pictures, texts).tolist(), stored, strict=True)]


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
