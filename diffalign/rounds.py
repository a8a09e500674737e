"""What the methods on their own samples share: a round of rollouts with its scores, and its transitions in parts of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from diffalign.checks import check
from diffalign.errors import InputError
from diffalign.sampling import Kernel, ddim, replay, rollout
from diffalign.shards import everyone, held, of_scores
from diffalign.types import ALONE, Condition, Context, Examples, Loss, Policy, Processes, Prompts, Reward, Trajectory


def check_noise(method: Any) -> None:
    """Raise InputError where a method's `eta` or `random_steps` leaves its rollouts of `inference_steps` without a random step."""
    check(method, "eta", 0 < method.eta < inf, "a number above 0, of a diffusion model up to 1. Without noise there are no actions")
    if method.random_steps is not None:
        most = method.inference_steps
        check(method, "random_steps", 1 <= method.random_steps <= most, f"1 to {most} (method.inference_steps)")


class Part(NamedTuple):
    """Transitions of one forward: which step and which row each is, both (size,); `count` of them count, the rest fill the forward."""

    steps: Tensor
    rows: Tensor
    count: int
    last: bool


class Share(NamedTuple):
    """The transitions (M,) of one optimiser step that this process has: which step and which row each is. M may be 0.

    `total` is how many a process has on average: a sum over these divided by `total` is, averaged over the processes, the mean over all.
    """

    steps: Tensor
    rows: Tensor
    total: float


@dataclass(frozen=True)
class Round:
    """N samples of one round: their trajectories, prompts and scores (N,); with several processes, those that this one has sampled.

    What is drawn of a round, such as the samples of an optimiser step, is drawn of all processes' rows, which are numbered as a single
    process would number them (`diffalign.shards`); each then trains on those that it has.

    `size` is the rows of one rollout, and of one forward of the update: where the policy has not changed since, as many rows through the
    same network give the same bits, and the ratio of the first pass is exactly 1.
    """

    trajectory: Trajectory
    prompts: Prompts
    scores: Tensor
    size: int
    processes: Processes = ALONE

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def total(self) -> int:
        """Samples of all processes."""
        return len(self) * self.processes.count

    def everyone(self, x: Tensor) -> Tensor:
        """(N, ...) of the round's rows as (total, ...); every process must call."""
        return everyone(x, self.processes, self.size)

    def share(self, steps: Tensor, rows: Tensor) -> Share:
        """What this process has of transitions (M,) of all processes' rows."""
        here, own = held(rows, self.processes, self.size)
        return Share(steps[here], own[here], len(rows) / self.processes.count)

    def nothing(self) -> Loss:
        """The optimiser step of a process that has none of its transitions."""
        return Loss(torch.zeros((), device=self.scores.device, requires_grad=True))

    @property
    def steps(self) -> Tensor:
        """Indices of the steps that are actions; those of std 0 are left out of every policy-gradient loss.

        Raises InputError where there are none: nothing could be trained, round after round.
        """
        if not self.trajectory.actions.any():
            raise InputError("No denoising step of a sample is random, so there are no actions: raise method.inference_steps.")
        return self.trajectory.actions.nonzero()[:, 0]

    def metrics(self) -> dict[str, float]:
        """What is logged of every round: the mean of all scores, and their deviation. Every process must call."""
        return {name: float(value) for name, value in of_scores(self.scores, self.processes, self.size).items()}

    def old_log_probs(self, part: Part) -> Tensor:
        """(count,) log-probabilities of a part's transitions under the policy that sampled them."""
        where = self.trajectory.log_probs.device
        return self.trajectory.log_probs[part.steps.to(where), part.rows.to(where)][: part.count]


@torch.no_grad()
def sample_round(
    policy: Policy,
    reward: Reward,
    batch: Prompts,
    context: Context,
    *,
    batches: int,
    samples: int,
    steps: int,
    kernel: Kernel,
    random_steps: int | range | None = None,
    same_noise: bool = False,
    keep: Literal["trajectory", "final"] = "trajectory",
) -> Round:
    """`samples` rollouts of each of `batches` batches of prompts (the first of them `batch`), and their scores.

    Rows are ordered by batch, then by sample, then by prompt. With `same_noise` the samples of a prompt start from one x_T. With `keep`
    final only x_0 stays of the states.
    """
    parts: list[tuple[Trajectory, Prompts, Tensor]] = []
    for prompts in context.batches(batch, batches):
        condition = policy.encode(prompts)
        start = policy.prior(condition, context.rng) if same_noise else None
        for _ in range(samples):
            trajectory = rollout(policy, condition, steps=steps, kernel=kernel, random_steps=random_steps, start=start, rng=context.rng)
            if keep == "final":
                trajectory = replace(trajectory, states=trajectory.states[-1:].clone())
            parts.append((trajectory, prompts, reward(policy.decode(trajectory.final), prompts)))
    trajectories, prompts, scores = zip(*parts, strict=True)
    joined, where = _joined(trajectories), trajectories[0].final.device
    return Round(joined, Prompts.join(prompts), torch.cat(scores).to(where), len(batch), context.processes)


def stored_round(
    policy: Policy, pairs: Sequence[Examples], random_steps: int | None = None, processes: Processes = ALONE
) -> tuple[Round, float]:
    """Batches of stored trajectories that were judged, as a round of two samples a prompt, and their eta.

    The preferred sample scores 1, the other one 0. The log-probabilities under the policy that sampled are not known, and 0. Of the random
    steps only the first `random_steps` count as actions.
    """
    taken = pairs[0].taken
    assert taken is not None
    sides = [(pair, states) for pair in pairs for states in (pair.x_0, pair.rejected) if states is not None]
    states = torch.cat([states for _, states in sides]).transpose(0, 1)
    actions = taken.actions & (torch.arange(len(taken.actions)) < (random_steps or len(taken.actions)))
    condition = Condition.join([policy.encode(pair.prompts) for pair, _ in sides])
    dtype = torch.promote_types(states.dtype, torch.float32)
    log_probs = torch.zeros(states.shape[0] - 1, states.shape[1], device=states.device, dtype=dtype)
    scores = torch.cat([torch.full((len(pair),), float(states is pair.x_0)) for pair, states in sides]).to(states.device)
    trajectory = Trajectory(states, log_probs, actions, taken.schedule, condition)
    return Round(trajectory, Prompts.join([pair.prompts for pair, _ in sides]), scores, len(pairs[0]), processes), taken.eta


def _joined(trajectories: tuple[Trajectory, ...]) -> Trajectory:
    first = trajectories[0]
    return Trajectory(
        torch.cat([t.states for t in trajectories], 1),
        torch.cat([t.log_probs for t in trajectories], 1),
        first.actions,
        first.schedule,
        Condition.join([t.condition for t in trajectories]),
    )


def parts(steps: Tensor, rows: Tensor, size: int) -> Iterator[Part]:
    """Transitions (M,) in parts of exactly `size`; the last one is filled up with its own first ones."""
    for i in range(0, len(steps), size):
        s, r = steps[i : i + size], rows[i : i + size]
        filled = torch.arange(size) % len(s)
        yield Part(s[filled], r[filled], len(s), i + size >= len(steps))


def shares(round_: Round, updates: int, fraction: float, rng: Generator) -> list[Share]:
    """The round's transitions for `updates` optimiser steps: each gets its own samples, at a random `fraction` of their steps.

    Samples are shuffled, and so is each one's order of steps, as in DDPO's reference code. Raises InputError where there are fewer samples
    than updates.
    """
    if updates > round_.total:
        raise InputError(
            f"{updates} optimiser steps cannot share the {round_.total} samples of a round: lower method.updates, or raise batch_size or "
            "method.batches."
        )
    actions = round_.steps
    keep = max(1, round(fraction * len(actions)))
    out: list[Share] = []
    for rows in torch.randperm(round_.total, generator=rng).tensor_split(updates):
        chosen = torch.stack([actions[torch.randperm(len(actions), generator=rng)[:keep]] for _ in rows], 1)  # (keep, rows)
        out.append(round_.share(chosen.flatten(), rows.repeat(keep)))
    return out


@torch.no_grad()
def greedy_scores(policy: Policy, reward: Reward, round_: Round, steps: int) -> Tensor:
    """(N,) scores of the deterministic samples (eta = 0) that start from the round's own noise: ReMax's baseline."""
    scores: list[Tensor] = []
    for i in range(0, len(round_), round_.size):
        at = slice(i, i + round_.size)
        start, condition = round_.trajectory.states[0, at], round_.trajectory.condition[at]
        final = rollout(policy, condition, steps=steps, kernel=ddim(0.0), start=start).final
        scores.append(reward(policy.decode(final), round_.prompts[at]))
    return torch.cat(scores).to(round_.scores.device)


def best_and_worst(round_: Round, batches: int, samples: int) -> tuple[Tensor, Tensor]:
    """Rows of each prompt's best and worst sample, both (P,) on the CPU; prompts whose samples are worth the same are left out.

    They are numbers of all processes' rows; every process must call.
    """
    rows = torch.arange(round_.total).unflatten(0, (batches, samples, -1)).movedim(1, -1).flatten(0, 1)  # (prompts, samples)
    scores = round_.everyone(round_.scores).cpu()[rows]
    (high, best), (low, worst) = scores.max(1), scores.min(1)
    differ = high > low
    prompt = torch.arange(len(rows))
    return rows[prompt, best][differ], rows[prompt, worst][differ]


def nothing_differs(count: int, context: Context, *, wanted: int = 1, most: int = 10) -> bool:
    """Whether all processes together have fewer than `wanted` things to train on, `count`, all of prompts whose samples differ in reward:
    the round can be passed over then. `wanted` is one for each optimiser step that shares them.

    Raises InputError after `most` such rounds on end.
    """
    empty = count < wanted
    context.memory["empty_rounds"] = context.memory.get("empty_rounds", 0) + 1 if empty else 0
    if context.memory["empty_rounds"] >= most:
        if count > 0:
            raise InputError(
                f"In {most} rounds on end too few samples of a prompt differed in reward: the last one's have {count} transitions, for "
                f"{wanted} optimiser steps. Lower method.updates, or raise batch_size, method.batches or method.samples."
            )
        raise InputError(f"In {most} rounds on end no two samples of a prompt differed in reward. Is it constant? diffalign check")
    return empty


@torch.no_grad()
def reference_log_probs(policy: Policy, round_: Round, kernel: Kernel) -> Tensor:
    """(T, N) log-probabilities of the round's transitions under the base model; 0 at the steps that are no actions."""
    with policy.reference():
        return log_probs(policy, round_, kernel)


@torch.no_grad()
def log_probs(policy: Policy, round_: Round, kernel: Kernel) -> Tensor:
    """(T, N) log-probabilities of the round's transitions under the policy as it is now; 0 at the steps that are no actions."""
    out = torch.zeros_like(round_.trajectory.log_probs)
    every = torch.cartesian_prod(round_.steps, torch.arange(len(round_)))
    for part in parts(every[:, 0], every[:, 1], round_.size):
        out[part.steps, part.rows] = replay(policy, round_.trajectory, part.steps, part.rows, kernel).log_prob
    return out


def check_first_pass(change: Tensor, clip: float) -> None:
    """Raise InputError where a log-probability replayed before any update is not what sampling gave: the ratio must be 1.

    On a CPU it is 1 to the last bit. The clip range is allowed, for kernels of a GPU that do not repeat their own sums.
    """
    worst = float(change.abs().max())
    if not worst <= clip:
        raise InputError(
            f"The ratio of the first pass is off by {worst:.1e}, with a clip range of {clip:g}: sampling and training do not compute the "
            "same log-probabilities here. Use fp32, switch dropout off, or raise the clip range."
        )
