"""`diffalign list`."""

from __future__ import annotations

from diffalign.commands.common import parser_of


def run(arguments: list[str]) -> int:
    parser = parser_of("list", "diffalign list rewards")
    parser.add_argument("what", choices=["methods", "rewards", "pipelines"])
    from diffalign.registry import installed, table

    rows = sorted(table(parser.parse_args(arguments).what).items())
    wide = max(len(name) for name, _ in rows)
    for name, entry in rows:
        missing = "" if installed(entry) else f"  (not installed: pip install 'diffalign[{entry.extra}]')"
        print(f"{name:{wide}}  {entry.facts:22}{entry.summary}{missing}")
    return 0
