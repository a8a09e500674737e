"""`diffalign train`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.commands.common import Parser, parser_of, plan_of, quiet
from diffalign.errors import InputError

if TYPE_CHECKING:
    from diffalign.hub import Push


def run(arguments: list[str]) -> int:
    quiet()
    arguments, to = _push_of(arguments)
    if any(argument.partition("=")[0] == "--resume" for argument in arguments):
        return _resume(arguments, to)
    resolved = plan_of(arguments, "train")
    if resolved is None:
        return 0
    from diffalign.session import start

    if to is not None and resolved[0].settings.tiny:
        raise InputError("--push-to-hub: a dry run trains a twin with random weights, and is not published. Drop it, or --tiny.")
    return _stoppable(lambda: start(*resolved), to)


def _resume(arguments: list[str], to: Push | None) -> int:
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

    return _stoppable(lambda: resume(chosen.resume, chosen.steps), to)


def _push_of(arguments: list[str]) -> tuple[list[str], Push | None]:
    """(the other words, where the run is to be pushed). That is no setting: who runs a run's config.yaml again has not asked for it."""
    parser = Parser("diffalign train", add_help=False, allow_abbrev=False)
    parser.add_argument("--push-to-hub", metavar="USER/REPO")
    parser.add_argument("--public", action="store_true")
    chosen, others = parser.parse_known_args(arguments)
    if chosen.push_to_hub is None:
        if chosen.public:
            raise InputError("--public says who may see what is pushed: add --push-to-hub USER/REPO, or drop it.")
        return others, None
    from diffalign.hub import Push

    return others, Push(chosen.push_to_hub, public=chosen.public)


def _stoppable(work: Callable[[], Any], to: Push | None) -> int:
    """Train, and push; of several processes the first one. Whether it may push is asked before, and what fails leaves the run whole."""
    import torch.distributed

    main, status = int(os.environ.get("RANK", "0")) == 0, 0
    if to is not None and main:
        from diffalign.hub import check_access

        check_access(to)

    from diffalign.console import say
    from diffalign.session import Stopped

    made = None
    try:
        made = work()
    except Stopped as stop:
        again = f" --push-to-hub {to.repo}{' --public' * to.public}" if to is not None else ""
        say(f"Stopped at step {stop.step}, saved. Go on: diffalign train --resume {stop.path}{again}")
        status = 128 + stop.signum
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if to is not None and made is not None and main:
        from diffalign.hub import upload

        try:
            address, notes = upload(made, to)
        except InputError as error:
            again = "" if "Push again: " in str(error) else f" Push it: {to.command(made.path)}"
            raise InputError(f"{error}{again}\nThe run is whole: {made.path}") from error
        for line in (*notes, f"Pushed: {address}"):
            say(line)
    return status
