"""What each memory and speed setting is worth on this machine: a step of DRaFT-1 on a random Stable Diffusion, on and off.

    OMP_NUM_THREADS=1 python scripts/benchmark_knobs.py [--cases plain channels_last] [--batch-size 4] [--repeats 3] [--output FILE.json]

The UNet has 21 million weights and latents of 32 x 32, the pictures are 256 x 256. Each setting has a process of its own. Seconds are the
processor's on a CPU, the least of the repeats after a step to warm up. `taken` is the highest of memory in a step: the allocator's word on
CUDA, on a CPU the tensors before it and what the process grew by. `counted` is the highest of the living tensors, `expected` the line
through steps of two and four samples: what `diffalign check` says beforehand.
"""

# pyright: reportArgumentType=false
# diffusers' annotations are narrower than what its constructors take.

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from diffalign.config import Plan
from diffalign.contract import CheckedReward, FunctionReward
from diffalign.lora import LoRA
from diffalign.memory import Trial, expected
from diffalign.methods.draft import DRaFT
from diffalign.models import load_pipeline, make_policy, prepare_to_train
from diffalign.peaks import taken
from diffalign.settings import Settings

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "vae_batch_size 1": {"vae_batch_size": 1},
    "gradient_checkpointing, vae_batch_size 1": {"gradient_checkpointing": True, "vae_batch_size": 1},
    "channels_last": {"channels_last": True},
    "attention eager": {"attention": "eager"},
    "attention sliced": {"attention": "sliced"},
    "precision bf16": {"precision": "bf16"},
    "full": {"full": True},
    "compile": {"compile": True},
    "offload": {"offload": True},
    "attention xformers": {"attention": "xformers"},
    "adamw8bit, full": {"optimizer": "adamw8bit", "full": True},
}
ON_CUDA = ("offload", "attention xformers", "adamw8bit, full")
PROMPTS = ["a red circle on a blue background", "two green squares", "a yellow triangle", "three grey crosses"]
GREEN = FunctionReward(lambda images, prompts: images[:, 1].mean((1, 2)) - images[:, 0].mean((1, 2)), differentiable=True)


def pipeline() -> Any:
    """The embedded model's text encoder, and a UNet and a VAE of random weights."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    parts = load_pipeline("shapes").components
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 256), layers_per_block=2, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=parts["text_encoder"].config.hidden_size,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return StableDiffusionPipeline(**{**parts, "unet": unet, "vae": vae}, requires_safety_checker=False)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(case: str, size: int, repeats: int) -> dict[str, float]:
    settings = Settings(guidance_scale=1.0, batch_size=size, lora=LoRA(rank=8), **CASES[case])
    plan = Plan(settings, "draft", DRaFT(inference_steps=2), "green", CheckedReward(GREEN, "green"))
    policy = make_policy(settings, pipeline(), train=False)
    if settings.compile:  # a long compilation's own memory is not the step's
        policy.encode(Trial(plan, policy, PROMPTS).inputs(size)[0])
    trial = Trial(plan, prepare_to_train(policy, settings), PROMPTS)
    begin = clock()
    trial.step(size)
    first = clock() - begin
    seconds = list[float]()
    with taken(policy.module.device) as took:
        for _ in range(repeats):
            begin = clock()
            trial.step(size)
            seconds.append(clock() - begin)
    counted, line = trial.peak(size), expected(trial)
    assert counted is not None
    assert line is not None
    megabytes = {"taken": took.peak / 1e6, "counted": counted / 1e6, "expected": line(size) / 1e6}
    return {"seconds": min(seconds), "first": first, **megabytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in CASES if torch.cuda.is_available() or name not in ON_CUDA]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=usual, metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a .json file of the numbers")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one, chosen.batch_size, chosen.repeats)))
        return 0
    found: dict[str, dict[str, float]] = {}
    columns = ("setting", "seconds a step", "first step, s", "taken, MB", "counted, MB", "expected, MB")
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for case in chosen.cases:
        sizes = ["--batch-size", str(chosen.batch_size), "--repeats", str(chosen.repeats)]
        done = subprocess.run([sys.executable, __file__, "--one", case, *sizes], stdout=subprocess.PIPE, text=True, check=True)
        row = found[case] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {case} | {row['seconds']:.2f} | {row['first']:.1f} | {row['taken']:,.0f} | {row['counted']:,.0f} "
            f"| {row['expected']:,.0f} |", flush=True,
        )  # fmt: skip
    if chosen.output:
        chosen.output.write_text(json.dumps({"batch_size": chosen.batch_size, "repeats": chosen.repeats, "cases": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
