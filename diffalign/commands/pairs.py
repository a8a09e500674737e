"""`diffalign pairs`."""

from __future__ import annotations

from diffalign.commands.common import quiet


def run(arguments: list[str]) -> int:
    quiet()
    from diffalign import pairs
    from diffalign.composing import with_part_flags
    from diffalign.flags import help_of, normal, parse, value_of
    from diffalign.making import build_parser, settle

    arguments = with_part_flags(normal(arguments))
    parser = build_parser(value_of(arguments, "--pipeline") or "shapes", value_of(arguments, "--reward.name"))
    if {"-h", "--help"} & set(arguments):
        print(f"{help_of(parser)}\nexample: diffalign pairs --reward shapes-clip --pairs 1000 --output pairs/shapes")
        return 0
    settled = settle(parse(parser, lambda: parser.parse_args(arguments)))
    try:
        print(pairs.make(*settled))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted. What is made is kept: the same command goes on with {settled[-1]}.") from None
    return 0
