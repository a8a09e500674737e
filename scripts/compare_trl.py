"""CPU seconds an epoch and peak memory of trl 0.23.1's DDPO and AlignProp trainers and of diffalign's, on one tiny model.

    python scripts/compare_trl.py [--env build/trl] [--epochs 10] [--repeats 3] [--threads 1] [--output docs/trl-comparison.json]

The first call builds a second environment with pip, since trl 0.23.1, the last release with these trainers, wants older packages. Both
sides train the same random Stable Diffusion pipeline (985,444 weights in the UNet, latents of 16 x 16) on the same prompts, with 8 samples
of 10 denoising steps an epoch, guidance 5, a LoRA of rank 4 on attention, AdamW, and the mean brightness as the reward. Each measurement
is a process of its own: CPU time of the process, median over the epochs after two of warm-up, and its peak resident memory; a row is the
median over the repeats, which alternate. Neither side writes checkpoints or pictures. Exits with status 1 where a ratio is above 1.
"""

# pyright: reportArgumentType=false, reportMissingImports=false
# diffusers' annotations are narrower than what its constructors take, and trl lives in the other environment.

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PEER = (
    "torch==2.13.0", "trl==0.23.1", "diffusers==0.35.2", "transformers==4.57.1", "peft==0.17.1", "accelerate==1.11.0",
)  # fmt: skip
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "grey") for thing in ("dog", "cat", "cow", "hen")]
BATCH, STEPS, GUIDANCE, WARM_UP = 8, 10, 5.0, 2
TASKS = {"DDPO": None, "AlignProp, 1 gradient step": 1, "AlignProp, 10 gradient steps": STEPS}  # name -> gradient steps
FOLDER = "model"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path("build/trl"), help="folder of trl's environment and of the model")
    parser.add_argument("--epochs", type=int, default=10, help="epochs that are measured, in each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/trl-comparison.json"))
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "TASK"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        side, task = chosen.worker
        return work(side, task, chosen.env, chosen.epochs)
    python = build(chosen.env)
    measured: dict[str, dict[str, list[dict[str, float]]]] = {name: {"trl": [], "diffalign": []} for name in TASKS}
    for name in TASKS:
        for _ in range(chosen.repeats):
            for side, interpreter in (("trl", python), ("diffalign", Path(sys.executable))):
                arguments = ["--worker", side, name, "--env", str(chosen.env), "--epochs", str(chosen.epochs)]
                measured[name][side].append(call(interpreter, arguments, chosen.threads))
    table = {name: {key: medians(sides, key) for key in ("cpu_seconds", "peak_mb")} for name, sides in measured.items()}
    print("| method | trl, CPU s an epoch | diffalign | ratio | trl, peak MB | diffalign | ratio |")
    print("| --- " * 7 + "|")
    for name, row in table.items():
        (a, b), (c, d) = row["cpu_seconds"], row["peak_mb"]
        print(f"| {name} | {a:.2f} | {b:.2f} | {b / a:.2f} | {c:.0f} | {d:.0f} | {d / c:.2f} |")
    about = {"threads": chosen.threads, "epochs": chosen.epochs, "repeats": chosen.repeats, "peer": PEER}
    chosen.output.write_text(json.dumps({**about, "trl, diffalign": table, "measured": measured}, indent=1) + "\n")
    return 0 if all(b <= a and d <= c for (a, b), (c, d) in (row.values() for row in table.values())) else 1


def build(env: Path) -> Path:
    """trl's interpreter and the model; made where they are missing."""
    python = env / "bin" / "python"
    if not (env / ".installed").exists():
        print(f"Installing {' '.join(PEER)} into {env}", file=sys.stderr, flush=True)
        venv.create(env, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEER], check=True)
        (env / ".installed").touch()
    if not (env / FOLDER / "model_index.json").exists():
        call(python, ["--worker", "trl", FOLDER, "--env", str(env)], 1)
    return python


def call(python: Path, arguments: list[str], threads: int) -> dict[str, float]:
    """What a worker printed last."""
    quiet = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    process = subprocess.run([python, __file__, *arguments], capture_output=True, text=True, env={**os.environ, **quiet})
    if process.returncode:
        sys.exit(f"{python} {' '.join(arguments)} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def medians(sides: dict[str, list[dict[str, float]]], key: str) -> tuple[float, float]:
    """Of trl's processes and of diffalign's."""
    trl, diffalign = (statistics.median(measured[key] for measured in sides[side]) for side in ("trl", "diffalign"))
    return trl, diffalign


def work(side: str, task: str, env: Path, epochs: int) -> int:
    """One process: make the model, or train and print what it took."""
    if task == FOLDER:
        write_model(env / FOLDER)
        print("{}")
        return 0
    make: Callable[[Path, int | None], Callable[[], Any]] = {"trl": trl_epochs, "diffalign": diffalign_epochs}[side]
    epoch = make(env / FOLDER, TASKS[task])
    seconds: list[float] = []
    for _ in range(WARM_UP + epochs):
        start = time.process_time()
        epoch()
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    print(json.dumps({"cpu_seconds": statistics.median(seconds[WARM_UP:]), "peak_mb": peak}))
    return 0


def trl_epochs(model: Path, gradient_steps: int | None) -> Callable[[], Any]:
    from accelerate import PartialState
    from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState(cpu=True)  # trl's pipeline logs before its trainer has made one
    pipeline = DefaultDDPOStableDiffusionPipeline(str(model), use_lora=True)
    prompts = endless()

    def reward(images: Any, prompts: Any, metadata: Any) -> Any:
        return images.mean((1, 2, 3)), {}

    common: dict[str, Any] = dict(
        sample_num_steps=STEPS, sample_guidance_scale=GUIDANCE, train_batch_size=BATCH, train_gradient_accumulation_steps=1,
        mixed_precision="no", save_freq=10**9, log_with=None, accelerator_kwargs={"cpu": True},
    )  # fmt: skip
    if gradient_steps is None:
        sampling = dict(sample_batch_size=BATCH, sample_num_batches_per_epoch=1, sample_eta=1.0)
        trainer: Any = DDPOTrainer(DDPOConfig(**common, **sampling), reward, lambda: (next(prompts), {}), pipeline)
    else:
        cut = dict(truncated_backprop_rand=False, truncated_backprop_timestep=STEPS - gradient_steps, sample_eta=0.0)
        trainer = AlignPropTrainer(AlignPropConfig(**common, **cut), reward, lambda: (next(prompts), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: trainer.step(0, 0)


def diffalign_epochs(model: Path, gradient_steps: int | None) -> Callable[[], Any]:
    from diffalign.config import resolve
    from diffalign.contract import reward
    from diffalign.loop import prepare, train
    from diffalign.models import make_policy
    from diffalign.processes import make_accelerator
    from diffalign.streams import PromptList

    brightness = reward(differentiable=True)(lambda images, prompts: images.mean((1, 2, 3)))
    ddpo = {"name": "ddpo", "inference_steps": STEPS, "batches": 1, "updates": 1, "advantage": "global"}
    alignprop = {"name": "alignprop", "inference_steps": STEPS, "truncation": "fixed", "k": gradient_steps}
    plan = resolve(
        {
            "pipeline": str(model), "method": alignprop if gradient_steps else ddpo, "guidance_scale": GUIDANCE, "batch_size": BATCH,
            "accumulate": 1, "lora": {"rank": 4}, "steps": 10**6, "device": "cpu",
        },
        brightness,
    )  # fmt: skip
    policy = make_policy(plan.settings)
    training = prepare(policy, plan.settings, PromptList(PROMPTS), make_accelerator(plan.settings))
    rows = train(training, policy, plan.method, plan.reward, plan.settings)
    return lambda: next(rows)


def endless() -> Iterator[str]:
    while True:
        yield from PROMPTS


def write_model(folder: Path) -> None:
    """A Stable Diffusion pipeline with random weights, as trl's older packages write it; the newer ones read that too."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    assert sum(p.numel() for p in unet.parameters()) == 985_444
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, sample_size=32,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
