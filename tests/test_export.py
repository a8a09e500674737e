"""A run's LoRA as a kohya file: through the pipeline's own load_lora_weights it makes the same pictures, and it can be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import test_flow_pipelines
import tiny
import torch
from parity import own_pictures, perturb, pictures, policy_of, trainable
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffalign
from diffalign import kohya
from diffalign.errors import InputError
from diffalign.lora import WEIGHTS, LoRA
from diffalign.models import adapter_of

CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "conv", "proj_in", "proj_out"]
LINEAR = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2"]
TARGETS = {"attention": None, "all": [*LINEAR, *CONVOLUTIONS]}


@pytest.fixture(params=sorted(tiny.FAMILIES))
def make(request: pytest.FixtureRequest) -> Any:
    return tiny.FAMILIES[request.param]


def a_policy(make: Any, lora: LoRA) -> Any:
    policy = policy_of(make())
    policy.adapt(lora)
    return policy


def exported(policy: Any, folder: Path) -> Path:
    policy.save(folder)
    save_file(kohya.convert(folder / WEIGHTS, type(policy.pipe)), folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


@pytest.mark.parametrize("targets", TARGETS)
def test_a_kohya_file_makes_the_same_pictures_and_is_trained_on(make: Any, targets: str, tmp_path: Path):
    policy = a_policy(make, LoRA(rank=2, alpha=5, target_modules=TARGETS[targets]))
    perturb(policy, 0.05)
    ours = pictures(policy)
    assert (ours - own_pictures(policy, pipe=make())).abs().max() > 0.01
    file = exported(policy, tmp_path)
    found = load_file(file)
    assert {name.partition(".")[2] for name in found} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") and name.count(".") == 1 + ("weight" in name) for name in found)
    assert {float(value) for name, value in found.items() if name.endswith(".alpha")} == {5.0}
    pipe = make()
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    torch.testing.assert_close(own_pictures(policy, pipe=pipe), ours, rtol=0, atol=1e-4)
    continued = a_policy(make, LoRA(init=str(file)))
    torch.testing.assert_close(pictures(continued), ours, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in trainable(continued)) == sum(p.numel() for p in trainable(policy))
    perturb(continued, 0.02)
    again = exported(continued, tmp_path / "again")
    pipe = make()
    pipe.load_lora_weights(again.parent, weight_name=again.name)
    torch.testing.assert_close(own_pictures(policy, pipe=pipe), pictures(continued), rtol=0, atol=1e-4)
    assert (pictures(continued) - ours).abs().max() > 1e-3


def test_names_and_numbers_are_kohyas(tmp_path: Path):
    """One attention layer and one convolution, by hand: the names that kohya's trainer and AUTOMATIC1111 give them."""
    policy = a_policy(tiny.stable_diffusion, LoRA(rank=2, alpha=3, target_modules=["attn1.to_q", "downsamplers.0.conv"]))
    perturb(policy)
    found = load_file(exported(policy, tmp_path))
    unet, layer = policy.module, "down_blocks.0.downsamplers.0.conv"
    name = "lora_unet_down_blocks_0_downsamplers_0_conv"
    assert torch.equal(found[f"{name}.lora_down.weight"], unet.get_submodule(layer).lora_A["default"].weight)
    assert torch.equal(found[f"{name}.lora_up.weight"], unet.get_submodule(layer).lora_B["default"].weight)
    assert found[f"{name}.lora_down.weight"].shape[2:] == (3, 3)
    assert found[f"{name}.lora_up.weight"].shape[2:] == (1, 1)
    assert found[f"{name}.alpha"].shape == ()
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight" in found
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert file.metadata() is None


def test_layers_of_several_alphas_and_ranks_keep_them(tmp_path: Path):
    """Which diffusers alone gets wrong: of an attention layer it takes the alpha of the others, without a word."""
    policy = a_policy(tiny.stable_diffusion, LoRA(rank=2, alpha=4, target_modules=["to_q", "to_k", "conv1"]))
    perturb(policy)
    expected, found = pictures(policy), load_file(exported(policy, tmp_path))
    odd = [name for name in found if "_attn1_to_q." in name] + [name for name in found if "resnets_0_conv1." in name]
    for name in odd:
        if name.endswith(".alpha"):
            found[name] = torch.tensor(1.0)
        elif "lora_up" in name:
            found[name] = torch.cat([4 * found[name], torch.zeros_like(found[name])], 1) * 2  # rank 4: alpha / rank = 1/4, not 2
        else:
            found[name] = torch.cat([found[name], found[name]])
    save_file(found, tmp_path / "theirs.safetensors")
    assert len(odd) >= 6
    pipe = tiny.stable_diffusion()
    pipe.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    assert (own_pictures(policy, pipe=pipe) - expected).abs().max() > 0.01, "diffusers reads it right: this may go"
    continued = a_policy(tiny.stable_diffusion, LoRA(init=str(tmp_path / "theirs.safetensors")))
    torch.testing.assert_close(pictures(continued), expected, rtol=0, atol=1e-4)
    file = exported(continued, tmp_path / "again")
    pipe = tiny.stable_diffusion()
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    torch.testing.assert_close(own_pictures(policy, pipe=pipe), expected, rtol=0, atol=1e-4)


def test_a_lora_with_several_alphas_of_our_own_is_written_right(tmp_path: Path):
    """peft's alpha_pattern, as a LoRA that others made has it, in the metadata of its file."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny.stable_diffusion()
    config = LoraConfig(r=2, lora_alpha=4, alpha_pattern={"attn1.to_q": 1}, rank_pattern={"to_k": 3}, target_modules=["to_q", "to_k"])
    pipe.unet.add_adapter(config)
    for name, p in pipe.unet.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape)
    told = {**config.to_dict(), "target_modules": ["to_q", "to_k"]}
    layers = get_peft_model_state_dict(pipe.unet)
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=told)
    policy = a_policy(tiny.stable_diffusion, LoRA(init=str(tmp_path)))
    theirs = pictures(policy)
    pipe = tiny.stable_diffusion()
    pipe.load_lora_weights(exported(policy, tmp_path / "ours").parent, weight_name="kohya.safetensors")
    torch.testing.assert_close(own_pictures(policy, pipe=pipe), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("targets", [None, ["to_q", "to_out.0"], ["x_embedder", "context_embedder"]])
def test_flux(targets: list[str] | None, tmp_path: Path):
    policy = test_flow_pipelines.a_policy(tiny.flux(), LoRA(rank=2, alpha=5, target_modules=targets))
    perturb(policy, 0.05)
    file, pipe = exported(policy, tmp_path), tiny.flux()
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    base = test_flow_pipelines.own_pictures(policy, pipe=tiny.flux())
    theirs = test_flow_pipelines.own_pictures(policy, pipe=pipe)
    assert (theirs - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs, test_flow_pipelines.pictures(policy), rtol=0, atol=1e-4)
    continued = test_flow_pipelines.a_policy(tiny.flux(), LoRA(init=str(file)))
    torch.testing.assert_close(test_flow_pipelines.pictures(continued), test_flow_pipelines.pictures(policy), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "targets", "says"),
    [
        (tiny.sd3, None, "StableDiffusion3Pipeline reads no kohya file of these layers. Use .*pytorch_lora_weights.safetensors"),
        (tiny.flux, ["to_q", "ff.net.2"], r"would lose layers: FluxPipeline does not read transformer_blocks.0.ff.net.2 from one"),
        (tiny.sdxl, ["to_q", "add_embedding.linear_1"], r"StableDiffusionXLPipeline does not read add_embedding.linear_1 from one"),
    ],
)
def test_what_would_not_be_read_back_is_refused(make: Any, targets: list[str] | None, says: str, tmp_path: Path):
    policy = adapter_of(type(make()).__name__).of(make())
    policy.adapt(LoRA(rank=2, target_modules=targets))
    with pytest.raises(InputError, match=says):
        exported(policy, tmp_path)


def test_a_damaged_kohya_file_is_no_lora(tmp_path: Path):
    policy = a_policy(tiny.stable_diffusion, LoRA(rank=2))
    file = exported(policy, tmp_path)
    found = load_file(file)
    save_file({name: value for name, value in found.items() if "mid_block" not in name or "lora_up" not in name}, file)
    with pytest.raises(InputError, match=r"kohya.safetensors is no LoRA that fits this pipeline"):
        a_policy(tiny.stable_diffusion, LoRA(init=str(file)))


# The command


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    @diffalign.reward(differentiable=True)
    def red(images: Any, prompts: Any) -> Any:
        return images[:, 0].mean((1, 2))

    given: dict[str, Any] = {"steps": 1, "batch_size": 2, "inference_steps": 2, "k": 1, "eval_size": 0, "learning_rate": 0.05}
    lora = {"rank": 2, "alpha": 6.0, "target_modules": ["to_q", "to_v", "conv1"]}
    model = str(files / "model")
    return diffalign.align(
        model, reward=red, prompts=tiny.PROMPTS, output=tmp_path_factory.mktemp("runs") / "red", lora=lora, **given
    ).path  # fmt: skip


def test_export_writes_a_file_named_after_the_run_and_refuses_to_replace_it(finished: Path, files: Path, run_cli: Any):
    outcome = run_cli("export", finished)
    file = finished / "red.safetensors"
    assert (outcome.status, outcome.out.strip()) == (0, str(file)), outcome.err
    pipes: list[Any] = [diffusers.StableDiffusionPipeline.from_pretrained(files / "model") for _ in "12"]
    pipes[0].load_lora_weights(finished / "lora")
    pipes[1].load_lora_weights(file)
    policy = policy_of(pipes[0])
    theirs = [own_pictures(policy, pipe=pipe) for pipe in pipes]
    torch.testing.assert_close(theirs[1], theirs[0], rtol=0, atol=1e-5)
    assert (theirs[1] - own_pictures(policy, pipe=tiny.stable_diffusion())).abs().max() > 1e-3
    first = file.read_bytes()
    file.write_bytes(b"mine")
    outcome = run_cli("export", finished)
    assert outcome.status == 2
    assert "exists already: choose another --output, or --force" in outcome.err
    assert file.read_bytes() == b"mine"
    assert run_cli("export", finished, "--format", "kohya", "--force").status == 0
    assert file.read_bytes() == first, "equal LoRAs give equal files"


def test_export_says_where_and_what_is_wrong(finished: Path, files: Path, run_cli: Any, tmp_path: Path):
    outcome = run_cli("export", finished, "--output", tmp_path / "new" / "x.safetensors")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "new" / "x.safetensors").is_file()
    bad = {
        ("export", tmp_path): "is no run",
        ("export", finished, "--output", "x.ckpt"): "give a .safetensors file",
        ("export", finished, "--output", finished / "lora" / WEIGHTS, "--force"): "is the run's own LoRA",
        ("export", finished, "--output", "/proc/nothing/x.safetensors"): "cannot be written",
        ("export", finished, "--format", "webui"): "invalid choice",
    }
    for arguments, says in bad.items():
        outcome = run_cli(*arguments)
        assert outcome.status == 2
        assert says in outcome.err
    cut = (finished / "lora" / WEIGHTS).read_bytes()
    try:
        (finished / "lora" / WEIGHTS).write_bytes(cut[:2000])
        outcome = run_cli("export", finished, "--output", "y.safetensors")
    finally:
        (finished / "lora" / WEIGHTS).write_bytes(cut)
    assert outcome.status == 2
    assert "is damaged" in outcome.err
    assert not Path("y.safetensors").exists()


@pytest.mark.parametrize(("change", "says"), [("full: true", "trained all weights"), ("full: false", "the run is unfinished. Resume it")])
def test_a_run_without_a_lora_has_nothing_to_export(change: str, says: str, finished: Path, run_cli: Any, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((finished / "config.yaml").read_text().replace("full: false", change))
    outcome = run_cli("export", other)
    assert outcome.status == 2
    assert says in outcome.err


def test_a_run_of_a_live_pipeline_is_exported_in_its_process_or_with_the_pipeline(tmp_path: Path, run_cli: Any):
    given: dict[str, Any] = {"steps": 1, "batch_size": 2, "inference_steps": 2, "k": 1, "eval_size": 0, "lora": {"rank": 2, "alpha": 6.0}}

    @diffalign.reward(differentiable=True)
    def red(images: Any, prompts: Any) -> Any:
        return images[:, 0].mean((1, 2))

    run = diffalign.align(tiny.sdxl(), reward=red, prompts=tiny.PROMPTS, output=tmp_path / "run", **given)
    first = run.export().read_bytes()
    assert diffalign.load(run.path, pipe=tiny.sdxl()).export(force=True).read_bytes() == first
    outcome = run_cli("export", run.path, "--force")
    assert outcome.status == 2
    assert "diffalign.load(folder, pipe=...) wants it again" in outcome.err
