"""`diffalign merge`."""

from __future__ import annotations

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser = parser_of("merge", "diffalign merge runs/clip runs/colour --weights 0.5 0.5 --output runs/both")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, of one model, each with a LoRA")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="of each run's update, in their order; of a single run 1")
    parser.add_argument(
        "--extrapolate", type=float, metavar="A", help="go on by A times the way from the base model: 1 is twice as far (ExPO)"
    )
    parser.add_argument(
        "--from", dest="origin", metavar="RUN", help="with --extrapolate: the way is from this run, not from the base model"
    )
    parser.add_argument("--rank", type=int, help="cut the LoRA to this rank; by default it has the sum of the runs' ranks, and is exact")
    parser.add_argument("--output", required=True, metavar="DIR", help="the new run's folder")
    chosen = parser.parse_args(arguments)
    quiet()
    from diffalign.console import say
    from diffalign.merging import merge

    runs, weights = chosen.runs, chosen.weights
    made = merge(runs, weights, output=chosen.output, extrapolate=chosen.extrapolate, origin=chosen.origin, rank=chosen.rank)
    say(f"Evaluate it: diffalign eval {made.path}")
    print(made.path)
    return 0
