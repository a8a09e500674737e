"""`diffalign compare`."""

from __future__ import annotations

from pathlib import Path

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser = parser_of("compare", "diffalign compare runs/draft-1 runs/ddpo-1")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--output", default="compare", help="folder of compare.html, compare.json and compare.png; by default compare")
    parser.add_argument("--limit", type=int, default=32, help="held-out prompts for KL and diversity, by default 32; 0 leaves them out")
    chosen = parser.parse_args(arguments)
    quiet()
    from diffalign.compare import compare_runs, write
    from diffalign.console import runs_table, say, show

    compared = compare_runs(chosen.runs, chosen.limit)
    files = write(compared, Path(chosen.output).expanduser())
    show(runs_table(compared["runs"]))
    for line in (*compared["notes"], f"Written: {', '.join(map(str, files))}"):
        say(line)
    return 0
