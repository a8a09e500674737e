"""`diffalign train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.commands.common import parser_of, plan_of, quiet
from diffalign.errors import InputError


def run(arguments: list[str]) -> int:
    quiet()
    if any(argument.partition("=")[0] == "--resume" for argument in arguments):
        return _resume(arguments)
    resolved = plan_of(arguments, "train")
    if resolved is None:
        return 0
    from diffalign.session import start

    return _stoppable(lambda: start(*resolved))


def _resume(arguments: list[str]) -> int:
    if "--tiny" in arguments:
        raise InputError("--tiny: a dry run goes on as one without being told so, and no other run becomes one. Drop it.")
    parser = parser_of("train", "diffalign train --resume runs/NAME --steps 200")
    parser.add_argument("--resume", required=True, metavar="DIR", help="the run folder")
    parser.add_argument("--steps", type=int, help="another number of optimiser steps than the run's")
    chosen, others = parser.parse_known_args(arguments)
    if others:
        raise InputError(
            f"{others[0].partition('=')[0]}: a run that is resumed keeps its settings, but for --steps. With others, start a new one: "
            f"diffalign train --config {Path(chosen.resume) / 'config.yaml'} {' '.join(others)}"
        )
    from diffalign.session import resume

    return _stoppable(lambda: resume(chosen.resume, chosen.steps))


def _stoppable(work: Callable[[], Any]) -> int:
    import torch.distributed

    from diffalign.console import say
    from diffalign.session import Stopped

    status = 0
    try:
        work()
    except Stopped as stop:
        say(f"Stopped at step {stop.step}, saved. Go on: diffalign train --resume {stop.path}")
        status = 128 + stop.signum
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status
