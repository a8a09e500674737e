"""Stable Diffusion XL as a policy: two encoders, pooled text, sizes, and the unconditional branch that is zero. See test_pipelines.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity import own_pictures, pictures, policy_of, prompts_for

from diffalign.errors import InputError
from diffalign.models import make_policy
from diffalign.pipelines.sdxl import StableDiffusionXL
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.settings import Settings
from diffalign.types import Prompts

SIZES = {"original_size": (32, 48), "crops_coords_top_left": (4, 2), "target_size": (20, 24)}


@pytest.mark.parametrize("negative", [None, "", "bad"])
@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_branch_is_the_pipelines_own(negative: str | None, zeros: bool):
    policy = policy_of(tiny.sdxl(force_zeros_for_empty_prompt=zeros), negative_prompt=negative)
    torch.testing.assert_close(pictures(policy), own_pictures(policy), rtol=0, atol=1e-5)
    null = policy.encode(prompts_for(policy)).null or {}
    texts = [bool(null[name].any()) for name in ("encoder_hidden_states", "text_embeds")]
    assert texts == [not (zeros and negative is None)] * 2
    assert null["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2, "the sizes are never left out"


def test_embeddings_are_of_both_encoders():
    policy = policy_of(tiny.sdxl())
    texts = ["a red fox", "two cats"]
    hidden, _, pooled, _ = policy.pipe.encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    found = policy.encode(Prompts(tuple(texts))).tensors
    torch.testing.assert_close(found["encoder_hidden_states"], hidden)
    torch.testing.assert_close(found["text_embeds"], pooled)
    assert hidden.shape == (2, 16, 32)
    assert pooled.shape == (2, 16)
    assert not torch.equal(hidden[..., :16], hidden[..., 16:])


@pytest.mark.parametrize("make", [tiny.sdxl, tiny.instruct_pix2pix_xl, tiny.inpaint_xl])
@pytest.mark.parametrize("told", [*SIZES, "all"])
def test_the_network_is_told_sizes_as_by_the_pipeline(make: Any, told: str):
    sizes: dict[str, Any] = SIZES if told == "all" else {told: SIZES[told]}
    policy = policy_of(make(), **sizes)
    theirs = own_pictures(policy, **sizes)
    torch.testing.assert_close(pictures(policy), theirs, rtol=0, atol=1e-5)
    assert (pictures(policy_of(make())) - theirs).abs().max() > 1e-4


def test_sizes_are_settings_and_are_checked():
    settings = Settings(device="cpu", original_size=(32, 48), guidance_scale=2.0, vae_precision="bf16")
    policy = make_policy(settings, tiny.sdxl(), train=False)
    assert policy.encode(Prompts(("a fox",))).tensors["time_ids"].tolist() == [[32, 48, 0, 0, 16, 16]]
    assert policy.pipe.vae.dtype == torch.bfloat16
    with pytest.raises(InputError, match="original_size is for SDXL: a StableDiffusionPipeline is told no sizes"):
        make_policy(settings, tiny.stable_diffusion(), train=False)
    with pytest.raises(InputError, match=r"crops_coords_top_left is \[-1, 0\]: give two numbers of pixels, each 0 or more"):
        Settings(crops_coords_top_left=(-1, 0))
    with pytest.raises(InputError, match="vae_precision fp16 needs a GPU"):
        make_policy(Settings(device="cpu", vae_precision="fp16"), tiny.sdxl(), train=False)


class Adapter:
    """One of another package, which knows nothing of SDXL."""

    @staticmethod
    def of(pipe: Any, *, guidance_scale: float, negative_prompt: str | None, height: Any, width: Any, precision: str, device: Any) -> Any:
        return StableDiffusion.of(pipe, guidance_scale=guidance_scale)


def test_an_adapter_that_takes_no_sizes_is_not_given_any(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffalign.models.adapter_of", lambda name: Adapter)
    assert make_policy(Settings(device="cpu", guidance_scale=3.0), tiny.stable_diffusion(), train=False).guidance_scale == 3.0
    for option, value in {"target_size": (8, 8), "vae_precision": "bf16"}.items():
        with pytest.raises(InputError, match=f"{option}: the adapter of StableDiffusionPipeline takes none"):
            make_policy(Settings(device="cpu", **{option: value}), tiny.stable_diffusion(), train=False)


def test_a_refiners_network_is_refused():
    pipe = tiny.sdxl(unet={"projection_class_embeddings_input_dim": 5 * 8 + 16})
    with pytest.raises(InputError, match="told other numbers than six sizes"):
        StableDiffusionXL.of(pipe)


def test_the_command_line_takes_sizes_and_the_run_keeps_them(run_cli: Any, files: Path):
    flags = ("--original-size", "32", "48", "--crops-coords-top-left", "[1, 2]", "--negative-prompt", "", "--print-config")
    given = ("--pipeline", files / "model", "--reward", f"{files}/rewards.py:red", "--prompts", files / "prompts.txt")
    shown = run_cli("train", *given, *flags)
    assert shown.status == 0, shown.err
    assert "original_size:\n- 32\n- 48\ncrops_coords_top_left:\n- 1\n- 2\ntarget_size: null\n" in shown.out
    assert "negative_prompt: ''\n" in shown.out
    (files.parent / "again.yaml").write_text(shown.out)
    again = run_cli("train", "--config", files.parent / "again.yaml", "--print-config")
    assert again.out == shown.out


def test_a_watermarker_is_said_to_stay():
    class Watermarker:
        pass

    pipe = tiny.sdxl()
    pipe.watermark = Watermarker()
    (note,) = policy_of(pipe).notes
    assert "watermark stays in the pipeline" in note
