"""`diffalign score`."""

from __future__ import annotations

from pathlib import Path

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser = parser_of("score", 'diffalign score --reward shapes-clip picture.png --prompt "a red circle"')
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures; for a reward of sound .wav files")
    parser.add_argument("--reward", required=True, metavar="NAME", help="with --reward.FIELD for its fields, as diffalign train has them")
    parser.add_argument("--prompt", help="the prompt of all the pictures, for a reward that reads one")
    parser.add_argument("--transcript", metavar="TEXT", help="what is said in all the sounds, for a reward of speech")
    parser.add_argument("--image", metavar="FILE", help="the picture that was edited, for a reward that judges edits")
    words, own = _split_fields(arguments)
    chosen = parser.parse_args(words)
    quiet()
    from diffalign.api import score_files
    from diffalign.config import reward_fields

    source = Path(chosen.image) if chosen.image else None
    fields = reward_fields(chosen.reward, own)
    files = [Path(f) for f in chosen.files]
    for file, value in score_files(chosen.reward, files, chosen.prompt, source, fields, chosen.transcript):
        print(f"{value:.6g}\t{file}")
    return 0


def _split_fields(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the other words, the words `--reward.FIELD value`)."""
    words, fields = list[str](), list[str]()
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        own = word.startswith("--reward.")
        (fields if own else words).append(word)
        if own and "=" not in word and waiting:
            fields.append(waiting.pop(0))
    return words, fields
