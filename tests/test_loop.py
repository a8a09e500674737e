"""The loop by itself: what `update` means, where a boundary is, clipping, the average, and no memory kept over many steps."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch

from diffalign.contract import CheckedReward, FunctionReward
from diffalign.errors import InputError
from diffalign.evaluate import sample
from diffalign.loop import Row, Training, prepare, train
from diffalign.lora import LoRA
from diffalign.methods.draft import DRaFT
from diffalign.models import make_policy
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.processes import make_accelerator
from diffalign.settings import Settings
from diffalign.streams import PromptList
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward

BRIGHT = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)), differentiable=True)


@dataclass(frozen=True)
class Rounds:
    """A method with two optimiser steps a batch, the second of two micro-batches; its loss is the sum of the trained weights."""

    value: float = 1.0
    needs: ClassVar[Needs] = Needs(reward=False)
    defaults: ClassVar[Mapping[str, Any]] = {}

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        def total() -> torch.Tensor:
            return sum((p.sum() for p in policy.module.parameters() if p.requires_grad), torch.zeros(())) * self.value

        context.memory["rounds"] = context.memory.get("rounds", 0) + 1
        yield Loss(total(), {"part": 1.0})
        yield Loss(total(), {"part": 2.0}, update=False)
        yield Loss(total(), {"part": 4.0})


def make(method: Any, **settings: Any) -> tuple[Training, Iterator[Row]]:
    chosen = Settings(**{"batch_size": 1, "learning_rate": 1e-3, "max_grad_norm": 1e9, **settings})
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=1.0)
    policy.adapt(LoRA(rank=2))
    training = prepare(policy, chosen, PromptList(["a dog", "a cat"]), make_accelerator(chosen))
    return training, train(training, policy, method, CheckedReward(BRIGHT, "bright"), chosen)


def test_updates_and_boundaries() -> None:
    training, rows = make(Rounds(), steps=5)
    taken = list(rows)
    assert [row.step for row in taken] == [1, 2, 3, 4, 5]
    assert [row.boundary for row in taken] == [False, True, False, True, True]
    assert [row.metrics["part"] for row in taken] == [1.0, 3.0, 1.0, 3.0, 1.0]
    count = sum(p.numel() for p in training.parameters.values())
    norms = [row.metrics["grad_norm"] for row in taken]
    assert norms == pytest.approx([count**0.5, 2 * count**0.5] * 2 + [count**0.5], rel=1e-5), "two micro-batches add up"
    assert training.context.memory == {"rounds": 3}


def test_accumulation_averages() -> None:
    training, rows = make(Rounds(), steps=2, accumulate=2)
    row = next(rows)
    count = sum(p.numel() for p in training.parameters.values())
    assert row.metrics["grad_norm"] == pytest.approx(1.5 * count**0.5, rel=1e-5), "(1 + 2) / 2"
    assert row.boundary


def test_gradients_that_lie_there_are_not_stepped_on() -> None:
    training, rows = make(Rounds(), steps=1)
    for p in training.parameters.values():
        p.grad = torch.full_like(p, 100.0)
    count = sum(p.numel() for p in training.parameters.values())
    assert next(rows).metrics["grad_norm"] == pytest.approx(count**0.5, rel=1e-5)


def test_the_step_is_adamw_on_the_clipped_gradient() -> None:
    training, rows = make(Rounds(), steps=1, max_grad_norm=0.5, learning_rate=0.1)
    before = {n: p.detach().clone() for n, p in training.parameters.items()}
    next(rows)
    for name, p in training.parameters.items():  # Adam's first step is the sign of the gradient, whatever the clipping
        assert torch.allclose(p, before[name] - 0.1, atol=1e-4)


def test_a_step_that_the_scaler_skips_changes_nothing_but_the_scale() -> None:
    """Of fp16, here on a CPU: torch's scaler and accelerate's optimizer are the same there."""
    chosen = Settings(batch_size=1, learning_rate=1e-3, max_grad_norm=1e9, steps=3, ema=0.5, lr_schedule="linear", device="cpu")
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=1.0)
    policy.adapt(LoRA(rank=2))
    accelerator = make_accelerator(chosen)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    training = prepare(policy, chosen, PromptList(["a dog", "a cat"]), accelerator)
    first = next(iter(training.parameters.values()))
    overflow = first.register_hook(lambda gradient: gradient * float("inf"))
    before = [first.detach().clone(), *(w.clone() for w in training.average.shadow_params)]
    rows = train(training, policy, Rounds(), CheckedReward(BRIGHT, "bright"), chosen)
    row = next(rows)
    assert (row.step, row.metrics["skipped"], row.metrics["learning_rate"]) == (1, 1.0, 1e-3)
    assert not math.isfinite(row.metrics["grad_norm"])
    assert all(torch.equal(*pair) for pair in zip(before, [first, *training.average.shadow_params], strict=True))
    assert (training.average.optimization_step, accelerator.scaler.get_scale()) == (0, 2.0)
    overflow.remove()
    row = next(rows)
    assert (row.step, row.metrics["skipped"], row.metrics["learning_rate"]) == (2, 0.0, pytest.approx(1e-3 * 2 / 3))
    assert math.isfinite(row.metrics["grad_norm"])
    assert not torch.equal(first, before[0])


def test_the_average_is_diffusers_own() -> None:
    training, rows = make(Rounds(), steps=3, ema=0.5)
    first = next(iter(training.parameters.values()))
    raw = [first.detach().clone(), *(first.detach().clone() for _ in rows)]
    average = raw[0]
    for step, weights in enumerate(raw[1:], 1):
        decay = min(0.5, (1 + step - 1) / (10 + step - 1)) if step > 1 else 0.0  # EMAModel's warm-up
        average = decay * average + (1 - decay) * weights
    with training.averaged():
        assert torch.allclose(first, average, atol=1e-6)
    assert torch.equal(first, raw[-1])


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "is nan: lower"), (float("inf"), "lower")])
def test_a_loss_that_is_no_number_stops_before_the_step(value: float, message: str) -> None:
    training, rows = make(Rounds(value), steps=1)
    before = {n: p.detach().clone() for n, p in training.parameters.items()}
    with pytest.raises(InputError, match=message):
        next(rows)
    assert all(torch.equal(p, before[n]) for n, p in training.parameters.items())


def test_no_graph_is_kept() -> None:
    """The number of live tensors is the same after 200 steps as after 20."""
    import gc

    _, rows = make(DRaFT(inference_steps=1), steps=201)
    counts: dict[int, int] = {}
    for row in rows:
        if row.step in (20, 200):
            gc.collect()
            counts[row.step] = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    assert counts[200] <= counts[20]


def test_the_state_comes_back() -> None:
    training, rows = make(Rounds(), steps=6, ema=0.9)
    for _ in range(2):
        next(rows)
    state = training.state()
    other, _ = make(Rounds(), steps=6, ema=0.9, seed=4)
    other.restore(state)
    assert other.context.step == 2
    assert all(torch.equal(p, other.parameters[n]) for n, p in training.parameters.items())
    assert torch.equal(other.context.rng.get_state(), training.context.rng.get_state())
    assert other.costs == training.costs
    state["parameters"] = {"unknown": torch.zeros(1)}
    with pytest.raises(InputError, match="do not fit this model"):
        other.restore(state)


def test_a_process_with_another_precision_already() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # other tests have made one
    Accelerator(mixed_precision="bf16")
    assert make_accelerator(Settings(device="cpu")).mixed_precision == "no"


def test_weights_that_train_are_not_rounded() -> None:
    """With `full` the network and its base keep every bit in bf16, and run in it all the same."""
    exact = tiny.stable_diffusion().unet.state_dict()
    plain, half = (
        make_policy(Settings(full=True, precision=precision, device="cpu"), tiny.stable_diffusion()) for precision in ("fp32", "bf16")
    )
    for module in (half.module, half.frozen):
        assert all(w.dtype == torch.float32 and torch.equal(w, exact[name]) for name, w in module.state_dict().items())
    at, x, condition = plain.path.schedule(2).now[0], torch.randn(1, 4, 8, 8), plain.encode(Prompts(("a dog",)))
    with torch.no_grad():
        error = float((plain.predict(x, at, condition) - half.predict(x, at, condition)).abs().max())
    assert 1e-4 < error < 0.1


def test_only_the_first_process_speaks(tmp_path: Path) -> None:
    code = (
        "import sys, torch.distributed as d; from diffalign.console import say\n"
        "d.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=int(sys.argv[1]), world_size=2)\n"
        "say(f'I am {d.get_rank()}'); d.barrier(); d.destroy_process_group()"
    )
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = "".join(process.communicate(timeout=120)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    assert [line for line in said.splitlines() if "I am" in line] == ["I am 0"]


@pytest.mark.parametrize("full", [False, True])
def test_costs_are_what_went_through_the_network(full: bool) -> None:
    """3 denoising steps of 2 samples with guidance; the first of K = 2 steps runs again, and the leash looks at both models once more."""
    chosen = Settings(batch_size=2, learning_rate=1e-3, steps=3)
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=2.0)
    if full:
        policy.unfreeze()
    else:
        policy.adapt(LoRA(rank=2))
    reward = CheckedReward(BRIGHT, "bright")
    training = prepare(policy, chosen, PromptList(["a dog", "a cat"]), make_accelerator(chosen))
    method = DRaFT(inference_steps=3, k=2, reference_weight=0.1)
    for i, row in enumerate(train(training, policy, method, reward, chosen), 1):
        calls = (3 + 1 + 2) * i
        assert {name: row.metrics[name] for name in ("reward_queries", "network_calls", "network_samples")} == {
            "reward_queries": 2 * i,
            "network_calls": calls,
            "network_samples": 2 * 2 * calls,
        }
        sample(policy, ["a dog"], steps=2, seed=0, batch_size=1)  # as the caller does between steps
        reward(torch.zeros(5, 3, 8, 8), Prompts(("a dog",) * 5))
