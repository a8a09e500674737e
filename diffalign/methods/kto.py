"""Diffusion-KTO: liked and disliked samples, unpaired (Li et al., NeurIPS 2024, arXiv 2404.04465)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.checks import above_zero, share, zero_or_more
from diffalign.noise import draw_noise
from diffalign.objectives.preference import kto
from diffalign.sampling import denoising_error, without_some_text
from diffalign.types import Context, Examples, Loss, Needs, Policy


@dataclass(frozen=True)
class KTO:
    """`w (1 - sigmoid(+-beta (g - z)))`, + where the sample is liked; `g = -(e - e_ref)`, e the mean squared denoising error of a sample.

    The baseline z is the mean of g over the batches of all processes, at least 0, without a gradient.
    """

    beta: float = 1000.0
    """Scale of the gain; it goes with errors that are means over the latent dimensions."""
    desirable_weight: float = 1.0
    """w of the liked samples."""
    undesirable_weight: float = 1.0
    """w of the disliked ones."""
    drop_text: float = 0.2
    """Share of samples that are trained with an empty prompt, for guidance."""

    needs: ClassVar[Needs] = Needs(reward=False, data="labels", in_step=True)
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-5,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "guidance_scale": 7.5,
        "batch_size": 8,
        "accumulate": 16,
        "steps": 2000,
    }

    def __post_init__(self) -> None:
        above_zero(self, "beta")
        zero_or_more(self, "desirable_weight", "undesirable_weight")
        share(self, "drop_text")

    def losses(self, policy: Policy, reward: Any, batch: Examples, context: Context) -> Iterator[Loss]:
        assert batch.desirable is not None
        liked = batch.desirable.to(batch.x_0.device)
        condition = without_some_text(policy, batch.prompts, self.drop_text, context.rng)
        at, noise = policy.path.draw(len(batch), context.rng), draw_noise(batch.x_0.shape, batch.x_0, context.rng)
        with torch.no_grad(), policy.reference():
            base = denoising_error(policy, batch.x_0, noise, at, condition)
        error = denoising_error(policy, batch.x_0, noise, at, condition)
        gain = base - error
        everyones = context.processes.gather(gain.detach())
        labels = context.processes.gather(liked.to(gain.dtype)) > 0
        baseline = everyones.mean().clamp(min=0)
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        metrics: dict[str, Tensor | float] = {"baseline": baseline, "denoising_error": error.detach().mean()}
        # of all processes: each has the same metrics, also where one has no sample of a kind
        metrics |= {name: everyones[kind].mean() for name, kind in (("gain_liked", labels), ("gain_disliked", ~labels)) if kind.any()}
        yield Loss(kto(gain, liked, baseline, beta=self.beta, **weights).mean(), metrics)
