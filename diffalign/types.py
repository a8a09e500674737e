"""The nouns of diffalign: plain, frozen, documented. Everything else is functions over them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

Modality = Literal["image", "audio"]
PromptField = Literal["image", "mask", "transcript"]  # of Prompts, besides the text
Index = slice | Sequence[int] | Tensor


@dataclass(frozen=True)
class Level:
    """Points on the noise path, `x_t = alpha x_0 + sigma noise`; every field float64 of shape (n,), on the CPU.

    `t` is what the network is told (a diffusers timestep), `alpha` and `sigma` scale signal and noise.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: int | Index) -> Level:
        """Slice, or with an int the single level as shape (1,): it broadcasts over a batch."""
        index = [index] if isinstance(index, int) else index
        return Level(self.t[index], self.alpha[index], self.sigma[index])


class Schedule(NamedTuple):
    """The transitions of a sampler, noisy to clean: step i goes from `now[i]` to `then[i]`; both of length T.

    With leading or trailing spacing `then[i]` is `now[i + 1]`. With linspace spacing diffusers' DDIM lands beside the next
    timestep instead, and so do we.
    """

    now: Level
    then: Level


@dataclass(frozen=True)
class Prompts:
    """A batch of what users ask for. `text` has one entry a sample; the other fields are for tasks that have them."""

    text: tuple[str, ...]
    image: Tensor | None = None  # (B, 3, H, W) in [0, 1]: the picture to edit
    mask: Tensor | None = None  # (B, 1, H, W), 1 where the picture is to be made anew
    transcript: tuple[str, ...] | None = None  # what is to be said, where the text says how
    sample_rate: int | None = None  # of the sound that answers, Hz
    metadata: tuple[Mapping[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("text", "transcript"):
            value = vars(self)[name]
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.transcript is not None and len(self.transcript) != len(self.text):
            raise ValueError(f"{len(self.text)} texts and {len(self.transcript)} transcripts.")

    def __len__(self) -> int:
        return len(self.text)

    @property
    def keys(self) -> tuple[str, ...]:
        """What tells prompts apart, in every process and run alike: the text, the transcript where there is one, and digests of the picture
        and the mask where there are."""
        pictures = [x.detach().float().cpu().contiguous().numpy() for x in (self.image, self.mask) if x is not None]
        digests = [[hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows] for rows in pictures]
        spoken = [] if self.transcript is None else [self.transcript]
        return tuple("\0".join(parts) for parts in zip(self.text, *spoken, *digests, strict=True))

    @property
    def spoken(self) -> tuple[str, ...]:
        """What is to be said: the transcripts; of a model that says the text itself, the texts."""
        return self.text if self.transcript is None else self.transcript

    def __getitem__(self, index: Index) -> Prompts:
        at = range(len(self))[index] if isinstance(index, slice) else [int(i) for i in index]
        return Prompts(
            text=tuple(self.text[i] for i in at),
            image=None if self.image is None else self.image[list(at)],
            mask=None if self.mask is None else self.mask[list(at)],
            transcript=None if self.transcript is None else tuple(self.transcript[i] for i in at),
            sample_rate=self.sample_rate,
            metadata=None if self.metadata is None else tuple(self.metadata[i] for i in at),
        )

    @staticmethod
    def join(parts: Sequence[Prompts]) -> Prompts:
        """One batch of several, in their order. All have the same fields."""
        first = parts[0]
        return Prompts(
            tuple(text for part in parts for text in part.text),
            None if first.image is None else torch.cat([part.image for part in parts if part.image is not None]),
            None if first.mask is None else torch.cat([part.mask for part in parts if part.mask is not None]),
            None if first.transcript is None else tuple(said for part in parts for said in part.transcript or ()),
            first.sample_rate,
            None if first.metadata is None else tuple(m for part in parts for m in part.metadata or ()),
        )


def says(text: str, transcript: str) -> bool:
    """Whether the transcript stands in the text, in whole words: "go" not in "gone". Writing without blanks or case, such as Chinese, has
    its words anywhere."""
    text, said = (" ".join(words.lower().split()) for words in (text, transcript))

    def apart(before: str, after: str) -> bool:
        return not all(c.isalnum() and unicodedata.category(c) != "Lo" for c in (before[-1:], after[:1]))

    starts = [i for i in range(len(text) - len(said) + 1) if text.startswith(said, i)]
    return any(apart(text[:i], said) and apart(said, text[i + len(said) :]) for i in starts)


@dataclass(frozen=True)
class Condition:
    """What the network is conditioned on: tensors whose first axis is the batch.

    `null` is the unconditional branch of classifier-free guidance (same names and shapes), None where there is no guidance.
    """

    tensors: Mapping[str, Tensor]
    null: Mapping[str, Tensor] | None = None
    guidance_scale: float = 1.0

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Index) -> Condition:
        there: dict[torch.device, Tensor] = {}  # the index where tensors are: some lie on the CPU beside others on a GPU

        def rows(x: Tensor) -> Tensor:
            if not isinstance(index, Tensor):
                return x[index]
            if x.device not in there:
                there[x.device] = index.to(x.device)
            return x[there[x.device]]

        null = None if self.null is None else {k: rows(v) for k, v in self.null.items()}
        return Condition({k: rows(v) for k, v in self.tensors.items()}, null, self.guidance_scale)

    def unguided(self) -> Condition:
        """The same without the null branch: one network call, no guidance."""
        return Condition(self.tensors)

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """One batch of several, in their order. All have the same names, and guidance or not."""
        first = parts[0]
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors}
        null = None if first.null is None else {name: torch.cat([(part.null or {})[name] for part in parts]) for name in first.null}
        return Condition(tensors, null, first.guidance_scale)


@dataclass(frozen=True)
class Trajectory:
    """What a rollout of N steps leaves: `states` (N+1, B, *latent) noisy to clean, `log_probs` (N, B), its levels and condition.

    `actions` (N,) says which steps were random: a step with std 0 is no action, its log-probability is 0 and means nothing. The
    log-probabilities are of the sampling policy; for a gradient, replay the steps with `transition`.
    """

    states: Tensor
    log_probs: Tensor
    actions: Tensor
    schedule: Schedule
    condition: Condition

    @property
    def final(self) -> Tensor:
        """(B, *latent): x_0, or x_t where the rollout stopped early."""
        return self.states[-1]


Data = Literal["pairs", "trajectories", "labels", "ratings", "edits", "pictures"]  # ratings: of rewards, no method takes them


@dataclass(frozen=True)
class Taken:
    """How stored trajectories of T steps came about: the steps' levels, which of them were random (T,), DDIM's eta, and the guidance."""

    schedule: Schedule
    actions: Tensor
    eta: float
    guidance_scale: float

    def same_as(self, other: Taken) -> bool:
        """Whether both can be in one batch."""
        levels = [torch.stack([getattr(level, name) for level in t.schedule for name in ("t", "alpha", "sigma")]) for t in (self, other)]
        alike = torch.equal(*levels) and torch.equal(self.actions, other.actions)
        return alike and (self.eta, self.guidance_scale) == (other.eta, other.guidance_scale)


@dataclass(frozen=True)
class Examples:
    """A batch of data that exists: what `prompts` ask for, and x_0 (B, *latent) of media that answer them.

    Pairs: `x_0` was preferred to `rejected`, both of the same prompt. Trajectories: pairs too, `x_0` and `rejected` being all states of
    the two samples, (B, T+1, *latent) noisy to clean, which were `taken` so. Labels: `desirable` (B,) bool. Edits: `prompts.image` is
    what was edited. Pictures: nothing more. `scores` (B,) are the run's reward of the media, where the data was scored.
    """

    prompts: Prompts
    x_0: Tensor
    rejected: Tensor | None = None
    desirable: Tensor | None = None
    scores: Tensor | None = None
    taken: Taken | None = None

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Loss:
    """One micro-batch's loss. `value` is a scalar with a graph; `metrics` are logged; `update`: it completes an optimiser step.

    Gradients are averaged over the processes; each yields as many losses with `update`.
    """

    value: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict[str, Tensor | float])
    update: bool = True


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without, checked before any model loads.

    `data_role` says what the data is to it: it trains on data `only`; where some is given, `besides` prompts and a reward; or `instead`
    of them. `split_by` are its fields that count batches, or `accumulate`: when batches are made n times smaller, an optimiser step is
    the same with n times as many. Empty where it is not, or nobody says so. `in_step`: every process calls the network equally often, with
    and without a gradient, whatever its samples are: what weights that are shared out (`--fsdp`) want.
    """

    reward: bool = True
    differentiable_reward: bool = False
    data: Data | None = None
    data_role: Literal["only", "besides", "instead"] = "only"
    modality: Modality | None = None
    split_by: tuple[str, ...] = ()
    in_step: bool = False


class Processes(Protocol):
    """The few collectives that a method may need; single-process versions are identities."""

    @property
    def count(self) -> int: ...
    @property
    def rank(self) -> int: ...
    def gather(self, x: Tensor) -> Tensor: ...  # (B, ...) -> (B of all processes, ...)


@dataclass(frozen=True)
class Alone:
    """The collectives of a single process."""

    count: int = 1
    rank: int = 0

    def gather(self, x: Tensor) -> Tensor:
        return x


ALONE = Alone()


@dataclass
class Context:
    """What a method may touch besides policy, reward and batch.

    `rng` is the run's own generator, on the CPU, of the same state in every process: rows of a batch are drawn with `draw_noise` or
    `diffalign.shards.draw_rows`, which give each process its own. `more` gives the next batch of the run's stream, for methods that want
    several at once; `examples` the next one of the data of a method that trains on prompts and takes data besides. `memory` is named
    state that lives through the training and is saved in checkpoints: tensors, numbers, strings, and lists and dicts of those. It must
    be the same in every process.
    """

    rng: Generator
    processes: Processes = ALONE
    more: Callable[[], Any] | None = None
    examples: Callable[[], Examples] | None = None
    memory: dict[str, Any] = field(default_factory=dict[str, Any])
    step: int = 0

    def batches(self, first: Any, count: int) -> list[Any]:
        """`first` and the `count - 1` batches after it."""
        if count > 1 and self.more is None:
            raise ValueError("This context has no stream to take more batches from.")
        return [first, *(self.more() for _ in range(count - 1) if self.more is not None)]


class NoisePath(Protocol):
    """The noise path and its parametrisation."""

    def schedule(self, steps: int) -> Schedule: ...
    def draw(self, n: int, rng: Generator | None = None) -> Level: ...
    def target(self, x_0: Tensor, noise: Tensor, at: Level) -> Tensor: ...
    def split(self, prediction: Tensor, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class Policy(Protocol):
    """A network on a noise path: what `transition`, `rollout` and the methods need of a pipeline."""

    @property
    def modality(self) -> Modality: ...
    @property
    def path(self) -> NoisePath: ...
    @property
    def module(self) -> nn.Module: ...  # what trains

    def encode(self, prompts: Prompts) -> Condition: ...
    def prior(self, condition: Condition, rng: Generator | None = None) -> Tensor: ...
    def predict(self, x_t: Tensor, at: Level, condition: Condition) -> Tensor: ...
    def decode(self, x_0: Tensor) -> Tensor: ...
    def embed(self, media: Tensor) -> Tensor: ...
    def reference(self) -> AbstractContextManager[None]: ...
    def save(self, folder: Path) -> None: ...  # what plain diffusers loads


@runtime_checkable
class PicturePolicy(Policy, Protocol):
    """A policy of pictures of `height` x `width` pixels, whose prompts come with those that it `takes`: none, a picture, a mask too."""

    height: int
    width: int

    @property
    def takes(self) -> tuple[PromptField, ...]: ...


@runtime_checkable
class SoundPolicy(Policy, Protocol):
    """A policy of sounds of `samples` samples at `sample_rate` Hz, whose prompts come with what it takes: nothing, or a transcript.

    `media` are float (B, samples) in [-1, 1]. `unspeakable` says why a transcript cannot be said, of a policy that takes none a text;
    None where it can, and where texts are not said.
    """

    sample_rate: int
    samples: int

    @property
    def takes(self) -> tuple[PromptField, ...]: ...
    def unspeakable(self, transcript: str) -> str | None: ...


@runtime_checkable
class DroppingPolicy(Policy, Protocol):
    """A policy that says what a prompt's tensors become where training leaves the text out, in `rows`, bool (B,).

    `dropped` None, or none at all: those of the empty text.
    """

    @property
    def dropped(self) -> Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]] | None: ...


@runtime_checkable
class EditingPolicy(PicturePolicy, Protocol):
    """A policy that edits pictures, and is trained without them too."""

    def blind(self, condition: Condition, rows: Tensor) -> Condition: ...  # no picture in `rows`, bool (B,)


@runtime_checkable
class Reward(Protocol):
    """`(media, prompts) -> (B,)`, higher is better. Images are float (B, 3, H, W) in [0, 1], sounds float (B, samples) in [-1, 1]."""

    @property
    def differentiable(self) -> bool: ...
    @property
    def modality(self) -> Modality: ...

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor: ...


@runtime_checkable
class SoundReward(Reward, Protocol):
    """A reward of sounds, which are brought to its `sample_rate` (Hz) before it is called; None: as they are, `prompts.sample_rate`."""

    @property
    def sample_rate(self) -> int | None: ...


@runtime_checkable
class ToldReward(Reward, Protocol):
    """A reward that somebody else says what it judges, such as a server: until it is `told`, its modality and rate are none to go by."""

    @property
    def told(self) -> bool: ...


@runtime_checkable
class LearnedReward(Reward, Protocol):
    """A reward with weights that it loads: `open` does so now rather than at the first call, and raises InputError where it cannot.

    `tiny` is its twin, of the same class and fields: random weights of some megabytes, written into a folder as the real ones lie on
    disk, and read by the same code. Tests and dry runs use it; its scores mean nothing.
    """

    def open(self) -> None: ...
    def tiny(self, folder: Path) -> Reward: ...


@runtime_checkable
class ReadingReward(Reward, Protocol):
    """A reward that cannot judge every prompt: `check_prompts` raises InputError for one that it cannot, of sounds of so many seconds, once
    it is open."""

    def check_prompts(self, prompts: Prompts, seconds: float) -> None: ...


@runtime_checkable
class StatefulReward(Reward, Protocol):
    """A reward that changes with what it has scored in a training. A call changes nothing, so an evaluation is of one state: `learn` does.

    After each round of the training it is handed the scores (N,) of that round, of all processes in a single process's order, and so is
    the same in each; a ComposedReward the raw scores (N, parts), NaN where a part was not asked. `learns` says whether they move its
    scale: scores of two of a training's steps do not compare then, and where not it is handed none. `state` is what a checkpoint holds:
    tensors, numbers, strings, and lists and dicts of those; `restore` goes back to it.
    """

    @property
    def learns(self) -> bool: ...
    def learn(self, scores: Tensor) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class ComposedReward(Reward, Protocol):
    """A reward of several parts: `total(measure(media, prompts))` is its call; `measure` gives each part's raw scores, (B,), by name.

    `learns` says whether a part of it does, or a running statistic moves, `waits` that statistics are lacking before `total` can be;
    `presume` takes the first raw scores (N, parts) for them. `rates` are those of sounds that each part wants, Hz, by name. `check` raises
    InputError for a prompt that no part is for, and of a training's `whole` prompts for a part that is for none; `still` are the parts
    without a gradient, `weighted` the rewards whose weight is not 0.
    """

    @property
    def still(self) -> list[str]: ...
    @property
    def learns(self) -> bool: ...
    @property
    def waits(self) -> bool: ...
    @property
    def weighted(self) -> Sequence[Reward]: ...
    @property
    def rates(self) -> Mapping[str, int | None]: ...

    def measure(self, media: Tensor, prompts: Prompts) -> dict[str, Tensor]: ...
    def total(self, raw: Mapping[str, Tensor]) -> Tensor: ...
    def check(self, prompts: Prompts, whole: bool = False) -> None: ...
    def presume(self, scores: Tensor) -> None: ...


class Method(Protocol):
    """A frozen dataclass whose fields are its hyperparameters; `losses` yields what the loop goes down.

    `batch` is what the method trains on: Prompts, or Examples where it needs data. `reward` is None only where it needs none.
    """

    needs: ClassVar[Needs]
    defaults: ClassVar[Mapping[str, Any]]  # settings of the loop that the method's paper or code recommends

    def losses(self, policy: Policy, reward: Any, batch: Any, context: Context) -> Iterator[Loss]: ...
