"""From what people write of a reward, a name or several with their weights, to the reward."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from diffalign import registry
from diffalign.contract import as_reward, name_of, short_name
from diffalign.errors import InputError, nearest
from diffalign.flags import COMPOSE, parameters, parse, refuse_empty
from diffalign.parts import SHAPING, Part, recorded
from diffalign.types import Reward

Combine = Literal["sum", "min", "product"]


def compose(parts: Sequence[Any], weights: Sequence[float] | None = None, combine: Combine = "sum") -> Reward:
    """Several rewards in one, for `align(reward=...)`.

    A part is a reward's name, a callable `(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`, a reward object, or a mapping: `name` or
    `reward` (an object), the fields of `diffalign.parts.Part` (`weight`, `normalise`, `at_least`, `when`, ...) and, of a named reward,
    its own fields. Raises InputError for what does not fit; no weights are loaded.
    """
    return _composed(parts, weights, combine)[0]


def make_reward(name: str, fields: Mapping[str, Any]) -> tuple[Reward, dict[str, Any]]:
    """`(reward, its fields as a run records them)` of a name and the fields that were given for it."""
    found, preset = registry.find("rewards", name)
    settled = {**preset, **fields}
    if name == COMPOSE:
        return _composed(**settled)
    return as_reward(found(**settled) if isinstance(found, type) else found), settled


def given_reward(reward: Any) -> tuple[dict[str, Any] | None, Any]:
    """Of what a Python caller gave as a reward `(what a config file would hold, None)`, or `(None, an object)` where no file can."""
    if isinstance(reward, str):
        return {"name": reward}, None
    if isinstance(reward, Mapping) and "parts" not in reward:
        if "name" not in reward:
            raise InputError(f"The reward {dict(reward)!r} has no name: give name: NAME and its fields, or parts: a list of rewards.")
        return dict(reward), None
    if not isinstance(reward, Mapping | list | tuple):
        return None, reward
    fields: dict[str, Any] = {"name": COMPOSE, **(reward if isinstance(reward, Mapping) else {"parts": list(reward)})}
    if all(isinstance(part, str) or (isinstance(part, Mapping) and "reward" not in part) for part in fields["parts"]):
        return fields, None
    return None, compose(**{key: value for key, value in fields.items() if key != "name"})


def _composed(parts: Sequence[Any] = (), weights: Sequence[float] | None = None, combine: str = "sum") -> tuple[Reward, dict[str, Any]]:
    found, _ = registry.find("rewards", COMPOSE)
    if isinstance(parts, str | Mapping):
        raise InputError("parts is no list: give the rewards' names, [hps-v2.1, aesthetic], or mappings of a name and its fields.")
    if combine not in typing.get_args(Combine):
        raise InputError(f"combine is {combine!r}: give sum, min or product.")
    if weights is not None and len(weights) != len(parts):
        raise InputError(f"{len(weights)} weights for {len(parts)} rewards: give one for each, in their order.")
    given = [part if isinstance(part, Mapping) else {_kind(part): part} for part in parts]
    if weights is not None:
        given = [{**part, "weight": weight} for part, weight in zip(given, weights, strict=True)]
    made = [_part(part) for part in given]
    records = [{**own, **recorded(part)} for part, own in made]
    return found(parts=[part for part, _ in made], combine=combine), {"combine": combine, "parts": records}


def _kind(part: Any) -> str:
    return "name" if isinstance(part, str) else "reward"


def _part(given: Mapping[str, Any]) -> tuple[Part, dict[str, Any]]:
    """A part, and its reward's name and own fields."""
    name, live = given.get("name"), given.get("reward")
    if (name is None) == (live is None) or not (name is None or isinstance(name, str)):
        raise InputError(f"The part {dict(given)!r} names no reward: give name: NAME, or in Python reward: an object, and not both.")
    if name == COMPOSE or name_of(live) == COMPOSE:
        raise InputError("A part of compose is compose again: list its parts beside the others.")
    thing, preset = (None, {}) if name is None else registry.find("rewards", name)
    own, label = parameters(thing), str(given.get("label") or (short_name(name) if name else name_of(live)))
    taken = sorted(own.keys() & {"reward", *SHAPING})
    if taken:
        raise InputError(f"The reward {name} has a field {taken[0]}, which a part has too: give the reward's another name.")
    values = {key: value for key, value in given.items() if key not in ("name", "reward")}
    known = {**own, **{key: value for key, value in parameters(Part).items() if key in SHAPING}}
    for key in values:
        if key not in known:
            raise InputError(f"There is no setting '{key}' of the part {label}. {nearest(key, known)}")
    try:
        typed = _typed(values, known)
        refuse_empty(typed, thing)
    except InputError as error:
        raise InputError(f"The part {label}: {error}") from error
    fields = {**preset, **{key: typed[key] for key in own if key in typed}}
    reward = as_reward(live if name is None else thing(**fields) if isinstance(thing, type) else thing)
    shaping: dict[str, Any] = {key: value for key, value in typed.items() if key in SHAPING}
    every = {key: default for key, (_, default, _) in own.items()}
    return Part(**{**shaping, "reward": reward, "label": label}), {"name": name, **every, **fields}


def _typed(values: Mapping[str, Any], known: Mapping[str, tuple[Any, Any, str]]) -> dict[str, Any]:
    """The values as their fields' types have them; raises InputError for what does not fit."""
    parser = ArgumentParser(exit_on_error=False)
    for key in values:
        parser.add_argument(f"--{key}", type=known[key][0])
    return dict(vars(parse(parser, lambda: parser.parse_object(dict(values)))))


def with_part_flags(arguments: list[str], parts: Sequence[Any] = ()) -> list[str]:
    """The words of a command line, each `--reward.PART.FIELD VALUE` put into its part: of those named there, else of a config file's."""
    named = [word.partition("=")[2] for word in arguments if word.startswith("--reward.parts=")]
    others = [word for word in arguments if word.startswith("--reward.name") and not word.endswith(f"={COMPOSE}")]
    listed = yaml.safe_load(named[-1]) if named else [] if others else parts
    if not isinstance(listed, list | tuple):
        return arguments
    given: list[Any] = [dict(part) if isinstance(part, Mapping) else {"name": part} for part in listed]
    flags = {f"--reward.{_label(part).replace('-', '_')}.": part for part in given}
    rest, waiting, found = list[str](), list(arguments), False
    while waiting:
        word = waiting.pop(0)
        flag = next((flag for flag in flags if word.startswith(flag)), None)
        if flag is None:
            rest.append(word)
            continue
        key, equals, value = word.removeprefix(flag).partition("=")
        if not equals and not waiting:
            raise InputError(f"{word} has no value: give one.")
        flags[flag][key] = _value(key, value if equals else waiting.pop(0))
        found = True
    return [*rest, f"--reward.parts={json.dumps(given)}"] if found else arguments


def _value(key: str, word: str) -> Any:
    """A word of the command line as YAML has it; a regular expression as it is."""
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return word if key == "when" and not isinstance(value, dict) else value


def _label(part: Mapping[str, Any]) -> str:
    return str(part.get("label") or short_name(str(part.get("name"))))
