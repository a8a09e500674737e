"""HIVE: an editing model on edits and their rewards (Zhang et al., CVPR 2024, arXiv 2303.09618; survey 4.5.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.checks import above_zero, at_least, check, share
from diffalign.errors import InputError
from diffalign.noise import draw_noise
from diffalign.objectives.weighting import effective_sample_size, exponential_weights
from diffalign.sampling import denoising_error
from diffalign.shards import draw_rows, everyone, of_scores, own
from diffalign.types import Condition, Context, EditingPolicy, Examples, Level, Loss, Needs, Prompts

WORDS = ("one", "two", "three", "four", "five")
PHRASE = ", image quality is {} out of five"
REMEMBERED = 4096  # scores that levels are measured by


@dataclass(frozen=True)
class HIVE:
    """`w mean((target - prediction)^2)` on edits that exist, given the source and the instruction.

    weighted: `w = exp(r / beta)`, scaled to mean 1 over the optimiser step's samples and capped. conditional: `w = 1`, and the
    instruction says how good the edit is, in five levels; when the trained model is sampled, it is asked for five out of five.
    """

    variant: Literal["weighted", "conditional"] = "weighted"
    """weighted: rewards are weights of the loss. conditional: rewards are words in the instruction."""
    beta: float = 1.0
    """Temperature of the weights, in the reward's units."""
    cap: float = 20.0
    """No weight is above this many times the mean."""
    forwards: int = 8
    """Batches of edits in one optimiser step; the weights are scaled over all of them."""
    weighting: Literal["epsilon", "v"] = "epsilon"
    """Of noise levels. epsilon: all alike, as in the paper. v: of networks that predict epsilon, the squared error of v (arXiv 2202.00512)
    times min(1, 5 / SNR) (arXiv 2303.09556), at most 40 times that of epsilon: more of high noise, where colours and shapes are decided."""
    drop_text: float = 0.05
    """Share of samples that are trained with an empty instruction, for guidance,"""
    drop_image: float = 0.05
    """without the source,"""
    drop_both: float = 0.05
    """and without both."""

    needs: ClassVar[Needs] = Needs(data="edits", modality="image", split_by=("forwards",), in_step=True)
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
        "batch_size": 16,
        "lora": {"rank": 8},
    }

    def __post_init__(self) -> None:
        above_zero(self, "beta")
        check(self, "cap", self.cap >= 1, "1 or more")
        at_least(self, forwards=1)
        share(self, "drop_text", "drop_image", "drop_both")
        if self.drop_text + self.drop_image + self.drop_both > 1:
            raise InputError("method.drop_text, method.drop_image and method.drop_both are above 1 together: give smaller shares.")

    @property
    def suffix(self) -> str:
        """What the trained model's prompts end in when it is sampled."""
        return PHRASE.format(WORDS[-1]) if self.variant == "conditional" else ""

    def losses(self, policy: EditingPolicy, reward: Any, batch: Examples, context: Context) -> Iterator[Loss]:
        if self.weighting == "v" and getattr(policy.path, "prediction", None) != "epsilon":
            raise InputError(
                "method.weighting v is of networks that predict epsilon, and this one does not: give method.weighting epsilon."
            )
        parts: list[Examples] = context.batches(batch, self.forwards)
        scores = torch.stack([_scores(part) for part in parts])  # (forwards, B)
        every = everyone(scores.flatten(), context.processes, len(batch))
        weights, levels = torch.ones_like(scores), torch.zeros_like(scores)
        about = of_scores(scores.flatten(), context.processes, len(batch))
        if self.variant == "weighted":
            flat = exponential_weights(every, beta=self.beta, cap=self.cap)
            weights = own(flat, context.processes, len(batch)).view_as(scores)
            about |= {"effective_sample_size": effective_sample_size(flat) / len(flat), "largest_weight": flat.max()}
        else:
            levels = _levels(scores, every, context)
            about["level"] = levels.float().mean() + 1
        for i, part in enumerate(parts):
            graded = levels[i].tolist() if self.variant == "conditional" else None
            condition = self._condition(policy, part.prompts, graded, context)
            noise, at = draw_noise(part.x_0.shape, part.x_0, context.rng), policy.path.draw(len(part), context.rng)
            error = denoising_error(policy, part.x_0, noise, at, condition)
            emphasis = _of_v(at).to(error) if self.weighting == "v" else 1.0
            loss = (weights[i].to(error) * emphasis * error).mean() / len(parts)
            yield Loss(loss, {**about, "denoising_error": error.detach().mean()}, update=i == len(parts) - 1)

    def _condition(self, policy: EditingPolicy, prompts: Prompts, levels: list[int] | None, context: Context) -> Condition:
        """Without guidance; some instructions empty, some sources left out, some of both (InstructPix2Pix, arXiv 2211.09800)."""
        texts = prompts.text if levels is None else tuple(t + PHRASE.format(WORDS[i]) for t, i in zip(prompts.text, levels, strict=True))
        u = draw_rows(len(prompts), context.rng, lambda n: torch.rand(n, generator=context.rng))
        both, text, image = self.drop_both, self.drop_both + self.drop_text, self.drop_both + self.drop_text + self.drop_image
        texts = tuple("" if nothing else text for text, nothing in zip(texts, (u < text).tolist(), strict=True))
        condition = policy.encode(replace(prompts, text=texts)).unguided()
        return policy.blind(condition, (u < both) | ((u >= text) & (u < image)))


def _scores(part: Examples) -> Tensor:
    if part.scores is None:
        raise InputError("HIVE needs a reward of every edit: --reward NAME.")
    return part.scores.float()


def _of_v(at: Level) -> Tensor:
    """(B,) `min(1 / alpha^2, 40) min(1, 5 / SNR)`; on a variance-preserving path `|dv|^2 = |depsilon|^2 / alpha^2`."""
    return (1 / at.alpha**2).clamp(max=40) * (5 * at.sigma**2 / at.alpha**2).clamp(max=1)


def _levels(scores: Tensor, every: Tensor, context: Context) -> Tensor:
    """Levels 0 to 4 of the scores: in which fifth of all scores seen lately each lies; equal scores have the higher level of theirs."""
    seen = torch.cat([torch.tensor(context.memory.get("scores", [])), every.cpu()])[-REMEMBERED:]
    context.memory["scores"] = seen.tolist()
    not_better = (seen <= scores.cpu()[..., None]).sum(-1)  # at least 1: each was seen itself
    return (len(WORDS) * not_better - 1) // len(seen)
