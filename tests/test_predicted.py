"""DNSMOS and NISQA: how torchmetrics' functions are called, what is taken of their answers, and what is said where they fail."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.contract import CheckedReward
from diffalign.errors import InputError
from diffalign.rewards.predicted import DNSMOS, NISQA
from diffalign.types import Prompts

TWO = Prompts(("one", "two"), sample_rate=16000)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torchmetrics with two functions of the real ones' signatures (1.9.0), which answer what tells the columns apart; and their calls."""
    found: list[Any] = []

    def dnsmos(
        preds: Tensor, fs: int, personalized: bool, device: str | None = None, num_threads: int | None = None, cache_session: bool = True
    ) -> Tensor:
        found.append((tuple(preds.shape), fs, personalized, device))
        return torch.arange(4.0, dtype=torch.float64).expand(len(preds), 4) + preds.mean(1, keepdim=True)

    def nisqa(preds: Tensor, fs: int) -> Tensor:
        found.append((tuple(preds.shape), fs))
        return torch.arange(5.0).expand(len(preds), 5) + preds.mean(1, keepdim=True)

    for name, function in (
        ("dnsmos.deep_noise_suppression_mean_opinion_score", dnsmos),
        ("nisqa.non_intrusive_speech_quality_assessment", nisqa),
    ):
        module, _, attribute = name.partition(".")
        made = types.ModuleType(f"torchmetrics.functional.audio.{module}")
        setattr(made, attribute, function)
        for parent in ("torchmetrics", "torchmetrics.functional", "torchmetrics.functional.audio"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return found


def test_each_opinion_is_its_column(asked: list[Any]) -> None:
    media = torch.tensor([[0.25] * 100, [0.5] * 100])
    dnsmos: Any = DNSMOS
    nisqa: Any = NISQA
    for i, measure in enumerate(("p808", "signal", "background", "overall")):
        assert dnsmos(measure=measure)(media, TWO).tolist() == [i + 0.25, i + 0.5]
    assert DNSMOS(personalized=True)(media, TWO).dtype == torch.float32
    assert asked[-1] == ((1, 100), 16000, True, "cpu")
    for i, measure in enumerate(("overall", "noisiness", "discontinuity", "coloration", "loudness")):
        assert nisqa(measure=measure)(media, TWO).tolist() == [i + 0.25, i + 0.5]
    assert asked[-1] == ((1, 100), 48000)
    scores = CheckedReward(nisqa(), "nisqa")(media.requires_grad_(), TWO)
    assert not scores.requires_grad
    assert asked[-1] == ((1, 300), 48000)


def test_opening_asks_once(asked: list[Any]) -> None:
    DNSMOS().open()
    NISQA().open()
    assert asked == [((1, 16000), 16000, False, "cpu"), ((1, 48000), 48000)]


def test_what_fails_is_said(asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    module: Any = sys.modules["torchmetrics.functional.audio.nisqa"]
    monkeypatch.setattr(module, "non_intrusive_speech_quality_assessment", unreachable)
    with pytest.raises(InputError, match=r"nisqa does not open \(ConnectionError\).*from GitHub into ~/\.torchmetrics/NISQA"):
        NISQA().open()
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.audio.dnsmos", None)
    with pytest.raises(InputError, match=r"dnsmos needs packages that are not installed .*pip install 'diffalign\[speech-metrics\]'"):
        DNSMOS().open()
    makes: list[Any] = [DNSMOS, NISQA]
    for make in makes:
        with pytest.raises(InputError, match="has no tiny twin"):
            make().tiny(tmp_path)
        with pytest.raises(InputError, match="measure is mos: give"):
            make(measure="mos")
        with pytest.raises(InputError, match="takes numbers in"):
            make()(torch.full((2, 100), float("nan")), TWO)
