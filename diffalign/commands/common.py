"""What commands share."""

from __future__ import annotations

import argparse
import json
import os
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NoReturn

from diffalign.commands import COMMANDS
from diffalign.errors import InputError

if TYPE_CHECKING:
    from diffalign.config import Plan


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ours: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:]}. See: {self.prog} --help")


def parser_of(command: str, example: str) -> Parser:
    about = COMMANDS[command]
    return Parser(f"diffalign {command}", description=about[0].upper() + about[1:] + ".", epilog=f"example: {example}", allow_abbrev=False)


def quiet() -> None:
    """Nothing on the screen that the person did not ask for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def split_fields(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the other words, the words `--reward.FIELD value`)."""
    from diffalign.flags import is_number

    words, fields = list[str](), list[str]()
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        own = word.startswith("--reward.")
        (fields if own else words).append(word)
        if own and "=" not in word and waiting:
            fields.append(waiting.pop(0))
            while word == "--reward.weights" and waiting and is_number(waiting[0]):
                fields.append(waiting.pop(0))
    return words, fields


def several_of(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the words, `--reward A B` as `--reward compose`; its parts). What follows a name and names none is no reward."""
    if "--reward" not in arguments:
        return arguments, []
    from diffalign.registry import names_reward

    at = arguments.index("--reward") + 1
    count = sum(1 for _ in takewhile(names_reward, arguments[at:]))
    if count < 2:
        return arguments, []
    return [*arguments[:at], "compose", *arguments[at + count :]], [f"--reward.parts={json.dumps(arguments[at : at + count])}"]


def plan_of(arguments: list[str], command: str) -> tuple[Plan, str | None] | None:
    """The plan of a train or check command line and its --output; None where help or the configuration was asked for, and printed."""
    from diffalign.composing import with_part_flags
    from diffalign.config import Names, build_parser, check_needs, names_of, settle
    from diffalign.flags import flat, nested, normal, parse, read_config, value_of

    arguments = normal(arguments)
    file = value_of(arguments, "--config")
    config = {} if file is None else nested(read_config(file))
    if config.get("merged"):
        raise InputError(
            f"{file} is of a merged run, which no training makes: --lora.init takes its lora/, --config that of a trained one."
        )
    own: Any = config.get("reward", {})
    arguments = with_part_flags(arguments, own.get("parts") or ())
    flags = {"method": "--method.name", "reward": "--reward.name", "pipeline": "--pipeline"}
    said = {key: value for key, flag in flags.items() if (value := value_of(arguments, flag)) is not None}
    names: Names = names_of({**config, **said})
    parser = build_parser(names, f"diffalign {command}")
    if {"-h", "--help"} & set(arguments):
        print(_help_of_plan(parser, command))
        return None
    if config:
        # the file's fields of a method or reward in whose place a flag names another are not that one's
        same = {k: v for k, v in config.items() if not (k in said and isinstance(v, dict) and v.get("name") != said[k])}
        parse(parser, lambda: parser.parse_object(same))
        parser.set_defaults({k: v for k, v in flat(same).items() if k not in ("method.name", "reward.name")})
    show = "--print_config" in arguments
    parsed = parse(parser, lambda: parser.parse_args([a for a in arguments if a != "--print_config"]))
    output = parsed.pop("output")
    if output == "":
        raise InputError("output is empty: give a value, or leave it out.")
    plan = settle(parsed, names)
    check_needs(plan)
    if plan.settings.tiny:
        from diffalign.tiny import cut

        plan = cut(plan)
    if show:
        import yaml

        print(yaml.safe_dump(plan.config(), sort_keys=False), end="")
        return None
    return plan, output


def _help_of_plan(parser: Any, command: str) -> str:
    from diffalign.flags import help_of

    resume = "  --resume DIR          Go on with a run, alone or with --steps N. A finished one starts a new round.\n"
    resume += "  --push-to-hub USER/REPO  Upload the run when it has ended, as diffalign push does; --public for everybody to see.\n"
    resume = resume if command == "train" else ""
    more = f"options:\n{resume}  --print-config        Show the resolved settings as YAML, and stop.\n"
    text = help_of(parser).replace("options:\n", more, 1)
    return f"{text}\nexample: diffalign {command} --method draft --steps 100 --seed 1 --lora.rank 4"
