"""The training loop: a generator that takes optimiser steps and yields a row of metrics after each; the caller drives it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from diffalign import fsdp
from diffalign.contract import CheckedReward
from diffalign.errors import InputError
from diffalign.knobs import make_optimizer
from diffalign.peaks import peak_memory_mb
from diffalign.processes import Accelerated, all_of, average_gradients, average_metrics
from diffalign.settings import Settings
from diffalign.shards import Shared
from diffalign.streams import Source, Stream
from diffalign.types import Context, Loss, Method, Policy, StatefulReward

STATE = "reward"  # in the context's memory: the state of a reward that has some


@dataclass
class Costs:
    """What the optimiser steps have taken so far, of all processes; pictures, checkpoints and the evaluation are not in it.

    Every forward of the network counts, the base model's and those that a checkpointed backward pass repeats too. `network_samples` are
    the rows that went through it: with guidance two or three for each sample and denoising step.
    """

    reward_queries: int = 0
    network_calls: int = 0
    network_samples: int = 0
    seconds: float = 0.0


@dataclass
class Training:
    """Everything that changes in a training, and so everything that a checkpoint holds."""

    parameters: dict[str, Any]
    optimizer: Any
    schedule: Any
    average: Any  # diffusers' EMAModel, or None
    accelerator: Any
    context: Context
    stream: Stream
    batch_size: int  # of all processes together
    examples: Stream | None = None  # of a method that trains on prompts and takes data besides
    costs: Costs = field(default_factory=Costs)
    sharded: bool = False  # each process has a part of every parameter, of its gradient and of what is kept of it
    guard: dict[str, Any] = field(default_factory=dict[str, Any])  # what it remembers, and its best weights; nothing without a guard

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def anywhere(self, here: bool) -> bool:
        """Whether it is true in any process."""
        return any(all_of(here))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, the same in every process, all of which must call; where they share it out, whole in the first one.

        Raises InputError where their generators have come out of step.
        """
        rng = self.context.rng.get_state()
        if not all(torch.equal(rng, other) for other in all_of(rng)):
            raise InputError("The processes have drawn differently: what a method draws must not depend on a process's own samples.")
        state = self.state_with(self.moving())
        return fsdp.whole(state) if self.sharded else state

    def moving(self) -> dict[str, Any]:
        """What changes without an optimiser step, as a copy: the generators, the places in the data, the method's memory, the costs."""
        return {
            "step": self.context.step,
            "costs": asdict(self.costs),
            "rng": self.context.rng.get_state(),
            "stream": self.stream.position(),
            "examples": self.examples and self.examples.position(),
            "memory": deepcopy(self.context.memory),
        }

    def state_with(self, moving: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a moment since which no step was taken, of which `moving` is; of this process alone."""
        average = self.average and {"weights": self.average.shadow_params, "steps": self.average.optimization_step}
        scaler = self.accelerator.scaler
        return {
            **moving,
            "parameters": self.parameters,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": average,
            "scaler": scaler and scaler.state_dict(),
            "batch_size": self.batch_size,
            "stream": self.stream.state(moving["stream"]),
            "examples": self.examples and self.examples.state(moving["examples"]),
            "guard": self.guard,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint; raises InputError where its weights are not this model's."""
        saved = state["parameters"]
        if {n: p.shape for n, p in self.parameters.items()} != {n: p.shape for n, p in saved.items()}:
            raise InputError("The checkpoint's weights do not fit this model: was it made with another base model or LoRA?")
        self.put(saved)
        self.optimizer.load_state_dict(self._own_states(state["optimizer"]))
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            pairs = zip(state["average"]["weights"], self.parameters.values(), strict=True)
            self.average.shadow_params = [self._own(w.to(self.device), parameter) for w, parameter in pairs]
            self.average.optimization_step = state["average"]["steps"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.context.rng.set_state(state["rng"])
        self.stream.restore(state["stream"])
        if self.examples is not None:
            self.examples.restore(state["examples"])
        self.context.memory.update(state["memory"])
        self.guard = state["guard"]
        self.context.step, self.costs = state["step"], Costs(**state["costs"])

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights in the place of those that train, by their names; each is whole, or this process's part."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._own(weights[name], parameter))

    def _own(self, x: Any, parameter: Tensor) -> Any:
        """What this process has of a value that is kept for a parameter: of a tensor of its shape its part, where that is shared out."""
        return fsdp.part(x, parameter) if self.sharded and isinstance(x, Tensor) and x.shape == parameter.shape else x

    def _own_states(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        parameters = list(self.parameters.values())
        states = {i: {name: self._own(x, parameters[i]) for name, x in state.items()} for i, state in optimizer["state"].items()}
        return {**optimizer, "state": states}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place while the block runs, where there is an average."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters.values())
        self.average.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.average.restore(self.parameters.values())


def prepare(policy: Policy, settings: Settings, source: Source, accelerator: Any, examples: Source | None = None) -> Training:
    """The state of a training at step 0. `source` gives the batches; `examples` what a method on prompts takes besides."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    parameters = {name: p for name, p in policy.module.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters.values(), settings)
    schedule = get_scheduler(settings.lr_schedule, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.steps)
    processes = Accelerated(accelerator)

    def stream(of: Source, seed: int) -> Stream:
        return Stream(of, settings.batch_size, Generator().manual_seed(seed), processes.count, processes.rank)

    main, side = stream(source, settings.seed), stream(examples, settings.seed + 1) if examples is not None else None
    rng = Generator() if processes.count == 1 else Shared(processes)
    return Training(
        parameters,
        accelerator.prepare_optimizer(optimizer),
        schedule,
        EMAModel(parameters.values(), decay=settings.ema) if settings.ema else None,
        accelerator,
        Context(rng.manual_seed(settings.seed * 1_000), processes, main.next, side.next if side else None),
        main,
        settings.batch_size * processes.count,
        side,
        sharded=settings.fsdp,
    )


@dataclass(frozen=True)
class Row:
    """The metrics of one optimiser step. `boundary`: the method is between two batches, so that the state can be saved."""

    step: int
    metrics: dict[str, float]
    boundary: bool


def train(training: Training, policy: Policy, method: Method, reward: CheckedReward | None, settings: Settings) -> Iterator[Row]:
    """Take optimiser steps until there are `settings.steps` of them.

    Raises InputError where a loss or gradient is not finite, or reaches no weight: before the step, so the weights are still good.
    """
    rows, networks = _updates(training, policy, method, reward, settings), _networks(policy)
    if reward is not None:
        _learns(reward, training.context)
    while True:
        with _counted(training, networks, reward):
            row = next(rows, None)
        if row is None:
            return
        yield replace(row, metrics={**row.metrics, **_costs(training)})


def _updates(training: Training, policy: Policy, method: Method, reward: CheckedReward | None, settings: Settings) -> Iterator[Row]:
    context, sums, marks = training.context, defaultdict[str, list[float]](list), 0
    training.optimizer.zero_grad()  # what others have left there is none of this training's
    while context.step < settings.steps:
        losses = method.losses(policy, reward, training.stream.next(), context)
        loss = _next(losses, reward, context)
        while loss is not None:
            _backward(training, loss, settings, sums)
            marks += loss.update
            stepped = loss.update and marks % settings.accumulate == 0
            row: dict[str, float] = {}
            if stepped:
                step = _step(training, settings)
                _note_parts(reward, sums)
                row = _row(training, sums, step)
                sums.clear()
            # Asked for only now: what comes next may depend on the step just taken, and whether anything comes says if this is a boundary.
            loss = _next(losses if context.step < settings.steps else iter(()), reward, context)
            if stepped:
                yield Row(context.step, row, boundary=loss is None)


def _learns(reward: CheckedReward, context: Context) -> None:
    """From now on a reward with state learns from what it scores, from the checkpoint's state on where there is one."""
    reward.learners, reward.noted = context.processes, {}
    if isinstance(reward.reward, StatefulReward) and STATE in context.memory:
        reward.reward.restore(context.memory[STATE])


def _next(losses: Iterator[Loss], reward: CheckedReward | None, context: Context) -> Loss | None:
    """The next loss; where there is none the round has ended, and a reward with state has learned from it before anything is saved."""
    loss = next(losses, None)
    if loss is None and reward is not None:
        reward.end_round()
        if isinstance(reward.reward, StatefulReward):
            context.memory[STATE] = reward.reward.state()
    return loss


def _note_parts(reward: CheckedReward | None, sums: dict[str, list[float]]) -> None:
    """The raw scores of a composed reward's parts since the last step, as `reward/PART`; of a part that was not asked nothing."""
    if reward is None or reward.noted is None:
        return
    for name, calls in reward.noted.items():
        raw = torch.cat(calls)
        if asked := raw[~raw.isnan()].tolist():
            sums[f"reward/{name}"] += asked
    reward.noted.clear()


def _networks(policy: Policy) -> set[nn.Module]:
    """The network that trains, and the base model's, where it is another."""
    trained = policy.module
    with policy.reference():
        return {trained, policy.module}


@contextmanager
def _counted(training: Training, networks: set[nn.Module], reward: CheckedReward | None) -> Iterator[None]:
    """Add to the training's costs what the block takes, in all processes."""
    costs, here = training.costs, Costs()
    queries, clock = reward.queries if reward else 0, time.perf_counter()

    def count(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        here.network_calls += 1
        here.network_samples += len(next(x for x in (*given, *named.values()) if isinstance(x, Tensor)))

    hooks = [network.register_forward_pre_hook(count, with_kwargs=True) for network in networks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    here.seconds, here.reward_queries = time.perf_counter() - clock, (reward.queries if reward else 0) - queries
    everyones = all_of(here)
    costs.reward_queries += sum(each.reward_queries for each in everyones)
    costs.network_calls += sum(each.network_calls for each in everyones)
    costs.network_samples += sum(each.network_samples for each in everyones)
    costs.seconds += max(each.seconds for each in everyones)


def _backward(training: Training, loss: Loss, settings: Settings, sums: dict[str, list[float]]) -> None:
    if not loss.value.requires_grad:
        raise InputError("The loss has no gradient: no trained weight was reached. Does the reward's gradient arrive? diffalign check")
    if not loss.value.isfinite():
        raise InputError(f"The loss of step {training.context.step + 1} is {float(loss.value.detach())}: lower --learning-rate.")
    training.accelerator.backward(loss.value / settings.accumulate)
    sums["loss"].append(float(loss.value.detach()) / settings.accumulate)
    for name, value in loss.metrics.items():
        sums[name].append(float(value))


def _step(training: Training, settings: Settings) -> dict[str, float]:
    """Average the gradients over the processes, clip, step; what is logged of it, the gradient's norm being before clipping.

    A step that the scaler of fp16 skips, since gradients overflowed, counts as one: it is `skipped`, and only the scale changes.
    """
    accelerator, parameters = training.accelerator, list(training.parameters.values())
    if not training.sharded:  # where they are, the backward pass has averaged them
        average_gradients(parameters, accelerator)
    norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
    norm = float(norm.full_tensor() if training.sharded else norm)
    if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler skips such a step, and scales less
        raise InputError(f"The gradient of step {training.context.step + 1} is not finite: lower --learning-rate, or use fp32.")
    training.optimizer.step()
    training.optimizer.zero_grad()
    skipped = accelerator.optimizer_step_was_skipped
    if not skipped:
        training.schedule.step()
        if training.average is not None:
            training.average.step(parameters)
    training.context.step += 1
    return {"grad_norm": norm, **({} if accelerator.scaler is None else {"skipped": float(skipped)})}


def _row(training: Training, sums: Mapping[str, list[float]], step: Mapping[str, float]) -> dict[str, float]:
    return {
        "step": training.context.step,
        **average_metrics(sums),
        **step,
        "learning_rate": training.schedule.get_last_lr()[0],
    }


def _costs(training: Training) -> dict[str, float]:
    """The costs so far, as columns of metrics.jsonl."""
    seconds = training.costs.seconds
    return {
        **asdict(training.costs),
        "seconds": round(seconds, 4),
        "device_seconds": round(seconds * training.accelerator.num_processes, 4),
        "peak_memory_mb": round(max(all_of(peak_memory_mb(training.device))), 1),
    }
