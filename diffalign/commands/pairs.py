"""`diffalign pairs`."""

from __future__ import annotations

from pathlib import Path

from diffalign.commands.common import Parser, quiet

FROM = "--from-labels"


def run(arguments: list[str]) -> int:
    quiet()
    if any(word == FROM or word.startswith(f"{FROM}=") for word in arguments):
        return _from_labels(arguments)
    from diffalign import pairs
    from diffalign.composing import with_part_flags
    from diffalign.flags import help_of, normal, parse, value_of
    from diffalign.making import build_parser, settle

    arguments = with_part_flags(normal(arguments))
    parser = build_parser(value_of(arguments, "--pipeline") or "shapes", value_of(arguments, "--reward.name"))
    if {"-h", "--help"} & set(arguments):
        print(f"{help_of(parser)}\nexample: diffalign pairs --reward shapes-clip --pairs 1000 --output pairs/shapes")
        print(f"from people: diffalign pairs {FROM} labels.sqlite --output pairs/people    (diffalign label)")
        return 0
    settled = settle(parse(parser, lambda: parser.parse_args(arguments)))
    try:
        print(pairs.make(*settled))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted. What is made is kept: the same command goes on with {settled[-1]}.") from None
    return 0


def _from_labels(arguments: list[str]) -> int:
    """The majority of what people said, as a folder."""
    parser = Parser("diffalign pairs", description="The pairs of people's answers.", allow_abbrev=False)
    parser.add_argument(FROM, required=True, metavar="FILE", help="the database of diffalign label")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    chosen = parser.parse_args(arguments)
    from diffalign.console import say
    from diffalign.label_export import export
    from diffalign.labels import Labels

    output = Path(chosen.output).expanduser()
    say(export(Labels.open(chosen.from_labels), output))
    print(output)
    return 0
