"""Checks of a method's fields: what is wrong is an InputError that names the one field and says what to give; NaN passes none."""

from __future__ import annotations

import math
from typing import Any

from diffalign.errors import InputError


def check(method: Any, name: str, fits: bool, give: str) -> None:
    """Raise InputError, `method.<name> is <its value>: give <give>.`, unless its value fits."""
    if not fits:
        raise InputError(f"method.{name} is {vars(method)[name]}: give {give}.")


def at_least(method: Any, **least: int) -> None:
    """The named fields are finite, and no less than these numbers."""
    for name, bound in least.items():
        check(method, name, vars(method)[name] != math.inf, "a finite number")
        check(method, name, vars(method)[name] >= bound, f"{bound} or more")


def above_zero(method: Any, *names: str) -> None:
    for name in names:
        check(method, name, vars(method)[name] != math.inf, "a finite number")
        check(method, name, vars(method)[name] > 0, "a number above 0")


def zero_or_more(method: Any, *names: str) -> None:
    at_least(method, **dict.fromkeys(names, 0))


def share(method: Any, *names: str) -> None:
    for name in names:
        check(method, name, 0 <= vars(method)[name] <= 1, "a share from 0 to 1")


def finite(method: Any, *names: str) -> None:
    for name in names:
        check(method, name, math.isfinite(vars(method)[name]), "a finite number")
