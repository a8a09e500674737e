"""Every family of pipelines as a policy: diffusers' own pictures, a decoder with a gradient, LoRA files both ways, a step of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from parity import lora_from_elsewhere, own_pictures, perturb, pictures, policy_of, prompts_for, run, trainable
from torch import Generator, Tensor

import diffalign
from diffalign import registry
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.media import to_pil
from diffalign.models import adapter_of, network_of
from diffalign.pipelines.unet import UNetFamily
from diffalign.sampling import noisy, transition
from diffalign.types import Condition, PicturePolicy, Policy, Prompts

SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "DDIM, v": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}),
    "Euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "Euler, v": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading", "prediction_type": "v_prediction"}),
    "DPM-Solver 1": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "solver_order": 1}),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(params=sorted(tiny.FAMILIES))
def make(request: pytest.FixtureRequest) -> Any:
    return tiny.FAMILIES[request.param]


@pytest.fixture(params=sorted({**tiny.FAMILIES, **tiny.FLOWS}))
def each(request: pytest.FixtureRequest) -> Any:
    """Of all families, those on a flow too: see test_flow_pipelines.py for what is theirs alone."""
    return {**tiny.FAMILIES, **tiny.FLOWS}[request.param]


def a_policy(make: Any, lora: LoRA | None = None, **options: Any) -> Any:
    return policy_of(make(), lora, **options)


def test_every_family_of_the_registry_is_tested_here():
    assert set(tiny.FAMILIES) == {name for name in registry.PIPELINES if isinstance(adapter_of(name), UNetFamily)}
    for name, make in tiny.FAMILIES.items():
        assert type(make()).__name__ == name


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_are_those_of_the_pipelines_own_call(make: Any, name: str, guidance: float):
    pipe, (scheduler, config) = make(), SCHEDULERS[name]
    pipe.scheduler = scheduler(**BETAS, **config)
    policy = policy_of(pipe, guidance_scale=guidance, negative_prompt="bad")
    theirs = own_pictures(policy)
    assert type(pipe.scheduler) is scheduler, "the pipeline keeps its own"
    torch.testing.assert_close(pictures(policy), theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.01, "the pictures hold something to compare"


@pytest.mark.parametrize("name", ["PNDMScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_without_a_kernel_is_replaced_by_its_ddim_twin_which_is_said(make: Any, name: str):
    pipe = make()
    pipe.scheduler = getattr(diffusers, name)(**BETAS, timestep_spacing="leading")
    policy = policy_of(pipe)
    assert any(name in note and "DDIM" in note for note in policy.notes)
    ours, theirs = pictures(policy), own_pictures(policy)
    assert (ours - theirs).abs().max() > 1e-3, "another sampler"
    pipe.scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=name != "PNDMScheduler")
    torch.testing.assert_close(ours, own_pictures(policy), rtol=0, atol=1e-4)
    assert not policy_of(pipe).notes


def test_a_pictures_default_is_the_pipelines_default(make: Any):
    """Without a negative prompt, and with a size of one's own."""
    policy = a_policy(make, height=16, width=24)
    theirs = own_pictures(policy)
    assert theirs.shape == (2, 3, 16, 24)
    torch.testing.assert_close(pictures(policy), theirs, rtol=0, atol=1e-4)
    other = pictures(a_policy(make, height=16, width=24, negative_prompt="bad"))
    assert (other - theirs).abs().max() > 1e-3


def test_what_is_asked_for_matters(each: Any):
    """Of text, picture and mask each, with the others as they are."""
    policy = a_policy(each)
    prompts = prompts_for(policy)
    others = [Prompts(("a red cow", "two hens"), prompts.image, prompts.mask)]
    others += [] if prompts.image is None else [Prompts(prompts.text, 1 - prompts.image, prompts.mask)]
    others += [] if prompts.mask is None else [Prompts(prompts.text, prompts.image, 1 - prompts.mask)]
    assert len(others) == 1 + len(policy.takes)
    for other in others:
        assert (pictures(policy, other) - pictures(policy, prompts)).abs().flatten(1).amax(1).min() > 1e-4


def test_decode_is_differentiable_to_the_latents(each: Any):
    policy = a_policy(each)
    latents = (3 * torch.randn(2, 4, 8, 8)).requires_grad_()
    images = policy.decode(latents)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images, images.clamp(0, 1))
    gradient = torch.autograd.grad(images.square().sum(), latents)[0]
    assert gradient.isfinite().all()
    assert (gradient.flatten(1) != 0).any(1).all()
    config = policy.pipe.vae.config
    posterior = policy.pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(policy.embed(images), (posterior - (config.shift_factor or 0)) * config.scaling_factor)


def test_it_is_a_policy_that_says_what_it_takes(make: Any):
    policy = a_policy(make)
    assert all(isinstance(policy, kind) for kind in (Policy, PicturePolicy))
    bare = Prompts(("a red fox",))
    if policy.takes:
        with pytest.raises(InputError, match="and the prompts have no"):
            policy.encode(bare)
    if policy.takes != ("image",):
        with pytest.raises(InputError, match="Only a pipeline that edits"):
            policy.blind(policy.encode(prompts_for(policy)), torch.tensor([True, False]))
    with pytest.raises(InputError, match="15 x 16 does not fit"):
        a_policy(make, height=15)


def test_a_condition_is_sliced_and_joined_with_its_null_branches(each: Any):
    policy, rows = a_policy(each), torch.tensor([1, 0, 1])
    whole = policy.encode(prompts_for(policy))
    x_t, at = policy.prior(whole, Generator().manual_seed(0)), policy.path.schedule(4).now[1]
    expected = policy.predict(x_t, at, whole)[rows]
    torch.testing.assert_close(policy.predict(x_t[rows], at, whole[rows]), expected)
    torch.testing.assert_close(policy.predict(x_t[rows], at, Condition.join([whole[[1]], whole])), expected)
    assert next(iter(whole.tensors)) == "encoder_hidden_states", "which a value network reads"


def test_text_is_encoded_once_and_kept_on_a_shelf(each: Any, tmp_path: Path):
    first, second, calls = a_policy(each, negative_prompt="bad"), a_policy(each, negative_prompt="bad"), list[int]()
    for policy in (first, second):
        policy.shelve(tmp_path)
        encode = policy.texts.encode
        policy.texts.encode = lambda texts, encode=encode: (calls.append(len(texts)), encode(texts))[1]
    conditions = [policy.encode(prompts_for(policy)) for policy in (first, first, second)]
    assert calls == [8, 8], "the prompts, and the negative one, by the first alone"
    for condition in conditions[1:]:
        for name, value in conditions[0].tensors.items():
            assert torch.equal(condition.tensors[name], value)
            assert torch.equal((condition.null or {})[name], (conditions[0].null or {})[name])


@pytest.mark.parametrize("eta", [0.7, 1.0])
def test_a_replayed_step_has_the_same_log_probability(each: Any, eta: float):
    policy = a_policy(each, LoRA(rank=2))
    perturb(policy)
    with torch.no_grad():
        taken = run(policy, eta=eta)
    actions = taken.actions.nonzero()[:, 0].tolist()
    assert len(actions) == len(taken.log_probs) - (policy.component == "transformer"), "the last step of a flow is none"
    for i in actions:
        now, then = (level[i] for level in taken.schedule)
        action = transition(policy, taken.states[i], now, then, taken.condition, noisy(policy.path, eta))
        log_prob = action.log_prob(taken.states[i + 1])
        assert torch.equal(log_prob, taken.log_probs[i]), "with a graph and without: ratio exactly 1"
        assert log_prob.requires_grad


def test_the_saved_lora_loads_through_the_pipelines_own_method(each: Any, tmp_path: Path):
    policy = a_policy(each, LoRA(rank=2, alpha=5))
    base = own_pictures(policy)
    assert torch.equal(pictures(policy), pictures(a_policy(each))), "a new LoRA changes nothing"
    perturb(policy)
    with policy.reference():
        assert torch.equal(pictures(policy), pictures(a_policy(each)))
    policy.save(tmp_path)
    pipe = each()
    pipe.load_lora_weights(tmp_path)
    theirs = own_pictures(policy, pipe=pipe)
    assert (theirs - base).abs().max() > 0.01
    torch.testing.assert_close(pictures(policy), theirs, rtol=0, atol=1e-4)
    continued = a_policy(each, LoRA(init=str(tmp_path)))
    assert torch.equal(pictures(continued), pictures(policy))
    continued.save(tmp_path / "again")
    (file,) = tmp_path.glob("*.safetensors")
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_lora_from_elsewhere_is_trained_on(each: Any, tmp_path: Path):
    folder = lora_from_elsewhere(each(), tmp_path / "theirs")
    policy, pipe = a_policy(each, LoRA(init=str(folder))), each()
    pipe.load_lora_weights(folder)
    theirs = own_pictures(policy, pipe=pipe)
    assert (theirs - own_pictures(policy, pipe=each())).abs().max() > 1e-3
    torch.testing.assert_close(pictures(policy), theirs, rtol=0, atol=1e-4)
    gradient = torch.autograd.grad(policy.decode(run(policy, grad_steps=1).final).sum(), trainable(policy))
    assert len(gradient) == len([n for n, _ in policy.module.named_parameters() if "lora_" in n]) > 0
    assert all(g.isfinite().all() and g.any() for g in gradient)
    with torch.no_grad():
        for p, g in zip(trainable(policy), gradient, strict=True):
            p.add_(g / g.norm(), alpha=0.1)
    policy.save(tmp_path / "ours")
    pipe = each()
    pipe.load_lora_weights(tmp_path / "ours")
    torch.testing.assert_close(pictures(policy), own_pictures(policy, pipe=pipe), rtol=0, atol=1e-4)
    assert (pictures(policy) - theirs).abs().max() > 1e-4


def test_full_fine_tuning_keeps_the_base(each: Any, tmp_path: Path):
    policy = a_policy(each)
    base = pictures(policy)
    policy.unfreeze()
    perturb(policy, 0.02 if policy.component == "unet" else 0.05)
    after = pictures(policy)
    with policy.reference():
        assert torch.equal(pictures(policy), base)
    assert not torch.equal(after, base)
    policy.save(tmp_path)
    pipe = each()
    setattr(pipe, policy.component, type(policy.module).from_pretrained(tmp_path))
    torch.testing.assert_close(own_pictures(policy, pipe=pipe), after, rtol=0, atol=1e-4)


def test_bf16_gives_gradients_to_fp32_weights_and_is_released(make: Any):
    policy = a_policy(make, LoRA(rank=2), precision="bf16", vae_precision="bf16")
    assert {policy.module.dtype, policy.pipe.vae.dtype, policy.pipe.text_encoder.dtype} == {torch.bfloat16}
    perturb(policy)
    final = run(policy, steps=3, grad_steps=2).final
    images = policy.decode(final)
    assert final.dtype == images.dtype == policy.embed(images).dtype == torch.float32
    gradient = torch.autograd.grad(images.square().sum(), trainable(policy))
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradient)
    policy.release()
    assert {m.dtype for m in policy.pipe.components.values() if isinstance(m, torch.nn.Module)} == {torch.float32}
    assert own_pictures(policy).isfinite().all(), "it can be called"


def test_the_vae_computes_in_fp32_where_it_overflows_in_fp16(each: Any):
    pipe = each()
    assert pipe.vae.config.force_upcast
    policy = policy_of(pipe, vae_precision="fp16")
    assert pipe.vae.dtype == torch.float32
    said = "The VAE overflows in fp16 (force_upcast in its configuration): it computes in fp32."
    assert policy.notes[-1] == said
    safe = each()
    safe.vae.register_to_config(force_upcast=False)
    policy = policy_of(safe, vae_precision="fp16")
    assert safe.vae.dtype == torch.float16
    assert said not in policy.notes


def test_a_vae_whose_latents_are_normalised(make: Any):
    policy = a_policy(make)
    x_0, mean, std = 3 * torch.randn(2, 4, 8, 8), [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 1.5]
    plain = policy.pipe.vae.decode(x_0 / 0.18215 * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).sample
    policy.pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    images = policy.decode(x_0)
    torch.testing.assert_close(images, (plain / 2 + 0.5).clamp(0, 1))
    posterior = policy.pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    expected = (posterior - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None] * 0.18215
    torch.testing.assert_close(policy.embed(images), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in_channels": 5}, "has 5 input channels, and that of a .* has [489] here.*the pipeline class that it was made for"),
        ({"time_cond_proj_dim": 8}, "was distilled to be told its guidance"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, r"IP-Adapter: pipe.unload_ip_adapter\(\)"),
    ],
)
def test_a_network_that_wants_something_else_is_refused(make: Any, change: dict[str, Any], says: str):
    pipe = make()
    pipe.unet.register_to_config(**change)
    with pytest.raises(InputError, match=says):
        policy_of(pipe)


def test_a_pipeline_without_a_part_is_refused(each: Any):
    pipe = each()
    for part in sorted({"text_encoder", "text_encoder_2", "vae", "unet", "transformer"} & set(pipe.components)):
        whole = getattr(pipe, part)
        setattr(pipe, part, None)
        with pytest.raises(InputError, match=f"This {type(pipe).__name__} has no {part}: load it whole"):
            policy_of(pipe)
        setattr(pipe, part, whole)


def test_an_unsupported_class_names_the_others_and_how_to_write_an_adapter():
    with pytest.raises(InputError) as error:
        adapter_of("KandinskyPipeline")
    for name in (*registry.PIPELINES, "has no adapter", "An adapter is one file: see 'A pipeline' in docs/design.md"):
        assert name in str(error.value)
    with pytest.raises(InputError, match=r"refiner works on pictures of the base model: align that one \(StableDiffusionXLPipeline\)"):
        adapter_of("StableDiffusionXLImg2ImgPipeline")


# A step of each kind of method


@diffalign.reward(differentiable=True)
def red(images: Tensor, prompts: Prompts) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def written(policy: Any, folder: Path) -> tuple[list[Any], Path]:
    """Prompts for a policy, as a caller gives them, and a folder of preference pairs on them."""
    folder.mkdir()
    prompts, shown = prompts_for(policy, tuple(tiny.PROMPTS[:4])), list[Any]()
    rows, rng = list[dict[str, str]](), Generator().manual_seed(0)
    fields = {"image": prompts.image, "mask": None if prompts.mask is None else prompts.mask.expand(-1, 3, -1, -1)}
    for i, text in enumerate(prompts.text):
        files = {name: f"{name}-{i}.png" for name, value in fields.items() if value is not None}
        for name, value in fields.items():
            if value is not None:
                to_pil(value[i]).save(folder / files[name])
        answers = {"chosen": f"chosen-{i}.png", "rejected": f"rejected-{i}.png"}
        for file in answers.values():
            to_pil(torch.rand(3, 16, 16, generator=rng)).save(folder / file)
        rows.append({"prompt": text, **files, **answers})
        shown.append((text, *(folder / file for file in files.values())) if files else text)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return shown, folder


@pytest.mark.parametrize("method", ["draft", "ddpo", "diffusion-dpo"])
def test_a_step_of_training_moves_the_lora(each: Any, method: str, tmp_path: Path):
    pipe = each()
    shown, folder = written(policy_of(pipe), tmp_path / "data")
    given: dict[str, Any] = {"steps": 1, "batch_size": 2, "accumulate": 1, "warmup_steps": 0, "lora": {"rank": 2}}
    given |= {"eval_size": 0, "sample_steps": 2, **({"max_sequence_length": 12} if network_of(pipe) == "transformer" else {})}
    offline = method == "diffusion-dpo"
    own: dict[str, Any] = {"data": str(folder)} if offline else {"prompts": shown, "reward": red, "inference_steps": 3}
    run = diffalign.align(pipe, method=method, output=tmp_path / "run", **given, **own)
    assert len(run.metrics) == 1
    assert run.metrics[0]["grad_norm"] > 0
    moved = {n: p for n, p in getattr(run.pipeline, network_of(pipe)).named_parameters() if "lora_B" in n}
    assert moved
    assert all(p.isfinite().all() for p in moved.values())
    assert any(p.any() for p in moved.values()), "the half that starts at zero"
    again = each()
    again.load_lora_weights(run.path / "lora")
    for name, p in getattr(again, network_of(pipe)).named_parameters():
        if name.endswith("lora_B.default_0.weight"):
            torch.testing.assert_close(p, moved[name.replace("default_0", "default")])
