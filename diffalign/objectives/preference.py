"""Preferences: one margin between the better and the worse sample, and the losses of it (survey arXiv 2409.11564, Table 11)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Margin = Literal["logistic", "squared", "hinge", "dpo", "ipo", "slic"]


def preference(
    margin: Tensor, *, beta: float, kind: Margin = "logistic", offset: float | Tensor = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """(B,) losses f of the margin m (B,), by how much the better sample is ahead; offset o is a number or (B,).

    - `logistic` or `dpo`: `-log sigmoid(beta m - o)` (DPO, arXiv 2305.18290, eq. 7; with an offset ODPO, arXiv 2402.10571)
    - `squared` or `ipo`: `(m - o - 1 / (2 beta))^2` (IPO, arXiv 2310.12036, eq. 17); here o is in the margin's units, not beta times them
    - `hinge` or `slic`: `max(0, 1 - (beta m - o))` (SLiC-HF, arXiv 2305.10425)

    With label smoothing e the loss is `(1 - e) f(m) + e f(-m)` (conservative DPO, Mitchell 2023): with probability e the label is
    wrong, the other sample is the better one, its margin is -m and it has to be ahead by the same o. At e = 1/2 the loss is even in m.
    Raises ValueError for another kind.
    """
    loss = _of_margin(margin, beta, kind, offset)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss + label_smoothing * _of_margin(-margin, beta, kind, offset)


def _of_margin(margin: Tensor, beta: float, kind: Margin, offset: float | Tensor) -> Tensor:
    match kind:
        case "logistic" | "dpo":
            return -F.logsigmoid(beta * margin - offset)
        case "squared" | "ipo":
            return (margin - offset - 1 / (2 * beta)) ** 2
        case "hinge" | "slic":
            return F.relu(1 - (beta * margin - offset))
        case _:
            raise ValueError(f"preference: kind is {kind!r}; give 'logistic' (or 'dpo'), 'squared' ('ipo') or 'hinge' ('slic').")


def wins(margin: Tensor) -> Tensor:
    """(B,) 1 where the better sample is ahead, 0 where it is behind, 1/2 where the margin (B,) is 0; detached."""
    return (torch.sign(margin.detach()) + 1) / 2


def denoising_margin(error_w: Tensor, error_l: Tensor, reference_w: Tensor | None = None, reference_l: Tensor | None = None) -> Tensor:
    """(B,) `-[(e_w - e_w_ref) - (e_l - e_l_ref)]` from the denoising errors (B,) of the better and the worse sample.

    Diffusion-DPO (arXiv 2311.12908, eq. 14) is `preference(denoising_margin(...), beta=beta / 2)`. Without references, `e_l - e_w`:
    reference-free, as CPO (arXiv 2401.08417) and SimPO (arXiv 2405.14734). Raises ValueError where one reference alone is given.
    """
    if reference_w is None and reference_l is None:
        return error_l - error_w
    if reference_w is None or reference_l is None:
        raise ValueError("denoising_margin: give both references, or neither for a reference-free margin.")
    return (error_l - reference_l) - (error_w - reference_w)


def kto(
    gain: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """(B,) `w (1 - sigmoid(+-beta (g - z)))` of Diffusion-KTO (arXiv 2404.04465), + and - as the sample is desirable or not.

    The gain g (B,) is how much better than the reference the policy denoises the sample, `-(e - e_ref)`; desirable is bool (B,);
    the baseline z, a scalar or (1,), is detached.
    """
    ahead = torch.where(desirable, 1, -1) * beta * (gain - baseline.detach())
    return torch.where(desirable, desirable_weight, undesirable_weight) * torch.sigmoid(-ahead)


def mapo(error_w: Tensor, error_l: Tensor, *, beta: float = 0.1, s: float = 0.5, scale: float = 1000.0) -> Tensor:
    """(B,) `e_w - beta log sigmoid(scale (f(e_w) - f(e_l)))`, `f(e) = s e / (exp(s e) - 1)`: MaPO (arXiv 2406.06424).

    The errors (B,) of the better and the worse sample are 0 or more. `scale` is the number of training timesteps.
    """
    return error_w - beta * F.logsigmoid(scale * (_bernoulli(s * error_w) - _bernoulli(s * error_l)))


def _bernoulli(x: Tensor) -> Tensor:
    """`x / (exp(x) - 1)` for x >= 0, 1 at 0. Value and gradient are finite and exact everywhere."""
    # near 0 autograd subtracts 1 / x from 1 / x: there the series, whose next term is x^6 / 30240
    small = x < 1e-2
    away = torch.where(small, 1, x)
    return torch.where(small, 1 - x / 2 + x**2 / 12 - x**4 / 720, away * torch.exp(-away) / -torch.expm1(-away))
