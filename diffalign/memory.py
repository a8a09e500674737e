"""What a training step takes of memory, found before it is started: steps of few samples are tried, and a line is drawn through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from diffalign.config import Plan
from diffalign.data import Prompt, batch_of
from diffalign.errors import InputError
from diffalign.knobs import make_optimizer
from diffalign.peaks import highest
from diffalign.streams import Source
from diffalign.types import Context, Loss

GB = 1e9
Peak = Callable[[int], float | None]  # bytes of a step of so many samples; None where they give no loss


@dataclass(frozen=True)
class Trial:
    """A plan with all that its first step needs; `examples` are of a method that takes data."""

    plan: Plan
    policy: Any
    prompts: Sequence[Prompt]
    examples: Source | None = None

    @property
    def device(self) -> torch.device:
        return next(self.policy.module.parameters()).device

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.policy.module.parameters() if p.requires_grad]

    def inputs(self, size: int) -> tuple[Any, Any]:
        """What the method trains on, `size` of it, and the data that it takes besides."""
        batch = batch_of((list(self.prompts) * size)[:size], self.policy)
        given: Any = None if self.examples is None else self.examples.take([i % len(self.examples) for i in range(size)])
        instead = given is not None and self.plan.method.needs.data_role != "besides"
        return given if instead else batch, given

    def loss(self, size: int) -> Loss | None:
        """The method's first loss of `size` samples; None where no two samples differ in what they are worth."""
        trained_on, given = self.inputs(size)
        context = Context(Generator().manual_seed(0), more=lambda: trained_on, examples=None if given is None else lambda: given)
        return next(iter(self.plan.method.losses(self.policy, self.plan.reward, trained_on, context)), None)

    def step(self, size: int) -> list[Tensor | None] | None:
        """Forward, backward and optimiser step of the first loss of `size` samples, at learning rate 0: the gradients.

        The weights stay what they are. None where there is no loss.
        """
        parameters, settings = self.parameters, self.plan.settings
        optimizer = make_optimizer(parameters, settings)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        average = [p.detach().clone() for p in parameters] if settings.ema else None
        try:
            for p in parameters:  # the states are there from the second step on
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
            loss = self.loss(size)
            if loss is None:
                return None
            if settings.accumulate > 1 or not loss.update:  # then gradients are there before the backward pass
                for p in parameters:
                    p.grad = torch.zeros_like(p)
            loss.value.backward()
            gradients = [p.grad for p in parameters]
            if all(g is None or bool(g.isfinite().all()) for g in gradients):  # NaN would reach the weights at any rate
                optimizer.step()
            del average
            return gradients
        finally:  # also where memory ran out half-way through the backward pass: the training would begin with these
            for p in parameters:
                p.grad = None

    def peak(self, size: int) -> float | None:
        """Bytes of all tensors on the device, at the highest, in a step of `size` samples and in decoding as many."""
        with highest(self.device) as reading:
            if self.step(size) is None:
                return None
            with torch.no_grad():
                self.policy.decode(self.policy.prior(self.policy.encode(batch_of((list(self.prompts) * size)[:size], self.policy))))
        return reading.peak


@dataclass(frozen=True)
class Line:
    """Bytes of a step of n samples: `fixed + each n`."""

    fixed: float
    each: float

    def __call__(self, size: int) -> float:
        return self.fixed + self.each * size

    @staticmethod
    def through(first: tuple[int, float], second: tuple[int, float]) -> Line:
        each = (second[1] - first[1]) / (second[0] - first[0])
        return Line(first[1] - each * first[0], each)


def expected(trial: Trial) -> Line | None:
    """The line through steps of two and of four samples, or of one and two where a batch is smaller; None where they give no loss.

    Not one: a method that compares two samples in a forward has two there as well.
    """
    _warm_up(trial)
    sizes = (2, 4) if trial.plan.settings.batch_size >= 4 else (1, 2)
    points = [(size, peak) for size in sizes if (peak := trial.peak(size)) is not None]
    return Line.through(*points) if len(points) == 2 else None


def _warm_up(trial: Trial) -> None:
    """A reward loads itself at its first call, and takes twice its size as it does: not in what is measured."""
    batch = batch_of(trial.prompts[:1], trial.policy)
    with torch.no_grad():
        pictures = trial.policy.decode(trial.policy.prior(trial.policy.encode(batch)))
        if trial.plan.reward is not None:
            trial.plan.reward(pictures, batch)


def largest(peak: Peak, sizes: Sequence[int], budget: float) -> tuple[int, float] | None:
    """`(size, bytes)` of the largest of the ascending `sizes` whose step fits into `budget` bytes; None where none does.

    Sizes are tried from below until three are known, then where the line through the last two says; what it says is tried too. A size
    that runs out of memory does not fit.
    """
    points: list[tuple[int, float]] = []
    best, left = None, list(sizes)
    while left:
        size = left[0]
        if len(points) >= 3:
            line = Line.through(*points[-2:])
            fitting = [n for n in left if line(n) <= budget]
            if not fitting:
                break
            size = fitting[-1]
        try:
            found = peak(size)
        except torch.OutOfMemoryError:
            found = float("inf")
        if found == float("inf"):
            torch.cuda.empty_cache()  # only now: the error has held what was in use
            left = [n for n in left if n < size]
            continue
        if found is None:
            left.remove(size)
            continue
        points.append((size, found))
        if found <= budget:
            best = size, found
        left = [n for n in left if (n > size if found <= budget else n < size)]
    return best


def within_budget(trial: Trial, least: Callable[[int], int] = int) -> tuple[Plan, str]:
    """The trial's plan with the largest batches that `memory_budget` has room for, as many more of them, and that in words.

    A step has the samples that were asked for. `least` makes one size of those of all processes. Raises InputError where not one sample
    fits.
    """
    plan, settings = trial.plan, trial.plan.settings
    assert settings.memory_budget is not None
    _warm_up(trial)
    sizes = [n for n in range(1, settings.batch_size + 1) if settings.batch_size % n == 0]
    tried: dict[int, float] = {}

    def peak(size: int) -> float | None:
        tried[size] = float("inf")  # as long as it has not come to its end
        taken = trial.peak(size)
        tried.pop(size) if taken is None else tried.update({size: taken})
        return taken

    found = largest(peak, sizes, settings.memory_budget * GB)
    size = least(found[0] if found else 0)
    if size == 0:
        raise InputError(
            f"memory_budget is {settings.memory_budget:g} GB, and a step of the smallest batch does not fit{_smallest(tried)}. What makes "
            "it smaller: --gradient-checkpointing, --vae-batch-size 1, --precision bf16, --height and --width."
        )
    split = smaller(plan, settings.batch_size // size)
    expects = f", {found[1] / GB:.2f} GB expected" if found and found[0] == size else ""
    return split, f"{settings.memory_budget:g} GB: batches of {size}{expects}; {split.batch_in_words()}"


def _smallest(tried: Mapping[int, float]) -> str:
    """What the smallest of the steps that were tried takes; where memory ran out in all of them, that."""
    ended = {size: taken for size, taken in tried.items() if taken < float("inf")}
    if not ended:
        return ": memory ran out in it" if tried else ""
    size = min(ended)
    return f": {size} sample{'s' * (size > 1)} take{'s' * (size == 1)} {max(ended[size] / GB, 1e-3):.3f} GB"


def smaller(plan: Plan, times: int) -> Plan:
    """The plan with batches that are `times` smaller, and as many more of them in an optimiser step."""
    counts = plan.method.needs.split_by
    method: Any = plan.method
    grown = {name: getattr(method, name) * times for name in counts if name != "accumulate"}
    accumulate = plan.settings.accumulate * (times if "accumulate" in counts else 1)
    settings = replace(plan.settings, batch_size=plan.settings.batch_size // times, accumulate=accumulate)
    return replace(plan, settings=settings, method=replace(method, **grown))


def in_words(trial: Trial, line: Line) -> str:
    """What a step of the plan's batch is expected to take, and what of."""
    policy, settings = trial.policy, trial.plan.settings
    parts = {name: _bytes(module) for name, module in policy.pipe.components.items() if isinstance(module, nn.Module)}
    if policy.frozen is not None:
        parts["base model"] = _bytes(policy.frozen)
    parts = {name: size for name, size in parts.items() if size}
    trained = sum(p.numel() for p in trial.parameters)
    training = trained * (4 + (8 if settings.optimizer == "adamw" else 2) + (4 if settings.ema else 0))
    size = settings.batch_size
    rest = line(size) - sum(parts.values()) - training
    return (
        f"{line(size) / 1e6:,.0f} MB expected: {', '.join(f'{name} {part / 1e6:,.0f}' for name, part in parts.items())}, "
        f"gradients and {settings.optimizer} {training / 1e6:,.0f}, the step of {size} {rest / 1e6:,.0f} ({line.each / 1e6:,.1f} a sample)"
    )


def _bytes(module: nn.Module) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())}.values())
