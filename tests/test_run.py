"""A run from end to end on the tiny pipeline: the folder, killing and resuming, the LoRA in plain diffusers, the Python API."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml
from PIL import Image

import diffalign
from diffalign import checkpoint
from diffalign.api import evaluate_run
from diffalign.data import PicturePrompt
from diffalign.errors import InputError
from diffalign.models import make_policy
from diffalign.rerun import again
from diffalign.run import Run
from diffalign.session import resume
from diffalign.settings import Settings

STEPS = 12
FLAGS = {"steps": STEPS, "batch_size": 2, "checkpoint_every": 3, "learning_rate": 0.01, "eval_size": 4, "ema": 0.9, "seed": 5}


@diffalign.reward(differentiable=True)
def bright_pictures(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return images.mean((1, 2, 3))


def train_args(files: Path, output: Path, **flags: Any) -> list[str]:
    named = {"pipeline": files / "model", "reward": f"{files / 'rewards.py'}:red", "prompts": files / "prompts.txt", "output": output}
    chosen = {**named, "method.inference_steps": 3, **FLAGS, **flags}
    return ["train", *(f"--{name}={value}" for name, value in chosen.items())]


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from diffalign.cli import main

    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(train_args(files, output)) == 0
    return diffalign.load(output)


def weights(run: Path) -> bytes:
    return (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes()


def test_the_folder(finished: Run) -> None:
    rows = finished.metrics
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    columns = {"loss", "reward", "grad_norm", "reward_queries", "seconds", "device_seconds", "peak_memory_mb"}
    assert columns <= rows[0].keys()
    assert [row["reward_queries"] for row in rows] == [2 * i for i in range(1, STEPS + 1)]
    assert sorted(p.name for p in (finished.path / "checkpoints").iterdir()) == ["step-000009", "step-000012"]
    assert {f"step-{i:06d}.png" for i in (0, 3, 6, 9, 12)} <= {p.name for p in (finished.path / "samples").iterdir()}
    assert Image.open(finished.path / "curve.png").width > 500
    red = finished.evaluation["rewards"][next(iter(finished.evaluation["rewards"]))]
    assert red["interval"][0] <= red["difference"] <= red["interval"][1]
    assert red["difference"] == pytest.approx(red["after"] - red["before"])
    train, held = (finished.read_prompts(part) for part in ("train", "heldout"))
    assert held
    assert not set(train) & set(held)
    assert {*train, *held} == {*tiny.PROMPTS}
    assert len(train) + len(held) == len(tiny.PROMPTS)


def test_killed_and_resumed_equals_uninterrupted(files: Path, finished: Run, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([sys.executable, "-m", "diffalign", *train_args(files, output)], stdout=log, stderr=log, cwd=tmp_path)
    at = random.SystemRandom().randint(1, STEPS - 2)
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= at):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "lora").exists(), "the run ended before it was killed"
    resume(output)
    assert weights(output) == weights(finished.path), f"killed at step {at}"
    same = ("step", "loss", "reward", "grad_norm", "reward_queries")
    assert [[row[k] for k in same] for row in Run.open(output).metrics] == [[row[k] for k in same] for row in finished.metrics]


def test_a_damaged_checkpoint_is_passed_over(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    shutil.rmtree(copy / "lora")
    tensors = copy / "checkpoints" / "step-000012" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    resume(copy)
    assert "step-000012 is incomplete" in capsys.readouterr().err
    assert weights(copy) == weights(finished.path)
    for folder in (copy / "checkpoints").iterdir():
        (folder / "tree.json").unlink()
    with pytest.raises(InputError, match="No whole checkpoint"):
        resume(copy)


def test_a_signal_saves_and_says_how_to_go_on(files: Path, finished: Run, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "diffalign", *train_args(files, output, checkpoint_every=1000)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, err
    assert f"diffalign train --resume {output}" in err
    resume(output)
    assert weights(output) == weights(finished.path)


def test_plain_diffusers_gives_the_runs_own_pictures(finished: Run, files: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    paths = finished.sample(["a red dog"], seed=7, output=tmp_path)
    pipe: Any = StableDiffusionPipeline.from_pretrained(files / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(finished.path / "lora"))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    picture = pipe("a red dog", latents=noise, num_inference_steps=3, guidance_scale=finished.config["guidance_scale"]).images[0]
    assert Image.open(paths[1]).tobytes() == picture.tobytes()


def test_lora_scale_zero_is_the_base(finished: Run, tmp_path: Path) -> None:
    run = diffalign.load(finished.path)
    paths = run.sample(["a red dog"], seed=7, lora_scale=0.0, output=tmp_path)
    with run.policy.reference():
        base = diffalign.load(finished.path).sample(["a red dog"], seed=7, output=tmp_path / "whole")
    assert Image.open(paths[1]).tobytes() != Image.open(base[1]).tobytes()
    side = Image.open(paths[0])
    height = (side.height - 40) // 2
    assert side.crop((60, 40, side.width, 40 + height)).tobytes() == side.crop((60, 40 + height, side.width, side.height)).tobytes()


def test_a_run_is_never_overwritten(finished: Run, files: Path, run_cli: Any) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.path.rglob("*"))
    outcome = run_cli(*train_args(files, finished.path))
    assert outcome.status == 2
    assert "never overwritten" in outcome.err
    assert before == sorted((p, p.stat().st_mtime_ns) for p in finished.path.rglob("*"))


def test_eval_again(finished: Run, run_cli: Any, tmp_path: Path) -> None:
    target = tmp_path / "again.json"
    assert run_cli("eval", finished.path, "--output", target).status == 0
    assert json.loads(target.read_text())["rewards"] == finished.evaluation["rewards"]
    assert run_cli("eval", finished.path, "--reward", "jpeg-compressibility", "--limit", 2, "--output", target).status == 0
    assert list(json.loads(target.read_text())["rewards"]) == ["jpeg-compressibility"]


def test_the_results_of_eval_are_on_standard_output(finished: Run, run_cli: Any, tmp_path: Path) -> None:
    outcome = run_cli("eval", finished.path, "--limit", 1, "--output", tmp_path / "e.json")
    assert "win rate" in outcome.out
    assert "win rate" not in outcome.err
    assert "Written" in outcome.err


def test_a_reward_that_is_gone_is_not_missed_by_sample(finished: Run, run_cli: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "reward": {"name": "/gone/rewards.py:red"}, "log": ["wandb"]}))
    assert run_cli("sample", copy, "--prompt", "a red dog").status == 0
    outcome = run_cli("eval", copy)
    assert outcome.status == 2
    assert "/gone/rewards.py does not exist" in outcome.err
    assert "--reward NAME" in outcome.err
    assert run_cli("eval", copy, "--reward", "jpeg-compressibility", "--limit", 1).status == 0
    assert "/gone/rewards.py does not exist" in run_cli("train", "--resume", copy, "--steps", STEPS + 1).err


def test_a_run_is_the_same_from_anywhere(files: Path, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are from the working folder, in flags and files; the run's own are absolute."""
    (tmp_path / "c.yaml").write_text("reward: rewards.py:red\nprompts: prompts.txt\neval_rewards: [rewards.py:plain]\n")
    there, run = tmp_path / "there", tmp_path / "there" / "run"
    shutil.copytree(files, there)
    monkeypatch.chdir(there)
    chosen = ["--pipeline", "model", "--method.inference-steps", 2, "--eval-size", 1]
    assert run_cli("train", "--config", "../c.yaml", "--output", "run", "--steps", 1, *chosen).status == 0
    again = ["train", "--config", run / "config.yaml", "--lora.init", "there/run/lora", "--print-config"]
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(run_cli(*again).out)
    assert config["pipeline"] == str(there / "model")
    assert config["prompts"] == str(there / "prompts.txt")
    assert config["reward"]["name"] == f"{there / 'rewards.py'}:red"
    assert config["eval_rewards"] == [f"{there / 'rewards.py'}:plain"]
    assert config["lora"]["init"] == str(run / "lora")
    assert run_cli("train", "--resume", "there/run", "--steps", 2).status == 0
    assert run_cli("eval", "there/run").status == 0
    embedded = yaml.safe_load(run_cli("train", "--print-config").out)
    assert (embedded["pipeline"], embedded["prompts"], embedded["reward"]["name"]) == ("shapes", "shapes", "shapes-clip")


def test_prompts_from_a_pipe(files: Path, tmp_path: Path) -> None:
    from diffalign.cli import main

    end, start = os.pipe()
    os.write(start, b"a dog\na cat\n")
    os.close(start)
    assert main(train_args(files, tmp_path / "r", prompts=f"/dev/fd/{end}", steps=1, eval_size=0)) == 0
    os.close(end)
    assert Run.open(tmp_path / "r").read_prompts("train") == ["a dog", "a cat"]


def test_trackers_get_the_settings(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    from diffalign import config
    from diffalign.cli import main

    given: dict[str, Any] = {}
    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", lambda self, name, config: given.update(config))
    monkeypatch.setattr(config, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True)))
    assert main(train_args(files, tmp_path / "r", steps=1, eval_size=0, log="[tensorboard]")) == 0
    assert (given["learning_rate"], given["lora.rank"], given["method.name"], given["method.inference_steps"]) == (0.01, 8, "draft", 3)
    assert given["reward.name"].endswith("rewards.py:red")
    assert all(isinstance(value, bool | int | float | str) for value in given.values()), "what TensorBoard takes as hyperparameters"


def test_weights_and_results_are_whole_or_not_there(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    run, before = Run.open(copy), {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_saved(folder: Path) -> None:
        folder.mkdir()
        full(folder / "pytorch_lora_weights.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        for work in (
            lambda: run.save_weights(SimpleNamespace(frozen=None, save=half_saved)),
            lambda: run.write_config({}),
            lambda: run.rewind_metrics(1),
            lambda: evaluate_run(run, limit=1),
        ):
            with pytest.raises(OSError, match="No space left"):
                work()
            assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    run.save_weights(SimpleNamespace(frozen=None, save=lambda folder: (folder.mkdir(), (folder / "new").touch())))
    assert [p.name for p in (copy / "lora").iterdir()] == ["new"]
    assert not [p for p in copy.iterdir() if p.name.startswith(".") and p.name != ".lock"], "nothing is left beside it"


def test_what_is_written_whole_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and folder before the move, and after it the folder that holds the new name."""
    synced, sync = list[tuple[int, bool]](), os.fsync
    final = tmp_path / "step-000001"

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, final.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    checkpoint.write(tmp_path, 1, {"a": torch.ones(2)}, keep=1)
    assert sorted(synced[:-1]) == sorted((p.stat().st_ino, False) for p in (final, *final.iterdir()))
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_align_a_live_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.stable_diffusion()

    @diffalign.reward(differentiable=True)
    def bright(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        assert len(prompts.text) == len(images)
        return images.mean((1, 2, 3))

    run = diffalign.align(
        pipe, reward=bright, prompts=["a dog", "a cat"], steps=4, k=2, inference_steps=3, eval_size=2,
        lora={"rank": 2, "alpha": 4}, learning_rate=1e-3, output=tmp_path / "live",
    )  # fmt: skip
    assert run.pipeline is pipe
    call = capsys.readouterr().err.rpartition("Again: ")[2].strip()
    assert call.startswith("diffalign.load('")
    assert all(path.is_file() for path in eval(call, {"diffalign": diffalign, "pipe": tiny.stable_diffusion()}))
    assert run.config["method"]["k"] == 2
    assert run.pipeline("a red circle", num_inference_steps=2).images[0].size == (16, 16)
    assert "bright" in run.evaluation["rewards"]
    again = diffalign.load(tmp_path / "live", pipe=tiny.stable_diffusion())
    noise = torch.randn(1, 4, 8, 8)
    pictures = [p("a dog", latents=noise, num_inference_steps=2, output_type="pt").images for p in (run.pipeline, again.pipeline)]
    assert torch.equal(*pictures)
    assert again.sample(["a dog"], output=tmp_path)[0].is_file()
    with pytest.raises(InputError, match="reward=\\.\\.\\.\\) wants it again"):
        diffalign.resume(tmp_path / "live", pipe=tiny.stable_diffusion())
    longer = diffalign.resume(tmp_path / "live", steps=5, pipe=tiny.stable_diffusion(), reward=bright)
    assert len(longer.metrics) == 5
    with pytest.raises(InputError, match="live pipeline object"):
        diffalign.load(tmp_path / "live").pipeline  # noqa: B018


@pytest.mark.parametrize("flags", [{"full": True}, {"ema": 0.9}, {"precision": "bf16"}], ids=["full", "ema", "bf16"])
def test_a_live_pipeline_holds_what_was_saved_and_knows_its_base(flags: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    pipe, base, other = tiny.stable_diffusion(), tiny.stable_diffusion(), tiny.stable_diffusion()
    chosen = {"steps": 3, "inference_steps": 2, "eval_size": 0, "learning_rate": 1e-2, **flags}
    run = diffalign.align(pipe, reward=bright_pictures, prompts=["a dog"], output=tmp_path / "r", **chosen)
    if "full" in flags:
        other.unet = UNet2DConditionModel.from_pretrained(tmp_path / "r" / "model")
    else:
        other.load_lora_weights(str(tmp_path / "r" / "lora"))
    noise = torch.randn(1, 4, 8, 8)
    mine, saved, before = (p("a dog", latents=noise, num_inference_steps=2, output_type="pt").images for p in (run.pipeline, other, base))
    assert torch.allclose(mine, saved, atol=2e-2 if "precision" in flags else 1e-6)
    assert not torch.allclose(mine, before, atol=1e-3)
    side = Image.open(run.sample(["a dog"], output=tmp_path)[0])
    height = (side.height - 40) // 2
    assert side.crop((60, 40, side.width, 40 + height)).tobytes() != side.crop((60, 40 + height, side.width, side.height)).tobytes()


def test_a_number_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    run.append_metrics({"step": 1, "loss": 0.5, "grad_norm": float("inf"), "reward": float("nan")})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": 0.5, "grad_norm": None, "reward": None}
    assert run.metrics[0]["grad_norm"] is None


def kinds_of(pipe: Any) -> dict[str, Any]:
    return {name: module.dtype for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.sd3])
@pytest.mark.parametrize("half", [(), ("unet", "transformer", "text_encoder")], ids=["fp32", "half"])
def test_a_live_pipeline_is_given_back_in_the_dtypes_in_which_it_came(make: Any, half: tuple[str, ...], tmp_path: Path) -> None:
    pipe = make()
    for name in set(half) & set(pipe.components):
        getattr(pipe, name).to(torch.bfloat16)
    came = kinds_of(pipe)
    assert set(came.values()) == ({torch.bfloat16, torch.float32} if half else {torch.float32})
    during: list[dict[str, Any]] = []

    def bright(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        during.append(kinds_of(pipe))
        return images.mean((1, 2, 3))

    reward = diffalign.reward(differentiable=True)(bright)
    chosen: dict[str, Any] = dict(steps=1, inference_steps=2, eval_size=0, precision="bf16", vae_precision="bf16", guidance_scale=1.0)
    diffalign.align(pipe, reward=reward, prompts=["a dog"], output=tmp_path / "r", **chosen)
    assert {torch.bfloat16} == set(during[-1].values())
    assert kinds_of(pipe) == came
    if not half:
        assert pipe("a red circle", num_inference_steps=2).images


def test_a_run_of_a_live_pipeline_in_half_precision_is_sampled(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion()
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    chosen: dict[str, Any] = {"steps": 1, "inference_steps": 2, "eval_size": 0}
    run = diffalign.align(pipe, reward=bright_pictures, prompts=["a dog"], output=tmp_path / "r", **chosen)
    assert run.sample(["a cat"], output=tmp_path)[0].is_file()
    assert (
        again(Path("a b"), PicturePrompt('"it\'s"', b"", None), live=False)
        == "diffalign sample 'a b' --prompt '\"it'\"'\"'s\"' --image FILE"
    )
    assert again(Path("r"), PicturePrompt("red", Path("a.png"), b""), live=True) == (
        "diffalign.load('r', pipe=pipe).sample([('red', 'a.png', 'mask.png')])"
    )


def test_a_live_pipeline_is_given_back_where_the_training_fails(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion()
    during: list[bool] = []

    def breaks(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        during.append(pipe.unet.is_gradient_checkpointing)
        if len(during) == 3:
            raise ValueError("no such luck")
        return images.mean((1, 2, 3))

    strides = [p.stride() for p in (*pipe.unet.parameters(), *pipe.vae.parameters())]
    knobs: dict[str, Any] = dict(gradient_checkpointing=True, channels_last=True, attention="eager", precision="bf16")
    kind = type(next(iter(pipe.unet.attn_processors.values())))
    with pytest.raises(InputError, match="no such luck"):
        diffalign.align(
            pipe, reward=diffalign.reward(differentiable=True)(breaks), prompts=["a dog"], output=tmp_path / "r",
            inference_steps=2, steps=5, eval_size=0, **knobs,
        )  # fmt: skip
    assert during[-1]
    assert not pipe.unet.is_gradient_checkpointing
    assert not pipe.vae.is_gradient_checkpointing
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {kind}
    weights = [p for part in (pipe.unet, pipe.vae) for name, p in part.named_parameters() if "lora_" not in name]
    assert [p.stride() for p in weights] == strides
    assert set(kinds_of(pipe).values()) == {torch.float32}
    assert pipe("a red circle", num_inference_steps=2).images


def test_a_setting_that_a_live_pipeline_does_not_have_leaves_it_as_it_came() -> None:
    pipe = tiny.sd3()
    with pytest.raises(InputError, match="attention eager is for UNets"):
        make_policy(Settings(device="cpu", precision="bf16", attention="eager"), pipe)
    assert set(kinds_of(pipe).values()) == {torch.float32}


def test_a_failed_start_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion()
    bad = diffalign.reward(differentiable=True)(lambda images, prompts: images.detach().mean((1, 2, 3)))
    for reward in (bad, bad):
        with pytest.raises(InputError, match="none arrives"):
            diffalign.align(pipe, reward=reward, prompts=["a dog"], output=tmp_path / "r", inference_steps=2)
    assert not (tmp_path / "r").exists()


def test_fewer_steps_than_were_taken_are_refused(finished: Run) -> None:
    with pytest.raises(InputError, match=f"at step {STEPS} already"):
        resume(finished.path, steps=1)
    assert finished.config["steps"] == STEPS


def test_two_trainings_do_not_share_a_folder(finished: Run) -> None:
    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in finished.path.rglob("*") if p.is_file()}

    before = files()
    with finished.alone(), pytest.raises(InputError, match="Another training"):
        resume(finished.path, steps=STEPS + 1)
    assert files() == {**before, str(finished.path / ".lock"): b""}


def test_full_fine_tuning(files: Path, tmp_path: Path) -> None:
    from diffalign.cli import main

    assert main([*train_args(files, tmp_path / "full", steps=3, learning_rate=1e-3), "--full"]) == 0
    run = diffalign.load(tmp_path / "full")
    trained = diffalign.load(tmp_path / "full").sample(["a red dog"], output=tmp_path)
    side = Image.open(trained[0])
    height = (side.height - 40) // 2
    assert side.crop((60, 40, side.width, 40 + height)).tobytes() != side.crop((60, 40 + height, side.width, side.height)).tobytes()
    with pytest.raises(InputError, match="no LoRA to scale"):
        run.sample(["a"], lora_scale=0.5, output=tmp_path)


def test_accumulated_batches_are_one_step(files: Path, tmp_path: Path) -> None:
    from diffalign.cli import main

    assert main(train_args(files, tmp_path / "a", steps=2, accumulate=3)) == 0
    rows = Run.open(tmp_path / "a").metrics
    assert [row["reward_queries"] for row in rows] == [6, 12]
    assert rows[0]["loss"] == pytest.approx(-rows[0]["reward"])


def test_a_reward_that_breaks_in_mid_run_loses_nothing(files: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    @diffalign.reward(differentiable=True)
    def moody(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        calls.append(len(images))
        return images.mean((1, 2, 3)) * (float("nan") if len(calls) > 4 else 1)

    with pytest.raises(InputError, match=r"(?s)no numbers.*Saved at step 3.*kept"):
        diffalign.align(str(files / "model"), reward=moody, prompts=["a dog"], output=tmp_path / "m", steps=9, inference_steps=2)
    assert weights(tmp_path / "m")
    assert len(Run.open(tmp_path / "m").metrics) == 3


def test_a_full_disk_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path / "checkpoints", 1, {"a": torch.ones(2)}, keep=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=f"No space left.*--resume {tmp_path}"):
        checkpoint.write(tmp_path / "checkpoints", 2, {"a": torch.zeros(2)}, keep=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert torch.equal(checkpoint.newest(tmp_path / "checkpoints")[0]["a"], torch.ones(2))


def test_checkpoint_trees_round_trip(tmp_path: Path) -> None:
    slashes = {"x/y": torch.zeros(1), "x": {"y": torch.ones(1)}, 2: torch.full((1,), 2.0), "2": torch.full((1,), 3.0)}
    read = checkpoint.read(checkpoint.write(tmp_path, 2, slashes, keep=1))
    assert [float(t) for t in (read["x/y"], read["x"]["y"], read[2], read["2"])] == [0, 1, 2, 3]
    tree = {"a": torch.arange(3), 1: [None, True, 2, 0.1, "x", {"deep": torch.zeros(0)}], "t": (torch.ones(2, 2).t(),)}
    read = checkpoint.read(checkpoint.write(tmp_path, 3, tree, keep=1))
    assert torch.equal(read["a"], tree["a"])
    assert read[1][:5] == [None, True, 2, 0.1, "x"]
    assert read[1][5]["deep"].shape == (0,)
    checkpoint.write(tmp_path, 4, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]
    with pytest.raises(TypeError, match="cannot hold"):
        checkpoint.write(tmp_path, 5, {"f": os.getcwd}, keep=1)
    assert checkpoint.newest(tmp_path)[0] == {}
