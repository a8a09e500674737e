"""Stable Diffusion 1.x and 2.x: a text-conditioned UNet on the latents of a VAE."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from diffalign import lora
from diffalign.cache import Shelf
from diffalign.noise import draw_noise, path_of
from diffalign.pipelines.common import (
    PRECISIONS,
    TextCache,
    base_unet,
    call_unet,
    decode_images,
    embed_images,
    freeze,
    frozen_copy,
    own_size,
    shelve,
)
from diffalign.types import Condition, Level, Modality, NoisePath, Prompts


@dataclass
class StableDiffusion:
    """A `StableDiffusionPipeline` as a policy. Latents (B, 4, H/8, W/8), images (B, 3, H, W) in [0, 1].

    Make one with `StableDiffusion.of(pipe)`. The pipeline's modules are used as they are, never copied: its UNet is what trains.
    """

    component: ClassVar[str] = "unet"
    lora_targets: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0"]

    pipe: Any
    path: NoisePath
    guidance_scale: float
    negative_prompt: str
    height: int
    width: int
    dtype: torch.dtype
    texts: TextCache
    frozen: Any = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        pipe: Any,
        *,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> StableDiffusion:
        """Wrap a live pipeline: moves it to `device`, its UNet and text encoder to `precision`, and its VAE to fp32."""
        dtype = PRECISIONS[precision]
        for module, kind in ((pipe.vae, torch.float32), (pipe.unet, dtype), (pipe.text_encoder, dtype)):
            freeze(module, device, kind)
        height, width = own_size(pipe, height, width)

        @torch.no_grad()
        def encode(texts: list[str]) -> list[Tensor]:
            return [pipe.encode_prompt(texts, device, 1, False)[0].float()]

        path = path_of(pipe.scheduler)
        return cls(pipe, path, guidance_scale, negative_prompt, height, width, dtype, TextCache(encode, device))

    @property
    def modality(self) -> Modality:
        return "image"

    @property
    def module(self) -> Any:
        """The UNet."""
        return self.pipe.unet

    def adapt(self, settings: lora.LoRA, seed: int = 0) -> None:
        """Put a trainable LoRA on the UNet."""
        lora.attach(self.pipe, self.component, settings, self.lora_targets, seed)

    def unfreeze(self) -> None:
        """Train every weight of the UNet, in fp32; a frozen copy stays behind as the reference."""
        self.frozen = frozen_copy(self.pipe.unet)
        self.pipe.unet.float().requires_grad_(True)

    def release(self) -> None:
        """Leave the pipeline in one dtype, fp32: with a half-precision UNet beside the fp32 VAE it could not be called."""
        for module in (self.pipe.unet, self.pipe.text_encoder):
            if module.dtype != torch.float32:
                module.float()

    def save(self, folder: Path) -> None:
        """Write what plain diffusers loads: a LoRA, or after full fine-tuning the UNet's folder."""
        if self.frozen is None:
            lora.save(self.pipe, self.component, folder)
        else:
            self.pipe.unet.save_pretrained(folder)

    def encode(self, prompts: Prompts) -> Condition:
        """Prompt embeddings (B, tokens, width), from the cache where they are known."""
        embeddings = self.texts(prompts.text)["encoder_hidden_states"]
        if self.guidance_scale <= 1:
            return Condition({"encoder_hidden_states": embeddings})
        null = self.texts([self.negative_prompt])["encoder_hidden_states"].expand_as(embeddings)
        return Condition({"encoder_hidden_states": embeddings}, {"encoder_hidden_states": null}, self.guidance_scale)

    def prior(self, condition: Condition, rng: Generator | None = None) -> Tensor:
        """x_T ~ N(0, I), (B, *latent)."""
        channels, factor = self.pipe.unet.config.in_channels, self.pipe.vae_scale_factor
        shape = (len(condition), channels, self.height // factor, self.width // factor)
        return draw_noise(shape, condition.tensors["encoder_hidden_states"], rng)

    def predict(self, x_t: Tensor, at: Level, condition: Condition) -> Tensor:
        """The UNet's guided output in fp32, (B, *latent); with guidance both branches go through in one call of 2B."""
        hidden = condition.tensors["encoder_hidden_states"]
        t = at.t.to(x_t.device, x_t.dtype).expand(len(x_t))
        if condition.null is None:
            return call_unet(self.pipe.unet, self.dtype, x_t, t, hidden)
        both = torch.cat([condition.null["encoder_hidden_states"], hidden])
        unconditional, conditional = call_unet(self.pipe.unet, self.dtype, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return unconditional + condition.guidance_scale * (conditional - unconditional)

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W) in [0, 1], in fp32, with a graph where one is wanted."""
        return decode_images(self.pipe.vae, x_0)

    def embed(self, media: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to x_0, the mode of the VAE's posterior."""
        return embed_images(self.pipe.vae, media)

    def shelve(self, root: Path) -> Shelf:
        """Keep text embeddings under `root` from now on; the shelf there of this VAE's latents at this size."""
        return shelve(self.pipe, self.texts, self.height, self.width, root)

    def reference(self) -> AbstractContextManager[None]:
        """The base model while the block runs: LoRA switched off, or the frozen copy in the UNet's place."""
        return base_unet(self.pipe, self.frozen)
