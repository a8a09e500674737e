"""Training a reward from pairs of which one was preferred (Bradley-Terry), or from ratings of several aspects, into a folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Generator, Tensor

from diffalign import judged, registry
from diffalign.checkpoint import occupied, whole_by_one
from diffalign.console import say, watch
from diffalign.data import PicturePrompt, text_of
from diffalign.errors import InputError
from diffalign.examples import check
from diffalign.judged import Judged
from diffalign.loop import Row
from diffalign.models import device_of
from diffalign.records import Tally
from diffalign.reward_features import Pictures, Texts, pictures_of
from diffalign.reward_fitting import Fitting
from diffalign.reward_model import CONFIG, SPLIT, WEIGHTS, Architecture, Card, RewardModel
from diffalign.reward_objectives import BradleyTerry, Objective, Rate, Ratings, ratings_of
from diffalign.run import versions
from diffalign.settings import Settings
from diffalign.streams import Stream
from diffalign.types import Data

RATES = {"none": 1e-3, "lora": 3e-4, "full": 1e-5}  # learning rates
METRICS = "metrics.jsonl"
KINDS: dict[str, Data] = {"bradley-terry": "pairs", "ratings": "ratings"}
READERS = {"pairs": judged.pairs, "ratings": judged.ratings}


def train_reward(data: str | Path, output: str | Path, **given: Any) -> Path:
    """Train a reward on judged pictures into the folder `output`, and return it; `given` are fields of `Fitting`.

    Raises InputError for what cannot work, and for a folder that holds something.
    """
    return fit(Fitting(str(data), **given), Path(output).expanduser())


def fit(fitting: Fitting, output: Path) -> Path:
    """Train, and write `output`: it is there whole or not at all. After Ctrl-C it has the best weights until then."""
    if occupied(output):
        raise InputError(f"{output} exists already: choose another --output, or remove it.")
    device = device_of(Settings(device=fitting.device))
    check(fitting.data, KINDS[fitting.loss])
    with ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            draft = stack.enter_context(whole_by_one(output))
        except OSError as error:
            raise InputError(f"{output} cannot be written ({error.strerror}): choose another --output.") from error
        stopped = _fit(fitting, device, draft)
    if stopped is not None:
        raise KeyboardInterrupt(f"Interrupted after step {stopped}. {output} holds the best weights until then.")
    return output


def _fit(fitting: Fitting, device: torch.device, folder: Path) -> int | None:
    """Write the reward into `folder`; the step after which a person stopped it, None where nobody did."""
    kind, tally = KINDS[fitting.loss], Tally(fitting.bad_pictures == "skip")
    model, base = _begin(fitting)
    model.to(device)
    pictures, texts = pictures_of(model, tally, device, say), Texts(model, device, fitting.train_text)
    rows = list(READERS[kind](fitting.data, pictures.take, tally, fitting.data_limit))
    pictures.finish()
    if not rows:
        raise InputError(f"{fitting.data}: no {kind} are left. {tally.in_words()}")
    if any(isinstance(row.prompt, PicturePrompt) for row in rows):
        raise InputError(f"{fitting.data} is of edits: this reward reads the prompt and the picture, and not the source that was edited.")
    model.base.note([text_of(row.prompt) for row in rows])
    train, held = ([rows[i] for i in side] for side in judged.split(rows, fitting.held_out, fitting.seed))
    objective: Objective = BradleyTerry(fitting.label_smoothing)
    if fitting.loss == "ratings":
        objective = ratings_of(train, judged.aspects_of(rows, tuple(fitting.weights or ())))
        # how ratings go with the cosine is not known: the start says their mean
        model.start_again(objective.aspects, scale=0.0, seed=fitting.seed)
    say(_in_words(fitting, train, held, model, pictures))
    if tally.counts:
        say(tally.in_words())

    def rate(batch: Sequence[Judged], which: int) -> Tensor:
        return model.rate(pictures.seen([row.pictures[which] for row in batch]), texts.read([text_of(row.prompt) for row in batch]))

    best = Best(model, objective, rate, held, fitting.batch_size)
    stopped = _train(fitting, best, train, folder / METRICS)
    best.put_back()
    loss, outputs = best.evaluate()
    numbers = {"loss": loss, **objective.report(outputs, held, fitting.seed), "step": best.step, "at_start": best.start}
    card, extent = _card(best, base, fitting, train)
    config = {
        **card.to_json(),
        "loss": fitting.loss,
        "range": extent,
        "held_out": {kind: len(held), "prompts": _prompts(held), **numbers},
        "data": {"source": fitting.data, "sha256": judged.contents(rows), kind: len(train), "prompts": _prompts(train)},
        "training": asdict(fitting),
        "versions": versions(),
    }
    try:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / SPLIT).write_text(json.dumps({"train": judged.marks(train), "heldout": judged.marks(held)}) + "\n", encoding="utf-8")
        save_file({name: p.detach().cpu().contiguous() for name, p in model.trained().items()}, folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"The reward could not be written ({error}): make room, or choose another --output.") from error
    say(_result(numbers, kind, held))
    return stopped


def _begin(fitting: Fitting) -> tuple[RewardModel, dict[str, str]]:
    found, _ = registry.find("rewards", "trained")
    alpha = float(fitting.lora_rank if fitting.lora_alpha is None else fitting.lora_alpha)
    architecture = Architecture(("preference",), fitting.hidden, fitting.train_tower, fitting.train_text, fitting.lora_rank, alpha)
    try:
        return found.begin(architecture, fitting.model, fitting.revision, fitting.precision, fitting.seed)
    except InputError as error:  # the flag by which a reward that is trained is told its base
        raise InputError(str(error).replace("--reward.base", "--model")) from error


def _prompts(rows: Sequence[Judged]) -> int:
    return len({row.asked for row in rows})


@dataclass
class Best:
    """The weights of the lowest held-out loss so far, the start's being the first."""

    model: RewardModel
    objective: Objective
    rate: Rate
    held: Sequence[Judged]
    batch_size: int
    loss: float = math.inf
    step: int = 0
    worse: int = 0  # evaluations since
    start: dict[str, float] | None = None
    weights: dict[str, Tensor] | None = None

    @torch.no_grad()
    def evaluate(self) -> tuple[float, Tensor]:
        """The held-out loss, and what it is of, on the CPU."""
        parts = [self.held[i : i + self.batch_size] for i in range(0, len(self.held), self.batch_size)]
        losses, found = zip(*(self.objective.loss(self.rate, part) for part in parts), strict=True)
        return float(torch.cat(losses).mean()), torch.cat(found).cpu()

    def look(self, step: int) -> dict[str, float]:
        """Evaluate, keep the weights where they are the best, and give what was found."""
        loss, found = self.evaluate()
        if not math.isfinite(loss):
            raise InputError(f"The held-out loss after step {step} is {loss}: lower --learning-rate.")
        numbers = _finite(self.objective.measure(found, self.held))
        self.start = self.start or {"loss": loss, **numbers}
        self.worse += 1
        if loss < self.loss:
            self.loss, self.step, self.worse = loss, step, 0
            self.weights = {name: p.detach().cpu().clone() for name, p in self.model.trained().items()}
        return {"heldout_loss": loss, **{f"heldout_{name}": value for name, value in numbers.items()}}

    @torch.no_grad()
    def put_back(self) -> None:
        for name, parameter in self.model.trained().items():
            parameter.copy_((self.weights or {})[name])


def _train(fitting: Fitting, best: Best, rows: Sequence[Judged], metrics: Path) -> int | None:
    every, step = fitting.evaluate_every or max(1, fitting.steps // 10), 0
    with metrics.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"step": 0, **best.look(0)}) + "\n")
        try:
            for row in watch(_steps(fitting, best, rows), 0, fitting.steps):
                step, due = row.step, row.step % every == 0 or row.step == fitting.steps
                found = best.look(step) if due else {}
                file.write(json.dumps({**row.metrics, **found}) + "\n")
                file.flush()
                if due:
                    said = (f"{k.removeprefix('heldout_')} {v:.4g}" for k, v in found.items() if v is not None)
                    say(f"step {step}: held out {', '.join(said)}")
                if due and fitting.patience is not None and best.worse >= fitting.patience:
                    say(f"Stopped after step {step}: the last {best.worse} evaluations were no better.")
                    break
        except KeyboardInterrupt:
            return step
    return None


def _steps(fitting: Fitting, best: Best, rows: Sequence[Judged]) -> Iterator[Row]:
    from diffusers.optimization import get_scheduler

    parameters = list(best.model.trained().values())
    optimizer = torch.optim.AdamW(parameters, fitting.learning_rate or RATES[fitting.train_tower], weight_decay=fitting.weight_decay)
    schedule = get_scheduler(fitting.lr_schedule, optimizer, num_warmup_steps=0, num_training_steps=fitting.steps)
    order = Stream(judged.Rows(rows), min(fitting.batch_size, len(rows)), Generator().manual_seed(fitting.seed + 1))
    began = time.perf_counter()
    for step in range(1, fitting.steps + 1):
        batch, used = order.next(), schedule.get_last_lr()[0]
        losses, found = best.objective.loss(best.rate, batch)
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, fitting.max_grad_norm))
        if not (loss.isfinite() and math.isfinite(norm)):
            raise InputError(f"The loss of step {step} is {float(loss.detach()):g}, its gradient's norm {norm:g}: lower --learning-rate.")
        optimizer.step()
        schedule.step()
        own = _finite(best.objective.measure(found.detach().cpu(), batch))
        costs = {"grad_norm": norm, "learning_rate": used, "seconds": round(time.perf_counter() - began, 4)}
        yield Row(step, {"step": step, "loss": float(loss.detach()), **own, **costs}, boundary=True)


@torch.no_grad()
def _card(best: Best, base: dict[str, str], fitting: Fitting, train: Sequence[Judged]) -> tuple[Card, list[float]]:
    """What the folder says of the reward, which has mean 0 and deviation 1 over the training pictures; and its extremes over them."""
    objective, architecture = best.objective, best.model.architecture
    weights, mean, std = (1.0,), (0.0,), (1.0,)
    if isinstance(objective, Ratings):
        chosen = fitting.weights or dict.fromkeys(objective.aspects, 1.0)
        weights, mean, std = tuple(chosen[name] for name in objective.aspects), objective.mean, objective.std
    card = Card(architecture, base, weights, mean, std)
    single = list({(text_of(row.prompt), key): replace(row, pictures=(key,)) for row in train for key in row.pictures}.values())
    parts = [single[i : i + fitting.batch_size] for i in range(0, len(single), fitting.batch_size)]
    mixed = torch.cat([card.mix(best.rate(part, 0)) for part in parts]).double()
    centre, spread = float(mixed.mean()), float(mixed.std(correction=0))
    if not spread > 0:
        raise InputError("The reward scores all training pictures the same: nothing was learned. Are all the pictures one picture?")
    return replace(card, centre=centre, spread=spread), [float((x - centre) / spread) for x in (mixed.min(), mixed.max())]


def _finite(numbers: dict[str, float]) -> dict[str, Any]:
    """NaN as null, which is what JSON has: a correlation of what is constant."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _in_words(fitting: Fitting, train: Sequence[Judged], held: Sequence[Judged], model: RewardModel, pictures: Pictures) -> str:
    kind, size = KINDS[fitting.loss], sum(p.numel() for p in model.trained().values())
    what = {"none": "a head", "lora": f"a head and a LoRA of rank {fitting.lora_rank}", "full": "a head and the tower"}[fitting.train_tower]
    return (
        f"{fitting.data}: {len(train):,} {kind} of {_prompts(train):,} prompts to train on, {len(held):,} of {_prompts(held):,} held "
        f"out; {pictures.computed:,} pictures embedded anew. {what[0].upper()}{what[1:]} on {fitting.model} ({size:,} weights), "
        f"{fitting.steps} steps of {min(fitting.batch_size, len(train))}, seed {fitting.seed}."
    )


def _result(numbers: dict[str, Any], kind: str, held: Sequence[Judged]) -> str:
    where = f"{len(held):,} {kind} of {_prompts(held):,} held-out prompts"
    if "accuracy" in numbers:
        low, high = numbers["interval"]
        before = numbers["at_start"]["accuracy"]
        return f"Accuracy on {where}: {numbers['accuracy']:.3f} [{low:.3f}, {high:.3f}]; the base model's cosine had {before:.3f}."
    ranks = ", ".join(f"{name} {value:.3f}" for name, value in numbers["spearman"].items() if value is not None)
    return f"Rank correlation on {where}: {ranks}."
