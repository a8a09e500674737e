"""`diffalign reward train` and `diffalign reward eval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffalign.commands.common import quiet
from diffalign.errors import InputError, nearest

HELP = """usage: diffalign reward train --data FOLDER --output DIR [options]        (diffalign reward train --help)
       diffalign reward eval --data FOLDER --reward NAME [NAME ...] [options]

  train   a reward from preferences (Bradley-Terry) or ratings: a head, and perhaps a LoRA, on a CLIP model
  eval    rewards on preferences that people or another reward gave: accuracy, calibration, agreement

examples:
  diffalign reward train --data pairs/mine --model openai/clip-vit-large-patch14 --train-tower lora --output rewards/mine
  diffalign reward eval --data pairs/test --reward rewards/mine pickscore clip
  diffalign train --method draft --reward trained --reward.checkpoint rewards/mine"""


def run(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "eval": _eval}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise InputError(f"There is no command 'reward {arguments[0]}'. {nearest(arguments[0], commands)}")
    quiet()
    return commands[arguments[0]](arguments[1:])


def _train(arguments: list[str]) -> int:
    from diffalign.flags import help_of, normal, parse
    from diffalign.reward_fitting import Fitting, build_parser
    from diffalign.reward_training import fit

    parser = build_parser()
    if {"-h", "--help"} & set(arguments):
        print(f"{help_of(parser)}\nexample: diffalign reward train --data pairs/shapes --model shapes-clip --output rewards/mine")
        return 0
    words = normal(arguments)
    values = parse(parser, lambda: parser.parse_args(words)).as_dict()
    output = Path(values.pop("output")).expanduser()
    print(fit(Fitting(**values), output))
    return 0


def _eval(arguments: list[str]) -> int:
    raise NotImplementedError
