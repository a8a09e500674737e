"""Several rewards in one: their sum, the worst of them, or their product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.contract import CheckedReward, judged
from diffalign.errors import InputError
from diffalign.parts import Moments, Part
from diffalign.types import LearnedReward, Modality, Prompts, ReadingReward, Reward, SoundReward, StatefulReward

Combine = Literal["sum", "min", "product"]
NEUTRAL = {"sum": 0.0, "min": float("inf"), "product": 1.0}  # what a part is to a prompt that it is not for


@dataclass(frozen=True)
class Compose:
    """`sum_k w_k s_k(r_k)`, `min_k w_k s_k(r_k)` or `prod_k s_k(r_k)^w_k` over the parts that are for the prompt.

    s_k is `diffalign.parts.Part.shaped`. A call changes nothing: running statistics move in `learn`, after a round.
    """

    parts: list[Any] = field(default_factory=list[Any])
    """The rewards: names, or mappings of a name with weight, normalise, at_least, at_most, when, ..., and the reward's own fields."""
    combine: Combine = "sum"
    """sum: weighted; min: the worst weighted part; product: of parts of 0 or more, the weights being exponents."""
    weights: list[float] | None = None
    """The parts' weights, in their order; by default each part's own, or 1."""

    moments: dict[str, Moments] = field(default_factory=dict[str, Moments], init=False, repr=False, compare=False)
    first: dict[str, Moments] = field(default_factory=dict[str, Moments], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError(
                "compose has no parts: name the rewards, --reward NAME NAME ..., or give them in a config file (reward: parts:)."
            )
        if not all(isinstance(part, Part) for part in self.parts):
            raise InputError("Compose takes parts that are made: diffalign.compose([...]) makes them from names, mappings and callables.")
        if self.weights is not None:
            raise InputError("Compose: parts that are made have their weights. diffalign.compose([...], weights=[...]) takes some.")
        labels = [part.label for part in self.parts]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise InputError(f"Two parts are called {twice}: give one of them another label, such as {{name: {twice}, label: {twice}-2}}.")
        self._check_alike()
        for part in self.parts:
            if self.combine in ("min", "product") and part.weight == 0:
                raise InputError(
                    f"The part {part.label} has the weight 0, which in a {self.combine} hides the others: give another, or drop it."
                )
            if self.combine == "product":
                self._check_factor(part)
        self.moments.update({part.label: Moments() for part in self.running})

    def _check_alike(self) -> None:
        """Raise InputError where parts judge different media, as far as that is known: a server's says so when it is opened."""
        kinds = {part.label: kind for part in self.parts if (kind := judged(part.reward)) is not None}
        if len(set(kinds.values())) > 1:
            said = ", ".join(f"{label} judges {kind}" for label, kind in kinds.items())
            raise InputError(f"The parts judge different things: {said}. One policy makes one of them.")

    @staticmethod
    def _check_factor(part: Part) -> None:
        if part.weight < 0:
            raise InputError(f"The part {part.label} has the weight {part.weight:g}: an exponent of a product is above 0.")
        if part.normalise == "running" or (part.bounded and part.threshold == "hinge"):
            what = "a hinge" if part.bounded else "a running z-score"
            raise InputError(
                f"The part {part.label} is {what}, which falls below 0, and a product takes parts of 0 or more: give normalise fixed, "
                "threshold step, or combine sum or min."
            )

    @property
    def differentiable(self) -> bool:
        """Whether all parts are; min and hinges have a gradient but where two sides meet."""
        return not self.still

    @property
    def still(self) -> list[str]:
        """The parts without a gradient."""
        return [part.label for part in self.parts if not part.differentiable]

    @property
    def told(self) -> bool:
        """Whether it is known what the parts judge, which is the same for all."""
        return any(judged(part.reward) is not None for part in self.parts)

    @property
    def weighted(self) -> list[Reward]:
        """The rewards of the parts whose weight is not 0."""
        return [part.reward for part in self.parts if part.weight]

    @property
    def modality(self) -> Modality:
        return next((part for part in self.parts if judged(part.reward) is not None), self.parts[0]).reward.modality

    @property
    def sample_rate(self) -> int | None:
        """Of sounds, Hz, where all parts want one rate; else None: each part's are brought to its own."""
        rates = {*self.rates.values()}
        return rates.pop() if len(rates) == 1 else None

    @property
    def rates(self) -> dict[str, int | None]:
        """Of sounds, Hz, those that the parts want, by label."""
        return {part.label: part.reward.sample_rate if isinstance(part.reward, SoundReward) else None for part in self.parts}

    @property
    def running(self) -> list[Part]:
        return [part for part in self.parts if part.normalise == "running"]

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Media and B prompts to (B,). InputError as `measure` and `total` have it."""
        return self.total(self.measure(media, prompts))

    def measure(self, media: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """Each part's raw scores (B,), by label: NaN for prompts that it is not for, with which it is not asked.

        Raises InputError for a prompt that no part is for, and where a part's answer is none.
        """
        self.check(prompts)
        raw: dict[str, Tensor] = {}
        for part in self.parts:
            rows = [row for row, applies in enumerate(part.applies(prompts)) if applies]
            ask = CheckedReward(part.reward, part.label)
            if len(rows) == len(prompts):
                raw[part.label] = ask(media, prompts)
                continue
            none = torch.full((len(prompts),), float("nan"), device=media.device)
            if rows:
                index = torch.tensor(rows, device=media.device)
                scores = ask(media[index], prompts[rows])
                none = none.to(scores.dtype).index_put((index,), scores)
            raw[part.label] = none
        return raw

    def check(self, prompts: Prompts, whole: bool = False) -> None:
        """Raise InputError for a prompt that no part is for; of the `whole` of a training's prompts also for a part that is for none."""
        per_part = [part.applies(prompts) for part in self.parts]
        idle = [part for part, applies in zip(self.parts, per_part, strict=True) if whole and not any(applies)]
        if idle:
            raise InputError(f"The part {idle[0].label} is for none of the {len(prompts):,} prompts: mend its 'when', {idle[0].when!r}.")
        for row, text in enumerate(prompts.text):
            if not any(applies[row] for applies in per_part):
                raise InputError(f"No part of the reward is for the prompt {text!r}: widen a 'when', or add a part without one.")

    def check_prompts(self, prompts: Prompts, seconds: float) -> None:
        """Raise InputError for a prompt that a part is for, and cannot read."""
        for part in self.parts:
            rows = [row for row, applies in enumerate(part.applies(prompts)) if applies]
            if rows and isinstance(part.reward, ReadingReward):
                part.reward.check_prompts(prompts[rows], seconds)

    def total(self, raw: Mapping[str, Tensor]) -> Tensor:
        """(B,) of what `measure` gave.

        Raises InputError where a running part has no statistics yet, and for a negative factor of a product, or one that is 0 where the
        gradient is infinite.
        """
        worth: list[Tensor] = []
        for part in self.parts:
            scores = raw[part.label]
            known = ~scores.isnan()
            if not known.any():
                worth.append(torch.full_like(scores, NEUTRAL[self.combine]))
                continue
            shaped = part.shaped(torch.where(known, scores, torch.ones_like(scores)), self._moments(part))
            value = self._power(part, shaped, known) if self.combine == "product" else part.weight * shaped
            worth.append(torch.where(known, value, torch.full_like(value, NEUTRAL[self.combine])))
        dtype = max((each.dtype for each in worth), key=lambda kind: kind.itemsize)
        stacked = torch.stack([each.to(dtype) for each in worth])
        match self.combine:
            case "sum":
                return stacked.sum(0)
            case "min":
                return stacked.amin(0)  # equal parts share the gradient
            case "product":
                return stacked.prod(0)

    def _moments(self, part: Part) -> Moments:
        if part.normalise != "running":
            return Moments()
        found = self.moments[part.label] if self.moments[part.label].count else self.first.get(part.label)
        if found is None:
            raise InputError(
                f"The part {part.label} is normalised by running statistics, and there are none before a training's first round: give "
                "normalise fixed with mean and std."
            )
        return found

    def _power(self, part: Part, shaped: Tensor, known: Tensor) -> Tensor:
        lowest = float(torch.where(known, shaped, torch.ones_like(shaped)).detach().min())
        if lowest < 0:
            raise InputError(
                f"The part {part.label} is {lowest:.4g}, and a product takes parts of 0 or more: combine sum or min, or shift it."
            )
        if lowest == 0 and part.weight < 1 and shaped.requires_grad:
            raise InputError(f"The part {part.label} is 0, where the power {part.weight:g} has no gradient: give it a weight of 1 or more.")
        return shaped.pow(part.weight)

    # --- running statistics ---

    @property
    def learns(self) -> bool:
        """Whether anything in it changes with what was scored."""
        return bool(self.running) or any(isinstance(part.reward, StatefulReward) and part.reward.learns for part in self.parts)

    @property
    def waits(self) -> bool:
        """Whether a running part has no statistics yet."""
        return any(not self.moments[part.label].count and part.label not in self.first for part in self.running)

    def presume(self, scores: Tensor) -> None:
        """Take the raw scores (N, parts) of a first batch for the statistics, until its round is learned."""
        for part, values in self._columns(scores):
            if values and not self.moments[part.label].count and part.label not in self.first:
                self.first[part.label] = Moments().after(values)

    def learn(self, scores: Tensor) -> None:
        """Add the raw scores (N, parts) of a round, of all processes; NaN where a part was not asked. Parts with a state learn too."""
        self.moments.update({part.label: self.moments[part.label].after(values) for part, values in self._columns(scores)})
        self.first.clear()
        for part, column in zip(self.parts, scores.unbind(1), strict=True):
            asked = column[~column.isnan()]
            if isinstance(part.reward, StatefulReward) and part.reward.learns and len(asked):
                part.reward.learn(asked)

    def _columns(self, scores: Tensor) -> list[tuple[Part, list[float]]]:
        columns = scores.double().cpu().unbind(1)
        pairs = zip(self.parts, columns, strict=True)
        return [(part, column[~column.isnan()].tolist()) for part, column in pairs if part.normalise == "running"]

    def state(self) -> dict[str, Any]:
        """Of each running part `statistics`: count, mean and sum of squares; and the state of those `parts` that have one."""
        stateful = {part.label: part.reward.state() for part in self.parts if isinstance(part.reward, StatefulReward)}
        return {"statistics": {label: [m.count, m.mean, m.squares] for label, m in self.moments.items()}, "parts": stateful}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state; raises InputError where it is of other parts."""
        mine = self.state()
        if any(state[kind].keys() != mine[kind].keys() for kind in mine):
            theirs, ours = ([label for kind in which.values() for label in kind] for which in (state, mine))
            raise InputError(f"The run has a state of {', '.join(theirs) or 'no part'}, and now {', '.join(ours) or 'no part'} has one.")
        self.moments.update({label: Moments(*values) for label, values in state["statistics"].items()})
        self.first.clear()
        for part in self.parts:
            if isinstance(part.reward, StatefulReward):
                part.reward.restore(state["parts"][part.label])

    # --- weights ---

    def open(self) -> None:
        """Load the weights of all parts. Raises InputError where some cannot be had."""
        for part in self.parts:
            CheckedReward(part.reward, part.label).open()
        self._check_alike()

    def tiny(self, folder: Path) -> Compose:
        """The same composition of twins, each in a folder of its own."""
        twins: list[Part] = []
        for number, part in enumerate(self.parts):
            (own := folder / str(number)).mkdir()
            twins.append(replace(part, reward=part.reward.tiny(own)) if isinstance(part.reward, LearnedReward) else part)
        return replace(self, parts=twins)
