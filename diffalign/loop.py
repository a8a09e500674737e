"""The training loop: a generator that takes optimiser steps and yields a row of metrics after each; the caller drives it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from diffalign.contract import CheckedReward
from diffalign.data import PromptStream
from diffalign.errors import InputError
from diffalign.models import device_of
from diffalign.run import peak_memory_mb
from diffalign.settings import Settings
from diffalign.types import Context, Loss, Method, Policy


@dataclass(frozen=True)
class Accelerated:
    """The collectives of `accelerate`, as methods see them."""

    accelerator: Any

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    def gather(self, x: Tensor) -> Tensor:
        return self.accelerator.gather(x)


@dataclass
class Training:
    """Everything that changes in a training, and so everything that a checkpoint holds."""

    parameters: dict[str, Any]
    optimizer: Any
    schedule: Any
    average: Any  # diffusers' EMAModel, or None
    accelerator: Any
    context: Context
    stream: PromptStream
    queries: int = 0
    seconds: float = 0.0

    def anywhere(self, here: bool) -> bool:
        """Whether it is true in any process."""
        from accelerate.utils import gather_object

        return any(gather_object([here]))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; every process must call it, since each has a generator of its own."""
        from accelerate.utils import gather_object

        average = self.average and {"weights": self.average.shadow_params, "steps": self.average.optimization_step}
        scaler = self.accelerator.scaler
        return {
            "step": self.context.step,
            "queries": self.queries,
            "seconds": self.seconds,
            "parameters": self.parameters,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": average,
            "scaler": scaler and scaler.state_dict(),
            "rng": gather_object([self.context.rng.get_state()]),
            "stream": self.stream.state(),
            "memory": self.context.memory,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint; raises InputError where its weights are not this model's."""
        saved = state["parameters"]
        if {n: p.shape for n, p in self.parameters.items()} != {n: p.shape for n, p in saved.items()}:
            raise InputError("The checkpoint's weights do not fit this model: was it made with another base model or LoRA?")
        for name, parameter in self.parameters.items():
            parameter.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            device = next(iter(self.parameters.values())).device
            self.average.shadow_params = [w.to(device) for w in state["average"]["weights"]]
            self.average.optimization_step = state["average"]["steps"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) != self.accelerator.num_processes:
            raise InputError(f"The run was made by {len(state['rng'])} processes: resume it with as many.")
        self.context.rng.set_state(state["rng"][self.accelerator.process_index])
        self.stream.restore(state["stream"])
        self.context.memory.update(state["memory"])
        self.context.step, self.queries, self.seconds = state["step"], state["queries"], state["seconds"]

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


def prepare(policy: Policy, settings: Settings, prompts: list[str], accelerator: Any) -> Training:
    """The state of a training at step 0."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    parameters = {name: p for name, p in policy.module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
    schedule = get_scheduler(settings.lr_schedule, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.steps)
    rank, count = accelerator.process_index, accelerator.num_processes
    return Training(
        parameters,
        accelerator.prepare_optimizer(optimizer),
        schedule,
        EMAModel(parameters.values(), decay=settings.ema) if settings.ema else None,
        accelerator,
        Context(Generator().manual_seed(settings.seed * 1_000 + rank), Accelerated(accelerator)),
        PromptStream(prompts, settings.batch_size, Generator().manual_seed(settings.seed), count, rank),
    )


@dataclass(frozen=True)
class Row:
    """The metrics of one optimiser step. `boundary`: the method is between two batches, so that the state can be saved."""

    step: int
    metrics: dict[str, float]
    boundary: bool


def train(training: Training, policy: Policy, method: Method, reward: CheckedReward, settings: Settings) -> Iterator[Row]:
    """Take optimiser steps until there are `settings.steps` of them.

    Raises InputError where a loss or gradient is not finite, or reaches no weight: before the step, so the weights are still good.
    """
    context, sums, marks = training.context, defaultdict[str, list[float]](list), 0
    queries = reward.queries
    clock = time.perf_counter()
    while context.step < settings.steps:
        losses = method.losses(policy, reward, training.stream.next(), context)
        loss = next(losses, None)
        while loss is not None:
            _backward(training, loss, settings, sums)
            marks += loss.update
            stepped = loss.update and marks % settings.accumulate == 0
            row: dict[str, float] = {}
            if stepped:
                grad_norm = _step(training, settings)
                now = time.perf_counter()
                training.seconds += now - clock
                training.queries += (reward.queries - queries) * context.processes.count
                clock, queries = now, reward.queries
                row = _row(training, sums, grad_norm)
                sums.clear()
            # Asked for only now: what comes next may depend on the step just taken, and whether anything comes says if this is a boundary.
            loss = None if context.step == settings.steps else next(losses, None)
            if stepped:
                training.seconds += time.perf_counter() - clock
                yield Row(context.step, row, boundary=loss is None)
                clock = time.perf_counter()


def _backward(training: Training, loss: Loss, settings: Settings, sums: dict[str, list[float]]) -> None:
    if not loss.value.requires_grad:
        raise InputError("The loss has no gradient: no trained weight was reached. Does the reward's gradient arrive? diffalign check")
    if not loss.value.isfinite():
        raise InputError(f"The loss of step {training.context.step + 1} is {float(loss.value.detach())}: lower --learning-rate.")
    training.accelerator.backward(loss.value / settings.accumulate)
    sums["loss"].append(float(loss.value.detach()) / settings.accumulate)
    for name, value in loss.metrics.items():
        sums[name].append(float(value))


def _step(training: Training, settings: Settings) -> float:
    """Average the gradients over the processes, clip, step; the gradient's norm before clipping."""
    accelerator, parameters = training.accelerator, list(training.parameters.values())
    if accelerator.num_processes > 1:
        for parameter in parameters:
            parameter.grad = accelerator.reduce(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, reduction="mean")
    norm = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm))
    if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler skips such a step, and scales less
        raise InputError(f"The gradient of step {training.context.step + 1} is not finite: lower --learning-rate, or use fp32.")
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.schedule.step()
    if training.average is not None:
        training.average.step(parameters)
    training.context.step += 1
    return norm


def _row(training: Training, sums: Mapping[str, list[float]], grad_norm: float) -> dict[str, float]:
    means = {name: sum(values) / (1 if name == "loss" else len(values)) for name, values in sums.items()}
    if training.accelerator.num_processes > 1:
        together = torch.tensor([means[n] for n in sorted(means)], device=training.accelerator.device)
        means = dict(zip(sorted(means), training.accelerator.reduce(together, reduction="mean").tolist(), strict=True))
    return {
        "step": training.context.step,
        **means,
        "grad_norm": grad_norm,
        "learning_rate": training.schedule.get_last_lr()[0],
        "reward_queries": training.queries,
        "seconds": round(training.seconds, 4),
        "device_seconds": round(training.seconds * training.accelerator.num_processes, 4),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }


def make_accelerator(settings: Settings) -> Any:
    """accelerate's Accelerator: processes, trackers, and the gradient scaler of fp16; the policy casts by itself."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a second training in one process may have another precision
    return Accelerator(
        mixed_precision="fp16" if settings.precision == "fp16" else "no",
        cpu=device_of(settings).type == "cpu",
        log_with=list(settings.log) or None,
        project_dir="runs",
    )


def one_for_all(value: str) -> str:
    """The first process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
