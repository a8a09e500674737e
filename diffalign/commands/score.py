"""`diffalign score`."""

from __future__ import annotations

from pathlib import Path

from diffalign.commands.common import parser_of, quiet, several_of, split_fields
from diffalign.errors import InputError


def run(arguments: list[str]) -> int:
    parser = parser_of("score", 'diffalign score --reward shapes-clip picture.png --prompt "a red circle"')
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures; for a reward of sound .wav files")
    parser.add_argument(
        "--reward", required=True, metavar="NAME", help="or several names; with --reward.FIELD for fields, as diffalign train has them"
    )
    parser.add_argument("--prompt", help="the prompt of all the pictures, for a reward that reads one")
    parser.add_argument("--transcript", metavar="TEXT", help="what is said in all the sounds, for a reward of speech")
    parser.add_argument("--image", metavar="FILE", help="the picture that was edited, for a reward that judges edits")
    words, own = split_fields(arguments)
    words, several = several_of(words)
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
    files = [Path(f) for f in chosen.files]
    for file, value, parts in score_files_by_part(chosen.reward, files, chosen.prompt, source, fields, chosen.transcript):
        print("\t".join([f"{value:.6g}", str(file), *(f"{name} {raw:.6g}" for name, raw in parts.items())]))
    return 0
