"""The reward's contract, kept at the edge: what a callable says it is, and whether that is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.shards import everyone
from diffalign.sound import resample
from diffalign.types import (
    ALONE,
    ComposedReward,
    LearnedReward,
    Modality,
    Policy,
    Processes,
    Prompts,
    Reward,
    SoundReward,
    StatefulReward,
    ToldReward,
)


@dataclass(frozen=True)
class FunctionReward:
    """A function `(media, prompts) -> (B,)` as a reward."""

    function: Callable[[Tensor, Prompts], Any]
    differentiable: bool = False
    modality: Modality = "image"
    sample_rate: int | None = None

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        return self.function(media, prompts)


def reward(
    *, differentiable: bool, modality: Modality = "image", sample_rate: int | None = None
) -> Callable[[Callable[..., Any]], FunctionReward]:
    """Decorate `f(media, prompts) -> (B,)` to say whether gradients flow from its scores to its media.

    Images are float (B, 3, H, W) in [0, 1]. Of modality "audio" the media are float (B, samples) in [-1, 1], resampled to `sample_rate`
    (Hz); without one they are as the model makes them, at `prompts.sample_rate`. `prompts.text` holds the B prompts, `prompts.spoken` what
    is to be said; higher scores are better.
    """

    def declare(function: Callable[..., Any]) -> FunctionReward:
        return FunctionReward(function, differentiable, modality, sample_rate)

    return declare


def as_reward(thing: Any) -> Reward:
    """A reward object as it is; a bare callable as a reward without gradient."""
    if isinstance(thing, Reward) and not isinstance(thing, type):
        if thing.modality == "audio" and not isinstance(thing, SoundReward):
            raise InputError(
                f"{type(thing).__name__} judges sound, and does not say at which rate: give its class sample_rate = 16000 (Hz "
                "that it wants), or None where any will do."
            )
        if {"learn", "state", "restore"} <= {*dir(thing)} and not isinstance(thing, StatefulReward):
            raise InputError(
                f"{type(thing).__name__} keeps a state, and does not say whether what it scores moves its scale: give its class "
                "learns = True, or False where it does not."
            )
        _check_declared(thing)
        return thing
    if callable(thing) and not isinstance(thing, type):
        return FunctionReward(thing)
    raise InputError(f"{thing!r} is no reward: give a name, a callable (images, prompts) -> (B,), or an object with 'differentiable'.")


def _check_declared(thing: Any) -> None:
    """Raise InputError for media that there are not, and for a rate that is none."""
    modality, rate = thing.modality, thing.sample_rate if thing.modality == "audio" and isinstance(thing, SoundReward) else None
    if modality not in ("image", "audio"):
        raise InputError(f"{name_of(thing)} has the modality {modality!r}: give image or audio.")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int) or rate < 1):
        raise InputError(f"{name_of(thing)} has sample_rate {rate!r}: give a whole number of Hz, such as 16000, or None where any will do.")


def short_name(name: str) -> str:
    """What logs call a reward: the name itself, `red` for `some/file.py:red`, and `mine` for the folder `trained/mine`."""
    return name.rpartition(":")[2] if ".py:" in name else Path(name).absolute().name


def name_of(reward: Any) -> str:
    """What a reward object is called in logs: its function's or its class's name."""
    function = reward.function if isinstance(reward, FunctionReward) else reward
    return "compose" if isinstance(reward, ComposedReward) else getattr(function, "__name__", type(function).__name__)


def judged(reward: Reward) -> Modality | None:
    """What a reward judges; None where somebody else is to say so, and has not yet."""
    return None if isinstance(reward, ToldReward) and not reward.told else reward.modality


def check_modality(reward: Reward, name: str, made: Modality) -> None:
    """Raise InputError where a reward judges other media than are made; one that is still to be told what it judges passes."""
    if judged(reward) not in (None, made):
        what = {"image": "pictures", "audio": "sound"}
        plain = isinstance(reward, FunctionReward) and made == "audio"
        mend = ' Declare it: @diffalign.reward(differentiable=..., modality="audio", sample_rate=16000).' if plain else ""
        others = "" if plain else " Choose another: diffalign list rewards."
        raise InputError(f"{name} judges {what[reward.modality]}, and this pipeline makes {what[made]}.{mend}{others}")


def as_heard(reward: Reward, media: Tensor, prompts: Prompts) -> tuple[Tensor, Prompts]:
    """Sounds (B, samples), and their prompts, at the rate that the reward wants, differentiable; pictures as they are.

    Raises InputError where nobody says which rate they have.
    """
    wanted = reward.sample_rate if isinstance(reward, SoundReward) and reward.modality == "audio" else None
    if wanted is None or wanted == prompts.sample_rate:
        return media, prompts
    if prompts.sample_rate is None:
        raise InputError(f"These sounds are to be heard at {wanted} Hz, and their prompts do not say at which rate they are (sample_rate).")
    return resample(media, prompts.sample_rate, wanted), replace(prompts, sample_rate=wanted)


@dataclass
class CheckedReward:
    """A reward whose every answer is checked and counted. Same call; `queries` is the number of media it has scored.

    Sounds are brought to the rate that it wants; those of a composition to that of each part.

    `tiny`: where it has weights, it is opened as its twin with tiny random ones. `learners`: in a training, the processes whose scores a
    reward with state learns from after a round; elsewhere None, and its state stays. `noted`: the raw scores of a composition's parts, by
    part, one tensor a call, where someone wants them. Raises InputError where the reward fails, or its answer is no finite float tensor of
    shape (B,).
    """

    reward: Reward
    name: str
    queries: int = 0
    tiny: bool = False
    learners: Processes | None = None
    noted: dict[str, list[Tensor]] | None = None
    seen: list[Tensor] = field(default_factory=list[Tensor])  # of this round, of all learners

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    @property
    def modality(self) -> Modality:
        return self.reward.modality

    @property
    def sample_rate(self) -> int | None:
        """Of the sounds that it wants, Hz; None where any will do, and of pictures."""
        return self.reward.sample_rate if isinstance(self.reward, SoundReward) else None

    @property
    def hears(self) -> dict[int, list[str]]:
        """Who hears at which rate, Hz: the reward, or the parts of one whose parts differ."""
        rates = self.reward.rates if self.sample_rate is None and isinstance(self.reward, ComposedReward) else {self.name: self.sample_rate}
        known = sorted({rate for rate in rates.values() if rate is not None})
        return {rate: [name for name, its in rates.items() if its == rate] for rate in known}

    @property
    def learns(self) -> bool:
        """Whether its scale moves in a training: scores of two of its steps do not compare."""
        return isinstance(self.reward, StatefulReward) and self.reward.learns

    def open(self) -> None:
        """Load the weights of a reward that has some; raises InputError for what is wrong with them, before anything expensive is done."""
        reward = self.reward
        if not isinstance(reward, LearnedReward):
            return
        if not self.tiny:
            reward.open()
            return
        with TemporaryDirectory() as folder:
            self.reward, self.tiny = reward.tiny(Path(folder)), False
            self.open()

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            try:
                heard, asked = as_heard(self.reward, media if self.differentiable else media.detach(), prompts)
                # a copy: a reward that writes in place must not change what the next one sees
                scores: Any = self._scores(heard.clone(), asked)
            except InputError:
                raise
            except (Exception, SystemExit) as error:
                raise InputError(f"The reward {self.name} failed with {type(error).__name__}: {error}") from error
        expected = (len(prompts),)
        if not isinstance(scores, Tensor):
            raise InputError(f"The reward {self.name} returned a {type(scores).__name__}: return a tensor of shape {expected}.")
        if tuple(scores.shape) != expected:
            raise InputError(f"The reward {self.name} returned the shape {tuple(scores.shape)}: return {expected}, one score a sample.")
        if scores.is_complex():
            raise InputError(f"The reward {self.name} returned complex numbers: return real ones.")
        scores = scores.to(media.device, torch.promote_types(scores.dtype, torch.float32))
        if not scores.isfinite().all():
            bad = [f"{prompts.text[i]!r}: {scores[i].item()}" for i in (~scores.isfinite()).nonzero().flatten().tolist()]
            raise InputError(f"The reward {self.name} returned scores that are no numbers. The samples: {'; '.join(bad[:4])}.")
        if self.learners is not None and self.learns and not isinstance(self.reward, ComposedReward):
            self.seen.append(everyone(scores.detach(), self.learners, len(scores)))
        self.queries += len(scores)
        return scores

    def _scores(self, media: Tensor, prompts: Prompts) -> Any:
        """The reward's own answer; of a composition's parts what is noted and learned."""
        reward = self.reward
        if not isinstance(reward, ComposedReward):
            return reward(media, prompts)
        raw = reward.measure(media, prompts)
        if self.noted is not None:
            for name, scores in raw.items():
                self.noted.setdefault(name, []).append(scores.detach().cpu())
        if self.learners is not None and reward.learns:
            self.seen.append(everyone(torch.stack([scores.detach() for scores in raw.values()], 1), self.learners, len(prompts)))
            if reward.waits:
                reward.presume(self.seen[-1])
        return reward.total(raw)

    def end_round(self) -> None:
        """A reward with state learns from what it has scored since the last time."""
        if isinstance(self.reward, StatefulReward) and self.seen:
            self.reward.learn(torch.cat(self.seen))
        self.seen = []

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """While the block runs a reward with state works as in a training's first round, in this process alone, and forgets it again."""
        before, state = self.learners, self.reward.state() if isinstance(self.reward, StatefulReward) else None
        self.learners = ALONE
        try:
            yield
        finally:
            self.learners, self.seen = before, []
            if isinstance(self.reward, StatefulReward) and state is not None:
                self.reward.restore(state)

    def check_settled(self, what: str) -> None:
        """Raise InputError where `what`, which is no training, would need statistics that only a training has."""
        if isinstance(self.reward, ComposedReward) and self.reward.waits:
            raise InputError(
                f"{self.name}: a part is normalised by running statistics, which begin with a training, and {what}: give normalise fixed "
                "with mean and std, or none."
            )


def check_gradient(reward: Reward, name: str, policy: Policy, prompts: Prompts) -> None:
    """Hold a reward that says it is differentiable to its word, on media decoded from noise.

    Raises InputError where no gradient arrives at the media, or only zeros.
    """
    with torch.no_grad():
        media = policy.decode(policy.prior(policy.encode(prompts), torch.Generator().manual_seed(0)))
    media = media.detach().requires_grad_(True)
    with torch.enable_grad():
        checked = CheckedReward(reward, name)
        with checked.rehearsal():
            total = checked(media, prompts).sum()
        gradient = torch.autograd.grad(total, media, allow_unused=True)[0] if total.requires_grad else None
    cause = "none arrives" if gradient is None else "it is zero everywhere" if not gradient.any() else ""
    if gradient is not None and not gradient.isfinite().all():
        cause = "it holds NaN or infinity"
    if cause:
        looked_at = "sounds" if policy.modality == "audio" else "pictures"
        raise InputError(
            f"The reward {name} says it is differentiable, but of its gradient with respect to the {looked_at} {cause}. Look for detach(), "
            "no_grad(), rounding or numpy on its way, or declare differentiable=False and use a method that needs no gradient."
        )
