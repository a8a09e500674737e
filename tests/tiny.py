"""A Stable Diffusion pipeline with random weights, small enough for a test."""

# pyright: reportArgumentType=false
# diffusers' annotations are narrower than what its constructors take.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def stable_diffusion(seed: int = 0, **scheduler: Any) -> Any:
    """Latents (B, 4, 8, 8), pictures (B, 3, 16, 16); `scheduler` overrides SD 1.5's scheduler configuration."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    config = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(**{**config, **scheduler}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def instruct_pix2pix(seed: int = 0, **scheduler: Any) -> Any:
    """The same with a UNet that sees the source's latents too."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    parts = {**stable_diffusion(seed, **scheduler).components, "image_encoder": None}
    unet = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 8})
    pipe = StableDiffusionInstructPix2PixPipeline(**{**parts, "unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "grey") for thing in ("dog", "cat", "cow", "hen")]
REWARDS = '''"""Plug-in rewards of the tests."""

import diffalign

@diffalign.reward(differentiable=True)
def red(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))

@diffalign.reward(differentiable=True)
def detached(images, prompts):
    return images.detach().mean((1, 2, 3))

@diffalign.reward(differentiable=True)
def zero(images, prompts):
    return images.mean((1, 2, 3)) * 0

@diffalign.reward(differentiable=True)
def nan(images, prompts):
    return images.mean((1, 2, 3)) * float("nan")

@diffalign.reward(differentiable=True)
def shape(images, prompts):
    return images.mean()

def plain(images, prompts):
    return images.mean((1, 2, 3))
'''


def write_files(folder: Path) -> Path:
    """model/, rewards.py and prompts.txt in `folder`."""
    stable_diffusion().save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder
