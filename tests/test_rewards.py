"""The reward's contract at the edge, and the rewards that need no model."""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffalign
from diffalign import registry
from diffalign.contract import CheckedReward, FunctionReward, as_reward
from diffalign.errors import InputError
from diffalign.rewards.jpeg import JPEGCompressibility
from diffalign.types import Prompts, Reward

TWO = Prompts(("a dog", "a cat"))


def test_prompts_slice_with_everything_they_carry() -> None:
    prompts = Prompts(("a", "b", "c"), image=torch.arange(3.0).reshape(3, 1, 1, 1), metadata=({"i": 0}, {"i": 1}, {"i": 2}))
    assert prompts[1:].text == ("b", "c")
    picked = prompts[[2, 0]]
    assert picked.text == ("c", "a")
    assert picked.image is not None
    assert picked.image.flatten().tolist() == [2.0, 0.0]
    assert picked.metadata == ({"i": 2}, {"i": 0})
    assert prompts[torch.tensor([1])].text == ("b",)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, p: x.mean(), r"shape \(\): return \(2,\)"),
        (lambda x, p: x.mean((2, 3)), r"shape \(2, 3\): return \(2,\)"),
        (lambda x, p: x[:1].mean((1, 2, 3)), r"shape \(1,\): return \(2,\)"),
        (lambda x, p: [1.0, 2.0], "returned a list"),
        (lambda x, p: np.zeros(2), "returned a ndarray"),
        (lambda x, p: torch.tensor([0.5, float("nan")]), "'a cat': nan"),
        (lambda x, p: torch.tensor([float("-inf"), 0.5]), "'a dog': -inf"),
        (lambda x, p: 1 / 0, "failed with ZeroDivisionError"),
    ],
)
def test_a_wrong_answer_is_named(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CheckedReward(FunctionReward(function), "mine")(torch.rand(2, 3, 4, 4), TWO)


def test_answers_are_counted_and_in_fp32() -> None:
    checked = CheckedReward(FunctionReward(lambda x, p: torch.tensor([1, 2])), "whole")
    scores = checked(torch.rand(2, 3, 4, 4), TWO)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.0]
    checked(torch.rand(2, 3, 4, 4), TWO)
    assert checked.queries == 4


def test_gradient_only_where_declared() -> None:
    def mean(x: torch.Tensor, p: Prompts) -> torch.Tensor:
        return x.mean((1, 2, 3))

    media = torch.rand(2, 3, 4, 4, requires_grad=True)
    assert CheckedReward(diffalign.reward(differentiable=True)(mean), "yes")(media, TWO).requires_grad
    assert not CheckedReward(diffalign.reward(differentiable=False)(mean), "no")(media, TWO).requires_grad
    with torch.no_grad():
        assert not CheckedReward(diffalign.reward(differentiable=True)(mean), "yes")(media, TWO).requires_grad


def test_a_reward_that_writes_in_place_changes_nothing_else() -> None:
    media = torch.rand(2, 3, 4, 4)
    before = media.clone()
    CheckedReward(FunctionReward(lambda x, p: x.mul_(255).mean((1, 2, 3))), "greedy")(media, TWO)
    assert torch.equal(media, before)


def test_what_is_no_reward() -> None:
    for thing in (3, "shapes-clip", JPEGCompressibility):
        with pytest.raises(InputError, match="is no reward"):
            as_reward(thing)
    assert not as_reward(lambda x, p: x).differentiable


def test_every_row_says_what_its_class_says() -> None:
    """`list rewards` imports no reward: its words must be true all the same."""
    for name, row in registry.REWARDS.items():
        if name == "compose":
            assert row.facts == "as its parts", "which it cannot be made without: test_compose.py"
            continue
        module, _, attribute = row.target.partition(":")  # not `find`: a row whose extra is not installed must be true too
        served = {"remote": {"url": "http://127.0.0.1:8770"}, "judge": {"url": "http://127.0.0.1:8770/v1", "model": "a"}}.get(name, {})
        made = getattr(importlib.import_module(module), attribute)(**{**row.preset, **served})
        assert isinstance(made, Reward), name
        assert (row.facts == "differentiable") == made.differentiable, name
    for name, row in registry.METHODS.items():
        found, preset = registry.find("methods", name)
        found(**preset)
        assert (row.facts == "differentiable reward") == found.needs.differentiable_reward, name


def test_jpeg_size_is_that_of_the_file() -> None:
    flat, noise = torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)
    scores = JPEGCompressibility()(torch.stack([flat, noise]), TWO)
    file = io.BytesIO()
    Image.fromarray((noise.permute(1, 2, 0) * 255).round().byte().numpy()).save(file, format="JPEG", quality=95)
    assert scores[1] == pytest.approx(-len(file.getvalue()) / 1000)
    assert scores[0] > scores[1]
    assert torch.equal(JPEGCompressibility(sign=1)(noise[None], TWO[:1]), -scores[1:])
    with pytest.raises(InputError, match="sign is 0"):
        JPEGCompressibility(sign=0)
