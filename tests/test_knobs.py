"""Memory and speed settings: each leaves the training what it was, does what it says to the pipeline, and is undone on release."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Generator, Tensor, nn
from torch._inductor import config as inductor

from diffalign import knobs
from diffalign.contract import CheckedReward, FunctionReward
from diffalign.data import batch_of
from diffalign.errors import InputError
from diffalign.loop import prepare, train
from diffalign.lora import LoRA
from diffalign.methods.ddpo import DDPO
from diffalign.methods.draft import DRaFT
from diffalign.models import make_policy
from diffalign.preflight import _ratio
from diffalign.processes import make_accelerator
from diffalign.settings import Settings
from diffalign.streams import PromptList
from diffalign.types import Prompts

RED = FunctionReward(lambda images, prompts: images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2)), differentiable=True)
CHOSEN: dict[str, Any] = dict(device="cpu", batch_size=4, steps=2, guidance_scale=3.0, lora=LoRA(rank=2), learning_rate=1e-3)
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "unet": tiny.stable_diffusion,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
}


def make(pipe: Any = None, **settings: Any) -> Any:
    return make_policy(Settings(**{**CHOSEN, **settings}), tiny.stable_diffusion() if pipe is None else pipe)


DRAFT = DRaFT(inference_steps=3, k=2)


def trained(method: Any = DRAFT, **settings: Any) -> dict[str, Tensor]:
    """The LoRA after two steps, by name."""
    chosen, policy = Settings(**{**CHOSEN, **settings}), make(**settings)
    training = prepare(policy, chosen, PromptList(tiny.PROMPTS, policy), make_accelerator(chosen))
    assert len(list(train(training, policy, method, CheckedReward(RED, "red"), chosen))) == 2
    return {name: p.detach() for name, p in training.parameters.items()}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return trained()


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, in steps of the learning rate; the names must be the same."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one) / CHOSEN["learning_rate"]


@pytest.mark.parametrize(
    "setting",
    [{"channels_last": True}, {"attention": "eager"}, {"attention": "sliced"}, {"vae_batch_size": 1}, {"vae_batch_size": 3}],
    ids=str,
)
def test_the_training_is_the_same(setting: dict[str, Any], plain: dict[str, Tensor]) -> None:
    assert max(float(p.abs().max()) for name, p in plain.items() if "lora_B" in name) > CHOSEN["learning_rate"], "something was trained"
    assert far(trained(**setting), plain) < 0.05


def test_gradient_checkpointing_changes_no_bit(plain: dict[str, Tensor]) -> None:
    """Also inside the rollout's own checkpoints (k above 1), and where log-probabilities are replayed."""
    assert far(trained(gradient_checkpointing=True), plain) == 0
    ddpo = DDPO(inference_steps=3, batches=1, updates=1, samples=2, advantage="global", clip=1e-5)
    assert far(trained(ddpo, gradient_checkpointing=True), trained(ddpo)) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_saves_memory_and_keeps_the_ratio(architecture: str) -> None:
    saved: dict[bool, int] = {}
    for on in (False, True):
        policy = make(ARCHITECTURES[architecture](), gradient_checkpointing=on)
        assert (policy.module.is_gradient_checkpointing, policy.pipe.vae.is_gradient_checkpointing) == (on, on)
        for name, p in policy.module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        batch = batch_of(tiny.PROMPTS[:2], policy)
        assert _ratio(policy, batch, steps=2).passed
        condition = policy.encode(batch)
        with kept_for_backward() as kept:
            policy.decode(policy.predict(policy.prior(condition, Generator().manual_seed(0)), policy.path.schedule(4).now[1], condition))
        saved[on] = sum(kept.values())
    assert saved[True] < 0.6 * saved[False]


@contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Bytes of what autograd saves while the block runs, by storage; weights take part in both sides of a comparison."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def test_the_vae_in_chunks() -> None:
    policy = make(vae_batch_size=2)
    sizes: list[int] = []
    policy.pipe.vae.decoder.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    x = torch.randn(5, 4, 8, 8)
    whole_in, chunked_in = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    with kept_for_backward() as few:
        chunked = policy.decode(chunked_in)
    assert sizes == [2, 2, 1]
    policy.vae_batch_size = None
    with kept_for_backward() as all_:
        whole = policy.decode(whole_in)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)
    assert sum(few.values()) < 0.1 * sum(all_.values())
    weight = torch.randn_like(whole)
    for pictures, given in ((chunked, chunked_in), (whole, whole_in)):
        (pictures * weight).sum().backward()
        assert given.grad is not None
    torch.testing.assert_close(chunked_in.grad, whole_in.grad, rtol=1e-4, atol=1e-6)
    policy.vae_batch_size = 2
    torch.testing.assert_close(policy.embed(whole.detach()[:3]), torch.cat([policy.embed(p[None]) for p in whole.detach()[:3]]))


def test_channels_last_is_how_the_weights_lie_and_files_are_as_ever(tmp_path: Path) -> None:
    policy = make(channels_last=True, full=True)
    convolutions = [m.weight for part in (policy.module, policy.pipe.vae) for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    policy.save(tmp_path / "model")
    loaded = type(policy.module).from_pretrained(tmp_path / "model")
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in policy.module.state_dict().items())


@pytest.mark.parametrize(
    "setting",
    [{"gradient_checkpointing": True}, {"channels_last": True}, {"attention": "sliced"}, {"attention": "eager"}],
    ids=lambda setting: next(iter(setting)) if isinstance(setting, dict) else None,
)
def test_release_undoes_it(setting: dict[str, Any]) -> None:
    pipe = tiny.stable_diffusion()

    def state() -> list[Any]:
        parts = (pipe.unet, pipe.vae)
        strides = [w.stride() for part in parts for name, w in part.state_dict(keep_vars=True).items() if "lora" not in name]
        checkpointed = [part.is_gradient_checkpointing for part in parts]
        return [
            strides,
            checkpointed,
            [type(p) for p in pipe.unet.attn_processors.values()],
            [len(part._state_dict_hooks) for part in parts],
        ]

    before = state()
    policy = make(pipe, **setting)
    assert state() != before
    policy.release()
    assert state() == before
    policy.release()  # a second time is no harm


def test_what_the_person_switched_on_stays() -> None:
    pipe = tiny.stable_diffusion()
    pipe.unet.enable_gradient_checkpointing()
    make(pipe, gradient_checkpointing=True).release()
    assert (pipe.unet.is_gradient_checkpointing, pipe.vae.is_gradient_checkpointing) == (True, False)


def test_offload_moves_what_works() -> None:
    """On a CPU alone `cpu:0` stands for the place where things rest: what counts is when they are sent where."""
    policy = make()
    device, home = policy.module.device, torch.device("cpu", 0)
    sent: list[tuple[str, torch.device]] = []
    for name in ("text_encoder", "vae"):
        module = getattr(policy.pipe, name)
        module.to = lambda to, name=name: sent.append((name, to))
    policy.offload(home)
    assert sent == [("text_encoder", home), ("vae", home)]

    def moves(work: Callable[[], Any]) -> list[tuple[str, torch.device]]:
        sent.clear()
        work()
        return list(sent)

    batch, x = batch_of(["a red dog"], policy), torch.randn(1, 4, 8, 8)
    came_and_went = [("text_encoder", device), ("text_encoder", home)] * 2  # the text, and the empty one
    assert moves(lambda: policy.encode(batch)) == came_and_went
    assert moves(lambda: policy.encode(batch)) == [], "texts are known, and there is no picture to embed"
    with torch.no_grad():
        assert moves(lambda: policy.decode(x)) == [("vae", device), ("vae", home)]
    assert moves(lambda: policy.decode(x.requires_grad_(True))) == [("vae", device)], "its backward pass is to come"
    assert moves(lambda: policy.decode(x.detach())) == []
    policy.undo.close()
    assert moves(lambda: policy.encode(batch_of(["a blue cat"], policy))) == []


def test_offload_brings_the_vae_where_a_picture_is_embedded() -> None:
    policy = make(tiny.instruct_pix2pix())
    device, home = policy.module.device, torch.device("cpu", 0)
    policy.offload(home)
    sent: list[torch.device] = []
    policy.pipe.vae.to = sent.append
    policy.encode(Prompts(("make it red",), torch.rand(1, 3, policy.height, policy.width)))
    assert sent == [device, home]


def test_compile_is_in_place() -> None:
    """With dynamo's eager backend: what is compiled with is torch's affair."""
    one_level = dict(block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    pipe = tiny.stable_diffusion(unet=one_level)  # to trace is slow
    policy = make(pipe, guidance_scale=1.0)
    names = set(policy.module.state_dict())
    at = policy.path.schedule(4).now[1]

    def predictions() -> list[Tensor]:
        with torch.no_grad():
            conditions = [policy.encode(batch_of(tiny.PROMPTS[:n], policy)) for n in (2, 3)]
            return [policy.predict(policy.prior(c, Generator().manual_seed(0)), at, c) for c in conditions]

    expected = predictions()
    knobs.compile_networks(policy, backend="eager")
    calls: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    for found, wanted in zip(predictions(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert calls == [2, 3], "hooks are called as ever"
    handle.remove()
    assert set(policy.module.state_dict()) == names
    assert "forward" in vars(pipe.unet)
    policy.release()
    assert "forward" not in vars(pipe.unet)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with (
        inductor.patch({"cpp.cxx": (str(tmp_path / "none"),), "fx_graph_cache": False}),
        pytest.raises(InputError, match=r"torch.compile does not work here .*drop --compile"),
    ):
        knobs._check_compiler(torch.device("cpu"))
    torch._dynamo.reset()


@pytest.mark.parametrize("package", ["xformers", "bitsandbytes"])
def test_a_package_that_is_not_there(package: str, monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., Any]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    flags = ["--attention", "xformers"] if package == "xformers" else ["--optimizer", "adamw8bit"]
    outcome = run_cli("train", *flags)
    assert (outcome.status, outcome.err) == (2, f"error: {package} is not installed: pip install 'diffalign[{package}]'\n")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"offload": True}, "offload brings what rests to the CPU, and this trains on it"),
        ({"attention": "xformers"}, "attention xformers needs a CUDA GPU"),
        ({"optimizer": "adamw8bit"}, "adamw8bit needs a GPU"),
    ],
    ids=str,
)
def test_what_a_cpu_cannot_have(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**setting)


def test_a_run_made_on_a_gpu_is_sampled_on_a_cpu() -> None:
    settings = Settings(offload=True, attention="xformers", optimizer="adamw8bit", vae_batch_size=2)
    assert knobs.to_sample(settings, torch.device("cpu")) == Settings(vae_batch_size=2)
    assert knobs.to_sample(settings, torch.device("cuda")).offload


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_attention_of_transformers(architecture: str) -> None:
    with pytest.raises(InputError, match="attention sliced is for UNets"):
        make(ARCHITECTURES[architecture](), attention="sliced")


def test_a_network_that_cannot_be_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.stable_diffusion()
    monkeypatch.setattr(type(pipe.unet), "_supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="gradient_checkpointing: a UNet2DConditionModel has none"):
        make(pipe, gradient_checkpointing=True)


@pytest.mark.parametrize("setting", [{"vae_batch_size": 0}, {"memory_budget": 0.0}, {"memory_budget": float("nan")}], ids=str)
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        Settings(**setting)


def test_states_of_8_bits_can_be_resumed() -> None:
    """Only where bitsandbytes and a GPU are."""
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("adamw8bit needs a GPU")
    weights = [nn.Parameter(torch.randn(128, 64, device="cuda")) for _ in range(2)]
    settings = Settings(optimizer="adamw8bit", learning_rate=0.1)
    first = knobs.make_optimizer(weights[:1], settings)
    weights[0].grad = torch.ones_like(weights[0])
    first.step()
    second = knobs.make_optimizer(weights[1:], settings)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        weights[1].copy_(weights[0])
    for weight, optimizer in zip(weights, (first, second), strict=True):
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
    assert torch.equal(*weights)
