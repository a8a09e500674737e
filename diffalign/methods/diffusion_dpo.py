"""Diffusion-DPO: preference pairs on the denoising loss (Wallace et al., CVPR 2024, arXiv 2311.12908)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffalign.checks import above_zero, check, finite, share
from diffalign.objectives.preference import Margin, denoising_margin, preference, wins
from diffalign.sampling import paired_errors
from diffalign.types import Context, Examples, Loss, Needs, Policy


@dataclass(frozen=True)
class DiffusionDPO:
    """`-log sigmoid(-(beta / 2) [(e_w - e_w_ref) - (e_l - e_l_ref)])` (eq. 14), e the mean squared denoising error of a sample.

    Both samples of a pair share noise and noise level. Other losses of the same margin: IPO (`loss` squared), SLiC (hinge), ODPO
    (`offset`), conservative DPO (`label_smoothing`), CPO's and SimPO's margin (`reference_free`).
    """

    beta: float = 5000.0
    """Of the margin; it goes with errors that are means over the latent dimensions."""
    loss: Margin = "logistic"
    """f of the margin: logistic (or dpo), squared (ipo), hinge (slic)."""
    offset: float = 0.0
    """What the margin has to exceed."""
    label_smoothing: float = 0.0
    """Share of the labels that are taken to be wrong."""
    reference_free: bool = False
    """Leave the base model out of the margin."""
    drop_text: float = 0.2
    """Share of pairs that are trained with an empty prompt, for guidance."""

    needs: ClassVar[Needs] = Needs(reward=False, data="pairs", split_by=("accumulate",), in_step=True)
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 2.048e-5,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "guidance_scale": 7.5,
        "batch_size": 4,
        "accumulate": 512,
        "steps": 2000,
        "lr_schedule": "constant_with_warmup",
        "warmup_steps": 500,
    }

    def __post_init__(self) -> None:
        above_zero(self, "beta")
        finite(self, "offset")
        check(self, "label_smoothing", 0 <= self.label_smoothing <= 0.5, "a share from 0 to 0.5")
        share(self, "drop_text")

    def losses(self, policy: Policy, reward: Any, batch: Examples, context: Context) -> Iterator[Loss]:
        won, lost, base_won, base_lost = paired_errors(policy, batch, context.rng, self.drop_text, reference=not self.reference_free)
        margin = denoising_margin(won, lost, base_won, base_lost)
        loss = preference(margin, beta=self.beta / 2, kind=self.loss, offset=self.offset, label_smoothing=self.label_smoothing)
        metrics: dict[str, Tensor | float] = {
            "implicit_accuracy": wins(margin).mean(),
            "margin": margin.detach().mean(),
            "denoising_error": won.detach().mean(),
        }
        yield Loss(loss.mean(), metrics)
