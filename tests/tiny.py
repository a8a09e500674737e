"""The package's tiny pipelines, by the class they are of, and what tests need besides: prompts, rewards, files."""

# pyright: reportArgumentType=false
# diffusers' annotations are narrower than what its constructors take.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffalign import registry
from diffalign.pipelines.tiny import (
    SCHEDULER,
    SD_2,
    TEXT,
    flux,
    inpaint,
    inpaint_xl,
    instruct_pix2pix,
    instruct_pix2pix_xl,
    sd3,
    sdxl,
    stable_diffusion,
    z_image,
)
from diffalign.pipelines.transformer import TransformerFamily
from diffalign.pipelines.unet import UNetFamily

__all__ = [
    "SCHEDULER", "SD_2", "flux", "inpaint", "inpaint_xl", "instruct_pix2pix", "instruct_pix2pix_xl", "sd3", "sdxl", "stable_diffusion",
    "z_image",
]  # fmt: skip


def _of(kind: type) -> dict[str, Any]:
    adapters = {name: registry.find("pipelines", name)[0] for name in registry.PIPELINES}
    return {name: adapter.tiny for name, adapter in adapters.items() if isinstance(adapter, kind)}


FAMILIES, FLOWS = _of(UNetFamily), _of(TransformerFamily)


def checked(seed: int = 0) -> Any:
    """Stable Diffusion with a safety checker, to which nothing is safe."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

    parts = {**stable_diffusion(seed).components, "image_encoder": None}
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=TEXT, vision_config=vision.to_dict(), projection_dim=16))
    torch.nn.init.constant_(checker.concept_embeds_weights, -2.0)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe = StableDiffusionPipeline(**{**parts, "safety_checker": checker, "feature_extractor": extractor})
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
