"""What a plan names, opened: its data, its prompts and its rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from diffalign import examples, tiny
from diffalign.composing import make_reward
from diffalign.config import Plan
from diffalign.console import say
from diffalign.contract import CheckedReward, check_gradient, check_modality, short_name
from diffalign.data import Prompt, SpokenPrompt, batch_of, check_transcripts, hold_out, read_prompts, takes, text_of, without_pictures
from diffalign.errors import InputError
from diffalign.examples import ExampleSet
from diffalign.models import adapter_of, class_of
from diffalign.settings import Settings
from diffalign.types import ComposedReward, Modality, Policy, ReadingReward, SoundPolicy

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
        limit, seed = settings.data_limit, settings.seed
        with (
            tiny.data(kind, takes(policy), policy.modality) if tiny.made(settings, settings.data) else nullcontext(settings.data) as source
        ):
            return examples.read(source, kind, policy, reward=reward, limit=limit, skip=skip, seed=seed, say=say)

    if accelerator is None:
        return read()
    with accelerator.local_main_process_first():  # it fills the cache that the others read, which by default each machine has its own of
        return read()


def given_prompts(
    settings: Settings, prompts: list[Prompt] | None = None, held: list[Prompt] | None = None
) -> tuple[list[Prompt] | None, list[Prompt] | None]:
    """Training and held-out prompts as far as they were given, in lists or in the settings' files, which may be pipes: read but once.

    Raises InputError for a wrong file, and where there are none and no data to take them from.
    """
    if prompts is None and settings.prompts is not None:
        prompts = _read(settings, settings.prompts)
    if held is None and settings.eval_prompts is not None:
        held = _read(settings, settings.eval_prompts, "heldout")
    if prompts is None and settings.data is None:
        raise InputError("No prompts: give --prompts FILE (one a line), or --prompts shapes.")
    return prompts, held


def _read(settings: Settings, source: str, part: str = "train") -> list[Prompt]:
    if tiny.made(settings, source):
        return tiny.prompts(getattr(adapter_of(class_of(settings)), "takes", ()))
    return read_prompts(source, part)


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


def check_media(plan: Plan, made: Modality | None) -> None:
    """Raise InputError where the plan's method or one of its rewards is for other media than the pipeline makes; nothing is loaded.

    None: nobody knows yet what that is.
    """
    if made is None:
        return
    wanted = plan.method.needs.modality
    if wanted not in (None, made):
        raise InputError(f"{plan.method_name} is for {wanted}, and this pipeline makes {made}.")
    rewards = [plan.reward] if plan.reward is not None else []
    check_judges([*rewards, *_made(plan.settings.eval_rewards or [])], made)
    for reward in _made(plan.settings.guard.rewards):
        check_modality(reward.reward, f"guard: {reward.name}", made)


def eval_rewards(plan: Plan) -> list[CheckedReward]:
    """The rewards of the plan's evaluation, opened: the one that is trained on, and the others that are named."""
    if plan.reward is None:
        return named_rewards(plan.settings.eval_rewards or [], dry=plan.settings.tiny)
    plan.reward.open()
    others = [name for name in plan.settings.eval_rewards or [] if name != plan.reward_name]
    return [CheckedReward(plan.reward.reward, plan.reward.name), *named_rewards(others, dry=plan.settings.tiny, taken=plan.reward.name)]


def named_rewards(
    names: Sequence[str],
    fields: Mapping[str, Any] | None = None,
    *,
    dry: bool = False,
    made: Modality | None = None,
    taken: str | None = None,
) -> list[CheckedReward]:
    """The rewards of these names, opened; `dry`: as their tiny twins. `fields` are for all of them; without, they have their defaults.

    One whose short name another has, or that is `taken`, goes by its full name. Raises InputError where one judges other media than are
    `made`, before any is opened.
    """
    rewards = _made(names, fields, dry=dry, taken=taken)
    check_judges(rewards, made)
    for reward in rewards:
        reward.open()
    check_judges(rewards, made)  # again: some know only now what they judge
    return rewards


def _made(
    names: Sequence[str], fields: Mapping[str, Any] | None = None, *, dry: bool = False, taken: str | None = None
) -> list[CheckedReward]:
    rewards, called = list[CheckedReward](), {taken}
    for name in dict.fromkeys(names):
        short = short_name(name)
        rewards.append(CheckedReward(make_reward(name, fields or {})[0], name if short in called else short, tiny=dry))
        called.add(short)
    return rewards


def check_judges(rewards: Sequence[CheckedReward], made: Modality | None) -> None:
    """Raise InputError where one of the rewards judges other media than are made; None: nobody knows yet what those are."""
    if made is not None:
        for reward in rewards:
            check_modality(reward.reward, reward.name, made)


def check_parts(plan: Plan, prompts: Sequence[Prompt] | None, held: Sequence[Prompt] | None = None) -> None:
    """Raise InputError where no part of a composed reward is for one of the prompts, or one is for none that it is trained on."""
    if plan.reward is not None and isinstance(plan.reward.reward, ComposedReward):
        if prompts:
            plan.reward.reward.check(without_pictures(prompts), whole=True)
        plan.reward.reward.check(without_pictures(held or ()))


def check_read(rewards: Sequence[CheckedReward], prompts: Sequence[Prompt], policy: Policy) -> None:
    """Raise InputError for a prompt that one of the rewards, which are open, cannot read: a recogniser does not spell every word."""
    if not prompts or not isinstance(policy, SoundPolicy) or policy.modality != "audio":
        return
    if any(isinstance(reward.reward, ReadingReward) for reward in rewards):
        _check_said_by_all(prompts)
    asked = replace(without_pictures(prompts), transcript=tuple(check_transcripts(prompts, policy)) or None)
    for reward in rewards:
        if isinstance(reward.reward, ReadingReward):
            reward.reward.check_prompts(asked, policy.samples / policy.sample_rate)


def _check_said_by_all(prompts: Sequence[Prompt]) -> None:
    """Raise InputError where some prompts come with a transcript and others without: rewards would hear for the others' whole text."""
    lacking = [prompt for prompt in prompts if not isinstance(prompt, SpokenPrompt)]
    if lacking and len(lacking) < len(prompts):
        raise InputError(
            f"The prompt '{text_of(lacking[0])}' has no transcript, and others have one: give each its own, which the reward hears for, "
            "or none."
        )


def check_reward(plan: Plan, policy: Any, prompts: list[Prompt]) -> None:
    if plan.reward is None:
        return
    check_parts(plan, prompts)
    check_modality(plan.reward.reward, plan.reward.name, policy.modality)
    check_read([plan.reward], prompts, policy)
    if plan.method.needs.differentiable_reward:
        check_gradient(plan.reward.reward, plan.reward.name, policy, batch_of(prompts[:2], policy))
