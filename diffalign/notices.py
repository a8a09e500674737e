"""What the packages say that nobody asked for: loading bars, and notices of weights and of packages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def quiet(*, pipelines: bool = False) -> Iterator[None]:
    """Without transformers' bars and notices while the block runs, and where it loads `pipelines` without diffusers'. Nor with warnings
    that torch's functions, which they call, will change.

    What fails is an exception all the same: diffusers logs errors that it then works around, such as a model in .bin files.
    """
    with ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from transformers.utils import logging as of_transformers

        _silence(of_transformers, logging.ERROR, undo)
        if pipelines:
            from diffusers.utils import logging as of_diffusers  # only now: importing it gives notices of transformers'

            _silence(of_diffusers, logging.CRITICAL, undo)
        yield


def _silence(its: Any, level: int, undo: ExitStack) -> None:
    """Of one of the two packages, whose logging modules are alike; as it was when `undo` is closed."""
    undo.callback(its.set_verbosity, its.get_verbosity())
    if its.is_progress_bar_enabled():
        undo.callback(its.enable_progress_bar)
    its.set_verbosity(level)
    its.disable_progress_bar()
