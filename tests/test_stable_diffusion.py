"""Stable Diffusion as a policy: diffusers' own pictures, a base that stays as it was, LoRA files that plain diffusers loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Generator, Tensor

from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.sampling import ddim, rollout, transition
from diffalign.types import Policy, Prompts, Trajectory

PROMPTS = Prompts(("a red fox", "two cats"))
STEPS = 4


def a_policy(lora: LoRA | None = None, seed: int = 0, **options: Any) -> StableDiffusion:
    policy = StableDiffusion.of(tiny.stable_diffusion(), **{"guidance_scale": 5.0, **options})
    if lora is not None:
        policy.adapt(lora, seed)
    return policy


def trainable(policy: StableDiffusion) -> list[Tensor]:
    return [p for p in policy.module.parameters() if p.requires_grad]


@torch.no_grad()
def perturb(policy: StableDiffusion, scale: float = 0.3) -> None:
    rng = Generator().manual_seed(7)
    for p in trainable(policy):
        p.add_(scale * torch.randn(p.shape, generator=rng))


def run(policy: StableDiffusion, eta: float = 0.0, steps: int = STEPS, **options: Any) -> Trajectory:
    return rollout(policy, policy.encode(PROMPTS), steps=steps, kernel=ddim(eta), rng=Generator().manual_seed(0), **options)


@torch.no_grad()
def pictures(policy: StableDiffusion, **options: Any) -> Tensor:
    return policy.decode(run(policy, **options).final)


@contextmanager
def calls(module: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of each call of `module`."""
    sizes = list[int]()
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len((*args, *kwargs.values())[0])), with_kwargs=True)
    yield sizes
    handle.remove()


def diffusers_pictures(pipe: Any, latents: Tensor, guidance: float, steps: int = STEPS, negative: str = "") -> Tensor:
    settings = {"latents": latents, "guidance_scale": guidance, "num_inference_steps": steps, "output_type": "pt"}
    return pipe(list(PROMPTS.text), negative_prompt=[negative] * len(PROMPTS), **settings).images


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
    ],
    ids=["sd", "leading", "trailing", "linspace", "v", "zero snr"],
)
def test_pictures_are_diffusers_own(config: dict[str, Any], steps: int, guidance: float):
    policy = StableDiffusion.of(tiny.stable_diffusion(**config), guidance_scale=guidance, negative_prompt="bad")
    latents = policy.prior(policy.encode(PROMPTS), Generator().manual_seed(0))
    theirs = diffusers_pictures(policy.pipe, latents, guidance, steps, "bad")
    torch.testing.assert_close(pictures(policy, steps=steps), theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.01, "the pictures hold something to compare"


@pytest.mark.parametrize("name", ["PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_a_pipeline_with_another_scheduler_is_sampled_with_its_ddim_twin(name: str):
    pipe = tiny.stable_diffusion()
    sd = {k: pipe.scheduler.config[k] for k in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler")(**sd, timestep_spacing="leading")
    policy = StableDiffusion.of(pipe, guidance_scale=5.0)
    assert type(pipe.scheduler).__name__ == f"{name}Scheduler", "the pipeline keeps its own"
    saved = {k: v for k, v in pipe.scheduler.config.items() if k != "_use_default_values"}  # as a folder on disk holds it
    pipe.scheduler = diffusers.DDIMScheduler.from_config(saved, clip_sample=False)
    latents = policy.prior(policy.encode(PROMPTS), Generator().manual_seed(0))
    torch.testing.assert_close(pictures(policy), diffusers_pictures(pipe, latents, 5.0), rtol=0, atol=1e-5)


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


def test_log_probabilities_replay_bit_for_bit():
    policy = a_policy(LoRA(rank=2))
    perturb(policy)
    with torch.no_grad():
        trajectory = run(policy, eta=1.0)
    for i in range(STEPS):
        now, then = trajectory.schedule.now[i], trajectory.schedule.then[i]
        action = transition(policy, trajectory.states[i], now, then, trajectory.condition, ddim(1.0))
        log_prob = action.log_prob(trajectory.states[i + 1])
        assert torch.equal(log_prob, trajectory.log_probs[i]), "with a graph and without: ratio exactly 1"
        assert log_prob.requires_grad


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


def test_plain_diffusers_loads_the_lora_and_makes_the_same_pictures(tmp_path: Path):
    policy = a_policy(LoRA(rank=2, alpha=5))
    perturb(policy)
    policy.save(tmp_path)
    pipe = tiny.stable_diffusion()
    pipe.load_lora_weights(tmp_path)
    latents = policy.prior(policy.encode(PROMPTS), Generator().manual_seed(0))
    theirs = diffusers_pictures(pipe, latents, 5.0)
    pipe.unload_lora_weights()
    assert (theirs - diffusers_pictures(pipe, latents, 5.0)).abs().max() > 0.01
    torch.testing.assert_close(pictures(policy), theirs, rtol=0, atol=1e-5)


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


def test_decode_is_differentiable_and_a_picture():
    policy = a_policy()
    latents = (3 * torch.randn(2, 4, 8, 8)).requires_grad_()
    images = policy.decode(latents)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images, images.clamp(0, 1))
    assert (torch.autograd.grad(images.sum(), latents)[0].flatten(1) != 0).any(1).all()
    assert policy.embed(images).shape == (2, 4, 8, 8)
    assert torch.equal(policy.embed(images), policy.pipe.vae.encode(images * 2 - 1).latent_dist.mode() * 0.18215)
    assert pictures(a_policy(height=16, width=24)).shape == (2, 3, 16, 24)


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
