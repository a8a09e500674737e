"""How a plan is resolved: settings' defaults < the method's < the embedded model's < the config file < what the user says."""

from __future__ import annotations

import importlib.util
import inspect
from argparse import SUPPRESS
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace

from diffalign import knobs, registry
from diffalign.composing import make_reward
from diffalign.contract import CheckedReward, FunctionReward, as_reward, name_of, short_name
from diffalign.errors import InputError
from diffalign.flags import COMPOSE, flat, nested, normal, parameters, parse, refuse_empty
from diffalign.guard import Guard
from diffalign.lora import LoRA
from diffalign.settings import LIVE, Settings
from diffalign.types import ComposedReward, Method

DATA = {
    "pairs": "preference pairs: --data FOLDER with pairs.jsonl (prompt, chosen, rejected). Make some: diffalign pairs --reward NAME "
    "--prompts FILE --output FOLDER",
    "trajectories": "preference pairs with their trajectories: --data FOLDER. Make some: diffalign pairs --trajectories --reward NAME "
    "--prompts FILE --output FOLDER",
    "labels": "pictures that are liked or not: --data FOLDER with labels.jsonl (prompt, image, label) or pairs.jsonl. Make some: diffalign "
    "pairs --reward NAME --prompts FILE --output FOLDER",
    "edits": "edits: --data FOLDER with edits.jsonl (source, instruction, edited), or --data shapes-edit. Make some: diffalign edits "
    "--pipeline P --prompts FILE.jsonl --output FOLDER",
    "pictures": "captioned pictures: --data FOLDER with pictures.jsonl (prompt, image)",
}


@dataclass(frozen=True)
class Plan:
    """A training with every value settled."""

    settings: Settings
    method_name: str
    method: Method
    reward_name: str | None
    reward: CheckedReward | None
    reward_fields: Mapping[str, Any] = field(default_factory=dict)
    reward_is_live: bool = False  # given as a Python object, which no file can name

    @property
    def sample_steps(self) -> int:
        """Denoising steps of pictures and evaluation."""
        return self.settings.sample_steps or vars(self.method).get("inference_steps", 50)

    @property
    def suffix(self) -> str:
        """What a method that trains on annotated prompts adds to the trained model's prompts when it samples (HIVE, conditional)."""
        return getattr(self.method, "suffix", "")

    def batch_in_words(self, processes: int = 1) -> str:
        """How many samples there are, and what they are made of."""
        size, method = self.settings.batch_size, vars(self.method)
        if "batches" not in method:
            total = size * self.settings.accumulate * processes
            return f"{size} samples x {self.settings.accumulate} batches x {processes} processes = {total} a step"
        if self.settings.data is not None and self.method.needs.data_role == "instead":
            total = size * method["batches"] * processes
            return f"rounds of {size} pairs x {method['batches']} batches x {processes} processes = {total} pairs"
        samples = method.get("samples", 1)
        total = size * method["batches"] * samples * processes
        return f"rounds of {size} prompts x {method['batches']} batches x {samples} samples x {processes} processes = {total} samples"

    def config(self) -> dict[str, Any]:
        """Nested plain values: what config.yaml holds and `--config` reads.

        What was said relative to the working folder, in flags and config files alike, is absolute here: it means the same anywhere.
        """
        assert is_dataclass(self.method)
        settings = asdict(self.settings)
        settings["data"] = _absolute(self.settings.data)
        settings |= {n: _absolute(settings[n]) for n in ("prompts", "eval_prompts") if settings[n] not in registry.PROMPTS}
        if Path(self.settings.pipeline).expanduser().is_dir():  # else a Hub id
            settings["pipeline"] = _absolute(self.settings.pipeline)
        if self.settings.eval_rewards is not None:
            settings["eval_rewards"] = [_absolute_plugin(name) for name in self.settings.eval_rewards]
        settings["lora"]["init"] = _absolute(self.settings.lora.init)
        settings["guard"]["rewards"] = [_absolute_plugin(name) for name in self.settings.guard.rewards]
        reward_name = self.reward_name and _absolute_plugin(self.reward_name)
        config: dict[str, Any] = {
            "method": {"name": _absolute_plugin(self.method_name), **asdict(self.method)},
            "reward": {"name": LIVE if self.reward_is_live else reward_name, **_recorded(self.reward_name, self.reward_fields)},
            **settings,
        }
        return _plain(config)


def _absolute(source: str | None) -> str | None:
    """A file or folder from the root; None, names, and what is on the Hub as they are."""
    if source is None or source in (*registry.MODELS, LIVE) or source.startswith("hf:"):
        return source
    return str(Path(source).expanduser().absolute())


def _absolute_plugin(name: str) -> str:
    """`path/to/file.py:Name` and a trained reward's folder from the root; other names as they are."""
    if folder := registry.trained_folder(name):
        return _absolute(str(folder)) or name
    file, colon, attribute = name.rpartition(":")
    return f"{_absolute(file)}:{attribute}" if colon and file.endswith(".py") else name


def _recorded(reward: str | None, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A reward's fields; the plug-ins among the parts of compose are named from the root."""
    if reward != COMPOSE or "parts" not in fields:
        return fields
    return {**fields, "parts": [{**part, "name": _absolute_plugin(part["name"])} for part in fields["parts"]]}


def _plain(value: Any) -> Any:
    """What YAML can hold, all the way down: lists for tuples, and text for paths, from the root."""
    match value:
        case Path():
            return str(value.expanduser().absolute())
        case Mapping():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case _:
            return value


def model_preset(pipeline: str, method: str) -> dict[str, Any]:
    """The settings that an embedded model brings along for a method (`assets/<model>.yaml`)."""
    if pipeline not in registry.MODELS:
        return {}
    preset = yaml.safe_load(registry.MODELS[pipeline].with_suffix(".yaml").read_text())
    special = preset.pop("methods", {}).get(method, {})
    return _merge(preset, special)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


@dataclass(frozen=True)
class Names:
    """What must be known before the flags are: whose flags they are."""

    method: str
    pipeline: str
    reward: str | None


def build_parser(names: Names, prog: str = "diffalign train") -> ArgumentParser:
    """The parser of one training: the settings' flags, and those of the named method and reward, with their defaults layered."""
    method, method_fields = registry.find("methods", names.method)
    parser = ArgumentParser(prog=prog, exit_on_error=False, usage=f"{prog} [--method NAME] [--pipeline P] [--reward NAME] [options]")
    about = "YAML file with these same names. Relative paths, here and in flags, are from the working folder; a run records absolute ones."
    parser.add_argument("--config", type=str | None, default=None, metavar="FILE", help=about)
    parser.add_argument("--output", type=str | None, default=None, metavar="DIR", help="Run folder; by default a new one in runs/.")
    parser.add_argument("--versions", type=dict, default=None, help=SUPPRESS)
    parser.add_argument("--processes", type=int | None, default=None, help=SUPPRESS)  # a note of what the run was, like the versions
    parser.add_argument("--merged", type=dict | None, default=None, help=SUPPRESS)
    parser.add_class_arguments(Settings, None)
    parser.add_argument("--method.name", type=str, default=names.method, help="See: diffalign list methods.")
    parser.add_argument("--reward.name", type=str | None, default=names.reward, help="See: diffalign list rewards.")
    for name, (kind, default, about) in parameters(method).items():
        parser.add_argument(f"--method.{name}", type=kind, default=default, help=about)
    reward, reward_fields = registry.find("rewards", names.reward) if names.reward else (None, {})
    for name, (kind, default, about) in parameters(reward).items():
        parser.add_argument(f"--reward.{name}", type=kind, default=default, help=about)
    layered = _merge(registry.defaults_of(names.method), {"method": method_fields})
    layered = _merge(layered, model_preset(names.pipeline, names.method))
    layered["reward"] = {"name": names.reward, **reward_fields}
    parser.set_defaults(flat(layered))
    about = {f"{p.arg_name}": " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(Settings).params}
    for group, kind in (("lora", LoRA), ("guard", Guard)):
        about |= {f"{group}.{p.arg_name}": " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(kind).params}
    for action in parser._actions:
        action.help = about.get(action.dest, action.help)
    return parser


def reward_fields(name: str, words: list[str]) -> dict[str, Any]:
    """The fields of a named reward that `words`, such as `--reward.precision bf16`, set. Raises InputError for those that do not fit."""
    found, _ = registry.find("rewards", name)
    parser = ArgumentParser(exit_on_error=False)
    known = parameters(found)
    for field_name, (kind, default, _) in known.items():
        parser.add_argument(f"--reward.{field_name}", type=kind, default=default)
    arguments = normal(words)
    values = parse(parser, lambda: parser.parse_args(arguments)).as_dict().get("reward", {})
    given = {word.partition("=")[0].removeprefix("--reward.") for word in arguments}
    fields = {key: value for key, value in values.items() if key in given}
    refuse_empty(fields, found, "reward.")
    return fields


def names_of(given: Mapping[str, Any]) -> Names:
    """The three names among what was given, nested or as plain strings; raises InputError where one is none, or nothing has it."""

    def name(key: str, default: str | None) -> str | None:
        value = given.get(key)
        value = value.get("name") if isinstance(value, Mapping) else value
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise InputError(f"{key} is {value!r}: give a name, or leave it out.")
        return default if value is None else value

    pipeline, method = name("pipeline", "shapes"), name("method", "draft")
    assert pipeline is not None
    assert method is not None
    registry.find("methods", method)
    if pipeline != LIVE:
        registry.locate(pipeline)
    reward = name("reward", model_preset(pipeline, method).get("reward"))
    return Names(method, pipeline, None if reward == LIVE else reward)


def settle(parsed: Namespace, names: Names, reward: Any = None) -> Plan:
    """The plan of parsed values: method and reward made, before any model is loaded. `check_needs` is the caller's to call."""
    values: dict[str, Any] = deepcopy(parsed).as_dict()
    method_class, _ = registry.find("methods", names.method)
    reward_class, _ = registry.find("rewards", names.reward) if names.reward is not None and reward is None else (None, {})
    method_fields = {k: v for k, v in values.pop("method").items() if k != "name"}
    reward_fields = {k: v for k, v in values.pop("reward").items() if k != "name"}
    for name in ("config", "output", "versions", "processes", "merged"):
        values.pop(name, None)
    refuse_empty(values, Settings)
    refuse_empty(values["lora"], LoRA, "lora.")
    refuse_empty(values["guard"], Guard, "guard.")
    refuse_empty(method_fields, method_class, "method.")
    refuse_empty(reward_fields, reward_class, "reward.")
    method = method_class(**method_fields)
    checked = None
    if reward is not None:
        checked = CheckedReward(as_reward(reward), names.reward or "reward")
    elif names.reward is not None:
        made, reward_fields = make_reward(names.reward, reward_fields)
        checked = CheckedReward(made, short_name(names.reward), tiny=values["tiny"])
    settings = Settings(**{**values, "lora": LoRA(**values["lora"]), "guard": Guard(**values["guard"]), "betas": tuple(values["betas"])})
    return Plan(settings, names.method, method, names.reward, checked, reward_fields, reward is not None)


def check_needs(plan: Plan) -> None:
    """Raise InputError where the method lacks what it cannot do without; nothing heavy has been loaded yet."""
    needs = plan.method.needs
    for name in plan.settings.log:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log: {name} is not installed: pip install 'diffalign[{name}]'")
    knobs.check(plan.settings)
    if plan.settings.memory_budget is not None and not needs.split_by:
        raise InputError(
            f"memory_budget: {plan.method_name} does not take its batch in smaller ones (its loss is of the whole batch, or it does not "
            "say that it can): drop --memory-budget, and lower --batch-size yourself. diffalign check says what a step takes."
        )
    if plan.settings.fsdp and not needs.in_step:
        able = [n for n in registry.METHODS if registry.find("methods", n)[0].needs.in_step]
        raise InputError(
            f"fsdp: with {plan.method_name} one process may call the network more often than another, and would wait for it for ever: drop "
            f"--fsdp, or take one of {', '.join(able)}."
        )
    instead = needs.data_role == "instead" and needs.data is not None
    if needs.reward and plan.reward is None and not (instead and plan.settings.data):
        others = f" Or it takes, instead, {DATA[needs.data]}." if instead and needs.data else ""
        raise InputError(f"{plan.method_name} needs a reward: --reward NAME. See: diffalign list rewards.{others}")
    if needs.data is not None and plan.settings.data is None and needs.data_role == "only":
        raise InputError(f"{plan.method_name} trains on {DATA[needs.data]}. See docs/data.md.")
    if needs.data is None and plan.settings.data is not None:
        raise InputError(f"{plan.method_name} takes no data: drop --data. Its samples are its own.")
    if plan.reward is not None and needs.data_role == "only" and needs.data is not None:
        plan.reward.check_settled(f"{plan.method_name} scores its data before it begins")
    if needs.differentiable_reward and plan.reward is not None and not plan.reward.differentiable:
        if lacking := _undeclared(plan.reward.reward):
            raise InputError(
                f"{plan.method_name} follows the reward's gradient, and {plan.reward_name} does not declare {' and '.join(lacking)}: "
                'give its class differentiable = True and modality = "image".'
            )
        if plan.reward_fields.get("backend") == "package":
            raise InputError(
                f"{plan.method_name} follows the reward's gradient, and the package's own scores of {plan.reward_name} have none: "
                "--reward.backend native has one, and scores the same."
            )
        accept = [n for n in registry.METHODS if not registry.find("methods", n)[0].needs.differentiable_reward]
        others = f"Methods that accept it: {', '.join(accept)}." if accept else "No method of this version accepts it."
        if isinstance(plan.reward.reward, ComposedReward):
            raise InputError(
                f"{plan.method_name} follows the reward's gradient, and these parts have none: {', '.join(plan.reward.reward.still)}. Drop "
                f"them, or declare yours with @diffalign.reward(differentiable=True) if they have one; a step has one as a hinge. {others}"
            )
        raise InputError(
            f"{plan.method_name} follows the reward's gradient, and {plan.reward_name} has none. Choose a differentiable reward "
            f"(diffalign list rewards), or declare yours with @diffalign.reward(differentiable=True) if it is one. {others}"
        )


def _undeclared(reward: Any) -> list[str]:
    """What an object that was taken for a bare callable leaves unsaid; nothing of a function, which cannot say it."""
    thing = reward.function if isinstance(reward, FunctionReward) else reward
    return [] if inspect.isroutine(thing) else [name for name in ("differentiable", "modality") if name not in dir(thing)]


def resolve(given: Mapping[str, Any], reward: Any = None, *, rewarded: bool = True) -> Plan:
    """The plan of nested values (the Python API, and a run's config.yaml); `reward` is an object in the place of a name.

    Where not `rewarded` the reward is left out, and need not be there any more.
    """
    given = nested(given)
    names = names_of(given)
    if reward is not None or names.reward is None or not rewarded:
        names = Names(names.method, names.pipeline, None)
        given = {**given, "reward": {}}
    parser = build_parser(names)
    parsed = parse(parser, lambda: parser.parse_object(dict(given)))
    if reward is not None:
        names = Names(names.method, names.pipeline, name_of(reward))
    return settle(parsed, names, reward)
