"""How a plan is resolved: settings' defaults < the method's < the embedded model's < the config file < what the user says."""

from __future__ import annotations

import importlib.util
import inspect
import re
import typing
from argparse import SUPPRESS
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from diffalign import registry
from diffalign.contract import CheckedReward, FunctionReward, as_reward, short_name
from diffalign.errors import InputError, nearest
from diffalign.lora import LoRA
from diffalign.settings import LIVE, Settings
from diffalign.types import Method

DATA = {
    "pairs": "preference pairs: --data FOLDER with pairs.jsonl (prompt, chosen, rejected). Make some: diffalign pairs --reward NAME "
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
        samples = method.get("samples", 1)
        total = size * method["batches"] * samples * processes
        return f"rounds of {size} prompts x {method['batches']} batches x {samples} samples x {processes} processes = {total} samples"

    def config(self) -> dict[str, Any]:
        """Nested plain values: what config.yaml holds and `--config` reads."""
        assert is_dataclass(self.method)
        settings = asdict(self.settings)
        settings["betas"] = list(self.settings.betas)
        return {
            "method": {"name": self.method_name, **asdict(self.method)},
            "reward": {
                "name": LIVE if self.reward_is_live else self.reward_name,
                **{k: str(v) if isinstance(v, Path) else v for k, v in self.reward_fields.items()},
            },
            **settings,
        }


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


def parameters(thing: Any) -> dict[str, tuple[Any, Any, str]]:
    """`name -> (type, default, help)` of a class's constructor; nothing for a function, which has been made already."""
    if not isinstance(thing, type):
        return {}
    hints = typing.get_type_hints(thing if is_dataclass(thing) else thing.__init__)
    about = {p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(thing).params}
    settled = {f.name for f in fields(thing) if not f.init} if is_dataclass(thing) else set()
    made = {f.name: f.default_factory for f in fields(thing) if f.default_factory is not MISSING} if is_dataclass(thing) else {}
    named = {n: p for n, p in inspect.signature(thing).parameters.items() if n not in settled and p.kind is not p.VAR_KEYWORD}
    return {n: (hints.get(n, Any), made[n]() if n in made else p.default, about.get(n, "")) for n, p in named.items()}


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
    parser.add_argument("--config", type=str | None, default=None, metavar="FILE", help="YAML file with these same names.")
    parser.add_argument("--output", type=str | None, default=None, metavar="DIR", help="Run folder; by default a new one in runs/.")
    parser.add_argument("--versions", type=dict, default=None, help=SUPPRESS)
    parser.add_class_arguments(Settings, None)
    parser.add_argument("--method.name", type=str, default=names.method, help="See: diffalign list methods.")
    parser.add_argument("--reward.name", type=str | None, default=names.reward, help="See: diffalign list rewards.")
    for name, (kind, default, about) in parameters(method).items():
        parser.add_argument(f"--method.{name}", type=kind, default=default, help=about)
    reward, reward_fields = registry.find("rewards", names.reward) if names.reward else (None, {})
    for name, (kind, default, about) in parameters(reward).items():
        parser.add_argument(f"--reward.{name}", type=kind, default=default, help=about)
    layered = _merge(dict(method.defaults), model_preset(names.pipeline, names.method))
    layered = _merge(layered, {"method": {**layered.get("method", {}), **method_fields}})
    layered["reward"] = {"name": names.reward, **reward_fields}
    parser.set_defaults(flat(layered))
    about = {f"{p.arg_name}": " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(Settings).params}
    about |= {f"lora.{p.arg_name}": " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(LoRA).params}
    for action in parser._actions:
        action.help = about.get(action.dest, action.help)
    return parser


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves


def names_of(given: Mapping[str, Any]) -> Names:
    """The three names among what was given, nested or as plain strings."""

    def name(key: str) -> str | None:
        value = given.get(key)
        return value.get("name") if isinstance(value, Mapping) else value

    pipeline = given.get("pipeline") or "shapes"
    method = name("method") or "draft"
    registry.find("methods", method)
    if pipeline != LIVE:
        registry.locate(pipeline)
    reward = name("reward") or model_preset(pipeline, method).get("reward")
    return Names(method, pipeline, None if reward == LIVE else reward)


def read_config(path: str) -> dict[str, Any]:
    """A config file as nested values; raises InputError where it is missing or no YAML mapping."""
    file = Path(path).expanduser()
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"There is no config file {file}.") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no YAML file ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{file} holds no settings: expected lines such as 'steps: 100'.")
    return loaded


def nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """`method: draft` is short for `method: {name: draft}`; so with reward."""
    short = {k: {"name": v} for k, v in given.items() if k in ("method", "reward") and not isinstance(v, Mapping)}
    return {**given, **short}


def parse(parser: ArgumentParser, read: Callable[[], Namespace]) -> Namespace:
    """Run a parse; raises InputError with the nearest known name for an unknown one."""
    try:
        return read()
    except ArgumentError as error:
        message = str(error).strip()
        unknown = re.search(r"unrecognized arguments: -*([\w.\-]+)|Option '([\w.]+)'|does not accept option '([\w.]+)'", message)
        if unknown is None:
            message = " ".join(re.sub(r"<class '(\w+)'>", r"\1", message).replace('Parser key "', "").replace('":', ":").split())
            raise InputError(_dashed(f"{message}.")) from error
        word = next(g for g in unknown.groups() if g).replace("-", "_")
        group = re.search(r"[Gg]roup '(\w+)'", message)
        word = f"{group[1]}.{word}" if group else word
        known = [a.dest for a in parser._actions if a.dest not in ("help", "print_config", "versions")]
        raise InputError(f"There is no setting '{word}'. {nearest(word, known)}") from error


def _dashed(message: str) -> str:
    return re.sub(r"--[\w.]+", lambda m: m[0].replace("_", "-"), message)


def settle(parsed: Namespace, names: Names, reward: Any = None) -> Plan:
    """The plan of parsed values: method and reward made, before any model is loaded. `check_needs` is the caller's to call."""
    values: dict[str, Any] = deepcopy(parsed).as_dict()
    method_class, _ = registry.find("methods", names.method)
    method_fields = {k: v for k, v in values.pop("method").items() if k != "name"}
    reward_fields = {k: v for k, v in values.pop("reward").items() if k != "name"}
    method = method_class(**method_fields)
    checked = None
    if reward is not None:
        checked = CheckedReward(as_reward(reward), names.reward or "reward")
    elif names.reward is not None:
        found, _ = registry.find("rewards", names.reward)
        checked = CheckedReward(as_reward(found(**reward_fields) if isinstance(found, type) else found), short_name(names.reward))
    for name in ("config", "output", "versions"):
        values.pop(name, None)
    for name in values["log"]:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log: {name} is not installed: pip install 'diffalign[{name}]'")
    settings = Settings(**{**values, "lora": LoRA(**values["lora"]), "betas": tuple(values["betas"])})
    return Plan(settings, names.method, method, names.reward, checked, reward_fields, reward is not None)


def check_needs(plan: Plan) -> None:
    """Raise InputError where the method lacks what it cannot do without; nothing heavy has been loaded yet."""
    needs = plan.method.needs
    if needs.reward and plan.reward is None:
        raise InputError(f"{plan.method_name} needs a reward: --reward NAME. See: diffalign list rewards.")
    if needs.data is not None and plan.settings.data is None and not needs.data_is_optional:
        raise InputError(f"{plan.method_name} trains on {DATA[needs.data]}. See docs/data.md.")
    if needs.data is None and plan.settings.data is not None:
        raise InputError(f"{plan.method_name} takes no data: drop --data. Its samples are its own.")
    if needs.differentiable_reward and plan.reward is not None and not plan.reward.differentiable:
        accept = [n for n in registry.METHODS if not registry.find("methods", n)[0].needs.differentiable_reward]
        others = f"Methods that accept it: {', '.join(accept)}." if accept else "No method of this version accepts it."
        raise InputError(
            f"{plan.method_name} follows the reward's gradient, and {plan.reward_name} has none. Choose a differentiable reward "
            f"(diffalign list rewards), or declare yours with @diffalign.reward(differentiable=True) if it is one. {others}"
        )


def name_of(reward: Any) -> str:
    """What a reward object is called in logs: its function's or its class's name."""
    function = reward.function if isinstance(reward, FunctionReward) else reward
    return getattr(function, "__name__", type(function).__name__)


def resolve(given: Mapping[str, Any], reward: Any = None) -> Plan:
    """The plan of nested values (the Python API, and a run's config.yaml); `reward` is an object in the place of a name."""
    given = nested(given)
    names = names_of(given)
    if reward is not None or names.reward is None:
        names = Names(names.method, names.pipeline, None)
        given = {**given, "reward": {}}
    parser = build_parser(names)
    parsed = parse(parser, lambda: parser.parse_object(dict(given)))
    if reward is not None:
        names = Names(names.method, names.pipeline, name_of(reward))
    return settle(parsed, names, reward)
