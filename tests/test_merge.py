"""`diffalign merge`: the merged network is the base network plus the weighted sum of the updates, and a run like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from parity import own_pictures, policy_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

import diffalign
from diffalign import bare, low_rank
from diffalign.checkpoint import whole_by_one
from diffalign.errors import InputError
from diffalign.lora import WEIGHTS, LoRA
from diffalign.low_rank import Factors
from diffalign.models import network_of
from diffalign.pipelines.tiny_sound import longcat_audio

CONVOLUTIONS = ["to_q", "to_out.0", "conv1", "conv_shortcut", "conv_in"]
LORAS = [LoRA(rank=2, alpha=5), LoRA(rank=3, alpha=3), LoRA(rank=1, alpha=4)]


def written(make: Callable[[], Any], lora: LoRA, seed: int, folder: Path) -> Path:
    """A LoRA of random numbers on the pipeline, as a run's lora/."""
    policy = policy_of(make(), lora)
    rng = Generator().manual_seed(seed)
    for p in (p for p in policy.module.parameters() if p.requires_grad):
        p.data = 0.15 * torch.randn(p.shape, generator=rng)
    policy.save(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / (WEIGHTS if (folder / WEIGHTS).is_file() else bare.WEIGHTS))


def moved(network: nn.Module, terms: list[tuple[float, LoRA, Path]]) -> nn.Module:
    """The network with each layer's weight plus `sum_i w_i alpha_i / r_i B_i A_i`, straight from the files."""
    for weight, lora, folder in terms:
        found = tensors_of(folder)
        prefix = bare.PREFIX if (folder / bare.WEIGHTS).is_file() else next(iter(found)).partition(".")[0] + "."
        for name, a in found.items():
            if name.endswith("lora_A.weight"):
                b = found[name.replace("lora_A", "lora_B")]
                target: Any = network.get_submodule(name.removeprefix(prefix).removesuffix(".lora_A.weight")).weight
                scale = weight * (lora.alpha or lora.rank) / lora.rank
                target.data += scale * torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).reshape(target.shape)
    return network


def summed(terms: list[tuple[float, LoRA, Path]], folder: Path, rank: int | None = None) -> Path:
    updates = [(weight, low_rank.read(source)) for weight, _, source in terms]
    first = updates[0][1]
    layers = {name: low_rank.add([(weight, update.layers[name]) for weight, update in updates]) for name in first.layers}
    if rank is not None:
        layers = {name: low_rank.truncate(factors, rank)[0] for name, factors in layers.items()}
    low_rank.write(folder, low_rank.Update(layers, first.component, first.settings), {"runs": []})
    return folder


# The arithmetic, against the closed form


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny.stable_diffusion, CONVOLUTIONS),
        (tiny.sd3, None),
        (tiny.flux, None),
        (tiny.z_image, None),
    ],
    ids=["stable diffusion, convolutions", "sd3", "flux", "z-image"],
)
@torch.no_grad()
def test_plain_diffusers_loads_the_weighted_sum(make: Any, targets: list[str] | None, tmp_path: Path) -> None:
    loras = [LoRA(rank=lora.rank, alpha=lora.alpha, target_modules=targets) for lora in LORAS]
    folders = [written(make, lora, seed, tmp_path / str(seed)) for seed, lora in enumerate(loras)]
    terms = list(zip((0.75, -0.5, 1.25), loras, folders, strict=True))
    merged, plain, closed = summed(terms, tmp_path / "sum"), make(), make()
    plain.load_lora_weights(merged)
    component = network_of(closed)
    moved(getattr(closed, component), terms)
    policy = policy_of(make())
    theirs, expected = own_pictures(policy, pipe=plain), own_pictures(policy, pipe=closed)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-4)
    assert (expected - own_pictures(policy, pipe=make())).abs().max() > 1e-2
    assert {tensor.shape[0] for name, tensor in tensors_of(merged).items() if "lora_A" in name} == {2 + 3 + 1}
    plain.fuse_lora()
    weights = {
        name.replace(".base_layer", ""): value for name, value in getattr(plain, component).named_parameters() if "lora_" not in name
    }
    for name, value in getattr(closed, component).named_parameters():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


@torch.no_grad()
def test_peft_loads_the_weighted_sum_of_loras_of_sound(tmp_path: Path) -> None:
    from peft import PeftModel

    folders = [written(longcat_audio, lora, seed, tmp_path / str(seed)) for seed, lora in enumerate(LORAS)]
    terms = list(zip((0.75, -0.5, 1.25), LORAS, folders, strict=True))
    base, closed = (longcat_audio().transformer for _ in "12")
    before = {name: value.clone() for name, value in base.named_parameters()}
    moved(closed, terms)
    loaded: Any = PeftModel.from_pretrained(base, str(summed(terms, tmp_path / "sum"))).merge_and_unload()
    weights = dict(loaded.named_parameters())
    for name, value in closed.named_parameters():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
    assert max((value - before[name]).abs().max() for name, value in closed.named_parameters()) > 0.1


@torch.no_grad()
def test_the_sum_is_pefts_cat_and_not_its_linear(tmp_path: Path) -> None:
    """peft adds up the products with combination_type cat, and with linear the factors, which is another update."""
    from peft import LoraConfig, get_peft_model

    rng = Generator().manual_seed(0)
    network = nn.ModuleDict({"line": nn.Linear(5, 4), "conv": nn.Conv2d(3, 6, 3)})
    model: Any = get_peft_model(network, LoraConfig(r=2, lora_alpha=5, target_modules=["line", "conv"]), "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=3, target_modules=["line", "conv"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=rng)
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(["one", "two"], [0.75, -0.5], kind, combination_type=kind)
    for name in network:
        layer = model.get_submodule(f"base_model.model.{name}")
        parts = [(weight, Factors(2.5 * scale * layer.lora_B[one].weight.double(), layer.lora_A[one].weight.double()))
                 for weight, one, scale in ((0.75, "one", 1.0), (-0.5, "two", 0.6))]  # fmt: skip
        ours = low_rank.add(parts).delta().float()
        torch.testing.assert_close(ours, layer.get_delta_weight("cat"), rtol=0, atol=1e-5)
        assert (ours - layer.get_delta_weight("linear")).abs().max() > 0.5


@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3, 3), (3, 9)], ids=["linear", "convolution", "narrow"])
def test_the_cut_is_the_truncated_svd_and_says_what_is_lost(shape: tuple[int, ...]) -> None:
    rng = Generator().manual_seed(1)
    up = torch.randn((shape[0], 4, *(1 for _ in shape[2:])), generator=rng, dtype=torch.float64)
    factors = Factors(up, torch.randn((4, *shape[1:]), generator=rng, dtype=torch.float64))
    whole = factors.delta().flatten(1)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    for rank in (1, 2, 3):
        cut, error, norm = low_rank.truncate(factors, rank)
        assert cut.rank == rank
        assert cut.down.shape[1:] == factors.down.shape[1:]
        torch.testing.assert_close(cut.delta().flatten(1), (u[:, :rank] * s[:rank]) @ v[:rank], rtol=0, atol=1e-10)
        assert error == pytest.approx(float(((whole - cut.delta().flatten(1)) ** 2).sum()), abs=1e-10)
        assert norm == pytest.approx(float((whole**2).sum()))
    torch.testing.assert_close(low_rank.truncate(factors, 4)[0].delta(), factors.delta(), rtol=0, atol=1e-10)


def test_layers_of_several_ranks_and_alphas_of_a_lora_made_elsewhere(tmp_path: Path) -> None:
    """alpha_pattern, rank_pattern and rslora's root, as peft scales them."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, names = tiny.stable_diffusion(), ["to_q", "to_k"]
    config = LoraConfig(
        r=2, lora_alpha=4, alpha_pattern={"attn1.to_q": 1}, rank_pattern={"to_k": 3}, target_modules=names, use_rslora=True
    )  # fmt: skip
    pipe.unet.add_adapter(config)
    for name, p in pipe.unet.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape)
    layers, told = get_peft_model_state_dict(pipe.unet), {**config.to_dict(), "target_modules": names}
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=told)
    update = low_rank.read(tmp_path)
    rank = low_rank.write(tmp_path / "again", update, {})
    assert rank == 3
    for folder in (tmp_path, tmp_path / "again"):
        found = low_rank.read(folder)
        for name, layer in pipe.unet.named_modules():
            if name in found.layers:
                torch.testing.assert_close(found.layers[name].delta().float(), layer.get_delta_weight("default"), rtol=0, atol=1e-5)
    assert len(update.layers) > 4


# Runs

BRIGHT = """import diffalign

@diffalign.reward(differentiable=True)
def bright(images, prompts):
    return images.mean((1, 2, 3))
"""
LAYERS = ["to_q", "to_v", "conv1"]
ONE, TWO = LoRA(rank=2, alpha=6.0), LoRA(rank=3)


def trained(files: Path, output: Path, reward: str, **given: Any) -> Path:
    small: dict[str, Any] = {"steps": 1, "batch_size": 2, "inference_steps": 2, "k": 1, "eval_size": 0, "learning_rate": 0.05}
    return diffalign.align(
        str(files / "model"), reward=reward, prompts=files / "prompts.txt", output=output, **{**small, "guidance_scale": 2.0, **given}
    ).path  # fmt: skip


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ on red, two/ of another rank on another reward."""
    folder, red = tmp_path_factory.mktemp("runs"), f"{files / 'rewards.py'}:red"
    (folder / "bright.py").write_text(BRIGHT)
    trained(files, folder / "one", red, lora={"rank": 2, "alpha": 6.0, "target_modules": LAYERS})
    bright = f"{folder / 'bright.py'}:bright"
    trained(files, folder / "two", bright, lora={"rank": 3, "target_modules": LAYERS}, guidance_scale=3.0)
    return folder


@torch.no_grad()
def weights_of(pipe: Any) -> dict[str, Tensor]:
    if hasattr(pipe.unet, "peft_config"):
        pipe.fuse_lora()
    return {name.replace(".base_layer", ""): value for name, value in pipe.unet.named_parameters() if "lora_" not in name}


def assert_is(run: Path, files: Path, terms: list[tuple[float, LoRA, Path]]) -> None:
    """The run's pipeline has the base model's weights plus the sum of these updates."""
    from diffusers import StableDiffusionPipeline

    base: Any = StableDiffusionPipeline.from_pretrained(files / "model")
    before = {name: value.clone() for name, value in base.unet.named_parameters()}
    expected = dict(moved(base.unet, [(w, lora, folder / "lora") for w, lora, folder in terms]).named_parameters())
    assert max((expected[name] - before[name]).abs().max() for name in before) > 1e-2
    for name, value in weights_of(diffalign.load(run).pipeline).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_a_merged_run_is_a_run(runs: Path, files: Path, run_cli: Any, tmp_path: Path) -> None:
    one, two, both = runs / "one", runs / "two", tmp_path / "both"
    outcome = run_cli("merge", one, two, "--weights", "0.75", "-0.5", "--output", both)
    assert (outcome.status, outcome.out.strip()) == (0, str(both)), outcome.err
    assert "+0.75 one -0.5 two" in outcome.err
    assert f"{two} was sampled with guidance_scale 3.0: here it is as {one} has it." in outcome.err
    assert_is(both, files, [(0.75, ONE, one), (-0.5, TWO, two)])
    config = yaml.safe_load((both / "config.yaml").read_text())
    red, bright = (diffalign.load(run).config["reward"]["name"] for run in (one, two))
    runs_of = [{"run": str(one), "weight": 0.75}, {"run": str(two), "weight": -0.5}]
    assert config["merged"] == {"runs": runs_of, "methods": ["draft"], "rewards": [red, bright]}
    assert (config["lora"]["rank"], config["lora"]["alpha"], config["guidance_scale"]) == (5, 5.0, 2.0)
    with safe_open(both / "lora" / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["diffalign"]) == {"runs": [["one", 0.75], ["two", -0.5]]}

    outcome = run_cli("eval", both, "--limit", 1)
    assert outcome.status == 0, outcome.err
    assert set(diffalign.load(both).evaluation["rewards"]) == {"red", "bright"}
    outcome = run_cli("sample", both, "--prompt", "a red dog", "--lora-scale", "0.5")
    assert outcome.status == 0, outcome.err
    outcome = run_cli("compare", one, both, "--limit", 1, "--output", tmp_path / "compared")
    assert outcome.status == 0, outcome.err
    first, second = json.loads((tmp_path / "compared" / "compare.json").read_text())["runs"]
    assert (first["method"], second["method"], second["steps"], second["seconds"]) == ("draft", "merge", 0, None)
    assert second["kl_to_base"] > 0
    assert run_cli("export", both).status == 0

    assert policy_of(tiny.stable_diffusion(), LoRA(init=str(both / "lora"))).module.peft_config["default"].r == 5
    again = diffalign.merge([both, one], [2, 0.5], output=tmp_path / "again").path
    assert_is(again, files, [(2.0, ONE, one), (-1.0, TWO, two)])  # 2 x 0.75 + 0.5

    outcome = run_cli("train", "--resume", both)
    assert outcome.status == 2
    assert f"was merged, and no training of it can go on. Begin one: --lora.init {both / 'lora'}" in outcome.err
    outcome = run_cli("train", "--config", both / "config.yaml")
    assert outcome.status == 2
    assert "is of a merged run, which no training makes" in outcome.err


def test_expo(runs: Path, files: Path, run_cli: Any, tmp_path: Path) -> None:
    """theta_1 + a (theta_1 - theta_0): over the base model a LoRA times 1 + a, and away from another run."""
    one, two = runs / "one", runs / "two"
    assert run_cli("merge", one, "--extrapolate", 0.5, "--output", "over").status == 0
    assert_is(tmp_path / "over", files, [(1.5, ONE, one)])
    assert run_cli("merge", two, "--extrapolate", 0.5, "--from", one, "--output", "away").status == 0
    assert_is(tmp_path / "away", files, [(1.5, TWO, two), (-0.5, ONE, one)])
    told = diffalign.load(tmp_path / "away").config["merged"]
    assert (told["runs"], told["extrapolate"]) == ([{"run": str(two), "weight": 1.5}, {"run": str(one), "weight": -0.5}], 0.5)
    assert told["methods"] == ["draft", "expo"]
    diffalign.merge([one, two], [0.5, 0.25], extrapolate=1.0, output=tmp_path / "mean")
    assert_is(tmp_path / "mean", files, [(1.0, ONE, one), (0.5, TWO, two)])


def test_a_cut_says_what_is_lost_and_a_rank_that_is_no_cut_is_exact(runs: Path, files: Path, run_cli: Any, tmp_path: Path) -> None:
    one, two = runs / "one", runs / "two"
    outcome = run_cli("merge", one, two, "--weights", 1, 1, "--rank", 2, "--output", "cut")
    assert outcome.status == 0, outcome.err
    exact = diffalign.merge([one, two], [1, 1], rank=64, output=tmp_path / "exact")
    assert exact.merged is not None
    assert (exact.merged["rank"], "lost" in exact.merged) == (64, False)
    assert_is(tmp_path / "exact", files, [(1.0, ONE, one), (1.0, TWO, two)])
    whole, cut = (low_rank.read(tmp_path / name / "lora").layers for name in ("exact", "cut"))
    error = sum(float(((whole[name].delta() - cut[name].delta()) ** 2).sum()) for name in whole)
    norm = sum(float((whole[name].delta() ** 2).sum()) for name in whole)
    assert {factors.rank for factors in cut.values()} == {2}
    lost = diffalign.load(tmp_path / "cut").config["merged"]["lost"]
    assert lost == pytest.approx(error / norm, rel=1e-4)
    assert 0.001 < lost < 1
    assert f"loses {lost:.2%} of the update's squared norm" in outcome.err


def test_a_weight_of_zero_costs_no_rank_and_the_first_run_stays_the_first(runs: Path, files: Path, tmp_path: Path) -> None:
    run = diffalign.merge([runs / "one", runs / "two"], [0, 1], output=tmp_path / "run")
    assert_is(run.path, files, [(1.0, TWO, runs / "two")])
    assert (run.config["lora"]["rank"], run.config["guidance_scale"]) == (3, 2.0)


def test_one_process_at_a_time_writes_a_folder(runs: Path, tmp_path: Path) -> None:
    with whole_by_one(tmp_path / "run"), pytest.raises(InputError, match="run is being written by another process"):
        diffalign.merge([runs / "one"], output=tmp_path / "run")
    assert diffalign.merge([runs / "one"], output=tmp_path / "again").lora_folder.is_dir()


def test_an_empty_text_is_seen_in_what_is_said(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(runs, tmp_path / "other", negative_prompt="")
    diffalign.merge([runs / "one", other], [1, 1], output=tmp_path / "run")
    assert f"{other} was sampled with negative_prompt '': here it is as" in capsys.readouterr().err


def test_a_reward_that_its_name_does_not_tell_is_left_out_of_the_evaluation(runs: Path, tmp_path: Path, capsys: Any) -> None:
    told = {"name": "shapes-clip", "folder": None}
    others = [changed(runs, tmp_path / "told", reward=told), changed(runs, tmp_path / "own", reward={**told, "folder": "/a/clip"})]
    others += [
        changed(runs, tmp_path / "live", reward={"name": "live object"}),
        changed(runs, tmp_path / "gone", reward={"name": "x.py:y"}),
    ]
    run = diffalign.merge([runs / "one", *others], [1] * 5, output=tmp_path / "run")
    assert run.config["eval_rewards"] == ["shapes-clip"]
    assert run.config["reward"] == diffalign.load(runs / "one").config["reward"]
    names = f"shapes-clip of {others[1]}, live object of {others[2]}, x.py:y of {others[3]}."
    assert f"their names alone do not say what they are: {names}" in capsys.readouterr().err


def test_prompts_that_another_run_was_trained_on_are_not_held_out(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    for name, held, train in (("one", "abcd", "efgh"), ("other", "efgh", "ab")):
        folder = shutil.copytree(runs / "one", tmp_path / name)
        for part, texts in (("heldout", held), ("train", train)):
            (folder / "prompts" / f"{part}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    run = diffalign.merge([tmp_path / "one", other], [1, 1], output=tmp_path / "run")
    assert run.read_prompts("heldout") == ["c", "d"]
    assert "Left out of 4 held-out prompts: 2 that another of the runs was trained on." in capsys.readouterr().err
    (other / "prompts" / "train.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcd"))
    assert diffalign.merge([tmp_path / "one", other], [1, 1], output=tmp_path / "all").read_prompts("heldout") == list("abcd")
    assert "trained on all of the first one's held-out prompts" in capsys.readouterr().err


def test_a_run_of_sound_is_merged_and_evaluated(run_cli: Any, tmp_path: Path) -> None:
    flags = ["--pipeline", "nobody/nothing", "--pipeline-class", "LongCatAudioDiTPipeline", "--tiny", "--lora.rank", 2, "--lora.alpha", 3]
    flags += ["--prompts", "hf:nobody/nothing/p.jsonl", "--reward", "loudness", "--learning-rate", "0.01"]
    assert run_cli("train", *flags, "--output", "one").status == 0
    outcome = run_cli("merge", "one", "one", "--weights", "0.5", "1", "--output", "sum")
    assert outcome.status == 0, outcome.err
    network, closed = (longcat_audio().transformer for _ in "12")
    bare.load(network, tmp_path / "sum" / "lora")
    moved(closed, [(1.5, LoRA(rank=2, alpha=3), tmp_path / "one" / "lora")])
    for name, module in closed.named_modules():
        layer: Any = network.get_submodule(name) if name else network
        if "default" in getattr(layer, "lora_A", {}):
            found = layer.base_layer.weight + layer.get_delta_weight("default")
            torch.testing.assert_close(found, module.weight, rtol=0, atol=1e-6)
    outcome = run_cli("eval", "sum", "--limit", 1)
    assert outcome.status == 0, outcome.err


def test_the_page_and_the_comparison_of_a_merged_run(runs: Path, run_cli: Any, tmp_path: Path) -> None:
    one, two, both = runs / "one", runs / "two", tmp_path / "both"
    diffalign.merge([one, two], [0.75, -0.5], rank=2, output=both)
    assert run_cli("report", both).status == 0
    page = (both / "report.html").read_text()
    for words in (
        "merged, not trained",
        "What was merged",
        ">+0.75<",
        ">-0.5<",
        "cut to rank 2, which loses",
        "made by draft, on red, bright",
    ):
        assert words in page, words
    for words in (">unfinished", "train --config", "train --resume", "No pictures", "draft on ", "Nothing was logged"):
        assert words not in page, words
    command = f"diffalign merge {one} {two} --weights 0.75 -0.5 --rank 2 --output NEW"
    assert command in page
    assert run_cli(*command.split()[1:]).status == 0
    for name, value in tensors_of(both / "lora").items():
        torch.testing.assert_close(tensors_of(tmp_path / "NEW" / "lora")[name], value, rtol=0, atol=0)
    assert run_cli("compare", one, both, "--limit", 0, "--output", "out").status == 0
    compared = (tmp_path / "out" / "compare.html").read_text()
    assert "one x 0.75, two x -0.5" in compared
    assert str(runs / "two") not in compared.partition('id="differ"')[2].replace(str(runs / "two.py"), "")
    shutil.rmtree(both / "lora")
    outcome = run_cli("compare", both, "--limit", 0)
    assert (outcome.status, "is unfinished" in outcome.err, "diffalign merge" in outcome.err) == (2, True, True)


def test_the_commit_of_the_base_model(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, also, b = (changed(runs, tmp_path / n, versions={"base_commit": commit}) for n, commit in (("a", "c0"), ("also", "c0"), ("b", "c1")))
    kept = diffalign.merge([a, also], [1, 1], output=tmp_path / "kept")
    assert kept.config["versions"]["base_commit"] == "c0"
    with pytest.raises(InputError, match=rf"LoRAs of different commits of .*: {a} at commit c0; {b} at commit c1. Give runs of one"):
        diffalign.merge([a, b], [1, 1], output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    capsys.readouterr()
    run = diffalign.merge([a, runs / "one"], [1, 1], output=tmp_path / "unknown")
    assert "base_commit" not in run.config["versions"]
    assert f"is not known of {runs / 'one'}: others are of c0" in capsys.readouterr().err


# What cannot be merged


def changed(runs: Path, folder: Path, **config: Any) -> Path:
    """one/ with other settings."""
    shutil.copytree(runs / "one", folder)
    told = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**told, **config}))
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "lora" / WEIGHTS
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    save_file(change(load_file(file)), file, told)
    return folder


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "There are no runs to merge"),
        (["ONE", "TWO"], r"2 runs need a weight each: --weights 0.5 0.5 is their mean"),
        (["ONE", "TWO", "--weights", 1], r"1 weights for 2 runs: give --weights one for each"),
        (["ONE", "TWO", "--weights", 1, "nan"], r"--weights 1 nan: give finite numbers"),
        (["ONE", "TWO", "--weights", 1, "much"], r"invalid float value: 'much'"),
        (["ONE", "TWO", "--weights", 0, 0], r"--weights are all 0, which leaves the base model"),
        (["ONE", "--weights", "1e300"], r"the sum is not finite in float32: give smaller ones"),
        (["ONE", "--extrapolate", "inf"], r"--extrapolate is inf: give a number above 0"),
        (["ONE", "--extrapolate", 0], r"--extrapolate is 0.0: give a number above 0, such as 0.5. Less of a LoRA is --weights 0.5"),
        (["ONE", "--from", "TWO"], r"--from is where --extrapolate goes on from"),
        (["ONE", "--rank", 0], r"--rank is 0: give 1 or more"),
        (["nowhere"], r"nowhere is no run: it holds no config.yaml"),
        (["ONE", "--output", "ONE"], r"one exists already, and a run is never overwritten: choose another --output"),
        (["ONE", "--output", "/proc/nothing/run"], r"/proc/nothing/run cannot be written"),
    ],
)
def test_what_is_said_wrong_is_refused(flags: list[Any], says: str, runs: Path, run_cli: Any, tmp_path: Path) -> None:
    words = [{"ONE": runs / "one", "TWO": runs / "two"}.get(word, word) for word in flags]
    outcome = run_cli("merge", *words, *([] if "--output" in flags else ["--output", "out"]))
    assert outcome.status == 2
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    with pytest.raises(InputError, match=says):
        raise InputError(outcome.err)
    assert not (tmp_path / "out").exists()


def test_runs_that_do_not_go_together_are_refused(runs: Path, tmp_path: Path) -> None:
    def first(name: str) -> Any:
        return lambda found: {(name if i == 0 else key): value for i, (key, value) in enumerate(sorted(found.items()))}

    def without(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in found.items() if "conv1" not in name}

    def grown(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat([value, value], 1) if "to_q.lora_A" in name else value for name, value in found.items()}

    def nan(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * float("nan") for name, value in found.items()}

    one = runs / "one"
    unfinished, cut = changed(runs, tmp_path / "unfinished"), changed(runs, tmp_path / "cut")
    shutil.rmtree(unfinished / "lora")
    (cut / "lora" / WEIGHTS).write_bytes((one / "lora" / WEIGHTS).read_bytes()[:3000])
    bad = {
        changed(runs, tmp_path / "full", full=True): "full trained all weights, and has no LoRA to merge",
        changed(runs, tmp_path / "other", pipeline="shapes"): f"different models do not add up: {one} of ",
        changed(runs, tmp_path / "older", revision="v1"): "older of .* \\(v1\\). Give runs of one --pipeline and --revision",
        unfinished: "holds no lora/ yet: the run is unfinished",
        cut: "cut/lora is damaged .* Write it again: diffalign train --resume",
        rewritten(changed(runs, tmp_path / "fewer"), without): f"different layers: {one} alone adapts .*conv1.* same --lora.target_modules",
        rewritten(changed(runs, tmp_path / "larger"), grown): "are of different models: .*to_q.* differ in size",
        rewritten(changed(runs, tmp_path / "nan"), nan): "holds numbers that are not finite. The training has diverged",
        rewritten(changed(runs, tmp_path / "dora"), first("unet.x.lora_magnitude_vector")): "only plain LoRA, matrices A and B",
    }
    run = diffalign.load(one)
    for folder, says in bad.items():
        with pytest.raises(InputError, match=says) as refused:
            diffalign.merge([run, folder], [1, 1], output=tmp_path / "out")
        assert len(str(refused.value).splitlines()) == 1
        assert not (tmp_path / "out").exists()
