"""The guard against reward hacking: its settings, and the rule by which it decides, on numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from statistics import fmean, stdev
from typing import Any, Literal

from diffalign.errors import InputError

SAMPLES = 2  # of each prompt: the fewest that have a diversity
DIVERSITY, KL = "diversity", "kl"  # measures besides the rewards
Z = 1.96  # of the normal 95% interval


@dataclass(frozen=True)
class Guard:
    """Guard against reward hacking: docs/guard.md."""

    rewards: list[str] = field(default_factory=list[str])
    """Rewards that are watched while training and never trained on, on held-out prompts; the training ends where one of them falls."""
    every: int | None = None
    """Optimiser steps between the guard's evaluations; by default a tenth of the steps."""
    size: int = 32
    """Held-out prompts of the guard's evaluations, two samples of each."""
    drop: float = 0.25
    """How far a watched reward may fall below its best evaluation, in guard.unit."""
    unit: Literal["std", "reward"] = "std"
    """Of guard.drop. std: one is the reward's standard deviation over the samples of step 0; reward: the reward's own."""
    diversity_drop: float = 0.5
    """Share of the diversity of step 0 that the samples of a prompt may lose."""
    kl: float | None = None
    """Highest KL to the base model, in nats per latent dimension summed over a sample's steps; by default any."""
    patience: int = 2
    """Evaluations in a row at which the same measure must fail for the guard to end the training."""
    action: Literal["rollback", "stop"] = "rollback"
    """The weights of a run that the guard has ended. rollback: those of its best evaluation; stop: the last ones."""

    def __post_init__(self) -> None:
        for name, least in dict(every=1, size=2, patience=1).items():
            if vars(self)[name] is not None and not vars(self)[name] >= least:
                raise InputError(f"guard.{name} is {vars(self)[name]}: give {least} or more.")
        if not 0 <= self.drop < math.inf:
            raise InputError(f"guard.drop is {self.drop}: give 0 or more.")
        if not 0 <= self.diversity_drop <= 1:
            raise InputError(f"guard.diversity_drop is {self.diversity_drop}: give a share from 0 to 1, which never fails.")
        if self.kl is not None and not 0 < self.kl < math.inf:
            raise InputError(f"guard.kl is {self.kl}: give nats, a number above 0, or leave it out.")
        unused = [f.name for f in fields(self) if f.default is not MISSING and vars(self)[f.name] != f.default]
        if unused and not self.rewards:
            raise InputError(f"guard.{unused[0]} is set, and no reward is watched: --guard NAME, or leave all settings of the guard out.")

    def steps_between(self, steps: int) -> int:
        """Optimiser steps from one evaluation to the next, in a training of `steps`."""
        return self.every or max(1, steps // 10)


@dataclass(frozen=True)
class Measured:
    """One evaluation of P prompts and S samples of each.

    `rewards`: of each watched reward (P, S) scores; `diversity`: (P,) differences of a prompt's samples; `kl`: to the base model, in nats
    per latent dimension; `trained`: the mean score of the reward that is trained on, None where there is none, or where its scale moves as
    it learns.
    """

    step: int
    rewards: Mapping[str, Sequence[Sequence[float]]]
    diversity: Sequence[float]
    kl: float
    trained: float | None


@dataclass(frozen=True)
class Reference:
    """What a measure is held against: its values (P,) at a step; and what one `std`, or all of the diversity, was at the first one."""

    step: int
    values: list[float]
    scale: float


@dataclass(frozen=True)
class Finding:
    """One measure at one evaluation: its mean, and the difference to its reference's with a 95% interval, where it has one.

    `failed`: all of the interval is past the limit; `within`: the difference itself is not. Between the two lies doubt.
    """

    value: float
    reference: float
    reference_step: int
    difference: float
    interval: tuple[float, float] | None
    limit: float | None  # of the difference; None for any
    failed: bool
    within: bool


@dataclass(frozen=True)
class Fired:
    """How a training came to be ended by its guard: by which measure, and under which settings."""

    step: int
    measure: str
    failures: int  # in a row
    finding: Finding
    settings: dict[str, Any]


@dataclass(frozen=True)
class State:
    """What a guard remembers from one evaluation to the next. `best` and `trained`: step and trained reward of the best one so far."""

    size: int
    references: Mapping[str, Reference] = field(default_factory=dict[str, Reference])
    failures: Mapping[str, int] = field(default_factory=dict[str, int])  # in a row
    best: int | None = None
    trained: float | None = None
    fired: Fired | None = None

    def plain(self) -> dict[str, Any]:
        """Nested plain values, for a checkpoint and for other processes."""
        return asdict(self)

    @staticmethod
    def of(plain: Mapping[str, Any]) -> State:
        """The state that `plain` was made of."""
        references = {name: Reference(**reference) for name, reference in plain["references"].items()}
        fired = plain["fired"] and Fired(**{**plain["fired"], "finding": _finding(plain["fired"]["finding"])})
        return State(**{**plain, "references": references, "fired": fired})


def _finding(plain: Mapping[str, Any]) -> Finding:
    return Finding(**{**plain, "interval": plain["interval"] and tuple(plain["interval"])})


def paired(now: Sequence[float], then: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean of the differences of two (P,), and its 95% interval: 1.96 standard errors to each side."""
    differences = [a - b for a, b in zip(now, then, strict=True)]
    mean, half = fmean(differences), Z * stdev(differences) / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


def hold_against(reference: Reference, values: Sequence[float], allowed: float) -> Finding:
    """A measure (P,) fails where all of the interval of its difference lies further below the reference than is allowed."""
    (difference, interval), limit = paired(values, reference.values), -allowed
    verdict = {"failed": interval[1] < limit, "within": difference >= limit}
    return Finding(fmean(values), fmean(reference.values), reference.step, difference, interval, limit, **verdict)


def decide(guard: Guard, state: State, measured: Measured) -> tuple[State, dict[str, Finding]]:
    """The state after an evaluation, and what was found of each measure. `state.fired` says whether the training is to end.

    - A watched reward is held against its own best evaluation so far, of those at which all was within its limits.
    - Diversity is held against the first evaluation, and the KL against `guard.kl`.
    - A measure that fails `guard.patience` times in a row fires: to end a training a fall must be proven.
    - The best evaluation is the one of highest trained reward of those at which all was within its limits, the first one included; without
      such a number the last of them: to be kept, weights must not even seem to have fallen so far.
    """
    step, means = measured.step, {name: [fmean(scores) for scores in rows] for name, rows in measured.rewards.items()}
    spreads = {name: stdev([score for row in rows for score in row]) for name, rows in measured.rewards.items()}
    first = {name: Reference(step, values, spreads[name]) for name, values in means.items()}
    first[DIVERSITY] = Reference(step, [*measured.diversity], fmean(measured.diversity))
    held = {**first, **state.references}

    found = {
        name: hold_against(held[name], values, guard.drop * (held[name].scale if guard.unit == "std" else 1.0))
        for name, values in means.items()
    }
    found[DIVERSITY] = hold_against(held[DIVERSITY], measured.diversity, guard.diversity_drop * held[DIVERSITY].scale)
    over = guard.kl is not None and measured.kl > guard.kl
    found[KL] = Finding(measured.kl, 0.0, 0, measured.kl, None, guard.kl, over, not over)

    failures = {name: state.failures.get(name, 0) + 1 if finding.failed else 0 for name, finding in found.items()}
    exhausted = [name for name, count in failures.items() if count >= guard.patience]
    name = exhausted[0] if exhausted else None
    fired = None if name is None else Fired(step, name, failures[name], found[name], asdict(guard))
    best, trained = state.best, state.trained
    if best is None or all(finding.within for finding in found.values()):
        held |= {name: replace(held[name], step=step, values=values) for name, values in means.items() if found[name].difference > 0}
        if best is None or measured.trained is None or trained is None or measured.trained > trained:
            best, trained = step, measured.trained
    return State(state.size, held, failures, best, trained, fired), found


def goes_on(guard: Guard, state: State) -> State:
    """The state with which a run is resumed: one that its guard ended goes on only under other settings than it was ended by.

    Which weights it ended with, `guard.action`, is no such setting. Raises InputError where the number of prompts is another.
    """
    if guard.size != state.size:
        raise InputError(f"guard.size is {guard.size}, and {state.size} when the run began: its evaluations are compared. Keep that.")
    if state.fired is None or asdict(replace(guard, action="stop")) == {**state.fired.settings, "action": "stop"}:
        return state
    return replace(state, failures={}, fired=None)


def in_words(fired: Fired) -> str:
    """What fired, where, and by how much."""
    found, times = fired.finding, f"{fired.failures} evaluations in a row" if fired.failures > 1 else "one evaluation"
    if found.interval is None:
        return f"at step {fired.step} the KL to the base model is {found.value:.3g}, above {found.limit:g}, at {times}"
    low, high = (-end for end in reversed(found.interval))
    return (
        f"at step {fired.step} {'the diversity' if fired.measure == DIVERSITY else fired.measure} is {found.value:.4g}, "
        f"{-found.difference:.3g} [{low:.3g}, {high:.3g}] below its {found.reference:.4g} of step {found.reference_step}, "
        f"where {-(found.limit or 0):.3g} is allowed, at {times}"
    )


def row(measured: Measured, state: State, found: Mapping[str, Finding]) -> dict[str, Any]:
    """The line of guard.jsonl of an evaluation."""
    measures = {name: {**asdict(finding), "failures": state.failures[name]} for name, finding in found.items()}
    fired = state.fired and {"measure": state.fired.measure, "text": in_words(state.fired)}
    return {"step": measured.step, "trained": measured.trained, "measures": measures, "best_step": state.best, "fired": fired}


def outcome(guard: Guard, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What eval.json and a comparison say of a run's guard, from the lines of guard.jsonl; None where there are none.

    `fired`, where it ended the training: by which measure, at which step, and by how much; `weights_of_step`: what the run ended with;
    `failing`: measures that failed at the last evaluation.
    """
    if not rows:
        return None
    last = rows[-1]
    back = last["fired"] is not None and guard.action == "rollback"
    return {
        "rewards": guard.rewards,
        "evaluations": len(rows),
        "step": last["step"],
        "fired": last["fired"],
        "failing": [name for name, measure in last["measures"].items() if measure["failed"]],
        "action": guard.action,
        "best_step": last["best_step"],
        "weights_of_step": last["best_step"] if back else last["step"],
    }


def closing(found: Mapping[str, Any]) -> str:
    """One line on an outcome, for the person."""
    fired, best = found["fired"], found["best_step"]
    if fired is None:
        doubt = f", but at the last one failed {', '.join(found['failing'])}; the best was that of step {best}" if found["failing"] else ""
        return f"The guard did not fire, at {found['evaluations']} evaluations{doubt}."
    weights = f"those of step {best}, the guard's best evaluation" if found["action"] == "rollback" else "the last ones"
    beside = "" if found["action"] == "rollback" else f"; those of step {best}, the guard's best evaluation, are in best/"
    return f"The guard ended the training: {fired['text']}. The run's weights are {weights}{beside}."
