"""The command line: what it prints, and that every bad input gets one message with the mend and status 2, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diffalign.cli import main
from diffalign.errors import InputError
from diffalign.flags import SWITCHES
from diffalign.settings import Settings


def args(files: Path, **flags: Any) -> list[str]:
    named = {"pipeline": files / "model", "reward": f"{files / 'rewards.py'}:red", "prompts": files / "prompts.txt", "steps": 1}
    return ["train", *(f"--{k}={v}" for k, v in {**named, "method.inference_steps": 2, "eval_size": 0, **flags}.items())]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "drfat"}, "no method 'drfat'. Did you mean 'draft'?"),
    ({"reward": "shapes-clap"}, "no reward 'shapes-clap'. Did you mean 'shapes-clip'?"),
    ({"reward": "jpeg-compressibility"}, "has none. Choose a differentiable reward"),
    ({"reward": "FILES/rewards.py:plain"}, "declare yours with @diffalign.reward(differentiable=True)"),
    ({"reward": "FILES/classes.py:Silent"}, "does not declare differentiable and modality"),
    ({"reward": "FILES/classes.py:Half"}, "does not declare modality: give"),
    ({"reward": "FILES/classes.py:unreal"}, "returned complex numbers"),
    ({"reward": "FILES/rewards.py:rde"}, "holds no 'rde'. Did you mean 'red'?"),
    ({"reward": "FILES/nothing.py:red"}, "nothing.py does not exist"),
    ({"reward": "FILES/broken.py:red"}, "does not load: SyntaxError"),
    ({"reward": "FILES/rewards.py:detached"}, "none arrives"),
    ({"reward": "FILES/rewards.py:zero"}, "zero everywhere"),
    ({"reward": "FILES/rewards.py:shape"}, "returned the shape (): return (2,)"),
    ({"reward": "FILES/rewards.py:nan"}, "'a red dog': nan"),
    ({"pipeline": "shaeps"}, "Did you mean 'shapes'?"),
    ({"pipeline": "./nowhere"}, "There is no model './nowhere'"),
    ({"pipeline": "FILES"}, "holds no model_index.json"),
    ({"pipeline": "FILES/corrupt"}, "does not load"),
    ({"pipeline": "FILES/damaged"}, "names no pipeline class"),
    ({"pipeline": "FILES/other"}, "FluxFooPipeline has no adapter"),
    ({"prompts": "FILES/none.txt"}, "no prompt file"),
    ({"prompts": "FILES/empty.txt"}, "holds no prompts"),
    ({"prompts": "FILES/binary.txt"}, "is no text file"),
    ({"prompts": "FILES/zeros.txt"}, "binary file"),
    ({"prompts": "FILES/bad.jsonl"}, "line 2"),
    ({"prompts": "FILES"}, "no prompt file"),
    ({"steps": 0}, "steps is 0: give 1 or more"),
    ({"steps": "many"}, "steps is many: give a whole number."),
    ({"steps": "1e3"}, "steps is 1000.0: give a whole number."),
    ({"full": "perhaps"}, "full is perhaps: give true or false."),
    ({"lora.alpha": "much"}, "lora.alpha is much: give a number or null."),
    ({"betas": "[1]"}, "betas is [1]: give a list with 2 elements."),
    ({"method": ""}, "method is '': give a name"),
    ({"reward": ""}, "reward is '': give a name"),
    ({"data": ""}, "data is empty"),
    ({"output": ""}, "output is empty"),
    ({"method.k": 3}, "method.k is 3: give 1 to 2"),
    ({"method.inference_steps": 1001}, "1 to 1000"),
    ({"stesp": 3}, "no setting 'stesp'. Did you mean 'steps'?"),
    ({"method.kk": 3}, "no setting 'method.kk'. Did you mean 'method.k'?"),
    ({"learning_rate": -1}, "learning_rate is -1"),
    ({"lora.rank": 0}, "lora.rank is 0"),
    ({"lora.alpha": 0}, "lora.alpha is 0"),
    ({"full": "true", "lora.init": "FILES/none"}, "full and lora.init"),
    ({"betas": "[2,3]"}, "betas is [2.0, 3.0]"),
    ({"weight_decay": -1}, "weight_decay is -1"),
    ({"seed": 2**40}, "seed is 1099511627776"),
    ({"batch_size": 10**9}, "batch_size is 1000000000"),
    ({"method": "FILES/rewards.py:red"}, "is no method: it lacks needs"),
    ({"lora.target_modules": "[nothing]"}, "fit no layer"),
    ({"lora.init": "FILES/none"}, "does not exist"),
    ({"precision": "fp61"}, "precision is fp61: give fp32 or bf16 or fp16."),
    ({"precision": "fp16"}, "fp16 needs a GPU"),
    ({"device": "cuda:7"}, "cannot be used here"),
    ({"device": "meta"}, "'meta' cannot be used here"),
    ({"height": 7}, "multiples of 2"),
    ({"config": "FILES/none.yaml"}, "no config file"),
    ({"config": "FILES/unknown.yaml"}, "no setting 'lora.rnk'. Did you mean 'lora.rank'?"),
    ({"config": "FILES/list.yaml"}, "holds no settings"),
    ({"config": "FILES/binary.txt"}, "no YAML"),
    ({"output": "/proc/nothing/run"}, "cannot be written"),
    ({"output": "FILES/model"}, "never overwritten"),
]


@pytest.fixture(scope="module")
def bad(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny files, and beside them every kind of broken one."""
    folder = tmp_path_factory.mktemp("bad") / "files"
    shutil.copytree(files, folder)
    (folder / "broken.py").write_text("def red(:")
    call = "    def __call__(self, images, prompts): return images.mean((1, 2, 3))\n"
    (folder / "classes.py").write_text(f"class Silent:\n{call}class Half(Silent):\n    differentiable = True\n")
    with (folder / "classes.py").open("a") as file:
        file.write(
            "import diffalign\n@diffalign.reward(differentiable=True)\ndef unreal(images, prompts): return images.mean((1, 2, 3)) * 1j\n"
        )
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "zeros.txt").write_bytes(b"a\0b\n")
    (folder / "bad.jsonl").write_text('{"prompt": "a dog"}\n{"text": "a cat"}\n')
    (folder / "unknown.yaml").write_text("lora: {rnk: 3}\n")
    (folder / "list.yaml").write_text("- 1\n")
    for name in ("corrupt", "damaged", "other"):
        shutil.copytree(files / "model", folder / name)
    weights = folder / "corrupt" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "damaged" / "model_index.json").write_text("{")
    (folder / "other" / "model_index.json").write_text('{"_class_name": "FluxFooPipeline"}')
    return folder


@pytest.mark.parametrize(
    ("flags", "message"), BAD, ids=["-".join(f"{k}-{v}".replace("FILES/", "") for k, v in flags.items()) for flags, _ in BAD]
)
def test_bad_input(flags: dict[str, Any], message: str, bad: Path, run_cli: Any, tmp_path: Path) -> None:
    flags = {k: v.replace("FILES", str(bad)) if isinstance(v, str) else v for k, v in flags.items()}
    outcome = run_cli(*args(bad, **flags))
    assert outcome.status == 2, outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error:") == 1
    assert not list((tmp_path / "runs").glob("*")), "a run folder was left behind"


@pytest.mark.parametrize(
    "text",
    [
        "method: [1]", "method: {name: 3}", "method: {name: draft, k: null}", "reward: [1]", "reward: {name: {a: 1}}", "pipeline: 3",
        "lora: null", "lora: 3", "lora: {rank: null}", "steps: null", "betas: null", "log: null", "1: 2",
    ],
)  # fmt: skip
def test_odd_config_files(text: str, run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text + "\n")
    outcome = run_cli("train", "--config", "c.yaml")
    assert outcome.status == 2, outcome.err
    assert outcome.err.count("error:") == outcome.err.count("\n") == 1


def test_words_that_belong_to_no_flag(run_cli: Any) -> None:
    assert "'100' belongs to no flag" in run_cli("train", "--steps", 10, 100).err
    assert "--method.name: expected one argument" in run_cli("train", "--method", "--steps", 10).err
    assert yaml.safe_load(run_cli("train", "--full", "no", "--print-config").out)["full"] is False
    assert yaml.safe_load(run_cli("train", "--full", "--steps", 3, "--print-config").out)["full"] is True


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--original-size", "abc"), "original_size is ['abc']: give a list with 2 elements or null."),
        (("--original-size", 3, "x"), "original_size is [3, 'x'], and of that x does not fit: give a whole number."),
        (("--betas", 0.1, "x"), "betas is x: give a number."),
        (("--lora.target-modules", 3), "lora.target_modules is [3], and of that 3 does not fit: give text."),
    ],
)
def test_values_of_lists_that_do_not_fit(flags: tuple[Any, ...], says: str, run_cli: Any) -> None:
    outcome = run_cli("train", *flags)
    assert (outcome.status, outcome.err) == (2, f"error: {says}\n")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            ("train", "--resume", "runs/a", "--memory-budget", 5),
            "--memory-budget: a run that is resumed keeps its settings, but for --steps.",
        ),
        (("train", "--resume", "runs/a", "--method.k=3"), "diffalign train --config runs/a/config.yaml --method.k=3"),
        (("train", "--resume", "runs/a", "--steps", "x"), "Argument --steps: invalid int value: 'x'. See: diffalign train --help"),
        (("sample",), "The following arguments are required: run. See: diffalign sample --help"),
        (("eval", "runs/a", "--rewards", "x"), "Unrecognized arguments: --rewards x. See: diffalign eval --help"),
    ],
)
def test_flags_that_a_command_does_not_take(command: tuple[Any, ...], says: str, run_cli: Any) -> None:
    outcome = run_cli(*command)
    assert outcome.status == 2
    assert says in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("field", [field for field in fields(Settings) if re.search("int|float", str(field.type))], ids=lambda f: f.name)
def test_no_number_is_nan(field: Any) -> None:
    nan = float("nan")
    given: dict[str, Any] = {field.name: (nan, nan) if "tuple" in str(field.type) else nan}
    with pytest.raises(InputError, match=f"{field.name} is .*nan"):
        Settings(**given)


def test_memory_that_is_not_there(run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import torch

    for ask in (lambda *_: torch.empty(10**16), lambda *_: np.empty(10**16)):
        monkeypatch.setattr("diffalign.session.start", ask)
        outcome = run_cli("train")
        assert outcome.status == 2
        assert re.fullmatch(r"error: Out of memory \(.*llocat.*\)\. Lower --batch-size .*\n", outcome.err), outcome.err


def test_debug_shows_the_traceback(run_cli: Any) -> None:
    outcome = run_cli("train", "--method", "nothing", "--debug")
    assert outcome.status == 2
    assert "Traceback" in outcome.err


def test_help_and_version(run_cli: Any) -> None:
    assert run_cli("--help").status == 0
    assert run_cli().status == 2
    assert run_cli("--version").out.startswith("diffalign 0.")
    outcome = run_cli("tarin")
    assert outcome.status == 2
    assert "Did you mean 'train'?" in outcome.err
    for command in ("train", "sample", "eval", "score", "check", "list", "doctor"):
        outcome = run_cli(command, "--help")
        assert outcome.status == 0
        assert f"example: diffalign {command}" in outcome.out.replace("\n", " ")


def test_train_help_has_the_flags_of_the_named_method_with_dashes(run_cli: Any) -> None:
    text = run_cli("train", "--method", "draft-lv", "--help").out
    assert "--method.inference-steps" in text
    assert "--batch-size" in text
    assert "_size" not in text.split("Training:")[0]


@pytest.mark.parametrize("command", [("train", "--method", "draft"), ("train", "--method", "diffusion-dpo"), ("pairs",)])
def test_help_shows_what_may_stand_alone_alone(run_cli: Any, command: tuple[str, ...]) -> None:
    text = run_cli(*command, "--help").out
    shown = [flag for flag in SWITCHES if re.search(rf"^  {flag.replace('_', '-')}( {{3,}}[A-Z]|$)", text, re.MULTILINE)]
    assert len(shown) == {"draft": 8, "diffusion-dpo": 8, "pairs": 3}[command[-1]]
    assert "{true,false}" not in text


def test_print_config_is_a_config(run_cli: Any, tmp_path: Path) -> None:
    printed = run_cli("train", "--method", "draft-lv", "--seed", 3, "--lora.rank", 2, "--print-config").out
    config = yaml.safe_load(printed)
    assert (config["method"]["n"], config["seed"], config["lora"]["rank"]) == (2, 3, 2)
    (tmp_path / "c.yaml").write_text(printed)
    assert run_cli("train", "--config", "c.yaml", "--print-config").out == printed
    changed = yaml.safe_load(run_cli("train", "--config=c.yaml", "--seed=4", "--print-config").out)
    assert changed == {**config, "seed": 4}


def test_a_rewards_mapping_is_a_config_too(run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "mixed.py").write_text(
        "class Mixed:\n"
        "    differentiable, modality = True, 'image'\n"
        "    def __init__(self, weights: dict[str, float] | None = None, deep: dict[str, dict[str, int]] = {'a': {'b': 1}}): ...\n"
        "    def __call__(self, images, prompts): ...\n"
    )
    weights = ("--reward.weights", '{"red": 0.5, "blue": 2}')
    printed = run_cli("train", "--reward", "mixed.py:Mixed", *weights, "--print-config").out
    assert yaml.safe_load(printed)["reward"]["weights"] == {"red": 0.5, "blue": 2.0}
    (tmp_path / "c.yaml").write_text(printed.replace("b: 1", "b: 7"))
    again = run_cli("train", "--config", "c.yaml", "--print-config")
    assert again.out == printed.replace("b: 1", "b: 7") != printed, again.err
    replaced = run_cli("train", "--config", "c.yaml", "--reward.weights", '{"red": 1}', "--print-config").out
    assert yaml.safe_load(replaced)["reward"]["weights"] == {"red": 1.0}


def test_layers_of_defaults(run_cli: Any, tmp_path: Path, files: Path) -> None:
    """Settings < the method's < the embedded model's < the file < the flag."""

    def config(*flags: str) -> dict[str, Any]:
        return yaml.safe_load(run_cli("train", *flags, "--print-config").out)

    reward = f"--reward={files / 'rewards.py'}:red"
    foreign = config("--pipeline", str(files / "model"), reward)
    assert (foreign["guidance_scale"], foreign["learning_rate"], foreign["method"]["inference_steps"]) == (7.5, 4e-4, 50)
    assert (config()["guidance_scale"], config()["method"]["inference_steps"]) == (1.0, 10)
    (tmp_path / "c.yaml").write_text("method: {name: draft, inference_steps: 7}\nguidance_scale: 3\n")
    assert config("--config", "c.yaml")["method"]["inference_steps"] == 7
    assert config("--config", "c.yaml", "--guidance-scale", "4")["guidance_scale"] == 4.0
    (tmp_path / "c.yaml").write_text("method: draft-lv\n")
    assert config("--config", "c.yaml")["method"]["n"] == 2


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_folder_that_is_no_run(command: str, run_cli: Any, tmp_path: Path) -> None:
    outcome = run_cli(command, tmp_path, *(["--prompt", "x"] if command == "sample" else []))
    assert outcome.status == 2
    assert "is no run" in outcome.err


def test_an_unfinished_run_names_resume(files: Path, run_cli: Any, tmp_path: Path) -> None:
    assert main(args(files, output=tmp_path / "r")) == 0
    shutil.rmtree(tmp_path / "r" / "lora")
    outcome = run_cli("sample", tmp_path / "r", "--prompt", "x")
    assert outcome.status == 2
    assert f"--resume {tmp_path / 'r'}" in outcome.err
    assert run_cli("sample", tmp_path / "r", "--prompt", " ").status == 2
    assert run_cli("train", "--resume", tmp_path / "nothing").status == 2


def test_resume_takes_more_steps(files: Path, run_cli: Any, tmp_path: Path) -> None:
    assert main(args(files, output=tmp_path / "r")) == 0
    assert run_cli("train", "--resume", tmp_path / "r", "--steps", 3).status == 0
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["steps"] == 3


def test_score(run_cli: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "flat.png")
    Image.effect_noise((64, 64), 80).save(tmp_path / "grey.png")
    one, several = ("--reward", "jpeg-compressibility"), ("--reward", "jpeg-compressibility", "jpeg-incompressibility")
    for words, message in (
        (
            (*several, "--reward.weights", "a", "b", "--prompt", "x", "flat.png"),
            "weights is ['a'], and of that a does not fit: give a number",
        ),
        ((*one, "", "--prompt", "x", "flat.png"), "A word is empty where a reward's or a picture's name should be"),
    ):
        outcome = run_cli("score", *words)
        assert (outcome.status, message in outcome.err) == (2, True), outcome.err
    outcome = run_cli("score", "--reward", "jpeg-compressibility", "flat.png", "--prompt", "x", "grey.png")
    scores = {line.split("\t")[1]: float(line.split("\t")[0]) for line in outcome.out.splitlines()}
    assert scores["flat.png"] > scores["grey.png"]
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("cut.png", "no picture that can be read"), ("text.png", "no picture"), ("none.png", "no file")):
        outcome = run_cli("score", "--reward", "jpeg-compressibility", name)
        assert outcome.status == 2
        assert message in outcome.err
        assert name in outcome.err


def test_list_and_doctor(run_cli: Any) -> None:
    for what, name in (("methods", "draft-lv"), ("rewards", "jpeg-incompressibility"), ("pipelines", "StableDiffusionPipeline")):
        assert name in run_cli("list", what).out
    assert "nothing is downloaded" in run_cli("doctor").out


def test_check_passes_and_fails(files: Path, run_cli: Any) -> None:
    outcome = run_cli(*["check", *args(files)[1:]])
    assert outcome.status == 0, outcome.out + outcome.err
    for name in (
        "ratio: replaying 4 steps gives the ratio 1",
        "ok    gradient",
        "ok    finite differences",
        "batch plan",
        "sigma = 0",
        "memory",
    ):
        assert name in outcome.out
    outcome = run_cli(*["check", *args(files, **{"reward": f"{files / 'rewards.py'}:detached"})[1:]])
    assert outcome.status == 2
    assert "none arrives" in outcome.err


def test_light_commands_import_nothing_heavy() -> None:
    """`--help` and `list` import neither torch nor the parser's packages: that is what makes them answer at once."""
    code = "import sys; from diffalign.cli import main; main(sys.argv[1:]); print([m for m in ('torch', 'rich') if m in sys.modules])"
    for arguments in (["--help"], ["list", "rewards"]):
        out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == "[]"
    out = subprocess.run([sys.executable, "-c", "import sys, diffalign; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert json.loads(out.stdout.lower()) is False


def test_every_yes_or_no_may_stand_alone():
    """`--offload`, and not only `--offload true`: of settings and of the methods' fields."""
    from diffalign import flags, registry
    from diffalign.settings import Settings

    methods = [registry.find("methods", name)[0] for name in registry.METHODS]
    of_methods = {f"--method.{f.name}" for method in methods for f in dataclasses.fields(method) if f.default is True or f.default is False}
    of_settings = {f"--{f.name}" for f in dataclasses.fields(Settings) if f.default is False}
    assert of_settings | of_methods <= set(flags.SWITCHES)
    assert flags.normal(["--gradient-checkpointing", "--steps", "2"]) == ["--gradient_checkpointing=true", "--steps", "2"]
