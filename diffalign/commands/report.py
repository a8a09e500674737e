"""`diffalign report`."""

from __future__ import annotations

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser = parser_of("report", "diffalign report runs/NAME")
    parser.add_argument("run", help="the run folder, also of a run that is unfinished; the page is RUN/report.html")
    chosen = parser.parse_args(arguments)
    quiet()
    from diffalign.pages import write_report
    from diffalign.run import Run

    print(write_report(Run.open(chosen.run)))
    return 0
