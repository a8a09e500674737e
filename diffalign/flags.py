"""From the words of a command line, or the lines of a config file, to values of the right types; what does not fit is an InputError."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from diffalign.errors import InputError, nearest

GROUPS = ("method", "reward", "lora", "guard")  # of settings, each with names of its own
MEANT_EMPTY = ("negative_prompt",)  # another thing than none
COMPOSE = "compose"  # the reward that several make
WEIGHTS = "--reward.weights"  # of its parts
LISTS = (
    *("--eval_rewards", "--guard.rewards", "--log", "--lora.target_modules", "--betas", "--original_size", "--crops_coords_top_left"),
    *("--target_size", "--method.window_range", "--aspects"),
)
SWITCHES = (
    *("--full", "--fsdp", "--tiny", "--gradient_checkpointing", "--channels_last", "--compile", "--offload", "--trajectories"),
    *("--method.checkpointing", "--method.reference_free", "--method.same_noise"),
    "--train_text",
)


def normal(arguments: list[str]) -> list[str]:
    """Flags as the parser knows them: `--batch-size` is batch_size, `--method NAME` method.name, a bare `--full` true.

    The words after a flag that takes several become a list: `--log tensorboard wandb`; several rewards are the parts of one.
    """
    normal: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--"):
            normal.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        flag = {"--method": "--method.name", "--reward": "--reward.name", "--guard": "--guard.rewards"}.get(flag, flag)
        names = list(takewhile(lambda word: not word.startswith("--"), waiting)) if flag == "--reward.name" and not equals else []
        if len(names) > 1:
            del waiting[: len(names)]
            normal += [f"{flag}={COMPOSE}", f"--reward.parts={json.dumps(names)}"]
        elif flag in LISTS or (flag == WEIGHTS and (_several(normal) or is_number(value if equals else waiting[0] if waiting else ""))):
            words = [value] if equals else []
            while not equals and waiting and not waiting[0].startswith("--"):
                words.append(waiting.pop(0))
            if not words and flag == "--guard.rewards":
                raise InputError("guard is empty: name the rewards to watch, or leave it out.")
            whole = len(words) == 1 and words[0].startswith(("[", "null"))
            normal.append(f"{flag}={words[0] if whole else '[' + ', '.join(words) + ']'}")
        elif flag in SWITCHES and not equals and (not waiting or waiting[0].startswith("-")):
            normal.append(f"{flag}=true")
        else:
            normal.append(flag + equals + value)
    return normal


def _several(normal: list[str]) -> bool:
    """Whether several rewards were named: their weights are a list, whatever stands in it."""
    return any(word.startswith("--reward.parts=") for word in normal)


def is_number(word: str) -> bool:
    """Whether it is the weight of a part, and not a field of a reward of one's own, such as its file."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def value_of(arguments: list[str], flag: str) -> str | None:
    """The last value of a flag, `--flag value` or `--flag=value`."""
    found = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments) and not arguments[i + 1].startswith("--"):
            found = arguments[i + 1]
        elif argument.startswith(flag + "="):
            found = argument.partition("=")[2]
    return found


def help_of(parser: ArgumentParser) -> str:
    """The parser's help with the flags as people type them: `--batch-size`, `--method NAME`, a bare `--full` and its like."""
    text = re.sub(r"--(method|reward)\.name NAME", r"--\1 NAME", parser.format_help())
    text = re.sub(r"^  --(lora|guard) CONFIG .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r", --[\w.]+\+ \w+", "", text)
    text = re.sub(r"--guard\.rewards \[.*\]", "--guard NAME ...", text)
    text = re.sub(r"--[\w.]+", lambda m: m[0].replace("_", "-"), text)
    bare = "|".join(re.escape(flag.replace("_", "-")) for flag in SWITCHES)
    choice = " {true,false}"
    return re.sub(rf"({bare}){choice}( +)?", lambda m: m[1] + (m[2] + " " * len(choice) if m[2] else ""), text)


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


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"lora": {"rank": 1}}` as `{"lora.rank": 1}`; a value that is itself a mapping, such as a reward's field, stays whole."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= {f"{key}.{name}": inner for name, inner in value.items()} if key in GROUPS else {key: value}
    return leaves


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
    """`method: draft` is short for `method: {name: draft}`, so with reward, and a list of rewards for `{name: compose, parts: [...]}`;
    `guard: [NAME]` is short for its rewards. Raises InputError where a group is no mapping.
    """
    reward = given.get("reward")
    if isinstance(reward, list):
        given = {**given, "reward": {"name": COMPOSE, "parts": reward}}
    elif isinstance(reward, Mapping) and "parts" in reward:
        given = {**given, "reward": {"name": COMPOSE, **reward}}
    short = {k: {"name": v} for k, v in given.items() if k in ("method", "reward") and not isinstance(v, Mapping)}
    if not isinstance(guard := given.get("guard", {}), Mapping):
        short["guard"] = {"rewards": [guard] if isinstance(guard, str) else guard}
    if not isinstance(given.get("lora", {}), Mapping):
        raise InputError(f"lora is {given['lora']!r}: give its settings, such as 'lora: {{rank: 8}}', or leave it out.")
    return {**given, **short}


def parse(parser: ArgumentParser, read: Callable[[], Namespace]) -> Namespace:
    """Run a parse; raises InputError with the nearest known name for an unknown one, and with what fits for a value that does not."""
    try:
        return read()
    except ArgumentError as error:
        message = str(error).strip()
        stray = re.search(r"unrecognized arguments: (?!-)(\S*)", message)
        if stray is not None:
            raise InputError(f"'{stray[1]}' belongs to no flag: a value follows its flag, such as --steps 100.") from error
        unknown = re.search(r"unrecognized arguments: -*([\w.\-]+)|Option '([\w.]+)'|does not accept option '([\w.]+)'", message)
        if unknown is None:
            raise InputError(_misfit(message)) from error
        word = next(g for g in unknown.groups() if g).replace("-", "_")
        group = re.search(r"[Gg]roup '(\w+)'", message)
        word = f"{group[1]}.{word}" if group else word
        known = [a.dest for a in parser._actions if a.dest not in ("help", "print_config", "versions")]
        raise InputError(f"There is no setting '{word}'. {nearest(word, known)}") from error


KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "Path": "a path", "list": "a list",
    "tuple": "a list", "dict": "names with values", "NoneType": "null",
}  # fmt: skip


def _misfit(message: str) -> str:
    """What the parser says of a value that does not fit, in our words: the setting, the value, and what would fit."""
    text = " ".join(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).split())
    found = re.fullmatch(r'Parser key "([\w.]+)": (.*?)\.? (?:Given value type: \S+ Given value|Got value): (.*)', text)
    within = re.fullmatch(r'Parser key "([\w.]+)": .*?(Expected .*?)\. Got value: (.*?) - .* Given value: (.*)', text)
    if within is not None:  # one of the list's: what fits in its place, rather than in the whole list's
        name, expected, one, value = within.groups()
        return f"{name} is {value}, and of that {one} does not fit: give {_fitting(expected)}."
    if found is None:
        text = re.sub(r'Parser key "([\w.]+)"', r"\1", text).rstrip(".")
        return re.sub(r"--[\w.]+", lambda m: m[0].replace("_", "-"), f"{text}.")
    name, expected, value = found.groups()
    return f"{name} is {value}: give {_fitting(expected)}."


def _fitting(expected: str) -> str:
    kinds = re.findall(r"Expected (?:an? )?(\w+)( with \d+ elements)?", expected)
    fitting = [KINDS.get(kind, kind) + size for kind, size in kinds if kind != "typing"] + re.findall(r"'([^']+)'", expected)
    return " or ".join(dict.fromkeys(fitting))


def refuse_empty(values: Mapping[str, Any], thing: Any, prefix: str = "") -> None:
    """Raise InputError for null and for empty text where they can mean nothing: a line cut short, or a variable that is not set."""
    for name, (kind, default, _) in parameters(thing).items():
        value = values.get(name, default)
        optional = default is None or kind is Any or type(None) in typing.get_args(kind)
        if (value is None and not optional) or (value == "" and default != "" and name not in MEANT_EMPTY):
            raise InputError(f"{prefix}{name} is empty: give a value, or leave it out.")
