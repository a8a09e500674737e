"""MaPO: preference pairs without a reference model (Hong et al. 2024, arXiv 2406.06424)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffalign.checks import above_zero, share
from diffalign.objectives.preference import mapo, wins
from diffalign.sampling import paired_errors
from diffalign.types import Context, Examples, Loss, Needs, Policy


@dataclass(frozen=True)
class MaPO:
    """`e_w - beta log sigmoid(1000 (f(e_w) - f(e_l)))`, `f(e) = s e / (exp(s e) - 1)`, e the mean squared denoising error of a sample.

    Both samples of a pair share noise and noise level. The first term keeps the model at the chosen samples in the reference's stead.
    """

    beta: float = 0.1
    """Weight of the margin against the denoising error."""
    s: float = 0.5
    """How fast f falls with the error."""
    drop_text: float = 0.0
    """Share of pairs that are trained with an empty prompt, for guidance."""

    needs: ClassVar[Needs] = Needs(reward=False, data="pairs", split_by=("accumulate",), in_step=True)
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-5,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "guidance_scale": 7.5,
        "batch_size": 4,
        "accumulate": 16,
        "steps": 2000,
    }

    def __post_init__(self) -> None:
        above_zero(self, "beta", "s")
        share(self, "drop_text")

    def losses(self, policy: Policy, reward: Any, batch: Examples, context: Context) -> Iterator[Loss]:
        won, lost, _, _ = paired_errors(policy, batch, context.rng, self.drop_text, reference=False)
        metrics: dict[str, Tensor | float] = {
            "implicit_accuracy": wins(lost - won).mean(),
            "margin": (lost - won).detach().mean(),
            "denoising_error": won.detach().mean(),
        }
        yield Loss(mapo(won, lost, beta=self.beta, s=self.s).mean(), metrics)
