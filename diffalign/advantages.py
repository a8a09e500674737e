"""Advantages: rewards made comparable, over the samples of all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.shards import everyone, own
from diffalign.types import Context

Kind = Literal["global", "per_prompt", "group", "group_global", "loo", "greedy", "none"]


def advantages(
    kind: Kind,
    scores: Tensor,
    keys: Sequence[str],
    context: Context,
    *,
    size: int | None = None,
    greedy: Tensor | None = None,
    clip: float = 5.0,
    buffer: int = 32,
    least: int = 16,
    epsilon: float = 1e-6,
) -> Tensor:
    """(N,) advantages of a round's scores (N,) for its prompts (N,), clipped to +-clip; fp32 or better, on the scores' device.

    Prompts are told apart by their `keys` (`Prompts.keys`). `size` is the batch of a process, where the round has several of them: with it
    scores are remembered in a single process's order.

    - `global`: `(r - mean) / (std + epsilon)` over the round
    - `per_prompt`: the same over the last `buffer` scores of the prompt, this round's included; over the round until there are `least`
      (DDPO, arXiv 2305.13301, and its public code)
    - `group`: the same over the prompt's samples in this round; 0 where all are equal (GRPO, arXiv 2402.03300)
    - `group_global`: r minus the mean of the prompt's samples, over the deviation of the whole round (Flow-GRPO, arXiv 2505.05470, and its
      public code)
    - `loo`: r minus the mean of the prompt's other samples in this round (RLOO, arXiv 2402.14740)
    - `none`: r itself, which is not clipped (DLPO, arXiv 2405.14632)
    - `greedy`: r minus `greedy` (N,), the scores of the deterministic samples (ReMax, arXiv 2310.10505)

    std is the population's. Statistics are over all processes, N being the same in each: every process must call. `per_prompt` keeps its
    scores in `context.memory["prompt_scores"]`, the same in every process.

    Raises InputError where `group`, `group_global` or `loo` finds a single sample of a prompt, where `least` is not from 1 to `buffer`;
    ValueError for scores that are not finite (in every process) or not (N,), for `greedy` without greedy scores, and for another kind.
    """
    if scores.shape != (len(keys),) or (greedy is not None and greedy.shape != scores.shape):
        shapes = tuple(scores.shape), None if greedy is None else tuple(greedy.shape)
        raise ValueError(f"advantages: scores and greedy scores of shapes {shapes} for {len(keys)} prompts; both are (N,).")
    if not 1 <= least <= buffer:
        raise InputError(f"{least} scores of a prompt are to be seen, of {buffer} that are kept: give 1 to {buffer}.")
    mine = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    if kind == "greedy":
        if greedy is None:
            raise ValueError("advantages: kind 'greedy' needs the greedy samples' scores.")
        mine = mine - greedy.detach().to(mine)

    # in float64, where the mean of equal fp32 scores is that score and leaves no rounding for a small epsilon to blow up; and on the
    # CPU, since not every accelerator has float64, nor sums in the same order each time
    size = len(scores) if size is None else size
    every = everyone(mine, context.processes, size).cpu().double()
    if not bool(every.isfinite().all()):
        raise ValueError(f"advantages: {int((~every.isfinite()).sum())} of {len(every)} scores are not finite.")
    texts = everyone(torch.tensor([_hash(key) for key in keys], device=mine.device), context.processes, size).cpu()
    match kind:
        case "none":
            return mine
        case "greedy":
            values = every
        case "global":
            values = _standardised(every, *_moments(every, torch.zeros_like(texts)), epsilon)
        case "per_prompt":
            values = _standardised(every, *_running_moments(every, texts, context, buffer, least), epsilon)
        case "group":
            values = _standardised(every, *_moments(every, _groups(kind, texts)[0]), epsilon)
        case "group_global":
            mean, _ = _moments(every, _groups(kind, texts)[0])
            _, std = _moments(every, torch.zeros_like(texts))
            values = _standardised(every, mean, std, epsilon)
        case "loo":
            group, members = _groups(kind, texts)
            mean, _ = _moments(every, group)
            values = (every - mean) * (members / (members - 1))  # r - (sum - r) / (k - 1)
        case _:
            raise ValueError(f"advantages: kind is {kind!r}; give one of {', '.join(map(repr, get_args(Kind)))}.")
    return own(values, context.processes, size).clamp(-clip, clip).to(mine)


def _hash(text: str) -> int:
    """63 bits, the same in every process and run, which Python's own hash is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _standardised(x: Tensor, mean: Tensor, std: Tensor, epsilon: float) -> Tensor:
    return (x - mean) / (std + epsilon)


def _groups(kind: Kind, texts: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) numbers of the prompts, and (N,) how many samples each one's prompt has: two or more."""
    _, group, sizes = texts.unique(return_inverse=True, return_counts=True)
    alone = int((sizes == 1).sum())
    if alone:
        raise InputError(
            f"'{kind}' advantages compare the samples of a prompt, and {alone} of this round's {len(sizes)} prompts have one sample: "
            "take at least two (--method.samples 2)."
        )
    return group, sizes[group]


def _moments(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the population's std of each row's group, (N,) both."""
    n = int(group.max()) + 1
    size = torch.bincount(group, minlength=n)
    mean = x.new_zeros(n).index_add(0, group, x) / size
    variance = x.new_zeros(n).index_add(0, group, (x - mean[group]) ** 2) / size
    return mean[group], variance.sqrt()[group]


def _running_moments(x: Tensor, texts: Tensor, context: Context, buffer: int, least: int) -> tuple[Tensor, Tensor]:
    """`_moments` of what the prompts' buffers hold after this round; of the round itself for a prompt with fewer than `least`."""
    kept: dict[str, list[float]] = context.memory.setdefault("prompt_scores", {})
    ids, group = texts.unique(return_inverse=True)
    keys = [str(i) for i in ids.tolist()]
    for row, score in zip(group.tolist(), x.tolist(), strict=True):
        kept.setdefault(keys[row], []).append(score)
    for key in keys:
        del kept[key][:-buffer]
    lengths = torch.tensor([len(kept[key]) for key in keys])
    held = torch.tensor([score for key in keys for score in kept[key]], dtype=x.dtype)
    mean, std = _moments(held, torch.arange(len(keys)).repeat_interleave(lengths))
    last = (lengths.cumsum(0) - 1)[group]  # any entry of the prompt's buffer: they all carry its moments
    known = (lengths >= least)[group]
    of_round = _moments(x, torch.zeros_like(texts))
    return torch.where(known, mean[last], of_round[0]), torch.where(known, std[last], of_round[1])
