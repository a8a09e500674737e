"""Held-out evaluation: the same prompts and the same noise for the base model and the trained one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from diffalign import sound
from diffalign.contract import CheckedReward
from diffalign.data import PicturePrompt, Prompt, batch_of, caption_of, text_of
from diffalign.media import fit, grid
from diffalign.objectives.preference import denoising_margin, wins
from diffalign.sampling import ddim, noisy, paired_errors, rollout, transition
from diffalign.streams import Source
from diffalign.types import Condition, Policy

PICTURES = 8  # of the held-out prompts that a run shows: the columns of its sheets


@torch.no_grad()
def sample(policy: Policy, prompts: Sequence[Prompt], *, steps: int, seed: int, batch_size: int, suffix: str = "") -> Tensor:
    """Media of the prompts, deterministic given `seed`: images (B, 3, H, W) in [0, 1] or sounds (B, samples) in [-1, 1], on the CPU.
    `suffix` is added to every prompt.

    All the noise is drawn first, so that it does not depend on the batch size.
    """
    slices = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    batches = [batch_of(prompts[part], policy) for part in slices]
    condition = Condition.join([policy.encode(replace(b, text=tuple(text + suffix for text in b.text))) for b in batches])
    noise = policy.prior(condition, Generator().manual_seed(seed))
    parts: list[Tensor] = []
    for part in slices:
        final = rollout(policy, condition[part], steps=steps, kernel=ddim(0.0), start=noise[part]).final
        parts.append(policy.decode(final).cpu())
    return torch.cat(parts)


def bootstrap(differences: NDArray[np.float64], seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """The 95% percentile interval of the mean of paired differences (n,)."""
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@torch.no_grad()
def score(reward: CheckedReward, media: Tensor, prompts: Sequence[Prompt], policy: Policy, *, batch_size: int) -> NDArray[np.float64]:
    """(B,) scores of media that lie on the CPU, computed in batches on the policy's device."""
    device, slices = next(policy.module.parameters()).device, [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    parts = [reward(media[part].to(device), batch_of(prompts[part], policy)) for part in slices]
    return torch.cat(parts).double().cpu().numpy()


def score_parts(
    reward: CheckedReward, media: Tensor, prompts: Sequence[Prompt], policy: Policy, *, batch_size: int
) -> dict[str, NDArray[np.float64]]:
    """`score` by the reward's name; of a composed reward also the raw scores of its parts that are for some of the prompts, `NAME/PART`.

    NaN where a part is not for the prompt.
    """
    reward.noted = {}
    found = {reward.name: score(reward, media, prompts, policy, batch_size=batch_size)}
    parts = {f"{reward.name}/{part}": torch.cat(calls).double().numpy() for part, calls in reward.noted.items()}
    reward.noted = None
    return found | {name: scores for name, scores in parts.items() if not np.isnan(scores).all()}


def compare(before: NDArray[np.float64], after: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """Means, the paired difference with its 95% interval, and how often the trained model wins (a tie counts half)."""
    difference = after - before
    low, high = bootstrap(difference, seed)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": float(difference.mean()),
        "interval": [low, high],
        "win_rate": float(((difference > 0) + 0.5 * (difference == 0)).mean()),
    }


def evaluate(
    policy: Policy,
    rewards: Sequence[CheckedReward],
    prompts: Sequence[Prompt],
    *,
    steps: int,
    seed: int,
    batch_size: int,
    suffix: str = "",
    draws: int = 1,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """`(results, media before, media after)` on held-out prompts; results hold one comparison for each reward, by name.

    Each prompt is sampled `draws` times, and what is compared are the means of its scores: the interval is over prompts. The media are
    those of the first draw.

    The parts of a composed one follow it, as `NAME/PART`: their raw scores, on the `prompts` that they are for, where those are fewer.
    `suffix` is added to the trained model's prompts; the rewards do not see it.
    """
    drawn = list(prompts) * draws
    after = sample(policy, drawn, steps=steps, seed=seed, batch_size=batch_size, suffix=suffix)
    with policy.reference():
        before = sample(policy, drawn, steps=steps, seed=seed, batch_size=batch_size)

    table: dict[str, dict[str, Any]] = {}
    for reward in rewards:
        pairs = [score_parts(reward, media, drawn, policy, batch_size=batch_size) for media in (before, after)]
        for name in pairs[0]:
            old, new = (scores[name].reshape(draws, len(prompts)).mean(0) for scores in pairs)
            known = ~np.isnan(old)
            table[name] = compare(old[known], new[known], seed) | ({} if known.all() else {"prompts": int(known.sum())})
    return (
        {"prompts": len(prompts), "draws": draws, "denoising_steps": steps, "seed": seed, "rewards": table},
        before[: len(prompts)],
        after[: len(prompts)],
    )


def sheet(rows: Sequence[tuple[str, Tensor]], prompts: Sequence[Prompt], sample_rate: int | None = None) -> Image.Image:
    """Rows of pictures under their prompts, as `media.grid` has them; above them the pictures that were edited, where there are some,
    grey where they were masked. Of sounds, (B, samples) at `sample_rate`, the mel spectrograms."""
    if sample_rate is not None:
        pictures = [(name, torch.stack([sound.picture(waveform, sample_rate) for waveform in heard])) for name, heard in rows]
        return grid(pictures, list(map(caption_of, prompts)))
    height, width = rows[0][1].shape[-2:]
    sources = [_source(prompt, height, width) for prompt in prompts if isinstance(prompt, PicturePrompt)]
    before = [("source", torch.stack(sources))] if sources else []
    return grid([*before, *rows], list(map(text_of, prompts)))


def _source(prompt: PicturePrompt, height: int, width: int) -> Tensor:
    picture, mask = prompt.open_both()
    if mask is not None:
        picture.paste("grey", mask=mask)
    return fit(picture, height, width)


@torch.no_grad()
def implicit_accuracy(policy: Policy, pairs: Source, *, seed: int, batch_size: int, levels: int = 8) -> float:
    """For how many pairs the policy's implicit reward (arXiv 2311.12908, eq. 14) prefers the chosen sample. A tie counts half.

    That reward is an expectation over noise and level: here the mean of `levels` draws, which both samples of a pair share. The policy
    without guidance, as it is trained.
    """
    rng, right = Generator().manual_seed(seed), list[Tensor]()
    for i in range(0, len(pairs), batch_size):
        batch = pairs.take(range(i, min(i + batch_size, len(pairs))))
        margins = [denoising_margin(*paired_errors(policy, batch, rng, drop_text=0.0)) for _ in range(levels)]
        right.append(wins(torch.stack(margins).mean(0)))
    return float(torch.cat(right).mean())


@torch.no_grad()
def kl_to_base(
    policy: Policy, prompts: Sequence[Prompt], *, steps: int, seed: int, batch_size: int, suffix: str = "", random_steps: int | None = None
) -> float:
    """How far the policy has moved from its base model, in nats per latent dimension, summed over the steps of a sample.

    The mean over prompts of `sum_t KL(pi_theta(x_s | x_t, c), pi_ref(x_s | x_t, c))` along random (eta = 1) samples of the policy,
    one a prompt; each term a mean over the latent dimensions. A step of std 0 is no action and left out, and so are those after the first
    `random_steps`, which are deterministic then. `suffix` is added to the policy's prompts, and not to the base model's.
    """
    rng, kernel, total = Generator().manual_seed(seed), noisy(policy.path, 1.0), 0.0
    for i in range(0, len(prompts), batch_size):
        batch = batch_of(prompts[i : i + batch_size], policy)
        condition = policy.encode(replace(batch, text=tuple(text + suffix for text in batch.text)))
        plain = policy.encode(batch) if suffix else condition
        taken = rollout(policy, condition, steps=steps, kernel=kernel, random_steps=random_steps, rng=rng)
        for step in taken.actions.nonzero()[:, 0].tolist():
            at = taken.states[step], taken.schedule.now[step], taken.schedule.then[step]
            action = transition(policy, *at, condition, kernel)
            with policy.reference():
                total += float(action.kl(transition(policy, *at, plain, kernel)).sum())
    return total / len(prompts)


@torch.no_grad()
def diversity(
    policy: Policy, prompts: Sequence[Prompt], *, samples: int, steps: int, seed: int, batch_size: int, suffix: str = ""
) -> float:
    """How much the samples of one prompt differ: the root mean square over pixels of the difference of two, in the media's units.

    The mean over the prompts and over all pairs of `samples` deterministic (eta = 0) samples of each, two at least.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    media = sample(policy, repeated, steps=steps, seed=seed, batch_size=batch_size, suffix=suffix)
    return float(pairwise_distance(media.unflatten(0, (len(prompts), samples))).mean())


def pairwise_distance(media: Tensor) -> Tensor:
    """(P,) mean root-mean-square difference of two of the n media of each prompt: (P, n, ...), n at least 2."""
    flat = media.flatten(2)
    return torch.stack([torch.pdist(rows).mean() for rows in flat]) / flat.shape[2] ** 0.5
