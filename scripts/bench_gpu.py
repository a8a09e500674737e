"""How fast a GPU samples and trains Stable Diffusion 1.5, SDXL and Stable Diffusion 3 medium, of true size and with random weights.

    python scripts/bench_gpu.py [--models sd15 sdxl sd3] [--tasks sampling draft ddpo diffusion-dpo] [--output bench-gpu]
    python scripts/bench_gpu.py --tiny --output FOLDER     all of the same code on networks of some thousand weights, in seconds, on a CPU

Speed needs no training, so nothing is downloaded: the networks are made on the device from the configurations below. They differ from the
released ones in their numbers alone, and in the tokenizers, which know single letters. Stable Diffusion 3 comes without T5, whose
embeddings are computed once a prompt. The reward is a picture's mean brightness, which costs nothing.

Every cell is one task of one model in bf16, its VAE too, with guidance: a batch of samples with their pictures, or one optimiser step of a
LoRA on the attention (Diffusion-DPO's without guidance, as its loss is; its pictures are both of each pair). The texts are encoded before.
The first step is a warm-up, in which the FLOPs are counted (torch.utils.flop_counter: matrix products, convolutions and attention of UNet
or transformer and VAE, forward and backward). The steps after it are timed for at most --seconds, one at least. The share is of what a
large bf16 matrix product reaches on the same device in the same run. Peak memory is a cell's own on a GPU, and the process's on a CPU.
Writes bench-gpu.json and bench-gpu.md into the folder of --output, after every cell.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as Steps
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

import diffalign
from diffalign.config import resolve
from diffalign.loop import prepare, train
from diffalign.models import adapter_of, device_of, make_policy, network_of, prepare_to_train
from diffalign.peaks import peak_memory_mb
from diffalign.processes import make_accelerator
from diffalign.run import versions
from diffalign.sampling import ddim, rollout
from diffalign.settings import LIVE, Settings
from diffalign.streams import PromptList
from diffalign.types import Examples, Policy, Prompts

Config = Mapping[str, Any]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "grey", "black") for thing in ("dog", "cat", "cow", "hen")]
CLIP: Config = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1)
CLIP_L: Config = dict(CLIP, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G: Config = dict(CLIP, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
VAE: Config = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
BETAS: Config = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
)  # fmt: skip
ADDED: Config = dict(addition_embed_type="text_time", use_linear_projection=True)
FLOW_VAE: Config = dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


@dataclass(frozen=True)
class Model:
    """A pipeline by its class, its network and the configurations of its parts; `texts` are its CLIP encoders', in order."""

    title: str
    pipeline: str
    network: Config
    vae: Config
    texts: tuple[Config, ...]
    batch_size: int


MODELS = {
    "sd15": Model(
        "Stable Diffusion 1.5", "StableDiffusionPipeline",
        dict(
            sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=768, attention_head_dim=8,
        ),
        dict(VAE, sample_size=512, scaling_factor=0.18215), (CLIP_L,), 8,
    ),
    "sdxl": Model(
        "Stable Diffusion XL", "StableDiffusionXLPipeline",
        dict(
            ADDED, sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        dict(VAE, sample_size=1024, scaling_factor=0.13025), (CLIP_L, CLIP_G), 4,
    ),
    "sd3": Model(
        "Stable Diffusion 3 medium", "StableDiffusion3Pipeline",
        dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
        ),
        dict(VAE, **FLOW_VAE, sample_size=1024), (CLIP_L, CLIP_G), 4,
    ),
}  # fmt: skip


def build(model: Model, device: torch.device | str) -> Any:
    """The pipeline with random weights in fp32, made on the device; on `meta` without any."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    flow, two = model.pipeline == "StableDiffusion3Pipeline", len(model.texts) > 1
    networks: dict[str, Any] = {"transformer": diffusers.SD3Transformer2DModel, "unet": diffusers.UNet2DConditionModel}
    name = "transformer" if flow else "unet"
    parts: dict[str, Any] = {}
    with torch.device(device):
        parts[name] = networks[name](**model.network)
        parts["vae"] = diffusers.AutoencoderKL(**model.vae)
        for i, config in enumerate(model.texts):
            # SDXL takes the last hidden state of its first encoder, and projects with the second; SD3 projects with both
            text: Any = CLIPTextModelWithProjection if flow or i else CLIPTextModel
            parts[f"text_encoder{'_2' if i else ''}"] = text(CLIPTextConfig(**config))
    for i, _ in enumerate(model.texts):
        vocabulary = {word: n for n, word in enumerate(WORDS)}
        parts[f"tokenizer{'_2' if i else ''}"] = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    if flow:
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    else:
        scheduler = diffusers.DDIMScheduler(**BETAS)
    if two and not flow:
        parts["add_watermarker"] = False
    if not two:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return getattr(diffusers, model.pipeline)(**parts, scheduler=scheduler)


@diffalign.reward(differentiable=True)
def brightness(images: Tensor, prompts: Prompts) -> Tensor:
    """A picture's mean."""
    return images.mean((1, 2, 3))


@dataclass(frozen=True)
class RandomPairs:
    """Preference pairs of random latents, on the device."""

    policy: Policy
    count: int

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int]) -> Examples:
        prompts = Prompts(tuple(PROMPTS[i % len(PROMPTS)] for i in indices))
        rng = Generator().manual_seed(0)
        x_0, rejected = (self.policy.prior(self.policy.encode(prompts), rng) for _ in "12")
        return Examples(prompts, x_0, rejected)

    def contents(self) -> str:
        return "random pairs"


TASKS: dict[str, Config] = {
    "sampling": {},
    "draft": {"k": 1, "n": 0},
    "ddpo": {"batches": 1, "samples": 1, "updates": 1, "inner_epochs": 1, "advantage": "global"},
    "diffusion-dpo": {},
}


def steps_of(task: str, pipe: Any, size: int, inference_steps: int, device: torch.device) -> Steps[None]:
    """One batch of samples, or one optimiser step on a batch, each time that it is asked for one; at first all that comes before."""
    common: dict[str, Any] = {
        "pipeline": LIVE, "precision": "bf16", "vae_precision": "bf16", "guidance_scale": 5.0, "batch_size": size, "accumulate": 1,
        "steps": 10**9, "warmup_steps": 0, "lr_schedule": "constant", "device": str(device), "lora": {"rank": 8},
    }  # fmt: skip
    if task == "sampling":
        settings = Settings(**{**common, "lora": Settings().lora})
        policy, rng = make_policy(settings, pipe, train=False), Generator().manual_seed(0)
        prompts = Prompts(tuple((PROMPTS * size)[:size]))
        policy.encode(Prompts(("", *PROMPTS)))
        yield
        while True:
            with torch.no_grad():
                policy.decode(rollout(policy, policy.encode(prompts), steps=inference_steps, kernel=ddim(0.0), rng=rng).final)
            yield
    rewarded = task != "diffusion-dpo"
    method = {"name": task, **TASKS[task], **({"inference_steps": inference_steps} if rewarded else {})}
    given = {**common, "method": method, **({} if rewarded else {"data": "random pairs"})}
    plan = resolve(given, brightness if rewarded else None)
    policy = prepare_to_train(make_policy(plan.settings, pipe, train=False), plan.settings)
    source = PromptList(PROMPTS, policy) if rewarded else RandomPairs(policy, 4 * size)
    training = prepare(policy, plan.settings, source, make_accelerator(plan.settings))
    policy.encode(Prompts(("", *PROMPTS)))
    try:
        yield
        for _ in train(training, policy, plan.method, plan.reward, plan.settings):
            yield
    finally:
        pipe.unload_lora_weights()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    start = clock(device)
    work()
    return clock(device) - start


def matrix_rate(device: torch.device, n: int, repeats: int = 20) -> float:
    """FLOP/s of a bf16 product of two (n, n) matrices; the median."""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in "12")
    for _ in range(3):
        torch.mm(a, b)
    return 2 * n**3 / statistics.median(timed(lambda: torch.mm(a, b), device) for _ in range(repeats))


def measure(task: str, pipe: Any, size: int, inference_steps: int, device: torch.device, seconds: float, most: int) -> dict[str, Any]:
    """One cell of the table; `error` where the device's memory did not suffice."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = steps_of(task, pipe, size, inference_steps, device)
    try:
        next(steps)
        with FlopCounterMode(display=False) as counter:
            next(steps)
        end, times = time.perf_counter() + seconds, list[float]()
        while not times or (len(times) < most and time.perf_counter() < end):
            times.append(timed(lambda: next(steps), device))
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        steps.close()  # which takes the LoRA off the pipeline
    step = statistics.median(times)
    pictures = 2 * size if task == "diffusion-dpo" else size
    return {
        "pictures": pictures, "steps_timed": len(times), "step_seconds": step, "images_per_second": pictures / step,
        "tflop": counter.get_total_flops() / 1e12, "tflop_per_second": counter.get_total_flops() / 1e12 / step,
        "peak_memory_gb": peak_memory_mb(device) / 1e3,
    }  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    lines = [
        f"{report['device']}, a bf16 matrix product of {report['matrix']} x {report['matrix']} at {report['matrix_tflop_per_second']:.4g} "
        f"TFLOP/s; torch {report['versions']['torch']}, diffusers {report['versions']['diffusers']}. Random weights, bf16, guidance 5.",
        "",
        "| model | task | size | pictures | denoising steps | step s | images/s | TFLOP | share of the matrix rate | peak GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        begin = f"| {row['title']} | {row['task']} | {row['pixels']} | "
        if "error" in row:
            lines.append(f"{begin}{row['batch_size']} | {row['denoising_steps']} | {row['error']} |  |  |  |  |")
        else:
            lines.append(
                f"{begin}{row['pictures']} | {row['denoising_steps']} | {row['step_seconds']:.4g} | {row['images_per_second']:.3g} "
                f"| {row['tflop']:.4g} | {row['share']:.3f} | {row['peak_memory_gb']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--inference-steps", type=int, help="denoising steps of a sample; by default 20, tiny 2")
    parser.add_argument("--batch-size", type=int, help="by default 8, and 4 of 1024 x 1024")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each cell")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed at most")
    parser.add_argument("--output", type=Path, default=Path("bench-gpu"), help="folder of bench-gpu.json and bench-gpu.md")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, on a CPU where there is no GPU")
    chosen = parser.parse_args(arguments)
    device, tiny = device_of(Settings()), chosen.tiny
    if device.type != "cuda" and not tiny:
        parser.error("networks of true size want a GPU: this machine has none. --tiny runs the same code.")
    steps, matrix = chosen.inference_steps or (2 if tiny else 20), 256 if tiny else 8192
    rate = matrix_rate(device, matrix)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU", "versions": versions(),
        "matrix": matrix, "matrix_tflop_per_second": rate / 1e12, "tiny": tiny, "rows": [],
    }  # fmt: skip
    chosen.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name in chosen.models:
        model = MODELS[name]
        pipe = adapter_of(model.pipeline).tiny() if tiny else build(model, device)
        size = chosen.batch_size or (2 if tiny else model.batch_size)
        side = getattr(pipe, network_of(pipe)).config.sample_size * pipe.vae_scale_factor
        for task in chosen.tasks:
            cell = measure(task, pipe, size, steps, device, chosen.seconds, 1 if tiny else chosen.repeats)
            gc.collect()
            torch.cuda.empty_cache()
            cell |= {} if "error" in cell else {"share": cell["tflop_per_second"] * 1e12 / rate}
            denoising = "" if task == "diffusion-dpo" else steps
            row = {"model": name, "title": model.title + ", tiny" * tiny, "task": task, "pixels": f"{side} x {side}", "batch_size": size}
            report["rows"].append({**row, "denoising_steps": denoising, **cell})
            # written after every cell: a lent machine may go away
            (chosen.output / "bench-gpu.json").write_text(json.dumps(report, indent=2) + "\n")
            (chosen.output / "bench-gpu.md").write_text(table(report))
        del pipe
        gc.collect()
    print(table(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
