"""One reward among several: which prompts it is for, how its raw score is made comparable, and the statistics that this takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from diffalign.errors import InputError
from diffalign.types import Prompts, Reward

Normalise = Literal["none", "fixed", "running"]
Threshold = Literal["hinge", "step"]
FLAT = 1e-6  # of the mean: a deviation below is rounding, and no scale


@dataclass(frozen=True)
class Moments:
    """How many numbers were seen, their mean, and the sum of their squared distances to it: Welford's, in float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def after(self, values: Iterable[float]) -> Moments:
        """The moments with these values too, one by one in their order."""
        count, mean, squares = self.count, self.mean, self.squares
        for value in values:
            count += 1
            distance = value - mean
            mean += distance / count
            squares += distance * (value - mean)
        return Moments(count, mean, squares)

    @property
    def scale(self) -> float:
        """The population's standard deviation; 1 where all values have been the same, but for rounding."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > FLAT * abs(self.mean) else 1.0


@dataclass(frozen=True)
class Part:
    """A reward and what of its raw scores r counts, `weight * s(r)`.

    Without a threshold `s(r) = (r - mean) / std`, with one a penalty, `s(r) = -(distance of r to [at_least, at_most]) / std`, or a step,
    `s(r) = 1` within and 0 outside.
    """

    reward: Reward
    label: str
    """What logs call the part; by default the reward's name."""
    weight: float = 1.0
    """Factor of what counts; in a product its exponent."""
    normalise: Normalise = "none"
    """none: mean 0 and std 1; fixed: those given; running: those of all the scores of the training's rounds so far."""
    mean: float | None = None
    """With fixed: of the raw scores; by default 0."""
    std: float | None = None
    """With fixed: of the raw scores."""
    at_least: float | None = None
    """The raw score counts only as far as it is below this."""
    at_most: float | None = None
    """The raw score counts only as far as it is above this."""
    threshold: Threshold = "hinge"
    """hinge: minus the distance to the bounds; step: 1 within them and 0 outside, which has no gradient."""
    when: str | dict[str, Any] | None = None
    """The part is for prompts in which this regular expression is found, or whose metadata have these values; by default for all."""

    def __post_init__(self) -> None:
        if not self.label.strip():
            raise InputError("The label of a part is empty: give a name, or leave it out.")
        for name in ("weight", "mean", "std", "at_least", "at_most"):
            value = vars(self)[name]
            if value is not None and not math.isfinite(value):
                raise self._error(f"{name} is {value}: give a finite number.")
        if self.normalise == "fixed" and not (self.std is not None and self.std > 0):
            raise self._error(f"std is {self.std}: normalise fixed wants the raw scores' standard deviation, a number above 0, and mean.")
        if self.normalise != "fixed" and (self.mean is not None or self.std is not None):
            raise self._error(f"mean and std are of normalise fixed, and normalise is {self.normalise}: drop them, or give fixed.")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise self._error(f"at_least {self.at_least:g} is above at_most {self.at_most:g}: no score is within.")
        if self.threshold == "step" and not self.bounded:
            raise self._error("threshold step: give at_least, at_most or both.")
        if self.threshold == "step" and self.normalise != "none":
            raise self._error("a step is 0 or 1, and is not normalised: drop normalise, or give threshold hinge.")
        if isinstance(self.when, str):
            try:
                re.compile(self.when)
            except re.error as error:
                raise self._error(f"when is {self.when!r}, which is no regular expression ({error}).") from error
        elif self.when is not None and not self.when:
            raise self._error("when is empty: give a regular expression, or metadata such as {style: photo}, or leave it out.")

    def _error(self, text: str) -> InputError:
        return InputError(f"The part {self.label}: {text}")

    @property
    def bounded(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable and not (self.bounded and self.threshold == "step")

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        return re.compile(self.when) if isinstance(self.when, str) else None

    def applies(self, prompts: Prompts) -> list[bool]:
        """Of each of the B prompts, whether the part is for it."""
        if self._pattern is not None:
            return [self._pattern.search(text) is not None for text in prompts.text]
        if isinstance(self.when, dict):
            wanted, rows = self.when.items(), prompts.metadata or ()
            if len(rows) < len(prompts):
                example = json.dumps({"prompt": "a dog", "metadata": self.when})
                raise self._error(f"when asks for metadata, which these prompts do not have: give a .jsonl file of lines such as {example}")
            return [all(key in row and row[key] == value for key, value in wanted) for row in rows]
        return [True] * len(prompts)

    def shaped(self, raw: Tensor, moments: Moments) -> Tensor:
        """s(r) of raw scores (B,), without the weight; `moments` are those of a running part. Statistics are constants to the gradient."""
        mean, std = (self.mean or 0.0, self.std or 1.0) if self.normalise == "fixed" else (moments.mean, moments.scale)
        if not self.bounded:
            return raw if self.normalise == "none" else (raw - mean) / std
        low, high = (-math.inf if self.at_least is None else self.at_least), (math.inf if self.at_most is None else self.at_most)
        if self.threshold == "step":
            return ((raw >= low) & (raw <= high)).to(raw)
        return ((raw - low).clamp(max=0) + (high - raw).clamp(max=0)) / (1.0 if self.normalise == "none" else std)


SHAPING = tuple(field.name for field in fields(Part) if field.name != "reward")


def recorded(part: Part) -> Mapping[str, Any]:
    """The part's own fields as a config file has them, but the reward: those that say something."""
    idle = {"threshold"} - ({"threshold"} if part.bounded else set())
    return {name: vars(part)[name] for name in SHAPING if vars(part)[name] is not None and name not in idle}
