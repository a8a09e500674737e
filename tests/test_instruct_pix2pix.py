"""InstructPix2Pix as a policy: diffusers' own pictures with both guidances, its null branches, and files that plain diffusers loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Generator, Tensor

from diffalign.data import batch_of, read_prompts
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.models import load_pipeline
from diffalign.pipelines.instruct_pix2pix import InstructPix2Pix
from diffalign.sampling import ddim, rollout, transition
from diffalign.types import Condition, EditingPolicy, Policy, Prompts, Trajectory

SOURCES = torch.rand(2, 3, 16, 16, generator=Generator().manual_seed(1))
PROMPTS = Prompts(("make it red", "two cats"), SOURCES)
STEPS = 4


def a_policy(lora: LoRA | None = None, **options: Any) -> InstructPix2Pix:
    policy = InstructPix2Pix.of(tiny.instruct_pix2pix(), **{"guidance_scale": 5.0, **options})
    if lora is not None:
        policy.adapt(lora)
    return policy


def trainable(policy: InstructPix2Pix) -> list[Tensor]:
    return [p for p in policy.module.parameters() if p.requires_grad]


@torch.no_grad()
def perturb(policy: InstructPix2Pix, scale: float = 0.3) -> None:
    rng = Generator().manual_seed(7)
    for p in trainable(policy):
        p.add_(scale * torch.randn(p.shape, generator=rng))


def run(policy: InstructPix2Pix, prompts: Prompts = PROMPTS, eta: float = 0.0, steps: int = STEPS, **options: Any) -> Trajectory:
    return rollout(policy, policy.encode(prompts), steps=steps, kernel=ddim(eta), rng=Generator().manual_seed(0), **options)


@torch.no_grad()
def pictures(policy: InstructPix2Pix, prompts: Prompts = PROMPTS, **options: Any) -> Tensor:
    return policy.decode(run(policy, prompts, **options).final)


@torch.no_grad()
def theirs(pipe: Any, policy: InstructPix2Pix, prompts: Prompts = PROMPTS, steps: int = STEPS) -> Tensor:
    """The pipeline's own pictures from the noise of `pictures`."""
    latents = policy.prior(policy.encode(prompts), Generator().manual_seed(0))
    assert prompts.image is not None
    scales = {"guidance_scale": policy.guidance_scale, "image_guidance_scale": policy.image_guidance_scale}
    negative = [policy.negative_prompt] * len(prompts)
    return pipe(
        list(prompts.text), prompts.image, negative_prompt=negative, latents=latents, num_inference_steps=steps, output_type="pt", **scales
    ).images


@contextmanager
def calls(module: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of each call of `module`."""
    sizes = list[int]()
    handle = module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


@pytest.mark.parametrize(("text", "image"), [(1.0, 1.0), (1.0, 1.8), (5.0, 1.0), (5.0, 1.8)])
@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}], ids=["sd", "v"])
def test_pictures_are_diffusers_own(config: dict[str, Any], text: float, image: float):
    policy = InstructPix2Pix.of(tiny.instruct_pix2pix(**config), guidance_scale=text, image_guidance_scale=image, negative_prompt="bad")
    expected = theirs(policy.pipe, policy)
    torch.testing.assert_close(pictures(policy), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01, "the pictures hold something to compare"


def test_both_guidances_and_the_source_matter():
    shown = [pictures(a_policy(guidance_scale=text, image_guidance_scale=image)) for text, image in ((5.0, 1.0), (5.0, 1.8), (4.0, 1.0))]
    shown.append(pictures(a_policy(), Prompts(PROMPTS.text, 1 - SOURCES)))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(shown) for b in shown[:i])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_shapes_edit_is_diffusers_own(guidance: float):
    policy = InstructPix2Pix.of(load_pipeline("shapes-edit"), guidance_scale=guidance, image_guidance_scale=1.5)
    policy.pipe.set_progress_bar_config(disable=True)
    prompts = batch_of(read_prompts("shapes-edit", "heldout")[:3], policy)
    torch.testing.assert_close(pictures(policy, prompts), theirs(policy.pipe, policy, prompts), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("guidance", "size"), [(5.0, 6), (1.0, 2)])
def test_guidance_is_one_batched_call_a_step(guidance: float, size: int):
    policy = a_policy(guidance_scale=guidance)
    with calls(policy.module) as sizes:
        run(policy)
    assert sizes == [size] * STEPS
    with calls(policy.module) as sizes:
        rollout(policy, policy.encode(PROMPTS).unguided(), steps=3, kernel=ddim())
    assert sizes == [2] * 3


def test_a_condition_is_sliced_and_joined_with_its_null_branches():
    policy, rows = a_policy(), torch.tensor([1, 0, 1])
    whole = policy.encode(PROMPTS)
    x_t, at = policy.prior(whole, Generator().manual_seed(0)), policy.path.schedule(STEPS).now[1]
    expected = policy.predict(x_t, at, whole)[rows]
    torch.testing.assert_close(policy.predict(x_t[rows], at, whole[rows]), expected)
    torch.testing.assert_close(policy.predict(x_t[rows], at, Condition.join([whole[[1]], whole])), expected)
    assert len(Condition.join([whole[:1].unguided(), whole.unguided()])) == 3


def test_a_blind_row_has_no_source():
    policy = a_policy(guidance_scale=1.0)
    condition = policy.encode(PROMPTS)
    source = policy.blind(condition, torch.tensor([True, False])).tensors["source"]
    assert not source[0].any()
    assert torch.equal(source[1], condition.tensors["source"][1])
    assert condition.tensors["source"][0].any(), "the condition itself is as it was"
    null = (a_policy().encode(PROMPTS).null or {})["source"]
    assert torch.equal(source[:1], null[:1]), "as in guidance's branch without a source"


def test_it_is_a_policy_of_pictures():
    policy = a_policy()
    assert isinstance(policy, Policy)
    assert isinstance(policy, EditingPolicy)
    with pytest.raises(InputError, match="edits pictures, and the prompts have none"):
        policy.encode(Prompts(("make it red",)))
    with pytest.raises(InputError, match=r"image_guidance_scale is 0.5: give 1"):
        a_policy(image_guidance_scale=0.5)
    with pytest.raises(InputError, match="multiples of 2"):
        a_policy(height=15)


def test_a_replayed_step_has_the_same_log_probability():
    policy = a_policy(LoRA(rank=2))
    perturb(policy)
    with torch.no_grad():
        trajectory = run(policy, eta=1.0)
    for i in range(STEPS):
        now, then = trajectory.schedule.now[i], trajectory.schedule.then[i]
        action = transition(policy, trajectory.states[i], now, then, trajectory.condition, ddim(1.0))
        log_prob = action.log_prob(trajectory.states[i + 1])
        assert torch.equal(log_prob, trajectory.log_probs[i])
        assert log_prob.requires_grad


def test_the_reference_is_the_base_bit_for_bit():
    policy, base = a_policy(LoRA(rank=2)), pictures(a_policy())
    assert torch.equal(pictures(policy), base), "a new LoRA changes nothing"
    perturb(policy)
    after = pictures(policy)
    assert not torch.equal(after, base)
    with policy.reference():
        assert torch.equal(pictures(policy), base)
    assert torch.equal(pictures(policy), after)


def test_plain_diffusers_loads_the_lora_and_makes_the_same_pictures(tmp_path: Path):
    policy = a_policy(LoRA(rank=2, alpha=5))
    perturb(policy)
    policy.save(tmp_path)
    pipe = tiny.instruct_pix2pix()
    before = theirs(pipe, policy)
    pipe.load_lora_weights(tmp_path)
    after = theirs(pipe, policy)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(pictures(policy), after, rtol=0, atol=1e-5)
    assert torch.equal(pictures(a_policy(LoRA(init=str(tmp_path)))), pictures(policy))


def test_full_fine_tuning_keeps_the_base(tmp_path: Path):
    policy = a_policy()
    base = pictures(policy)
    policy.unfreeze()
    perturb(policy, 0.02)
    after = pictures(policy)
    with policy.reference():
        assert torch.equal(pictures(policy), base)
    assert not torch.equal(after, base)
    policy.save(tmp_path)
    policy.pipe.unet = type(policy.pipe.unet).from_pretrained(tmp_path)
    assert torch.equal(pictures(policy), after)


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_bf16_gives_gradients_to_fp32_weights(grad_steps: int):
    policy = a_policy(LoRA(rank=2), precision="bf16")
    perturb(policy)
    final = run(policy, steps=3, grad_steps=grad_steps).final
    assert final.dtype == torch.float32
    gradient = torch.autograd.grad(policy.decode(final).square().sum(), trainable(policy))
    assert all(g.dtype == torch.float32 and g.any() for g in gradient)
    policy.release()
    assert policy.module.dtype == torch.float32


def test_decode_and_embed():
    policy = a_policy()
    images = policy.decode((3 * torch.randn(2, 4, 8, 8)).requires_grad_())
    assert images.shape == (2, 3, 16, 16)
    assert images.requires_grad
    assert torch.equal(policy.embed(images), policy.pipe.vae.encode(images * 2 - 1).latent_dist.mode() * 0.18215)
    source = policy.encode(PROMPTS).tensors["source"]
    torch.testing.assert_close(source * 0.18215, policy.embed(SOURCES), msg="the source's latents are not scaled")
