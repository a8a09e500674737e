"""`diffalign eval`."""

from __future__ import annotations

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser = parser_of("eval", "diffalign eval runs/NAME --reward shapes-checker jpeg-compressibility --prompts prompts.txt")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--reward", nargs="+", metavar="NAME", help="by default the run's")
    parser.add_argument("--prompts", help="a prompt file; by default the run's held-out prompts")
    parser.add_argument("--limit", type=int, help="use so many prompts; by default the run's eval_size")
    parser.add_argument("--draws", type=int, help="samples of each prompt; by default the run's eval_draws")
    parser.add_argument("--seed", type=int, help="of the noise; by default the run's seed + 1, as at the end of its training")
    parser.add_argument("--output", help="where to write; by default RUN/eval.json")
    chosen = parser.parse_args(arguments)
    quiet()
    from diffalign.api import evaluate_run
    from diffalign.console import comparison, show
    from diffalign.run import Run

    given = (chosen.reward, chosen.prompts, chosen.limit, chosen.seed, chosen.output, chosen.draws)
    show(comparison(evaluate_run(Run.open(chosen.run), *given)))
    return 0
