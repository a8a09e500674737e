"""The one exception that means "the input is wrong, and here is the mend"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what and how to mend it; the CLI exits with status 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the closest known word, or the sorted list of them all."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."
