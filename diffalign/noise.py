"""Noise paths `x_t = alpha x_0 + sigma noise`, built from a pipeline's own diffusers scheduler.

Levels are float64 on the CPU, computed once; coefficients are cast to the states' dtype and device where they are used.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from diffalign.errors import InputError
from diffalign.shards import draw_rows
from diffalign.types import Level, NoisePath, Schedule

Prediction = Literal["epsilon", "v_prediction", "sample"]


def spread(coefficient: Tensor, like: Tensor) -> Tensor:
    """(n,) coefficients as (n, 1, ..., 1) of the dtype and device of `like` (B, ...), n being 1 or B."""
    return coefficient.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def diffuse(x_0: Tensor, noise: Tensor, at: Level) -> Tensor:
    """`x_t = alpha x_0 + sigma noise`, all (B, *latent)."""
    return spread(at.alpha, x_0) * x_0 + spread(at.sigma, x_0) * noise


def noise_between(x_0: Tensor, x_t: Tensor, at: Level) -> Tensor:
    """The noise that takes x_0 to x_t, `(x_t - alpha x_0) / sigma`, all (B, *latent), in fp32 or better. No level's sigma is 0."""
    x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
    return (x_t - spread(at.alpha, x_t) * x_0) / spread(at.sigma, x_t)


def draw_noise(shape: torch.Size | tuple[int, ...], like: Tensor, rng: Generator | None = None) -> Tensor:
    """Standard normal noise of `shape`, drawn where the generator lives and moved to the dtype and device of `like`.

    The run's generator lives on the CPU: the same seed gives the same noise on every device. The first axis is the batch: with several
    processes each has its own rows of the noise of all.
    """
    device = torch.device("cpu") if rng is None else rng.device

    def draw(n: int) -> Tensor:
        return torch.randn((n, *shape[1:]), generator=rng, device=device, dtype=like.dtype)

    return draw_rows(shape[0], rng, draw).to(like.device)


@dataclass(frozen=True)
class VariancePreserving:
    """Diffusion with `alpha^2 + sigma^2 = 1`; the network predicts the noise, v (arXiv 2202.00512) or the sample.

    `scheduler` is a `DDIMScheduler`: its betas, spacing, offset, final alpha, clipping and thresholding are taken as they are.
    """

    scheduler: Any

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"Prediction type '{self.prediction}' of the scheduler is unknown: epsilon, v_prediction or sample.")

    @property
    def prediction(self) -> Prediction:
        return self.scheduler.config.prediction_type

    def level(self, t: Tensor) -> Level:
        """Levels of integer timesteps (n,); a negative one is the end of the path, where diffusers has its final alpha."""
        alpha_bar = torch.where(t < 0, self.scheduler.final_alpha_cumprod, self.scheduler.alphas_cumprod[t.clamp(min=0)]).double()
        return Level(t.clamp(min=0).double(), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def schedule(self, steps: int) -> Schedule:
        """The T transitions of diffusers' DDIM: from each of its timesteps to `num_train_timesteps // T` before it."""
        train_steps = int(self.scheduler.config.num_train_timesteps)
        if not 1 <= steps <= train_steps:
            raise InputError(f"{steps} denoising steps: this scheduler takes 1 to {train_steps}.")
        self.scheduler.set_timesteps(steps, device="cpu")
        t = self.scheduler.timesteps[:steps]  # trailing spacing rounds some counts (61) to one more, a timestep -1 after the end
        if int(t.max()) >= train_steps:
            raise InputError(f"{steps} denoising steps go past the last training timestep with this scheduler's steps_offset: give fewer.")
        now = self.level(t)
        if self.prediction == "epsilon" and float(now.alpha.min()) == 0:
            raise InputError(
                "With zero-terminal-SNR betas the first timestep holds no signal, and x_0 cannot be computed from an epsilon "
                "prediction there. Use a v-prediction model, or 'leading' timestep spacing."
            )
        return Schedule(now, self.level(t - train_steps // steps))

    def draw(self, n: int, rng: Generator | None = None) -> Level:
        """n levels uniform over the training timesteps; of an epsilon prediction without alpha 0, where its target is its input."""
        alpha_bar = self.scheduler.alphas_cumprod  # falls with t
        count = int((alpha_bar > 0).sum()) if self.prediction == "epsilon" else len(alpha_bar)
        return self.level(draw_rows(n, rng, lambda n: torch.randint(count, (n,), generator=rng)))

    def target(self, x_0: Tensor, noise: Tensor, at: Level) -> Tensor:
        """What the network regresses to, (B, *latent)."""
        match self.prediction:
            case "epsilon":
                return noise
            case "v_prediction":
                return spread(at.alpha, x_0) * noise - spread(at.sigma, x_0) * x_0
            case "sample":
                return x_0

    def split(self, prediction: Tensor, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        """The network's `(x_0, noise)`; x_0 clipped or thresholded where the scheduler says so, noise as predicted."""
        alpha, sigma = spread(at.alpha, x_t), spread(at.sigma, x_t)
        match self.prediction:
            case "epsilon":
                x_0, noise = (x_t - sigma * prediction) / alpha, prediction
            case "v_prediction":
                x_0, noise = alpha * x_t - sigma * prediction, alpha * prediction + sigma * x_t
            case "sample":
                x_0, noise = prediction, (x_t - alpha * prediction) / sigma
        if self.scheduler.config.thresholding:
            x_0 = self.scheduler._threshold_sample(x_0)
        elif self.scheduler.config.clip_sample:
            bound = float(self.scheduler.config.clip_sample_range)
            x_0 = x_0.clamp(-bound, bound)
        return x_0, noise


@dataclass(frozen=True)
class RectifiedFlow:
    """Flow matching, `x_t = (1 - sigma) x_0 + sigma noise`; the network predicts the velocity `noise - x_0`.

    `scheduler` is a `FlowMatchEulerDiscreteScheduler`; `mu` its shift where that depends on the resolution. `spacing` is of the sigmas
    before the shift: the scheduler's own, or `linear`, 1 to 1 / T, which is what FLUX's pipeline gives its scheduler.
    """

    scheduler: Any
    mu: float | None = None
    spacing: Literal["scheduler", "linear"] = "scheduler"

    def level(self, sigma: Tensor) -> Level:
        sigma = sigma.double()
        return Level(sigma * float(self.scheduler.config.num_train_timesteps), 1 - sigma, sigma)

    def schedule(self, steps: int) -> Schedule:
        """The T transitions of diffusers' Euler steps, from noise to sigma 0."""
        if steps < 1:
            raise InputError(f"{steps} denoising steps: give at least 1.")
        sigmas = None if self.spacing == "scheduler" else torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
        self.scheduler.set_timesteps(steps, device="cpu", sigmas=sigmas, mu=self.mu)
        return Schedule(self.level(self.scheduler.sigmas[:-1]), self.level(self.scheduler.sigmas[1:]))

    def draw(self, n: int, rng: Generator | None = None) -> Level:
        """n levels, logit-normal in sigma (Stable Diffusion 3, arXiv 2403.03206, section 3.1) and shifted like the schedule."""
        sigma = torch.sigmoid(draw_rows(n, rng, lambda n: torch.randn(n, generator=rng, dtype=torch.float64)))
        if self.scheduler.config.use_dynamic_shifting:
            return self.level(self.scheduler.time_shift(self.mu, 1.0, sigma))
        shift = float(self.scheduler.shift)
        return self.level(shift * sigma / (1 + (shift - 1) * sigma))

    def target(self, x_0: Tensor, noise: Tensor, at: Level) -> Tensor:
        """The velocity, (B, *latent)."""
        return noise - x_0

    def split(self, prediction: Tensor, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        """The network's `(x_0, noise)`: along the straight line through x_t with the predicted velocity."""
        return x_t - spread(at.sigma, x_t) * prediction, x_t + spread(at.alpha, x_t) * prediction


def path_of(scheduler: Any, mu: float | None = None) -> NoisePath:
    """The noise path of a diffusers scheduler: rectified flow for flow matching, its DDIM twin for every diffusion scheduler.

    The twin takes over betas, spacing, offset and prediction type, and where the last step lands: so it equals Euler steps, and
    DPM-Solver's of order 1, on timesteps that DDIM has too. Of the configuration only what the scheduler itself reads is taken: files
    carry what other schedulers left in them. Latents are clipped only if that says so: `DDIMScheduler` would clip by default.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    known = inspect.signature(type(scheduler).__init__).parameters
    config: dict[str, Any] = {name: value for name, value in scheduler.config.items() if name in known}
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if config["use_dynamic_shifting"] and mu is None:
            raise InputError("This scheduler shifts by the resolution (use_dynamic_shifting): path_of(scheduler, mu=...) needs mu.")
        return RectifiedFlow(FlowMatchEulerDiscreteScheduler.from_config(config), mu)  # pyright: ignore[reportUnknownMemberType]
    if "num_train_timesteps" not in config or not ("beta_schedule" in config or "trained_betas" in config):
        raise InputError(f"No noise path is known for {type(scheduler).__name__}. Give the pipeline a DDIMScheduler.")
    if config.get("timestep_type") == "continuous":
        raise InputError(
            "Networks that are told continuous noise levels (EDM) are not supported: the scheduler has timestep_type continuous."
        )
    if not isinstance(scheduler, DDIMScheduler):
        config.setdefault("clip_sample", False)
        config.setdefault("set_alpha_to_one", config.get("final_sigmas_type", "zero") == "zero")
    return VariancePreserving(DDIMScheduler.from_config(config))  # pyright: ignore[reportUnknownMemberType]
