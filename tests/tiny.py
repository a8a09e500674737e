"""Pipelines with random weights, small enough for a test: latents (B, 4, 8, 8), pictures (B, 3, 16, 16)."""

# pyright: reportArgumentType=false
# diffusers' annotations are narrower than what its constructors take.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
TEXT = dict(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
UNET = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16, attention_head_dim=8,
)  # fmt: skip
SD_2 = dict(use_linear_projection=True, attention_head_dim=(2, 4))  # what Stable Diffusion 2.x has otherwise
SDXL = dict(
    SD_2, cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=(1, 2),
)  # fmt: skip
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
)  # fmt: skip


def stable_diffusion(seed: int = 0, unet: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """`scheduler` overrides SD 1.5's scheduler configuration, `unet` the network's."""
    from diffusers import StableDiffusionPipeline

    return _quiet(StableDiffusionPipeline(**_parts(seed, unet or {}, scheduler), **UNCHECKED))


def checked(seed: int = 0) -> Any:
    """Stable Diffusion with a safety checker, to which nothing is safe."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

    parts = _parts(seed, {}, {})
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=TEXT, vision_config=vision.to_dict(), projection_dim=16))
    torch.nn.init.constant_(checker.concept_embeds_weights, -2.0)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return _quiet(StableDiffusionPipeline(**parts, safety_checker=checker, feature_extractor=extractor))


def sdxl(seed: int = 0, unet: dict[str, Any] | None = None, force_zeros_for_empty_prompt: bool = True, **scheduler: Any) -> Any:
    """Two text encoders of different weights, and a UNet that is told sizes."""
    from diffusers import StableDiffusionXLPipeline

    zeros = {"force_zeros_for_empty_prompt": force_zeros_for_empty_prompt}
    return _quiet(StableDiffusionXLPipeline(**_xl_parts(seed, unet or {}, scheduler), **zeros, add_watermarker=False))


def instruct_pix2pix(seed: int = 0, **scheduler: Any) -> Any:
    """Stable Diffusion with a UNet that sees the source's latents too."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    parts = {**stable_diffusion(seed, **scheduler).components, "image_encoder": None}
    unet = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 8})
    return _quiet(StableDiffusionInstructPix2PixPipeline(**{**parts, "unet": unet}, requires_safety_checker=False))


def instruct_pix2pix_xl(seed: int = 0, is_cosxl_edit: bool = False, **scheduler: Any) -> Any:
    from diffusers import StableDiffusionXLInstructPix2PixPipeline

    parts = _xl_parts(seed, {"in_channels": 8}, scheduler)
    return _quiet(StableDiffusionXLInstructPix2PixPipeline(**parts, is_cosxl_edit=is_cosxl_edit, add_watermarker=False))


def inpaint(seed: int = 0, unet: dict[str, Any] | None = None, certain: bool = True, **scheduler: Any) -> Any:
    """A UNet with 9 channels. `certain`: the VAE's posterior has no spread, since this pipeline draws from it."""
    from diffusers import StableDiffusionInpaintPipeline

    parts = _parts(seed, {"in_channels": 9, **(unet or {})}, scheduler)
    return _quiet(StableDiffusionInpaintPipeline(**(_certain(parts) if certain else parts), **UNCHECKED))


def inpaint_xl(seed: int = 0, **scheduler: Any) -> Any:
    from diffusers import StableDiffusionXLInpaintPipeline

    return _quiet(StableDiffusionXLInpaintPipeline(**_certain(_xl_parts(seed, {"in_channels": 9}, scheduler)), add_watermarker=False))


UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
FAMILIES = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": sdxl,
    "StableDiffusionInstructPix2PixPipeline": instruct_pix2pix,
    "StableDiffusionXLInstructPix2PixPipeline": instruct_pix2pix_xl,
    "StableDiffusionInpaintPipeline": inpaint,
    "StableDiffusionXLInpaintPipeline": inpaint_xl,
}


def _parts(seed: int, unet: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(WORDS)}, merges=[], model_max_length=16)
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT))
    network = UNet2DConditionModel(**{**UNET, **unet})
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    steps = DDIMScheduler(**{**SCHEDULER, **scheduler})
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": network, "scheduler": steps}


def _xl_parts(seed: int, unet: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    parts = _parts(seed, {**SDXL, **unet}, scheduler)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, projection_dim=16))
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(WORDS)}, merges=[], model_max_length=16, pad_token=WORDS[2])
    return {**parts, "text_encoder_2": second, "tokenizer_2": tokenizer}


@torch.no_grad()
def _certain(parts: dict[str, Any]) -> dict[str, Any]:
    parts["vae"].quant_conv.weight[4:] = 0
    parts["vae"].quant_conv.bias[4:] = -30
    return parts


def _quiet(pipe: Any) -> Any:
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
