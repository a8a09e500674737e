"""What a step takes of memory: the count of living tensors, the line through small steps, and batches that fit a budget."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from torch import Tensor, nn

import diffalign
from diffalign import registry
from diffalign.config import Plan
from diffalign.contract import CheckedReward, FunctionReward
from diffalign.errors import InputError
from diffalign.loop import prepare, train
from diffalign.lora import LoRA
from diffalign.memory import Line, Trial, expected, in_words, largest, smaller, within_budget
from diffalign.methods.ddpo import DDPO
from diffalign.methods.draft import DRaFT
from diffalign.models import make_policy
from diffalign.peaks import Living, peak_memory_mb, taken
from diffalign.processes import make_accelerator
from diffalign.settings import Settings
from diffalign.streams import PromptList

RED = FunctionReward(lambda images, prompts: images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2)), differentiable=True)
CPU = torch.device("cpu")
METHODS: dict[str, Any] = {
    "draft": DRaFT(inference_steps=2),
    "ddpo": DDPO(inference_steps=2, batches=2, updates=1, samples=2, advantage="global", clip=1e-2),
}


def trial(method: str = "draft", reward: FunctionReward = RED, **settings: Any) -> Trial:
    chosen = Settings(**{"device": "cpu", "batch_size": 8, "guidance_scale": 1.0, "lora": LoRA(rank=2), **settings})
    plan = Plan(chosen, method, METHODS[method], "red", CheckedReward(reward, "red"))
    return Trial(plan, make_policy(chosen, tiny.stable_diffusion()), tiny.PROMPTS)


def test_living_counts_storages_until_they_are_freed() -> None:
    there = torch.zeros(1000)  # 4000 bytes, before
    with Living(CPU) as living:
        start = living.bytes
        made = there + 1
        view = made[10:]
        assert living.bytes == start + 4000, "a view is no memory"
        del made
        assert living.bytes == start + 4000, "its storage is"
        del view, there
        assert living.bytes == start - 4000
        _ = torch.zeros(500) * 2
        del _
    assert (living.bytes, living.peak) == (start - 4000, start + 4000)


def test_living_counts_no_fake_tensors() -> None:
    """What torch.compile leaves behind: tensors that say they are on the CPU, and hold nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = Living(CPU).bytes
    with FakeTensorMode():
        fake = torch.zeros(1_000_000)
    assert fake.device == CPU
    assert Living(CPU).bytes == before


def test_living_counts_what_autograd_keeps() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with Living(CPU) as living:
        start = living.bytes
        loss = x.exp().sum()  # exp keeps its result for the backward pass
        assert living.bytes == start + 4004
        loss.backward()
        assert living.bytes == start + 4004, "the result is gone, and a gradient came"
        del loss
        x.grad = None
        assert living.bytes == start


@pytest.mark.parametrize("method", METHODS)
def test_the_line_says_what_larger_steps_take(method: str) -> None:
    tried = trial(method)
    line = expected(tried)
    assert line is not None
    assert line.each > 0
    found = tried.peak(8)
    assert found is not None
    assert line(8) == pytest.approx(found, rel=0.05)
    words = in_words(tried, line)
    assert words.startswith(f"{line(8) / 1e6:,.0f} MB expected: vae ")
    assert f"({line.each / 1e6:,.1f} a sample)" in words


def test_what_a_setting_saves_is_seen() -> None:
    peaks = {
        name: trial(**{name: value}).peak(8) for name, value in {"seed": 0, "gradient_checkpointing": True, "vae_batch_size": 1}.items()
    }
    plain = peaks.pop("seed")
    assert plain is not None
    assert all(peak is not None and peak < plain - 1e5 for peak in peaks.values()), (plain, peaks)
    more = {name: trial(full=True, **{name: value}).peak(2) for name, value in {"seed": 0, "ema": 0.9, "accumulate": 2}.items()}
    weights = sum(p.numel() * 4 for p in tiny.stable_diffusion().unet.parameters())
    assert more["ema"] == pytest.approx((more["seed"] or 0) + weights, rel=0.02)
    assert (more["accumulate"] or 0) > (more["seed"] or 0), "gradients lie there during the backward pass"


@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_a_tried_step_changes_no_weight(factor: float) -> None:
    reward = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)) * 1.0, differentiable=True)
    tried = trial(reward=reward, weight_decay=0.1)
    if factor != 1.0:
        tried.policy.pipe.unet.conv_out.register_full_backward_hook(lambda module, given, out: (given[0] * factor,))
    before = {name: value.clone() for name, value in tried.policy.module.state_dict().items()}
    gradients = tried.step(2)
    assert gradients is not None
    assert any(g is not None and bool(g.any()) for g in gradients)
    after = tried.policy.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in tried.parameters)


def test_what_is_taken() -> None:
    with taken(CPU) as took:
        kept = torch.ones(25_000_000)  # 100 MB, every page of them touched
        del kept
    assert 90e6 < took.peak - Living(CPU).bytes < 150e6


def test_what_is_taken_on_a_cpu_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 5_000_000 * (device or CPU).index)
    test_what_is_taken()
    assert peak_memory_mb(torch.device("cuda", 1)) == 5, "of the GPU that trains, which is not always the first"


@pytest.mark.skipif(platform.system() != "Linux", reason="others do not forget what a process had")
def test_the_peak_of_a_run_is_its_own(tmp_path: Path) -> None:
    before = torch.ones(250_000_000)  # 1 GB, as a budget's search may take it
    del before
    highest = peak_memory_mb(CPU)
    given: dict[str, Any] = dict(method="draft", inference_steps=2, reward=RED, prompts=tiny.PROMPTS, device="cpu", eval_size=0)
    run = diffalign.align(tiny.stable_diffusion(), output=tmp_path / "run", steps=1, batch_size=1, lora={"rank": 2}, **given)
    assert 0 < run.metrics[0]["peak_memory_mb"] < highest - 500


def by(line: Callable[[int], float | None]) -> tuple[Callable[[int], float | None], list[int]]:
    tried: list[int] = []

    def peak(size: int) -> float | None:
        tried.append(size)
        return line(size)

    return peak, tried


SIZES = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(("budget", "size"), [(15, None), (20, 1), (30, 2), (175, 16), (650, 64), (1e9, 64)])
def test_the_largest_batch_that_fits(budget: float, size: int | None) -> None:
    peak, tried = by(Line(10, 10))
    found = largest(peak, SIZES, budget)
    assert found == (None if size is None else (size, 10 + 10 * size))
    assert len(tried) <= 4
    assert max(tried) <= max(4, 2 * (size or 1)), "little more is tried than what fits"


def test_the_largest_batch_where_the_line_is_wrong() -> None:
    peak, tried = by(lambda size: 20 if size < 8 else 10.0 * size)  # flat first, as where a forward holds two samples at least
    assert largest(peak, SIZES, 170) == (16, 160.0)
    assert len(tried) == len(set(tried))
    peak, _ = by(lambda size: None if size < 3 else 10.0 * size)  # few samples give no loss
    assert largest(peak, SIZES, 100) == (8, 80.0)
    peak, _ = by(lambda size: None)
    assert largest(peak, SIZES, 100) is None


def test_what_runs_out_of_memory_does_not_fit() -> None:
    def peak(size: int) -> float:
        if size > 8:
            raise torch.OutOfMemoryError
        return 1.0

    assert largest(peak, SIZES, 100) == (8, 1.0)


def test_a_search_that_runs_out_of_memory_leaves_no_gradient() -> None:
    """Out of memory half-way through the backward pass, where some weights have their gradient already."""

    def full(module: nn.Module, given: Any, out: Any) -> None:
        if len(out[0]) >= 4:
            raise torch.OutOfMemoryError

    tried = trial(memory_budget=100.0)
    hook = tried.policy.pipe.unet.mid_block.register_full_backward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        tried.step(4)
    assert all(p.grad is None for p in tried.parameters)
    plan, words = within_budget(tried)
    hook.remove()
    assert (plan.settings.batch_size, plan.settings.accumulate) == (2, 4)
    assert "batches of 2, " in words
    assert all(p.grad is None for p in tried.parameters)


def test_methods_name_fields_of_theirs() -> None:
    for name in registry.METHODS:
        method, _ = registry.find("methods", name)
        assert set(method.needs.split_by) <= {"accumulate", *(field.name for field in fields(method))}
        assert bool(method.needs.split_by) != (name == "kto"), "KTO's baseline is of the whole batch"


def test_smaller_batches_are_as_many_samples() -> None:
    ddpo = smaller(trial("ddpo").plan, 4)
    assert (ddpo.settings.batch_size, ddpo.settings.accumulate, vars(ddpo.method)["batches"]) == (2, 1, 8)
    draft = smaller(trial(accumulate=3).plan, 2)
    assert (draft.settings.batch_size, draft.settings.accumulate) == (4, 6)


def test_a_step_of_smaller_batches_is_the_same_step() -> None:
    """Of DRaFT, whose only draw is x_T."""

    def gradient(tried: Trial) -> dict[str, Tensor]:
        settings = tried.plan.settings
        training = prepare(tried.policy, settings, PromptList(tiny.PROMPTS, tried.policy), make_accelerator(settings))
        training.optimizer.optimizer.register_step_post_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in training.parameters.items()})
        )
        found: dict[str, Tensor] = {}
        next(train(training, tried.policy, tried.plan.method, tried.plan.reward, settings))
        return found

    whole = trial(batch_size=4, steps=1, max_grad_norm=1e9)
    halves = trial(batch_size=4, steps=1, max_grad_norm=1e9)
    halves = replace(halves, plan=smaller(halves.plan, 2))
    found, wanted = gradient(halves), gradient(whole)
    assert any(bool(g.any()) for g in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-7)


def test_a_budget_finds_the_batches() -> None:
    tried = trial(memory_budget=1e-6)
    least = tried.peak(1)
    assert least is not None
    with pytest.raises(InputError, match=rf"a step of the smallest batch does not fit: 1 sample takes {least / 1e9:.3f} GB"):
        within_budget(tried)
    line = expected(tried)
    assert line is not None
    between = replace(tried, plan=replace(tried.plan, settings=replace(tried.plan.settings, memory_budget=(line(2) + line(4)) / 2e9)))
    plan, words = within_budget(between)
    assert (plan.settings.batch_size, plan.settings.accumulate) == (2, 4)
    assert "batches of 2, " in words
    assert "2 samples x 4 batches x 1 processes = 8 a step" in words
    assert within_budget(between, least=lambda size: size // 2)[0].settings.batch_size == 1, "another process has room for less"


def test_a_run_records_what_was_found_and_goes_on_with_it(tmp_path: Path) -> None:
    line = expected(trial(batch_size=4))
    assert line is not None
    budget = (line(2) + line(4)) / 2e9
    given: dict[str, Any] = dict(
        method="draft", inference_steps=2, reward=RED, prompts=tiny.PROMPTS, output=tmp_path / "run", device="cpu",
        guidance_scale=1.0, eval_size=0, batch_size=4, lora={"rank": 2},
    )  # fmt: skip
    pipe = tiny.stable_diffusion()
    run = diffalign.align(pipe, steps=1, memory_budget=budget, **given)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert (config["batch_size"], config["accumulate"], config["memory_budget"]) == (2, 2, budget)
    pipe = tiny.stable_diffusion()
    longer = diffalign.resume(run.path, steps=2, pipe=pipe, reward=RED)
    assert yaml.safe_load((longer.path / "config.yaml").read_text())["batch_size"] == 2
    assert [row["reward_queries"] for row in longer.metrics] == [4, 8]


def test_check_prints_what_is_expected_and_what_was_taken(run_cli: Callable[..., Any], files: Path) -> None:
    flags = ["--pipeline", files / "model", "--reward", f"{files / 'rewards.py'}:red", "--prompts", files / "prompts.txt"]
    flags += ["--method", "draft", "--method.inference-steps", 2, "--batch-size", 4, "--guidance-scale", 1]
    outcome = run_cli("check", *flags, "--memory-budget", 100)
    assert outcome.status == 0, outcome.err
    lines = [line.strip() for line in outcome.out.splitlines()]
    assert any(line.startswith("memory budget: 100 GB: batches of 4, ") for line in lines)
    assert any(line.startswith("memory: ") and " MB expected: vae " in line for line in lines)
    assert any(line.startswith("memory: ") and line.endswith(" MB taken in a step of 4") for line in lines)
    outcome = run_cli("check", *flags, "--method", "kto", "--memory-budget", 1)
    assert outcome.status == 2
