"""docs/examples, as they stand there, with few steps: what a person would paste runs. The notebook's cells are executed in their order."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import diffalign

FOLDER = Path(diffalign.__file__).parents[1] / "docs" / "examples"
FEW: dict[str, Any] = {"steps": 1, "batch_size": 2, "inference_steps": 2, "k": 1, "sample_steps": 2, "eval_size": 2, "sample_every": 9}
SCRIPTS = ["live_pipeline.py", "mix_two_rewards.py"]
PLUGINS = {"own_reward.py": "colourful", "own_method.py": "WorstFirst"}
NOTEBOOK = "shapes.ipynb"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The examples' own calls, with the least that trains."""
    align, draw = diffalign.align, StableDiffusionPipeline.__call__
    monkeypatch.setattr(diffalign, "align", lambda *given, **named: align(*given, **{**named, **FEW}))
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda *given, **named: draw(*given, **{**named, "num_inference_steps": 2}))
    monkeypatch.chdir(tmp_path)


def test_every_example_is_run_here_and_in_the_index() -> None:
    found = {file.name for file in FOLDER.iterdir()} - {"README.md", "__pycache__"}
    assert found == {*SCRIPTS, *PLUGINS, NOTEBOOK}
    index = (FOLDER / "README.md").read_text()
    assert all(f"[{name}]({name})" in index for name in found)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    left = runpy.run_path(str(FOLDER / name), run_name="__main__")
    if name == "live_pipeline.py":
        run = left["run"]
        assert left["pipe"] is run.pipeline
        assert len(list(run.path.glob("before-*.png"))) == len(list(run.path.glob("after-*.png"))) == 4
        assert any(a.tobytes() != b.tobytes() for a, b in zip(left["before"], left["after"], strict=True))
    else:
        assert (left["both"].path / "scaled-and-mixed.png").is_file()
        assert left["both"].merged["runs"][1] == {"run": str(left["colour"].path.resolve()), "weight": 0.5}
        assert left["columns"][0][0].tobytes() != left["columns"][2][0].tobytes() != left["columns"][-1][0].tobytes()
        half = left["draw"]([0.5, 0.5])
        pipe = left["both"].pipeline  # the one LoRA that was merged makes the pictures of the two side by side
        noise = torch.Generator().manual_seed(0)
        theirs = pipe(left["PROMPTS"] * 2, num_inference_steps=10, guidance_scale=1.0, generator=noise, output_type="pt").images
        ours = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(32, 32, 3) for p in half]) / 255
        torch.testing.assert_close(theirs, ours.movedim(-1, 1), rtol=0, atol=1.5 / 255)


def test_the_reward_and_the_method_train_a_model(files: Path, tmp_path: Path) -> None:
    reward, method = (f"{FOLDER / file}:{name}" for file, name in PLUGINS.items())
    given = {"reward": reward, "prompts": files / "prompts.txt", "output": tmp_path / "run"}
    FEW_HERE = {key: value for key, value in FEW.items() if key != "k"}
    run = diffalign.api.align(str(files / "model"), method=method, share=0.5, **given, **FEW_HERE)
    (row,) = run.metrics
    assert row["grad_norm"] > 0
    assert row["reward_worst"] < row["reward"]
    assert row["loss"] == pytest.approx(-row["reward_worst"])
    assert set(run.evaluation["rewards"]) == {"colourful"}
    with pytest.raises(diffalign.InputError, match=r"method.share is nan: give a number above 0, and at most 1"):
        diffalign.api.align(str(files / "model"), method=method, share=float("nan"), **given)


def test_colourful_is_hasler_and_suesstrunks() -> None:
    """A picture half red, half blue: rg is 1 and 0, yb 1/2 and -1, worked out by hand."""
    colourful = runpy.run_path(str(FOLDER / "own_reward.py"))["colourful"]
    picture = torch.zeros(1, 3, 2, 4)
    picture[:, 0, 0], picture[:, 2, 1] = 1.0, 1.0
    spread = (0.25 + 0.5625) * 8 / 7  # variances of 8 pixels
    mean = 0.5**2 + 0.25**2
    assert float(colourful(picture, None)) == pytest.approx(spread**0.5 + 0.3 * mean**0.5, abs=1e-5)
    grey = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    colourful(grey, None).sum().backward()
    assert grey.grad is not None
    assert bool(grey.grad.isfinite().all())


def test_the_notebook_is_one_and_its_cells_run(tmp_path: Path) -> None:
    text = (FOLDER / NOTEBOOK).read_text()
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"code", "markdown"}
    assert len(text) < 200_000
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    left: dict[str, Any] = {"__name__": "__main__"}
    for cell in code:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), left)
    assert left["further"].merged["extrapolate"] == 0.5
    assert set(left["found"]) == {"shapes-clip", "shapes-all-right"}
