"""What a plan names, opened: its data, its prompts and its rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffalign import examples, registry
from diffalign.config import Plan
from diffalign.console import say
from diffalign.contract import CheckedReward, as_reward, check_gradient, short_name
from diffalign.data import Prompt, batch_of, hold_out, read_prompts, takes
from diffalign.errors import InputError
from diffalign.examples import ExampleSet
from diffalign.settings import Settings

Data = tuple[ExampleSet, ExampleSet] | None  # training and held-out examples


def open_data(plan: Plan, policy: Any, accelerator: Any = None) -> Data:
    """`(training examples, held-out examples)` of the plan's data, embedded by the base model; None where there is no data."""
    settings, kind = plan.settings, plan.method.needs.data
    if settings.data is None or kind is None:
        return None

    if kind == "edits" and takes(policy) != ("image",):
        raise InputError(
            f"{plan.method_name} trains pipelines that edit pictures, and {settings.pipeline} is none: --pipeline shapes-edit, or an "
            "InstructPix2Pix model."
        )

    def read() -> Data:
        assert settings.data is not None
        skip, needs = settings.bad_pictures == "skip", plan.method.needs
        reward = plan.reward if needs.reward and needs.data_role == "only" else None  # where the method wants the data scored
        return examples.read(settings.data, kind, policy, reward=reward, limit=settings.data_limit, skip=skip, seed=settings.seed, say=say)

    if accelerator is None:
        return read()
    with accelerator.main_process_first():  # it fills the cache that the others read
        return read()


def given_prompts(
    settings: Settings, prompts: list[Prompt] | None = None, held: list[Prompt] | None = None
) -> tuple[list[Prompt] | None, list[Prompt] | None]:
    """Training and held-out prompts as far as they were given, in lists or in the settings' files, which may be pipes: read but once.

    Raises InputError for a wrong file, and where there are none and no data to take them from.
    """
    if prompts is None and settings.prompts is not None:
        prompts = read_prompts(settings.prompts)
    if held is None and settings.eval_prompts is not None:
        held = read_prompts(settings.eval_prompts, "heldout")
    if prompts is None and settings.data is None:
        raise InputError("No prompts: give --prompts FILE (one a line), or --prompts shapes.")
    return prompts, held


def prompt_lists(
    settings: Settings, prompts: list[Prompt] | None, held: list[Prompt] | None, data: Data
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts: those given, else the prompts of the data; where none are held out, a tenth."""
    if prompts is None:
        assert data is not None
        prompts, held = data[0].prompts, held or list(dict.fromkeys(data[1].prompts))
    if held is not None:
        return prompts, held
    prompts, held = hold_out(prompts, settings.seed)
    if set(prompts) == set(held):
        say("Fewer than ten prompts: the evaluation uses the training prompts themselves, with other noise.")
    return prompts, held


def eval_rewards(plan: Plan) -> list[CheckedReward]:
    if plan.reward is None:
        return named_rewards(plan.settings.eval_rewards or [])
    others = [name for name in plan.settings.eval_rewards or [] if name != plan.reward_name]
    return [CheckedReward(plan.reward.reward, plan.reward.name), *named_rewards(others)]


def named_rewards(names: Sequence[str]) -> list[CheckedReward]:
    found = [(name, *registry.find("rewards", name)) for name in dict.fromkeys(names)]
    return [
        CheckedReward(as_reward(thing(**preset) if isinstance(thing, type) else thing), short_name(name)) for name, thing, preset in found
    ]


def check_reward(plan: Plan, policy: Any, prompts: list[Prompt]) -> None:
    if plan.reward is None:
        return
    if plan.reward.modality != policy.modality:
        raise InputError(f"{plan.reward_name} judges {plan.reward.modality}, and this pipeline makes {policy.modality}.")
    if plan.method.needs.differentiable_reward:
        check_gradient(plan.reward.reward, plan.reward.name, policy, batch_of(prompts[:2], policy))
