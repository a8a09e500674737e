"""InstructPix2Pix as a policy, also on SDXL: diffusers' own pictures with both guidances, and its null branches. See test_pipelines.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from parity import own_pictures, run
from parity import pictures as pictures_of
from torch import Generator, Tensor

from diffalign.data import batch_of, read_prompts
from diffalign.errors import InputError
from diffalign.models import load_pipeline, make_policy
from diffalign.pipelines.instruct_pix2pix import InstructPix2Pix, InstructPix2PixXL
from diffalign.pipelines.latent import LatentPolicy
from diffalign.sampling import ddim, rollout
from diffalign.settings import Settings
from diffalign.types import EditingPolicy, Prompts

SOURCES = torch.rand(2, 3, 16, 16, generator=Generator().manual_seed(1))
PROMPTS = Prompts(("make it red", "two cats"), SOURCES)
STEPS = 4


def a_policy(**options: Any) -> LatentPolicy:
    return InstructPix2Pix.of(tiny.instruct_pix2pix(), **{"guidance_scale": 5.0, **options})


def pictures(policy: LatentPolicy, prompts: Prompts = PROMPTS) -> Tensor:
    return pictures_of(policy, prompts)


@contextmanager
def calls(module: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of each call of `module`."""
    sizes = list[int]()
    handle = module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


@pytest.mark.parametrize(("text", "image"), [(1.0, 1.0), (1.0, 1.8), (5.0, 1.0), (5.0, 1.8)])
@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}], ids=["sd", "v"])
@pytest.mark.parametrize("xl", [False, True])
def test_pictures_are_diffusers_own(config: dict[str, Any], text: float, image: float, xl: bool):
    pipe, family = (tiny.instruct_pix2pix_xl(**config), InstructPix2PixXL) if xl else (tiny.instruct_pix2pix(**config), InstructPix2Pix)
    policy = family.of(pipe, guidance_scale=text, image_guidance_scale=image, negative_prompt="bad")
    expected = own_pictures(policy, PROMPTS)
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
    torch.testing.assert_close(pictures(policy, prompts), own_pictures(policy, prompts), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("guidance", "size"), [(5.0, 6), (1.0, 2)])
def test_guidance_is_one_batched_call_a_step(guidance: float, size: int):
    policy = a_policy(guidance_scale=guidance)
    with calls(policy.module) as sizes:
        run(policy, PROMPTS)
    assert sizes == [size] * STEPS
    with calls(policy.module) as sizes:
        rollout(policy, policy.encode(PROMPTS).unguided(), steps=3, kernel=ddim())
    assert sizes == [2] * 3


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
    assert isinstance(policy, EditingPolicy)
    with pytest.raises(InputError, match="edits pictures, and the prompts have none"):
        policy.encode(Prompts(("make it red",)))
    with pytest.raises(InputError, match=r"image_guidance_scale is 0.5: give 1"):
        a_policy(image_guidance_scale=0.5)
    with pytest.raises(InputError, match="multiples of 2"):
        a_policy(height=15)


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.sdxl, tiny.inpaint, tiny.sd3])
def test_a_pipeline_that_edits_nothing_is_guided_towards_no_picture(make: Any):
    for scale in (1.0, 2.0):
        with pytest.raises(InputError, match=r"image_guidance_scale.* (is for pipelines that edit pictures|takes none).*Drop it"):
            make_policy(Settings(image_guidance_scale=scale, device="cpu"), make())


def test_the_sources_latents_are_scaled_only_where_a_pipeline_says_so():
    policy = a_policy()
    source = policy.encode(PROMPTS).tensors["source"]
    torch.testing.assert_close(source * 0.18215, policy.embed(SOURCES), rtol=0, atol=1e-6)
    cosxl = InstructPix2PixXL.of(tiny.instruct_pix2pix_xl(is_cosxl_edit=True), guidance_scale=5.0)
    torch.testing.assert_close(cosxl.encode(PROMPTS).tensors["source"], cosxl.embed(SOURCES), rtol=0, atol=1e-6)
    torch.testing.assert_close(pictures(cosxl), own_pictures(cosxl, PROMPTS), rtol=0, atol=1e-5)
