"""Every recipe of docs/recipes, trained through the command line on the tiny twin of its pipeline: none may rot."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import diffalign

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
WANTED = {  # (model, method) of which there must be a recipe
    *(("sd15", method) for method in ("draft", "ddpo", "refl", "alignprop", "dpok", "prdp", "diffusion-dpo")),
    *(("sdxl", method) for method in ("draft", "diffusion-dpo")),
    ("ip2p", "hive"),
    *(("sd35m", method) for method in ("flow-grpo", "draft")),
}
MODELS = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "StableDiffusionPipeline"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline"),
    "ip2p": ("timbrooks/instruct-pix2pix", "StableDiffusionInstructPix2PixPipeline"),
    "sd35m": ("stabilityai/stable-diffusion-3.5-medium", "StableDiffusion3Pipeline"),
}
CUT = {"batches", "samples", "forwards", "pretrain_batches", "inference_steps", "first", "last", "k"}  # by a dry run


def config_of(recipe: Path) -> dict[str, Any]:
    return yaml.safe_load(recipe.read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_trains_a_tiny_twin(recipe: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    outcome = run_cli("train", "--config", recipe, "--tiny", "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert "A dry run (tiny): random tiny weights in the place of" in outcome.err
    run, given = diffalign.load(tmp_path / "run"), config_of(recipe)
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert all(math.isfinite(value) for row in run.metrics for value in row.values())
    assert all(row["grad_norm"] > 0 for row in run.metrics)
    (lora,) = (tmp_path / "run" / "lora").glob("*.safetensors")
    weights = load_file(lora)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name or "lora.up" in name)  # they start at 0
    rewards = {
        given.get("reward") if isinstance(given.get("reward"), str | None) else given["reward"]["name"],
        *given.get("eval_rewards", []),
    }
    assert set(run.evaluation["rewards"]) == rewards - {None}
    assert run.config["tiny"] is True
    assert {name: run.config["method"][name] for name in given["method"].keys() - CUT} == {
        name: given["method"][name] for name in given["method"].keys() - CUT
    }
    kept = ("pipeline", "prompts", "data", "guidance_scale", "learning_rate", "weight_decay", "lr_schedule", "max_sequence_length")
    assert all(run.config[name] == given[name] for name in kept if name in given)
    assert {**run.config["lora"], **given["lora"]} == run.config["lora"]


def test_every_combination_has_its_recipe_and_every_name_says_what_it_is() -> None:
    found = set[tuple[str, str]]()
    for recipe in RECIPES:
        config = config_of(recipe)
        model, method = recipe.stem.partition("-")[0], config["method"]["name"]
        found.add((model, method))
        reward = config.get("reward") or config["data"]
        words = {"hps-v2": "hpsv2", "hf:yuvalkirstain/pickapic_v2": "pickapic"}
        reward = reward if isinstance(reward, str) else reward["name"]
        memory = recipe.stem.rpartition("-")[2]
        assert memory in ("16gb", "24gb", "80gb")
        assert recipe.stem == f"{model}-{method}-{words.get(reward, reward)}-{memory}"
        assert (config["pipeline"], config["pipeline_class"]) == MODELS[model]
    assert found == WANTED


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_comment_is_true_of_itself(recipe: Path) -> None:
    comment, config = "\n".join(line for line in recipe.read_text().splitlines() if line.startswith("#")), config_of(recipe)
    assert f"diffalign train --config docs/recipes/{recipe.name} " in comment
    assert re.search(r"arXiv \d{4}\.\d{5}", comment)
    assert f"{recipe.stem.rpartition('-')[2].removesuffix('gb')} GB, an estimate" in comment
    sizes = {"accumulate": config.get("accumulate", 1), **config["method"]}
    named = (
        [name for name in ("batches", "samples") if name in sizes] or [name for name in ("forwards",) if name in sizes] or ["accumulate"]
    )
    factors = [config["batch_size"], *(sizes[name] for name in named)]
    product = r" \w+ x ".join(map(str, factors)) + rf" \w+ = {math.prod(factors):,} "
    assert re.search(f"Batch   {product}", comment), product


def test_the_page_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| \[([\w.-]+)\]\(([\w.-]+)\.yaml\) \|.*\| (\d+) GB \|", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == [recipe.stem for recipe in RECIPES]
    assert all(name == link and name.endswith(f"-{memory}gb") for name, link, memory in rows)


def test_a_flag_names_another_reward_or_method_than_the_recipe(run_cli: Callable[..., Any]) -> None:
    """The recipe's fields of its own reward and method (precision, k) are not the other one's."""
    recipe = FOLDER / "sd15-draft-hpsv2-24gb.yaml"
    outcome = run_cli("train", "--config", recipe, "--reward", "jpeg-compressibility", "--method", "ddpo", "--print-config")
    assert outcome.status == 0, outcome.err
    shown = yaml.safe_load(outcome.out)
    assert (shown["reward"]["name"], shown["method"]["name"]) == ("jpeg-compressibility", "ddpo")
    assert "precision" not in shown["reward"]
    assert shown["method"]["inference_steps"] == 50
    assert shown["learning_rate"] == config_of(recipe)["learning_rate"], "the rest of the recipe stays"
