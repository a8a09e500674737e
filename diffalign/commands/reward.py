"""`diffalign reward train` and `diffalign reward eval`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from diffalign.commands.common import quiet, split_fields
from diffalign.errors import InputError, nearest

HELP = """usage: diffalign reward train --data FOLDER --output DIR [options]        (diffalign reward train --help)
       diffalign reward eval --data FOLDER --reward NAME [NAME ...] [options]

  train   a reward from preferences (Bradley-Terry) or ratings: a head, and perhaps a LoRA, on a CLIP model
  eval    rewards on preferences that people or another reward gave: accuracy, calibration, agreement

examples:
  diffalign reward train --data pairs/mine --model openai/clip-vit-large-patch14 --train-tower lora --output trained/mine
  diffalign reward eval --data pairs/test --reward trained/mine pickscore clip
  diffalign train --method draft --reward trained/mine"""


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
        print(f"{help_of(parser)}\nexample: diffalign reward train --data pairs/shapes --model shapes-clip --output trained/mine")
        return 0
    words = normal(arguments)
    values = parse(parser, lambda: parser.parse_args(words)).as_dict()
    output = Path(values.pop("output")).expanduser()
    print(fit(Fitting(**values), output))
    return 0


def _eval(arguments: list[str]) -> int:
    example = "diffalign reward eval --data pairs/test --reward trained/mine pickscore --output rewards.json"
    about = "Test rewards on pairs, or on ratings, that people or another reward gave."
    parser = argparse.ArgumentParser("diffalign reward eval", description=about, epilog=f"example: {example}", allow_abbrev=False)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="judged pictures: a folder, a file of one, or hf:user/dataset")
    parser.add_argument(
        "--reward", required=True, nargs="+", metavar="NAME", help="rewards: names, or folders of trained ones; of one, --reward.FIELD too"
    )
    parser.add_argument(
        "--split", choices=("heldout", "train", "all"), default="all", help="with a trained reward: what it was not, or was, trained on"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="so many judgements, the first ones")
    parser.add_argument("--bad-pictures", choices=("refuse", "skip"), default="refuse", help="those that are missing or damaged")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures that are scored at once, by default 32")
    parser.add_argument("--device", help="by default cuda, mps or cpu, the first there is")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write what was found as JSON")
    words, own = split_fields(arguments)
    chosen = parser.parse_args(words)
    for name in ("limit", "batch_size"):
        if vars(chosen)[name] is not None and vars(chosen)[name] < 1:
            raise InputError(f"{name} is {vars(chosen)[name]}: give 1 or more.")
    from diffalign.checkpoint import whole
    from diffalign.config import reward_fields
    from diffalign.console import show
    from diffalign.reward_eval import evaluate_rewards, marks_of, open_rewards
    from diffalign.reward_tables import tables

    names = chosen.reward
    output = None if chosen.output is None else chosen.output.expanduser()
    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):
        raise InputError(f"--output {output}: give a file in a folder that exists and can be written to.")
    fields = reward_fields(names[0], own) if own else {}
    known = None if chosen.split == "all" else marks_of(names)
    results = evaluate_rewards(
        chosen.data,
        open_rewards(names, fields),
        known=known,
        split=chosen.split,
        limit=chosen.limit,
        skip=chosen.bad_pictures == "skip",
        batch_size=chosen.batch_size,
        device=chosen.device,
        seed=chosen.seed,
    )
    for table in tables(results):
        show(table)
    if output is not None:
        try:
            with whole(output) as draft:
                draft.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{output} cannot be written ({error.strerror}): choose another --output.") from error
    return 0
