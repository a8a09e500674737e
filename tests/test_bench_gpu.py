"""The GPU benchmark: networks of the released models' size, and its whole code on tiny ones."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_gpu.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def millions(module: Any) -> float:
    """Of weights, and of the positions that SD3 keeps with them."""
    return sum(p.numel() for p in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]) / 1e6


# Millions of numbers of network, VAE, text encoders; and 10^12 multiplications of weights in the network's forward on one picture, which
# profilers give as 339 GMAC for Stable Diffusion 1.5 and 2.99 TMAC for SDXL.
KNOWN = {
    "sd15": (859.52, 83.65, [123.06], 0.339),
    "sdxl": (2567.46, 83.65, [123.06, 694.66], 2.99),
    "sd3": (2084.95, 83.82, [123.65, 694.66], None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_networks_have_the_released_models_size(name: str, bench: Any):
    network, vae, texts, tmac = KNOWN[name]
    pipe = bench.build(bench.MODELS[name], "meta")
    main = pipe.components.get("unet") or pipe.transformer
    assert millions(main) == pytest.approx(network, abs=0.01)
    assert millions(pipe.vae) == pytest.approx(vae, abs=0.01)
    encoders = [pipe.text_encoder] + ([pipe.text_encoder_2] if len(texts) > 1 else [])
    assert [millions(encoder) for encoder in encoders] == pytest.approx(texts, abs=0.01)
    if tmac is None:
        return
    side, width = main.config.sample_size, main.config.cross_attention_dim
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)} if name == "sdxl" else None
        main(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, 77, width), added_cond_kwargs=added)
    flops = {str(operation): n / 1e12 for operation, n in counter.get_flop_counts()["Global"].items()}
    attention = flops.pop("aten.bmm")
    assert sum(flops.values()) / 2 == pytest.approx(tmac, rel=0.005)
    assert 0.1 < attention / sum(flops.values()) < 0.2


def test_every_cell_runs_on_tiny_networks(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "device_of", lambda settings: torch.device("cpu"))  # also where there is a GPU
    assert bench.main(["--tiny", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "bench-gpu.json").read_text())
    rows = {(row["model"], row["task"]): row for row in report["rows"]}
    assert set(rows) == {(model, task) for model in bench.MODELS for task in bench.TASKS}
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(row["pictures"] / row["step_seconds"])
        assert row["share"] == pytest.approx(row["tflop"] / row["step_seconds"] / report["matrix_tflop_per_second"])
        assert row["peak_memory_gb"] > 0
    for model in bench.MODELS:
        sampled, trained = (rows[model, task]["tflop"] for task in ("sampling", "ddpo"))
        assert 2 < trained / sampled < 4, "a sample's network calls once more, with their backward passes"
    text = (tmp_path / "out" / "bench-gpu.md").read_text()
    assert text.count("| Stable Diffusion") == len(rows)


def test_a_cell_that_does_not_fit_is_said_and_the_next_one_runs(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "device_of", lambda settings: torch.device("cpu"))
    whole = bench.train

    def full(training: Any, policy: Any, method: Any, *others: Any) -> Any:
        if type(method).__name__ == "DRaFT":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(training, policy, method, *others)

    monkeypatch.setattr(bench, "train", full)
    assert bench.main(["--tiny", "--models", "sd15", "--tasks", "draft", "diffusion-dpo", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench-gpu.json").read_text())["rows"]
    assert rows[0]["error"] == "out of memory"
    assert rows[1]["images_per_second"] > 0
    assert "out of memory" in (tmp_path / "bench-gpu.md").read_text()


def test_true_size_wants_a_gpu(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bench, "device_of", lambda settings: torch.device("cpu"))
    with pytest.raises(SystemExit) as stop:
        bench.main([])
    assert stop.value.code == 2
    assert "want a GPU" in capsys.readouterr().err
