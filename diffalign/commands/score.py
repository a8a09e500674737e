"""`diffalign score`."""

from __future__ import annotations

from pathlib import Path

from diffalign.commands.common import parser_of, quiet, split_fields


def run(arguments: list[str]) -> int:
    parser = parser_of("score", 'diffalign score --reward shapes-clip picture.png --prompt "a red circle"')
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures")
    parser.add_argument("--reward", required=True, metavar="NAME", help="with --reward.FIELD for its fields, as diffalign train has them")
    parser.add_argument("--prompt", help="the prompt of all the pictures, for a reward that reads one")
    parser.add_argument("--image", metavar="FILE", help="the picture that was edited, for a reward that judges edits")
    words, own = split_fields(arguments)
    chosen = parser.parse_args(words)
    quiet()
    from diffalign.api import score_files
    from diffalign.config import reward_fields

    source = Path(chosen.image) if chosen.image else None
    fields = reward_fields(chosen.reward, own)
    for file, value in score_files(chosen.reward, [Path(f) for f in chosen.files], chosen.prompt, source, fields):
        print(f"{value:.6g}\t{file}")
    return 0
