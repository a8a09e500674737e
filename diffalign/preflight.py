"""`diffalign check`: what would make a training fail or stand still, found in a minute, before it is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from diffalign.config import Plan
from diffalign.data import Prompt, batch_of
from diffalign.memory import Trial, expected, in_words, within_budget
from diffalign.peaks import taken
from diffalign.sampling import ddim, noisy, rollout, transition
from diffalign.streams import Source
from diffalign.types import Prompts


@dataclass(frozen=True)
class Finding:
    """One check: `passed` is None for a plain fact."""

    name: str
    passed: bool | None
    text: str


def preflight(plan: Plan, policy: Any, prompts: list[Prompt], examples: Source | None = None) -> Iterator[Finding]:
    """Yield the findings, cheap ones first. The policy's weights are the same afterwards. `examples` are of a method that takes data."""
    trial = Trial(plan, policy, prompts, examples)
    if plan.settings.memory_budget is not None:
        plan, text = within_budget(trial)
        trial = replace(trial, plan=plan)
        yield Finding("memory budget", None, text)
    size = plan.settings.batch_size
    batch = batch_of((prompts * size)[:size], policy)
    yield from (Finding("pipeline", None, note) for note in vars(policy).get("notes", ()))
    if plan.settings.fsdp:
        yield Finding("fsdp", None, "one process works here, with the whole network: what is said of memory is of that")
    yield _batch_plan(plan, len(prompts))
    line = expected(trial)
    yield Finding(
        "memory",
        None,
        "no estimate: steps of so few samples have nothing to learn from (one of a prompt, or equal rewards)"
        if line is None
        else in_words(trial, line),
    )
    yield _deterministic_steps(_steps(plan), policy)
    yield _ratio(policy, batch)
    if plan.reward is not None:
        yield _variance(plan, policy, batch)
    with taken(trial.device) as took:
        gradients = trial.step(size)
    if gradients is None:
        yield Finding("gradient", False, "no two samples of a prompt differ in reward: there is nothing to learn in this round")
        return
    yield _gradient_arrives(gradients)
    if plan.method.needs.differentiable_reward:
        yield _finite_differences(plan, policy, batch)
    yield Finding("memory", None, f"{took.peak / 1e6:,.0f} MB {took.what} in a step of {size}")


def _reward(plan: Plan) -> Any:
    assert plan.reward is not None
    return plan.reward


def _batch_plan(plan: Plan, prompts: int) -> Finding:
    s = plan.settings
    text = (
        f"{s.steps} optimiser steps, {plan.batch_in_words()}, {_steps(plan)} denoising steps, guidance {s.guidance_scale:g}; "
        f"{prompts} prompts"
    )
    return Finding("batch plan", None, text)


def _steps(plan: Plan) -> int:
    """Denoising steps of the method's own rollouts."""
    return vars(plan.method).get("inference_steps", plan.sample_steps)


def _deterministic_steps(steps: int, policy: Any) -> Finding:
    still = int((policy.path.schedule(steps).then.sigma == 0).sum())
    text = f"{still} of {steps} steps end at sigma 0" + (": no action there, and no log-probability" if still else "")
    return Finding("sigma = 0", None, text)


def _ratio(policy: Any, batch: Prompts, steps: int = 4) -> Finding:
    """Replay a stochastic rollout: the new log-probabilities must equal the stored ones."""
    kernel = noisy(policy.path, 1.0)
    with torch.no_grad():
        trajectory = rollout(policy, policy.encode(batch), steps=steps, kernel=kernel, rng=Generator().manual_seed(0))
    worst = 0.0
    for i in range(steps):
        now, then = trajectory.schedule.now[i], trajectory.schedule.then[i]
        action = transition(policy, trajectory.states[i], now, then, trajectory.condition, kernel)
        ratio = (action.log_prob(trajectory.states[i + 1]) - trajectory.log_probs[i]).exp()
        worst = max(float((ratio - 1).abs().max().detach().nan_to_num(float("inf"))), worst)
    text = f"replaying {steps} steps gives the ratio 1" + ("" if worst == 0 else f" only within {worst:.1e}")
    return Finding("ratio", worst == 0, text)


def _variance(plan: Plan, policy: Any, batch: Prompts) -> Finding:
    with torch.no_grad():
        trajectory = rollout(policy, policy.encode(batch), steps=plan.sample_steps, kernel=ddim(0.0), rng=Generator().manual_seed(0))
        scores = _reward(plan)(policy.decode(trajectory.final), batch)
    spread = float(scores.std(correction=0))
    text = f"{plan.reward_name}: mean {float(scores.mean()):.4g}, standard deviation {spread:.3g} over {len(scores)} samples"
    return Finding("reward", spread > 0 or len(scores) == 1, text + ("" if spread else ": all samples are worth the same"))


def _gradient_arrives(gradients: list[Tensor | None]) -> Finding:
    live = sum(g is not None and bool(g.any()) for g in gradients)
    finite = all(g is None or bool(g.isfinite().all()) for g in gradients)
    text = f"non-zero in {live} of {len(gradients)} trained tensors" + ("" if finite else ", and not finite")
    return Finding("gradient", live > 0 and finite, text + (" (half of a new LoRA starts at zero)" if live < len(gradients) else ""))


def _finite_differences(plan: Plan, policy: Any, batch: Prompts) -> Finding:
    """The directional derivative of the reward along its own gradient through the last step, against central differences.

    The states before it are held still: a truncated gradient is exact for what follows them.
    """
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    if policy.dtype != torch.float32:
        return Finding("finite differences", None, "left out: they need fp32")
    if plan.settings.tiny:
        return Finding("finite differences", None, "left out: the scores of a random reward differ by too little")
    k, steps = 1, _steps(plan)
    condition = policy.encode(batch)
    with torch.no_grad():
        prefix = rollout(policy, condition, steps=steps, kernel=ddim(0.0), rng=Generator().manual_seed(0))
    schedule = prefix.schedule

    def objective() -> Tensor:
        x = prefix.states[steps - k]
        for i in range(steps - k, steps):
            x = transition(policy, x, schedule.now[i], schedule.then[i], condition, ddim(0.0)).mean
        return _reward(plan)(policy.decode(x), batch).double().mean()

    gradients = torch.autograd.grad(objective(), parameters, allow_unused=True)
    direction = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    norm = float(torch.stack([d.double().square().sum() for d in direction]).sum().sqrt())
    if norm == 0:
        return Finding("finite differences", False, "the reward's gradient with respect to the trained weights is zero")
    errors: list[float] = []
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for h in (0.3, 0.1, 0.03, 0.01):
            values: list[float] = []
            for sign in (1.0, -1.0):
                for p, start, d in zip(parameters, before, direction, strict=True):
                    p.copy_(start + d * (sign * h / norm))
                values.append(float(objective()))
            errors.append(abs((values[0] - values[1]) / (2 * h) / norm - 1))
        for p, start in zip(parameters, before, strict=True):
            p.copy_(start)
    best = min(errors)
    return Finding("finite differences", best < 0.05, f"the reward's gradient at the trained weights agrees within {best:.1%}")
