"""Noise paths: the numbers of the diffusers schedulers they are built from, to the last step."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false
# diffusers' annotations are narrower than what its schedulers take and wider than what they return.

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Generator, Tensor
from toy import diffusion, flow

from diffalign.errors import InputError
from diffalign.noise import RectifiedFlow, VariancePreserving, diffuse, draw_noise, path_of
from diffalign.sampling import ddim, flow_sde
from diffalign.types import Level, NoisePath

SHAPE = (2, 3, 4, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
DYNAMIC = {"use_dynamic_shifting": True}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def every_step_equals_ddim(config: dict[str, Any], steps: int, etas: tuple[float, ...] = (0.0, 0.5, 1.0)) -> None:
    """Each step from a state of the path, with a network output beside the truth and the same noise."""
    reference, path = DDIMScheduler(**config), path_of(DDIMScheduler(**config))
    reference.set_timesteps(steps)
    schedule = path.schedule(steps)
    assert schedule.now.t.tolist() == reference.timesteps.tolist()
    for i, t in enumerate(reference.timesteps):
        now, then = schedule.now[i], schedule.then[i]
        x_0, noise, error, z = torch.randn(4, *SHAPE)
        x_t, output = diffuse(x_0, noise, now), path.target(x_0, noise, now) + error / 4
        for eta in etas:
            action = ddim(eta)(*path.split(output, x_t, now), now, then)
            close(action.at(z), reference.step(output, int(t), x_t, eta=eta, variance_noise=z).prev_sample)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_step_is_ddims(prediction: str, spacing: str, offset: int, to_one: bool):
    config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": to_one}
    for steps in (1, 2, 7, 50):
        every_step_equals_ddim(config, steps)


@pytest.mark.parametrize(
    "config",
    [
        {**ZERO_SNR, "prediction_type": "v_prediction"},
        {**ZERO_SNR, "prediction_type": "sample", "set_alpha_to_one": False},
        {"timestep_spacing": "leading", "rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 2.0, "prediction_type": "v_prediction"},
        {"thresholding": True, "sample_max_value": 1.5, "prediction_type": "sample"},
        {"thresholding": True, "sample_max_value": 3.0, "prediction_type": "epsilon", "timestep_spacing": "linspace"},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": [0.001, 0.01, 0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 6},
    ],
    ids=str,
)
def test_every_step_is_ddims_with_rarer_settings(config: dict[str, Any]):
    for steps in (1, 3, 6) if "trained_betas" in config else (3, 20, 30):
        # with no signal left and eta 1, diffusers takes the root of a rounding error: NaN
        every_step_equals_ddim({**SD, **config}, steps, (0.0, 0.5, 0.99) if ZERO_SNR.items() <= config.items() else (0.0, 0.5, 1.0))


def test_ancestral_step_from_pure_noise():
    """alpha_t = 0, eta = 1: `sqrt(a_s) x_0 + sqrt(1 - a_s) z`, whatever x_t was."""
    path = VariancePreserving(DDIMScheduler(**SD, **ZERO_SNR, prediction_type="v_prediction"))
    now, then = path.schedule(4).now[0], path.schedule(4).then[0]
    x_0, x_t, z = torch.randn(3, *SHAPE)
    assert float(now.alpha) == 0
    close(ddim(1.0)(*path.split(-x_0, x_t, now), now, then).at(z), diffuse(x_0, z, then))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_thousand_steps_are_ddims(prediction: str):
    every_step_equals_ddim({**SD, "prediction_type": prediction}, 1000)


@pytest.mark.parametrize(
    ("config", "mu"),
    [({}, None), ({"shift": 3.0}, None), (DYNAMIC, 0.5), (DYNAMIC, 1.15), ({**DYNAMIC, "time_shift_type": "linear"}, 2.0)],
)
@pytest.mark.parametrize("steps", [1, 3, 28, 1000])
def test_every_step_is_eulers(config: dict[str, Any], mu: float | None, steps: int):
    reference, path = FlowMatchEulerDiscreteScheduler(**config), path_of(FlowMatchEulerDiscreteScheduler(**config), mu)
    reference.set_timesteps(steps, mu=mu)
    schedule = path.schedule(steps)
    close(schedule.now.t.float(), reference.timesteps)
    x = torch.randn(SHAPE)
    for i, t in enumerate(reference.timesteps):
        velocity, now, then = torch.randn(SHAPE), schedule.now[i], schedule.then[i]
        want = reference.step(velocity, t, x).prev_sample
        for kernel in (flow_sde(0), ddim(0)):
            close(kernel(*path.split(velocity, x, now), now, then).at(None), want)
        x = want
    assert float(schedule.then.sigma[-1]) == 0


@pytest.mark.parametrize(
    "path",
    [*(diffusion(prediction_type=p) for p in PREDICTIONS), flow(shift=3.0), flow(0.8, **DYNAMIC)],
    ids=[*PREDICTIONS, "flow", "dynamic"],
)
def test_split_undoes_target(path: NoisePath):
    at = path.draw(64, Generator().manual_seed(1))
    x_0, noise = torch.randn(2, 64, 3, 2, dtype=torch.float64)
    got = path.split(path.target(x_0, noise, at), diffuse(x_0, noise, at), at)
    close(got[0], x_0, 1e-10)
    close(got[1], noise, 1e-10)


def test_diffusion_is_diffusers_own():
    scheduler, at = DDIMScheduler(**SD), torch.tensor([0, 10, 500, 999])
    path = VariancePreserving(scheduler)
    x_0, noise = torch.randn(2, 4, 3, 2)
    close(diffuse(x_0, noise, path.level(at)), scheduler.add_noise(x_0, noise, at))
    v = VariancePreserving(DDIMScheduler(**SD, prediction_type="v_prediction"))
    close(v.target(x_0, noise, v.level(at)), scheduler.get_velocity(x_0, noise, at))
    close(path.level(at).alpha ** 2 + path.level(at).sigma ** 2, torch.ones(4, dtype=torch.float64), 1e-15)


def test_flow_is_diffusers_own():
    scheduler = FlowMatchEulerDiscreteScheduler()
    at = scheduler.timesteps[[0, 300, 998]]
    x_0, noise = torch.randn(2, 3, 3, 2)
    close(diffuse(x_0, noise, RectifiedFlow(scheduler).level(at / 1000)), scheduler.scale_noise(x_0, at, noise))


def logit(x: Tensor) -> Tensor:
    return (x / (1 - x)).log()


def test_diffusion_draws_every_training_timestep_alike():
    at = diffusion(num_train_timesteps=20).draw(40_000, Generator().manual_seed(0))
    counts = torch.bincount(at.t.long())
    assert len(counts) == 20
    assert float((counts - 2000).abs().max()) < 5 * 2000**0.5


def test_what_cannot_be_learnt_is_not_drawn():
    """At zero terminal SNR the last timestep holds no signal: to v-prediction its own, to epsilon a target that is the input."""
    for prediction, last in (("epsilon", 18), ("v_prediction", 19), ("sample", 19)):
        at = diffusion(num_train_timesteps=20, prediction_type=prediction, **ZERO_SNR).draw(2_000, Generator().manual_seed(0))
        assert int(at.t.max()) == last
        assert (float(at.alpha.min()) == 0) == (last == 19)


@pytest.mark.parametrize(
    ("path", "added"),
    [(flow(shift=3.0), math.log(3)), (flow(0.8, **DYNAMIC), 0.8), (flow(2.5, time_shift_type="linear", **DYNAMIC), math.log(2.5))],
    ids=["shift", "exponential", "linear"],
)
def test_flow_draws_logit_normal_levels_shifted_like_the_schedule(path: RectifiedFlow, added: float):
    """`k s / (1 + (k - 1) s)` adds log k to the logit; the exponential shift's mu is that logarithm."""
    plain, shifted = (p.draw(20_000, Generator().manual_seed(0)).sigma for p in (flow(), path))
    assert abs(float(logit(plain).mean())) < 0.03
    assert abs(float(logit(plain).std()) - 1) < 0.03
    close(logit(shifted) - logit(plain), torch.full((20_000,), added, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("path", [diffusion(), flow(shift=3.0)], ids=["diffusion", "flow"])
def test_a_generator_repeats_its_draws(path: NoisePath):
    draws = [path.draw(5, rng) for rng in (Generator().manual_seed(3), Generator().manual_seed(3), Generator().manual_seed(4))]
    assert torch.equal(draws[0].t, draws[1].t)
    assert not torch.equal(draws[0].t, draws[2].t)
    global_state = torch.get_rng_state()
    like = torch.zeros(1, dtype=torch.float64)
    noise = [draw_noise((2, 3), like, Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    assert noise[0].dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), global_state), "the run's draws touch no global generator"


@pytest.mark.parametrize("name", ["PNDM", "EulerDiscrete", "DPMSolverMultistep", "DDPM", "DDIM"])
@pytest.mark.parametrize("given", [{}, {**SD, "timestep_spacing": "trailing", "steps_offset": 1, "prediction_type": "v_prediction"}])
def test_other_schedulers_become_their_ddim_twin(name: str, given: dict[str, Any]):
    kind = getattr(diffusers, f"{name}Scheduler")
    clips = name in ("DDPM", "DDIM")
    own = kind(**{k: v for k, v in given.items() if k != "clip_sample" or clips})
    path = path_of(own)
    assert isinstance(path, VariancePreserving)
    assert isinstance(path.scheduler, DDIMScheduler)
    assert path.scheduler is not own, "the pipeline's own scheduler is never stepped"
    for key in ("beta_start", "beta_schedule", "timestep_spacing", "prediction_type", "steps_offset"):
        assert path.scheduler.config[key] == own.config.get(key, 0), key
    assert torch.equal(path.scheduler.alphas_cumprod, DDIMScheduler(**SD).alphas_cumprod if given else own.alphas_cumprod)
    assert path.scheduler.config.clip_sample == (clips and not given), "clipping comes only from the scheduler's own configuration"


def test_trailing_counts_that_diffusers_rounds_to_one_more():
    """61 steps are 62 timesteps in diffusers, the last of them -1."""
    schedule = diffusion(timestep_spacing="trailing").schedule(61)
    assert len(schedule.now) == len(schedule.then) == 61
    assert float(schedule.now.t.min()) > 0


def test_levels_are_cut_like_tensors():
    at = Level(*torch.arange(12, dtype=torch.float64).reshape(3, 4))
    assert at[1].t.tolist() == [1]
    assert at[-1:].alpha.tolist() == [7]
    assert at[torch.tensor([3, 0])].sigma.tolist() == [11, 8]
    assert len(at[:3]) == 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: diffusion().schedule(0), "0 denoising steps.*1 to 1000"),
        (lambda: diffusion().schedule(1001), "1001 denoising steps.*1 to 1000"),
        (lambda: diffusion(steps_offset=1).schedule(1000), "1000 denoising steps.*steps_offset.*fewer"),
        (lambda: path_of(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)), "needs mu"),
        (lambda: flow().schedule(0), "0 denoising steps.*at least 1"),
        (lambda: diffusion(rescale_betas_zero_snr=True, timestep_spacing="trailing").schedule(10), "v-prediction model, or 'leading'"),
        (lambda: path_of(diffusers.EDMEulerScheduler()), "EDMEulerScheduler.*DDIMScheduler"),
        (lambda: path_of(diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")), "flow_prediction"),
    ],
)
def test_errors_name_the_mend(call: Any, says: str):
    with pytest.raises(InputError, match=says):
        call()
