"""`diffalign doctor`."""

from __future__ import annotations

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser_of("doctor", "diffalign doctor").parse_args(arguments)
    quiet()
    from diffalign.doctor import report

    for line in report():
        print(line, flush=True)
    return 0
