"""Flow-matching pipelines as policies: diffusers' own pictures, a decoder with a gradient, LoRA files both ways, a step of training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from parity import STEPS, own_pictures, perturb, pictures, run, trainable
from parity import policy_of as a_policy
from torch import Generator, Tensor

import diffalign
from diffalign import registry
from diffalign.cache import TextCache
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.media import to_pil
from diffalign.models import make_policy
from diffalign.sampling import ddim, flow_sde, rollout
from diffalign.settings import Settings
from diffalign.types import Condition, Policy, Prompts

PROMPTS = Prompts(("a red fox", "two cats"))
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 32}


@pytest.fixture(params=sorted(tiny.FLOWS))
def make(request: pytest.FixtureRequest) -> Any:
    return tiny.FLOWS[request.param]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_every_flow_pipeline_of_the_registry_is_tested_here():
    flows = {name for name, row in registry.PIPELINES.items() if row.target.split(":")[0].endswith((".sd3", ".flux", ".z_image"))}
    assert set(tiny.FLOWS) == flows
    for name, make in tiny.FLOWS.items():
        assert type(make()).__name__ == name
        assert sum(p.numel() for p in make().transformer.parameters()) < 400_000


SCHEDULERS = {
    "no shift": {"shift": 1.0, "use_dynamic_shifting": False},
    "shift 3": {"shift": 3.0, "use_dynamic_shifting": False},
    "dynamic": DYNAMIC,
    "dynamic, linear": {**DYNAMIC, "time_shift_type": "linear"},
    "terminal": {"shift": 3.0, "use_dynamic_shifting": False, "shift_terminal": 0.1},
    "karras": {"shift": 3.0, "use_dynamic_shifting": False, "use_karras_sigmas": True},
}


@pytest.mark.parametrize("kernel", [flow_sde(0), ddim(0)], ids=["flow_sde(0)", "ddim(0)"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_are_those_of_the_pipelines_own_call(make: Any, name: str, scale: float, kernel: Any):
    pipe = make(**SCHEDULERS[name])
    scales: dict[str, Any] = {"guidance_scale": 3.5, "true_cfg_scale": scale} if make is tiny.flux else {"guidance_scale": scale}
    policy = a_policy(pipe, negative_prompt="bad", **scales)
    theirs = own_pictures(policy, steps=5)
    close(pictures(policy, steps=5, kernel=kernel), theirs)
    assert theirs.std() > 0.05, "the pictures hold something to compare"
    if scale > 1:
        assert (theirs - own_pictures(a_policy(pipe, **scales), steps=5)).abs().max() > 1e-2, "the negative prompt matters"


@pytest.mark.parametrize(("height", "width"), [(16, 8), (4, 12)])
@pytest.mark.parametrize("config", [DYNAMIC, {"shift": 2.0, "use_dynamic_shifting": False}], ids=["dynamic", "shift"])
def test_another_size_has_its_own_positions_and_its_own_shift(make: Any, config: dict[str, Any], height: int, width: int):
    policy = a_policy(make(**config), height=height, width=width)
    theirs = own_pictures(policy)
    assert theirs.shape == (2, 3, height, width)
    close(pictures(policy), theirs)
    whole = a_policy(make(**config))
    assert (policy.path.mu != whole.path.mu) == (config is DYNAMIC)


def test_without_t5_there_are_zeros_in_its_place():
    policy = a_policy(tiny.sd3(t5=False))
    close(pictures(policy), own_pictures(policy))
    assert not policy.encode(PROMPTS).tensors["encoder_hidden_states"][:, 16:].any()
    assert policy.notes == ("The pipeline has no text_encoder_3: zeros in the place of its embeddings, as in diffusers.",)
    with_it = a_policy(tiny.sd3())
    assert with_it.notes == ()
    assert with_it.encode(PROMPTS).tensors["encoder_hidden_states"][:, 16:].any()


def test_the_default_length_of_text_is_the_pipelines(make: Any):
    policy = a_policy(make(), max_sequence_length=None)
    theirs = own_pictures(policy)
    close(pictures(policy), theirs)
    assert policy.encode(PROMPTS).tensors["encoder_hidden_states"].shape[1] == (256 + 16 if make is tiny.sd3 else 512)


def test_flux_is_told_its_guidance_or_says_that_it_is_not():
    told = [pictures(a_policy(tiny.flux(), guidance_scale=scale, true_cfg_scale=1.0)) for scale in (1.0, 3.5)]
    assert (told[0] - told[1]).abs().max() > 1e-3
    schnell = tiny.flux(guidance_embeds=False)
    policy = a_policy(schnell, guidance_scale=3.5, true_cfg_scale=1.0)
    assert policy.notes == ("This model is told no guidance: guidance_scale 3.5 has no effect. true_cfg_scale has.",)
    close(pictures(policy), own_pictures(policy))
    assert policy.encode(PROMPTS).null is None
    assert a_policy(schnell).encode(PROMPTS).null is not None


def test_the_same_generator_gives_the_pipelines_own_noise(make: Any):
    """So that a seed means the same in a policy and in its pipeline."""
    policy = a_policy(make())
    close(pictures(policy), own_pictures(policy, latents=None, generator=Generator().manual_seed(0)))


def test_guidance_is_one_batched_call_a_step(make: Any):
    sizes, policy = list[int](), a_policy(make())
    handle = policy.module.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    run(policy)
    rollout(policy, policy.encode(PROMPTS).unguided(), steps=2, kernel=ddim())
    handle.remove()
    assert sizes == [4] * STEPS + [2] * 2


def test_another_length_of_text_has_a_shelf_of_its_own(make: Any, tmp_path: Path):
    folders = set[Path]()
    for tokens in (12, 11):
        policy = a_policy(make(), max_sequence_length=tokens)
        policy.shelve(tmp_path)
        folders.add(policy.texts.shelf.folder)
    assert len(folders) == 2, "another embedding"


def test_what_the_network_reads_as_numbers_stays_on_the_cpu():
    """Z-Image's lengths of texts: read from a GPU they would hold up every call of the network."""
    assert a_policy(tiny.z_image()).texts.on_cpu == ("lengths",)
    cache = TextCache(lambda texts: (torch.ones(len(texts), 3), torch.arange(len(texts))), "meta", ("x", "lengths"), on_cpu=("lengths",))
    condition = Condition(cache(["a", "b", "c"]), cache(["", "", ""]))
    for index in (torch.tensor([2, 0]), [2, 0]):
        part = condition[index]
        assert {name: value.device.type for name, value in part.tensors.items()} == {"x": "meta", "lengths": "cpu"}
        assert part.tensors["x"].shape == (2, 3)
        assert part.tensors["lengths"].tolist() == [2, 0]


def test_a_pipeline_with_gradient_checkpointing_has_the_same_gradient(make: Any):
    """What FLUX needs on one GPU: the network's own, switched on by its owner."""
    gradients = list[tuple[Tensor, ...]]()
    for saving in (False, True):
        pipe = make()
        if saving:
            pipe.transformer.enable_gradient_checkpointing()
        policy = a_policy(pipe, LoRA(rank=2))
        perturb(policy)
        gradients.append(torch.autograd.grad(run(policy, grad_steps=1).final.sum(), trainable(policy)))
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, saved)


def test_a_new_lora_is_on_every_attention_of_both_streams(make: Any):
    policy = a_policy(make(), LoRA(rank=2))
    assert isinstance(a_policy(make()), Policy)
    assert torch.equal(pictures(policy), pictures(a_policy(make()))), "it changes nothing"
    names = {name for name, p in policy.module.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in policy.module.named_parameters() if "lora_" in name}
    layers = {re.split(r"\.attn\.|\.attention\.", name.split(".lora_")[0])[-1] for name in names}
    of_text = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"} if make is not tiny.z_image else set[str]()
    assert layers == {"to_q", "to_k", "to_v", "to_out.0", *of_text}
    encoders = [getattr(policy.pipe, name) for name in ("vae", *policy.encoders)]
    assert not any(p.requires_grad for module in encoders for p in module.parameters())


def test_a_lora_with_layers_that_the_network_lacks_is_refused(make: Any, tmp_path: Path):
    """Made for a network with more blocks: diffusers would take what fits, and leave the rest out."""
    deeper = {"n_layers": 2} if make is tiny.z_image else {"num_layers": 3}
    policy = a_policy(make(transformer=deeper), LoRA(rank=2))
    policy.save(tmp_path)
    with pytest.raises(InputError, match=r"adapts \d+ layers, of which .* has \d+: it was made for another network"):
        a_policy(make(), LoRA(init=str(tmp_path)))


def test_bf16_gives_gradients_to_fp32_weights_and_is_released(make: Any):
    # bf16 rounds what FLUX is told, a thousand times the guidance: 4000 stays, 3500 would become 3504, in its pipeline as here
    given: dict[str, Any] = {"lora": LoRA(rank=2), "guidance_scale": 4.0}
    policy, whole = a_policy(make(), precision="bf16", vae_precision="bf16", **given), a_policy(make(), **given)
    assert {policy.module.dtype, policy.pipe.vae.dtype, policy.pipe.text_encoder.dtype} == {torch.bfloat16}
    slopes = list[Tensor]()
    for p in (policy, whole):
        perturb(p)
        final = run(p, steps=3, grad_steps=2).final
        images = p.decode(final)
        assert final.dtype == images.dtype == p.embed(images).dtype == torch.float32
        gradient = torch.autograd.grad(images.square().sum(), trainable(p))
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradient)
        slopes.append(torch.cat([g.flatten() for g in gradient]))
    assert torch.cosine_similarity(*slopes, dim=0) > 0.9
    policy.release()
    assert {m.dtype for m in policy.pipe.components.values() if isinstance(m, torch.nn.Module)} == {torch.float32}, "as it came"
    half = a_policy(make().to(torch.bfloat16), precision="bf16", lora=LoRA(rank=2))
    assert half.pipe.vae.dtype == torch.float32
    half.release()
    assert {m.dtype for m in half.pipe.components.values() if isinstance(m, torch.nn.Module)} == {torch.bfloat16}
    assert own_pictures(half, latents=None, output_type="latent").isfinite().all(), "it can be called"
    assert own_pictures(policy, latents=None, output_type="latent").isfinite().all(), "it can be called"


# Bad input


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_without_a_flow_is_refused(make: Any, name: str):
    pipe = make()
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(InputError, match=f"predicts a velocity, and no flow is known for its {name}. Give it a FlowMatchEulerDiscrete"):
        a_policy(pipe)


OF_A_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}


@pytest.mark.parametrize(("name", "config"), [("FlowMatchHeunDiscreteScheduler", {"shift": 2.0}), ("UniPCMultistepScheduler", OF_A_FLOW)])
def test_another_scheduler_of_a_flow_has_an_euler_twin_which_is_said(make: Any, name: str, config: dict[str, Any]):
    policy = a_policy(make(shift=2.0, use_dynamic_shifting=False))
    theirs = own_pictures(policy)
    pipe = make()
    pipe.scheduler = getattr(diffusers, name)(**config)
    twin = a_policy(pipe)
    assert any(name in note and "Euler" in note for note in twin.notes)
    close(pictures(twin), theirs)
    assert type(pipe.scheduler).__name__ == name, "the pipeline keeps its own"


def test_a_scheduler_that_runs_the_other_way_is_refused_and_a_random_one_is_said(make: Any):
    with pytest.raises(InputError, match="from data to noise"):
        a_policy(make(invert_sigmas=True))
    policy = a_policy(make(stochastic_sampling=True))
    assert len(policy.notes) == 1
    assert "samples at random" in policy.notes[0]


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 6), (0, 16), (-16, 16)])
def test_a_size_that_does_not_fit_is_an_error(make: Any, height: int, width: int):
    with pytest.raises(InputError, match=f"{height} x {width} does not fit.*multiples of 4"):
        a_policy(make(), height=height, width=width)


def test_stable_diffusion_3_knows_positions_up_to_a_size():
    assert pictures(a_policy(tiny.sd3(), height=32, width=4)).shape == (2, 3, 32, 4)
    with pytest.raises(InputError, match="36 x 16 does not fit this model: it knows positions up to 32 pixels a side"):
        a_policy(tiny.sd3(), height=36, width=16)


def test_a_network_that_wants_something_else_is_refused(make: Any):
    pipe = make(transformer={"in_channels": 20})
    with pytest.raises(InputError, match=r"The transformer (takes 20 channels, and the VAE has 4|has 20 input channels, and FLUX .* 16)"):
        a_policy(pipe)


@pytest.mark.parametrize("tokens", [0, 513])
def test_a_length_of_text_that_makes_no_sense_is_an_error(make: Any, tokens: int):
    with pytest.raises(InputError, match=f"max_sequence_length is {tokens}: give 1"):
        a_policy(make(), max_sequence_length=tokens)


def test_an_option_of_another_family_is_an_error():
    with pytest.raises(InputError, match="true_cfg_scale is for FLUX"):
        a_policy(tiny.sd3(), true_cfg_scale=2.0)
    with pytest.raises(InputError, match="true_cfg_scale: the adapter of StableDiffusionPipeline takes none"):
        make_policy(Settings(true_cfg_scale=2.0), tiny.stable_diffusion())
    with pytest.raises(InputError, match=r"true_cfg_scale is 0.5: give 1 \(none\) or more"):
        Settings(true_cfg_scale=0.5)


# A step of each kind of method


@diffalign.reward(differentiable=True)
def red(images: Tensor, prompts: Prompts) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def some_pairs(folder: Path) -> Path:
    folder.mkdir()
    rows, rng = list[dict[str, str]](), Generator().manual_seed(0)
    for i, text in enumerate(("a red fox", "two cats", "a cow", "a hen")):
        answers = {"chosen": f"chosen-{i}.png", "rejected": f"rejected-{i}.png"}
        for file in answers.values():
            to_pil(torch.rand(3, 16, 16, generator=rng)).save(folder / file)
        rows.append({"prompt": text, **answers})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("method", ["draft", "ddpo", "diffusion-dpo"])
def test_a_step_of_training_moves_all_the_weights(make: Any, method: str, tmp_path: Path):
    pipe = make()
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    own: dict[str, Any] = {"prompts": ["a red fox", "two cats", "a cow", "a hen"], "reward": red, "inference_steps": 3}
    if method == "diffusion-dpo":
        own = {"data": str(some_pairs(tmp_path / "data")), "warmup_steps": 0}
    given: dict[str, Any] = {"steps": 1, "batch_size": 2, "eval_size": 0, "sample_steps": 2, "accumulate": 1, "max_sequence_length": 12}
    trained = diffalign.align(pipe, method=method, output=tmp_path / "run", height=16, width=16, full=True, **given, **own)
    assert trained.metrics[0]["grad_norm"] > 0
    again = type(pipe.transformer).from_pretrained(trained.path / "model")
    assert max((p - before[name]).abs().max() for name, p in again.named_parameters()) > 0


def test_a_run_from_a_folder_samples_and_loads_again(make: Any, tmp_path: Path):
    make().save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {"steps": 1, "batch_size": 2, "eval_size": 0, "sample_steps": 2, "max_sequence_length": 12, "full": True}
    own = {"prompts": ["a red fox", "two cats"], "reward": red, "inference_steps": 2}
    trained = diffalign.align(str(tmp_path / "model"), method="draft", output=tmp_path / "run", height=16, width=16, **given, **own)
    loaded = diffalign.load(trained.path)
    assert type(loaded.pipeline).__name__ == type(make()).__name__
    files = loaded.sample(["a red fox"], steps=2)
    assert all(file.is_file() for file in files)
    assert loaded.policy.frozen is not None


def test_d3po_learns_from_trajectories_that_were_stored(make: Any, tmp_path: Path, run_cli: Any):
    """Made on the flow's SDE, and replayed on it: the levels and their noise are those of the file."""
    make().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo cats\na cow")
    same = ["--pipeline", "model", "--height", 16, "--width", 16, "--max-sequence-length", 8, "--guidance-scale", 2]
    making = ["--reward", "jpeg-compressibility", "--prompts", "prompts.txt", "--pairs", 4, "--batch-size", 4, "--sample-steps", 4]
    outcome = run_cli("pairs", *same, *making, "--trajectories", "--output", "pairs")
    assert outcome.status == 0, outcome.err
    small = ["--steps", 1, "--batch-size", 2, "--method.batches", 1, "--method.updates", 1, "--eval-size", 0, "--lora.rank", 2]
    outcome = run_cli("train", "--method", "d3po", *same, *small, "--data", "pairs", "--sample-steps", 2, "--output", "run")
    assert outcome.status == 0, outcome.err
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["loss"] == pytest.approx(0.6931, abs=1e-3), "ln 2: the policy is still its base, whose log-probabilities repeat"
    assert row["grad_norm"] > 0
    outcome = run_cli("train", "--method", "d3po", *same[:-1], 3, *small, "--data", "pairs", "--output", "other")
    assert outcome.status == 2
    assert "sampled with guidance 2, and the training has 3: --guidance-scale 2" in outcome.err
