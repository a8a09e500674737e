"""Stable Diffusion as a policy: diffusers' own pictures for all its noise schedules, embeddings, and the LoRA. See test_pipelines.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity import own_pictures, perturb, trainable
from parity import pictures as pictures_of
from parity import run as run_of
from torch import Tensor

import diffalign
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.pipelines.latent import LatentPolicy
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.sampling import ddim, rollout
from diffalign.types import Policy, Prompts, Trajectory

PROMPTS = Prompts(("a red fox", "two cats"))
STEPS = 4


def a_policy(lora: LoRA | None = None, seed: int = 0, **options: Any) -> LatentPolicy:
    policy = StableDiffusion.of(tiny.stable_diffusion(), **{"guidance_scale": 5.0, **options})
    if lora is not None:
        policy.adapt(lora, seed)
    return policy


def run(policy: LatentPolicy, **options: Any) -> Trajectory:
    return run_of(policy, PROMPTS, **options)


def pictures(policy: LatentPolicy, **options: Any) -> Tensor:
    return pictures_of(policy, PROMPTS, **options)


@contextmanager
def calls(module: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of each call of `module`."""
    sizes = list[int]()
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len((*args, *kwargs.values())[0])), with_kwargs=True)
    yield sizes
    handle.remove()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({}, 5),
        ({"steps_offset": 0, "set_alpha_to_one": True}, 7),
        ({"timestep_spacing": "trailing"}, 4),
        ({"timestep_spacing": "linspace"}, 3),
        ({"prediction_type": "v_prediction"}, 5),
        ({"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, 5),
        ({"prediction_type": "v_prediction", "unet": tiny.SD_2}, 5),
        ({"prediction_type": "sample"}, 5),
    ],
    ids=["sd", "leading", "trailing", "linspace", "v", "zero snr", "2.x", "sample"],
)
def test_pictures_are_diffusers_own(config: dict[str, Any], steps: int, guidance: float):
    policy = StableDiffusion.of(tiny.stable_diffusion(**config), guidance_scale=guidance, negative_prompt="bad")
    theirs = own_pictures(policy, PROMPTS, steps)
    torch.testing.assert_close(pictures(policy, steps=steps), theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.01, "the pictures hold something to compare"


def test_what_other_schedulers_left_in_the_configuration_is_not_read():
    """SDXL's own file is of a scheduler that ends at sigma 0, and says set_alpha_to_one: false, which that scheduler does not know."""
    import diffusers

    pipe = tiny.stable_diffusion()
    left = {"set_alpha_to_one": False, "clip_sample": True, "skip_prk_steps": True}
    euler: Any = diffusers.EulerDiscreteScheduler.from_config({**tiny.SCHEDULER, **left, "timestep_spacing": "leading"})
    pipe.scheduler = euler
    assert euler.config.set_alpha_to_one is False
    policy = StableDiffusion.of(pipe, guidance_scale=5.0)
    torch.testing.assert_close(pictures(policy), own_pictures(policy, PROMPTS), rtol=0, atol=1e-4)
    assert float(policy.path.schedule(4).then.sigma[-1]) == 0
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(euler.config, final_sigmas_type="sigma_min")
    policy = StableDiffusion.of(pipe, guidance_scale=5.0)
    torch.testing.assert_close(pictures(policy), own_pictures(policy, PROMPTS), rtol=0, atol=1e-4)
    assert float(policy.path.schedule(4).then.sigma[-1]) > 0
    pipe.scheduler = diffusers.EulerDiscreteScheduler(timestep_type="continuous")
    with pytest.raises(InputError, match="continuous noise levels"):
        StableDiffusion.of(pipe)


def test_a_safety_checker_stays_in_the_pipeline_which_is_said(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipe = tiny.checked()
    pipe.save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {"prompts": tiny.PROMPTS, "steps": 1, "batch_size": 2, "eval_size": 0, "sample_steps": 2, "inference_steps": 2}
    for model, name in ((pipe, "live"), (tmp_path / "model", "named")):
        run = diffalign.align(model, reward=f"{files}/rewards.py:red", output=tmp_path / name, lora={"rank": 2}, **given)
        assert "The pipeline's safety checker stays in the pipeline" in capsys.readouterr().err
        trained = run.pipeline
        assert type(trained.safety_checker).__name__ == "StableDiffusionSafetyChecker"
        trained.set_progress_bar_config(disable=True)
        done = trained("a red dog", num_inference_steps=2, output_type="pt")
        assert done.nsfw_content_detected == [True], "it is called: the tiny one flags everything"
        assert not done.images.any()


def test_a_tiny_vae_has_no_posterior():
    from diffusers import AutoencoderTiny

    pipe = tiny.stable_diffusion()
    pipe.register_modules(
        vae=AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
        )
    )  # fmt: skip
    policy = StableDiffusion.of(pipe, guidance_scale=5.0)
    torch.testing.assert_close(pictures(policy), own_pictures(policy, PROMPTS), rtol=0, atol=1e-5)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(policy.embed(images), pipe.vae.encode(images * 2 - 1).latents)


@pytest.mark.parametrize(("guidance", "size"), [(5.0, 4), (1.0, 2)])
def test_guidance_is_one_batched_call_a_step(guidance: float, size: int):
    policy = a_policy(guidance_scale=guidance)
    with calls(policy.module) as sizes:
        run(policy)
    assert sizes == [size] * STEPS
    with calls(policy.module) as sizes:
        rollout(policy, policy.encode(PROMPTS).unguided(), steps=3, kernel=ddim())
    assert sizes == [2] * 3


def test_embeddings_are_computed_once():
    policy = a_policy()
    with calls(policy.pipe.text_encoder) as sizes:
        first, again = policy.encode(PROMPTS), policy.encode(PROMPTS)
    assert sizes == [8, 8], "the prompts, and the empty one of the null branch"
    prompt, null = policy.pipe.encode_prompt(list(PROMPTS.text), "cpu", 1, True)
    for condition in (first, again):
        torch.testing.assert_close(condition.tensors["encoder_hidden_states"], prompt)
        torch.testing.assert_close((condition.null or {})["encoder_hidden_states"], null)


def test_an_embeddings_bits_do_not_depend_on_its_neighbours():
    texts = [f"{word} {other}" for word in ("a red fox", "two cats", "x") for other in ("runs", "sits", "a very long story", "")]
    together = a_policy().encode(Prompts(tuple(texts))).tensors["encoder_hidden_states"]
    for i in (0, 5, 11):
        assert torch.equal(a_policy().encode(Prompts((texts[i],))).tensors["encoder_hidden_states"][0], together[i])
    assert not torch.equal(together[0], together[1])


def test_a_new_lora_changes_nothing_and_trains_only_itself():
    policy, base = a_policy(LoRA(rank=2, alpha=8)), a_policy()
    assert isinstance(policy, Policy)
    assert torch.equal(pictures(policy), pictures(base))
    names = {name for name, p in policy.module.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in policy.module.named_parameters() if "lora_" in name}
    assert {name.split(".lora_")[0].rsplit("attn", 1)[1][2:] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert not any(p.requires_grad for m in (policy.pipe.vae, policy.pipe.text_encoder) for p in m.parameters())
    count, added = (sum(p.numel() for p in ps) for ps in (policy.module.parameters(), trainable(policy)))
    assert count == added + sum(p.numel() for p in base.module.parameters()), "no second copy of the base"


def test_the_seed_alone_decides_the_lora():
    first, same, other = (trainable(a_policy(LoRA(rank=2), seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@torch.no_grad()
def test_the_update_is_scaled_by_alpha_over_rank():
    policy, plain = a_policy(LoRA(rank=2, alpha=8)), a_policy(LoRA(rank=2))
    for p in (policy, plain):
        perturb(p)
    for name, p in plain.module.named_parameters():
        p.mul_(4 if "lora_B" in name else 1)
    torch.testing.assert_close(pictures(policy), pictures(plain), rtol=0, atol=1e-5)


def test_the_reference_is_the_base_bit_for_bit():
    policy, base = a_policy(LoRA(rank=2)), pictures(a_policy())
    perturb(policy)
    after = pictures(policy)
    assert not torch.equal(after, base)
    alive = len(trainable(policy))
    with suppress(KeyError), policy.reference():
        assert torch.equal(pictures(policy), base)
        raise KeyError("the adapter comes back however the block ends")
    assert torch.equal(pictures(policy), after)
    assert len(trainable(policy)) == alive > 0


def test_a_graph_lives_through_the_reference():
    """As in a KL term: forward, the base's forward, then backward."""
    policy = a_policy(LoRA(rank=2))
    perturb(policy)
    gradients = list[tuple[Tensor, ...]]()
    for interrupted in (False, True):
        final = run(policy, grad_steps=2).final
        if interrupted:
            with policy.reference():
                pictures(policy)
        gradients.append(torch.autograd.grad(final.sum(), trainable(policy)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.any() for g in gradients[0])


@pytest.mark.parametrize("as_file", [False, True])
def test_training_continues_from_a_saved_lora(tmp_path: Path, as_file: bool):
    policy = a_policy(LoRA(rank=2, alpha=5))
    perturb(policy)
    policy.save(tmp_path)
    (file,) = tmp_path.iterdir()
    continued = a_policy(LoRA(init=str(file if as_file else tmp_path)))
    assert torch.equal(pictures(continued), pictures(policy))
    assert len(trainable(continued)) == len(trainable(policy)) > 0
    again = tmp_path / "again"
    continued.save(again)
    assert (again / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"target_modules": ["to_z"]}, r"\['to_z'\] fit no layer.*conv1.*to_k.*to_q"),
        ({"rank": 0}, "rank is 0: give 1 or more"),
        ({"init": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_a_wrong_lora_is_an_error_with_its_mend(lora: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        a_policy(LoRA(**lora))


def test_a_file_that_is_no_lora_and_a_second_adapter_are_errors(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(bytes(16))
    with pytest.raises(InputError, match=r"x.safetensors is no LoRA that fits"):
        a_policy(LoRA(init=str(tmp_path / "x.safetensors")))
    with pytest.raises(InputError, match="already carries an adapter"):
        a_policy(LoRA()).adapt(LoRA())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_fine_tuning_keeps_the_base(tmp_path: Path, precision: str):
    policy = a_policy(precision=precision)
    base = pictures(policy)
    policy.unfreeze()
    assert len(trainable(policy)) == len(list(policy.module.parameters()))
    assert all(p.dtype == torch.float32 for p in trainable(policy))
    perturb(policy, 0.02)
    after = pictures(policy)
    with policy.reference():
        assert torch.equal(pictures(policy), base)
        assert not trainable(policy)
    assert torch.equal(pictures(policy), after)
    assert not torch.equal(after, base)
    policy.save(tmp_path)
    policy.pipe.unet = type(policy.pipe.unet).from_pretrained(tmp_path)
    assert torch.equal(pictures(policy), after)


def test_a_picture_is_embedded_as_the_mode_of_the_posterior():
    policy, images = a_policy(), torch.rand(2, 3, 16, 16)
    assert torch.equal(policy.embed(images), policy.pipe.vae.encode(images * 2 - 1).latent_dist.mode() * 0.18215)


@pytest.mark.parametrize("grad_steps", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_gives_gradients_to_fp32_weights(grad_steps: int, checkpointing: bool):
    """The steps without a graph come first: autocast must not hand their casts of the weights to the steps with one."""
    policy, full = a_policy(LoRA(rank=2), precision="bf16"), a_policy(LoRA(rank=2))
    gradients = list[Tensor]()
    for p in (policy, full):
        perturb(p)
        final = run(p, steps=3, grad_steps=grad_steps, checkpointing=checkpointing).final
        assert final.dtype == torch.float32
        gradient = torch.autograd.grad(p.decode(final).square().sum(), trainable(p))
        assert all(g.dtype == torch.float32 and g.any() for g in gradient)
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    assert policy.module.dtype == torch.bfloat16
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 7), (0, 16), (-16, 16)])
def test_a_size_that_does_not_fit_is_an_error(height: int, width: int):
    with pytest.raises(InputError, match=f"{height} x {width} does not fit.*multiples of 2"):
        a_policy(height=height, width=width)
