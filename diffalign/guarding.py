"""A guard at work in a training: it evaluates on held-out prompts, and puts in place what `diffalign.guard` decides on the numbers."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import guard as rule
from diffalign import registry
from diffalign.checkpoint import whole
from diffalign.config import Plan
from diffalign.console import say
from diffalign.contract import CheckedReward, FunctionReward, check_modality
from diffalign.data import Prompt
from diffalign.errors import InputError
from diffalign.evaluate import kl_to_base, pairwise_distance, sample, score
from diffalign.flags import COMPOSE, parameters
from diffalign.inputs import check_read, named_rewards
from diffalign.loop import Row, Training
from diffalign.processes import one_for_all
from diffalign.run import Run, json_lines
from diffalign.types import ComposedReward

KL_PROMPTS = 16  # the KL is a mean over all latent dimensions of a sample too, and needs fewer
TECHNICAL = (  # fields of rewards that do not say what is judged
    *("precision", "batch_size", "checkpoint", "tokenizer", "revision", "clip", "base", "backend"),
    *("timeout", "retries", "wait", "parallel", "encoding", "token_env"),
)


def guard_rewards(plan: Plan) -> list[CheckedReward]:
    """The rewards that the plan's guard watches, opened. Raises InputError for the one that is trained on, and for unclear names."""
    names = plan.settings.guard.rewards
    for name in names:
        if trained_on(plan, name):
            raise InputError(
                f"guard: {name} is what is trained on, or a part of it, and cannot watch over itself: name a reward of another make."
            )
    rewards = named_rewards(names, dry=plan.settings.tiny)
    called = [rule.DIVERSITY, rule.KL, *(reward.name for reward in rewards)]
    for name in called:
        if called.count(name) > 1:
            raise InputError(f"guard: two measures would be called {name} in its log: give the reward another name.")
    return rewards


def trained_on(plan: Plan, name: str) -> bool:
    """Whether the plan trains on the reward of this name, with its usual fields, as its reward or as a part with a weight."""
    if plan.reward is None or not plan.method.needs.reward:
        return False
    if plan.reward_is_live:
        reward = plan.reward.reward
        weighted = reward.weighted if isinstance(reward, ComposedReward) else [reward]
        own = [(each if isinstance(each, FunctionReward) else type(each), getattr(each, "__dict__", {})) for each in weighted]
    else:
        given = plan.reward_fields
        parts = given["parts"] if plan.reward_name == COMPOSE else [{**given, "name": plan.reward_name, "weight": 1.0}]
        own = [(registry.find("rewards", part["name"])[0], part) for part in parts if part["weight"]]
    watched = _identity(*registry.find("rewards", name))
    return any(_identity(thing, fields) == watched for thing, fields in own)


def _identity(thing: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """What makes a reward: the class or function, and the fields that say what is judged."""
    trained = thing is registry.find("rewards", "trained")[0]  # of which the folder says all
    known = {
        key: default for key, (_, default, _) in parameters(thing).items() if key not in TECHNICAL or (trained and key == "checkpoint")
    }
    fields = {key: given.get(key, default) for key, default in known.items()}
    absolute = {key: value.expanduser().resolve() if isinstance(value, Path) else value for key, value in fields.items()}
    return thing.function if isinstance(thing, FunctionReward) else thing, {key: str(value) for key, value in absolute.items()}


def check_guard(rewards: Sequence[CheckedReward], policy: Any, held_out: Sequence[Prompt]) -> None:
    """Raise InputError where a watched reward does not judge what the policy makes, or there is nothing to watch it on."""
    for reward in rewards:
        check_modality(reward.reward, f"guard: {reward.name}", policy.modality)
    if rewards and not held_out:
        raise InputError("guard: no prompts are held out to watch the rewards on: give --eval-prompts FILE.")
    check_read(rewards, held_out, policy)


def check_resumed(plan: Plan, checkpoint: Mapping[str, Any], steps: int | None) -> None:
    """Raise InputError where more steps are wanted of a run that its guard ended and would end again, or it measures otherwise now."""
    if not plan.settings.guard.rewards or not checkpoint["guard"]:
        return
    state = rule.goes_on(_guard(plan), rule.State.of(checkpoint["guard"]["state"]))
    if state.fired is not None and steps is not None:
        raise InputError(
            f"The guard ended this run: {rule.in_words(state.fired)}. To go on from there, change guard in its config.yaml (a higher drop, "
            "or 'guard: {}' for none), and resume it."
        )


def _guard(plan: Plan) -> rule.Guard:
    """The plan's guard with the names as a run records them: the same at its start and when it is resumed."""
    return rule.Guard(**plan.config()["guard"])


def guard_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's guard.jsonl, one an evaluation; none where no guard watched. Raises InputError where one is damaged."""
    file = path / "guard.jsonl"
    try:
        return json_lines(file)
    except ValueError as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> InputError:
    return InputError(f"{file} is damaged: a line of it is no JSON, or has no step. Mend or delete that line.")


def guard_outcome(run: Run) -> dict[str, Any] | None:
    """What came of a run's guard: see `diffalign.guard.outcome`. None where it has none."""
    said = run.config.get("guard")
    if isinstance(said, Mapping) and not said.get("rewards"):
        return None  # most runs: their whole plan is not made again for that
    guard = run.plan.settings.guard
    return rule.outcome(guard, guard_rows(run.path)) if guard.rewards else None


def rewind_guard(run: Run, step: int, remembered: bool) -> None:
    """Drop the lines after `step`, and one cut short by a kill: a resumed run writes them again.

    `remembered`: whether the checkpoint holds the guard's state; else that of `step` itself is written again too. Raises InputError for a
    damaged line.
    """
    file = run.path / "guard.jsonl"
    if not file.is_file():
        return
    whole_lines = [line for line in file.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
    try:
        lines = [line for line in whole_lines if json.loads(line)["step"] < step + remembered]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file) from error
    with whole(file) as draft:
        draft.write_text("".join(lines))


@dataclass
class Guarding:
    """What a guard needs at its work. Its state lies in `training.guard`, and so in every checkpoint: `state`, and the best `weights`."""

    plan: Plan
    run: Run
    policy: Any
    training: Training
    rewards: list[CheckedReward]
    prompts: list[Prompt]
    due: bool = False

    @property
    def state(self) -> rule.State:
        if not self.training.guard:
            return rule.State(self.plan.settings.guard.size)
        return rule.State.of(self.training.guard["state"])

    @property
    def fired(self) -> bool:
        return self.state.fired is not None

    def after(self, row: Row) -> bool:
        """Evaluate after a step where it is due and the method is between two batches; whether the training is to end here."""
        settings = self.plan.settings
        self.due = self.due or row.step % settings.guard.steps_between(settings.steps) == 0 or row.step == settings.steps
        if self.due and row.boundary:
            self.evaluate()
            self.due = False
        return self.fired

    def evaluate(self) -> None:
        """Measure, decide, log. The first process decides for all; the others wait, or where they share the network out, measure too."""
        training, guard, clock = self.training, _guard(self.plan), time.perf_counter()
        main, decided = training.accelerator.is_main_process, "null"
        with training.averaged():
            if main or training.sharded:
                measured = self._measure()
                state, found = rule.decide(guard, self.state, measured)
                decided = json.dumps(state.plain())
                if main:
                    self._log({**rule.row(measured, state, found), "seconds": round(time.perf_counter() - clock, 3)})
            training.guard["state"] = json.loads(one_for_all(decided))
            if training.guard["state"]["best"] == training.context.step:
                training.guard["weights"] = self._weights()

    def settle(self) -> None:
        """When the training has ended: where the guard ended it, put the best weights in place, or beside the last ones into best/."""
        main, training = self.training.accelerator.is_main_process, self.training
        if main:
            shutil.rmtree(self.run.path / "best", ignore_errors=True)  # of an ending that is past
        if not self.fired:
            return
        last = self._weights()
        training.put(training.guard["weights"])
        if self.plan.settings.guard.action == "rollback":
            return
        with self.policy.whole() if training.sharded else nullcontext():
            if main:
                self.run.save_weights(self.policy, "best")
        training.put(last)

    def _measure(self) -> rule.Measured:
        plan, settings, step = self.plan, self.plan.settings, self.training.context.step
        chosen: dict[str, Any] = {"steps": plan.sample_steps, "seed": settings.seed + 2, "batch_size": settings.batch_size}
        chosen["suffix"] = plan.suffix if step else ""
        prompts = [prompt for prompt in self.prompts for _ in range(rule.SAMPLES)]
        media = sample(self.policy, prompts, **chosen)

        def scores(reward: CheckedReward) -> Any:
            return score(reward, media, prompts, self.policy, batch_size=settings.batch_size)

        trained = None
        if plan.method.needs.reward and plan.reward is not None and not plan.reward.learns:
            # counted apart: these are no queries of the training
            trained = CheckedReward(plan.reward.reward, plan.reward.name)
        return rule.Measured(
            step,
            {reward.name: scores(reward).reshape(-1, rule.SAMPLES).tolist() for reward in self.rewards},
            pairwise_distance(media.unflatten(0, (-1, rule.SAMPLES))).tolist(),
            kl_to_base(self.policy, self.prompts[:KL_PROMPTS], **chosen),
            None if trained is None else float(scores(trained).mean()),
        )

    def _weights(self) -> dict[str, Tensor]:
        """A copy of the trained weights as they are: on the CPU, or of a network that is shared out this process's part."""
        named, sharded = self.training.parameters.items(), self.training.sharded
        with torch.no_grad():
            return {name: p.detach().clone() if sharded else p.detach().to("cpu", copy=True) for name, p in named}

    def _log(self, row: dict[str, Any]) -> None:
        with (self.run.path / "guard.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        measures = row["measures"]
        self.training.accelerator.log({f"guard/{name}": measure["value"] for name, measure in measures.items()}, step=row["step"])
        failing = [f"{name} ({m['failures']} of {self.plan.settings.guard.patience})" for name, m in measures.items() if m["failed"]]
        texts = [f"{name} {measure['value']:.4g}" for name, measure in measures.items()]
        say(f"Guard, step {row['step']}: {', '.join(texts)}{'; failing: ' * bool(failing)}{', '.join(failing)}")


def guarding(
    plan: Plan, run: Run, policy: Any, training: Training, rewards: list[CheckedReward], held_out: Sequence[Prompt]
) -> Guarding | None:
    """The guard of a training that is prepared, or resumed, with its first evaluation; None where no rewards are watched.

    It takes the last held-out prompts, as the evaluation takes the first; where there are fewer than `guard.size`, again with other noise.
    """
    if not rewards:
        return None
    guard, backwards = _guard(plan), [*held_out][::-1]
    prompts = [backwards[i % len(backwards)] for i in range(guard.size)]
    watch = Guarding(plan, run, policy, training, rewards, prompts)
    if training.guard:
        state = rule.goes_on(guard, watch.state)
        training.guard["state"] = state.plain()
    else:
        watch.evaluate()
    return watch
