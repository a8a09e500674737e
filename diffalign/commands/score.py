"""`diffalign score`."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

from diffalign.commands.common import parser_of, quiet, split_fields
from diffalign.errors import InputError


def run(arguments: list[str]) -> int:
    parser = parser_of("score", 'diffalign score --reward shapes-clip picture.png --prompt "a red circle"')
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures")
    parser.add_argument(
        "--reward", required=True, metavar="NAME", help="or several names; with --reward.FIELD for fields, as diffalign train has them"
    )
    parser.add_argument("--prompt", help="the prompt of all the pictures, for a reward that reads one")
    parser.add_argument("--image", metavar="FILE", help="the picture that was edited, for a reward that judges edits")
    from diffalign.flags import is_number

    words, own = split_fields(arguments)
    words, several = _several(words)
    weights = own[own.index("--reward.weights") + 1 :][:1] if several and "--reward.weights" in own else []
    if weights and not is_number(weights[0]):
        raise InputError(f"--reward.weights: '{weights[0]}' is no number: give one for each reward, in their order.")
    chosen = parser.parse_intermixed_args(words)
    if "" in chosen.files:
        raise InputError("A word is empty where a reward's or a picture's name should be: leave it out.")
    quiet()
    from diffalign.api import score_files_by_part
    from diffalign.composing import with_part_flags
    from diffalign.config import reward_fields
    from diffalign.flags import normal

    source = Path(chosen.image) if chosen.image else None
    fields = reward_fields(chosen.reward, with_part_flags(normal([*several, *own])))
    for file, value, parts in score_files_by_part(chosen.reward, [Path(f) for f in chosen.files], chosen.prompt, source, fields):
        print("\t".join([f"{value:.6g}", str(file), *(f"{name} {raw:.6g}" for name, raw in parts.items())]))
    return 0


def _several(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the words, `--reward A B` as `--reward compose`; its parts). What follows a reward's name and names none is a picture."""
    if "--reward" not in arguments:
        return arguments, []
    from diffalign.registry import names_reward

    at = arguments.index("--reward") + 1
    count = sum(1 for _ in takewhile(names_reward, arguments[at:]))
    if count < 2:
        return arguments, []
    return [*arguments[:at], "compose", *arguments[at + count :]], [f"--reward.parts={json.dumps(arguments[at : at + count])}"]
