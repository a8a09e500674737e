"""What rewards of trained networks share: how pictures are prepared, chunks, and what is refused at the edge; and the twins' protocol."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from original_networks import smooth
from PIL import Image

from diffalign import registry
from diffalign.contract import CheckedReward, check_gradient
from diffalign.errors import InputError
from diffalign.media import to_pil, to_tensor
from diffalign.rewards.common import View, check_fields, in_chunks
from diffalign.types import LearnedReward, Prompts

TWO = Prompts(("a dog", "a cat"))
LEARNED = [name for name in registry.REWARDS if name.split("-")[0] in ("hps", "image", "pickscore", "clip", "aesthetic", "trained")]


def test_there_are_seven_learned_rewards_that_need_no_extra() -> None:
    assert sorted(LEARNED) == ["aesthetic", "clip", "hps-v2", "hps-v2.1", "image-reward", "pickscore", "trained"]


def twin(name: str, folder: Path, **fields: Any) -> Any:
    found, preset = registry.find("rewards", name)
    return found(**{**preset, **fields}).tiny(folder)


@pytest.mark.parametrize("name", LEARNED)
def test_every_learned_reward_has_a_twin_of_its_class_that_scores_with_a_gradient(name: str, tmp_path: Path) -> None:
    reward = twin(name, tmp_path, batch_size=3)
    assert all(isinstance(thing, LearnedReward) for thing in [reward])
    assert type(reward) is registry.find("rewards", name)[0]
    assert reward.batch_size == 3
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6e6
    checked = CheckedReward(reward, name)
    checked.open()
    pictures = smooth(2, 40, 64).requires_grad_()
    scores = checked(pictures, TWO)
    low, high = reward.range
    assert ((scores >= low) & (scores <= high)).all()
    assert torch.autograd.grad(scores.sum(), pictures)[0].any()
    assert reward.resolution == 224
    again = twin(name, tmp_path / "again", batch_size=3)
    assert torch.equal(again(pictures, TWO), scores)


@pytest.mark.parametrize("name", LEARNED)
def test_pictures_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    reward = twin(name, tmp_path)
    good = smooth(2, 40, 64)
    nan = good.clone()
    nan[1, 0, 3, 3] = float("nan")
    for pictures, says in (
        (good * 2 - 1, r"Pictures with pixels from -\d.*: this reward takes numbers in \[0, 1\]"),
        (good * 255, r"to 2\d\d.*takes numbers in \[0, 1\]"),
        (nan, "takes numbers in"),
        (good[:, :1], r"Pictures of shape \(2, 1, 40, 64\)"),
        (good[0], r"Pictures of shape \(3, 40, 64\)"),
        ((good * 255).byte(), "torch.uint8"),
        (good[:1], "1 pictures and 2 prompts"),
    ):
        with pytest.raises(InputError, match=says):
            reward(pictures, TWO)


def test_constructing_loads_nothing_and_checks_its_fields() -> None:
    for name in LEARNED:
        module, _, attribute = registry.REWARDS[name].target.partition(":")
        made = getattr(importlib.import_module(module), attribute)
        assert not {"towers", "judge", "networks"} & set(vars(made()))
        with pytest.raises(InputError, match="batch_size is 0: give 1 or more"):
            made(batch_size=0)
        with pytest.raises(InputError, match="precision is fp16: give fp32 or bf16"):
            made(precision="fp16")
    check_fields("bf16", 1)


@pytest.mark.parametrize("size", [(448, 448), (300, 401), (97, 60), (224, 225), (64, 64)])
@pytest.mark.parametrize("rounds", [True, False])
def test_the_crop_is_pillows_within_rounding(size: tuple[int, int], rounds: bool) -> None:
    picture = (smooth(1, *size) * 255).round() / 255
    height, width = size
    scaled = (224 if height <= width else int(224 * height / width), 224 if width <= height else int(224 * width / height))
    top, left = (round(x / 2) if rounds else x // 2 for x in (scaled[0] - 224, scaled[1] - 224))
    pillow = to_tensor(to_pil(picture[0]).resize((scaled[1], scaled[0]), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224)))
    found = View(rounds=rounds).fit(picture)[0].clamp(0, 1)
    assert found.shape == (3, 224, 224)
    assert (found - pillow).abs().max() <= 1.25 / 255  # Pillow rounds to 8 bits twice, once for each axis


@pytest.mark.parametrize("size", [(448, 448), (300, 401), (97, 60), (10, 2000), (224, 100)])
def test_the_pad_keeps_all_of_the_picture_in_the_middle(size: tuple[int, int]) -> None:
    ones = View(how="pad").fit(torch.ones(1, 3, *size))[0, 0]
    scale = 224 / max(size)
    height, width = (max(1, round(side * scale)) for side in size)
    top, left = (224 - height) // 2, (224 - width) // 2
    wanted = torch.zeros(224, 224)
    wanted[top : top + height, left : left + width] = 1
    assert torch.allclose(ones, wanted, atol=1e-5)


def test_the_squash_and_the_normalisation() -> None:
    view = View(32, "squash", "bilinear", (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    found = view(torch.full((1, 3, 10, 50), 0.75))
    assert found.shape == (1, 3, 32, 32)
    assert torch.allclose(found.amax((0, 2, 3)), torch.tensor([1.0, 0.5, 0.25]))
    assert torch.equal(View(40).fit(smooth(1, 40, 40)), smooth(1, 40, 40))


def test_chunks_and_their_graph() -> None:
    seen: list[int] = []

    def score(media: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(len(media))
        return (media**2).mean((1, 2, 3)) * weights

    media, weights = torch.rand(5, 3, 4, 4, requires_grad=True), torch.arange(5.0)
    scores = in_chunks(score, 2, media, weights)
    assert seen == [2, 2, 1]
    assert torch.allclose(torch.autograd.grad(scores.sum(), media)[0], 2 * media / 48 * weights.view(-1, 1, 1, 1))
    assert sorted(seen[3:]) == [1, 2, 2]  # each once more on the way back
    seen.clear()
    in_chunks(score, 2, media.detach(), weights)
    in_chunks(score, 5, media, weights).sum().backward()
    assert seen == [2, 2, 1, 5]


def test_the_engine_finds_the_gradient(tmp_path: Path) -> None:
    import tiny as pipelines

    from diffalign.models import make_policy
    from diffalign.settings import Settings

    policy = make_policy(Settings(), pipelines.stable_diffusion(), train=False)
    check_gradient(twin("hps-v2", tmp_path), "hps-v2", policy, TWO)


SMALL = (
    "--lr-schedule",
    "constant",
    "--batch-size",
    2,
    "--eval-size",
    2,
    "--sample-steps",
    2,
    "--sample-every",
    100,
    "--checkpoint-every",
    1,
)


def flags(folder: Path) -> list[object]:
    """Those of a twin of HPS v2.1 in `folder`."""
    reward = twin("hps-v2.1", folder)
    return ["--reward", "hps-v2.1", "--reward.checkpoint", reward.checkpoint, "--reward.tokenizer", folder]


def test_a_training_on_local_files_and_its_resumption(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    words = ["--method", "draft", *flags(tmp_path), "--reward.batch-size", 1, *SMALL]
    assert run_cli("train", *words, "--steps", 2, "--output", "whole").status == 0
    assert run_cli("train", *words, "--steps", 1, "--output", "parts").status == 0
    outcome = run_cli("train", "--resume", "parts", "--steps", 2)
    assert outcome.status == 0, outcome.err
    rows = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("whole", "parts")]
    assert [row["reward"] for row in rows[0]] == [row["reward"] for row in rows[1]]
    assert all(row["grad_norm"] > 0 for row in rows[0])
    weights = [(tmp_path / run / "lora" / "pytorch_lora_weights.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["reward"]
    assert config == {
        "name": "hps-v2.1", "version": "v2.1", "checkpoint": str(tmp_path / "HPS_v2.1_compressed.pt"), "tokenizer": str(tmp_path),
        "revision": "main", "sha256": None, "precision": "fp32", "batch_size": 1, "backend": "native",
    }  # fmt: skip


def test_what_is_wrong_with_a_reward_is_said_before_a_model_is_loaded(
    tmp_path: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = flags(tmp_path)
    whole = (tmp_path / "HPS_v2.1_compressed.pt").read_bytes()
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(whole[:9000])

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr("diffalign.models.load_pipeline", loaded)
    for command in (("train", "--method", "ddpo", "--output", "run"), ("check",), ("pairs", "--output", "pairs", "--prompts", "shapes")):
        outcome = run_cli(*command, *words)
        assert outcome.status == 2, command
        assert "HPS_v2.1_compressed.pt is damaged or cut short" in outcome.err
        assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_score_takes_the_rewards_fields(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    to_pil(smooth(1, 60, 40)[0]).save(tmp_path / "a.png")
    outcome = run_cli("score", "a.png", *flags(tmp_path), "--reward.precision=bf16", "--prompt", "a dog")
    assert outcome.status == 0, outcome.err
    reward = twin("hps-v2.1", tmp_path, precision="bf16")
    wanted = float(reward(to_tensor(Image.open(tmp_path / "a.png"))[None], Prompts(("a dog",))))
    assert float(outcome.out.split("\t")[0]) == pytest.approx(wanted, rel=1e-5)
    for words, says in (
        (["--reward.presicion", "bf16"], "There is no setting 'reward.presicion'. Did you mean 'reward.precision'?"),
        (["--reward.precision", "fp8"], "reward.precision is fp8: give fp32 or bf16."),
    ):
        outcome = run_cli("score", "a.png", "--reward", "hps-v2.1", *words)
        assert outcome.status == 2
        assert says in outcome.err


def test_the_list_says_what_is_not_installed(run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines = run_cli("list", "rewards").out.splitlines()
    (line,) = [line for line in lines if line.startswith("open-clip ")]
    assert line.endswith("(not installed: pip install 'diffalign[open-clip]')")
    assert all(any(line.startswith(name + " ") for line in lines) for name in LEARNED)
    with pytest.raises(InputError, match=r"pip install 'diffalign\[open-clip\]'"):
        registry.find("rewards", "open-clip")
