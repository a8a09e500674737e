"""Stable Diffusion 1.x and 2.x: a text-conditioned UNet on the latents of a VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from diffalign import lora
from diffalign.noise import draw_noise, path_of
from diffalign.pipelines.common import PRECISIONS, TextCache, adapter_off, check_size, freeze, frozen_copy
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
        size = pipe.unet.config.sample_size
        own = [int(n) * pipe.vae_scale_factor for n in ((size, size) if isinstance(size, int) else size)]
        height, width = int(own[0] if height is None else height), int(own[1] if width is None else width)
        check_size(height, width, pipe.vae_scale_factor)

        @torch.no_grad()
        def encode(texts: list[str]) -> Tensor:
            return pipe.encode_prompt(texts, device, 1, False)[0].float()

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
        embeddings = self.texts(prompts.text)
        if self.guidance_scale <= 1:
            return Condition({"encoder_hidden_states": embeddings})
        null = self.texts([self.negative_prompt]).expand_as(embeddings)
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
            return self._unet(x_t, t, hidden)
        both = torch.cat([condition.null["encoder_hidden_states"], hidden])
        unconditional, conditional = self._unet(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return unconditional + condition.guidance_scale * (conditional - unconditional)

    def _unet(self, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        # Each weight is used once a call, and older torch handed a step with a graph the casts made without one: no cache.
        half = self.dtype != torch.float32
        with torch.autocast(x.device.type, self.dtype if half else None, enabled=half, cache_enabled=False):
            return self.pipe.unet(x, t, encoder_hidden_states=hidden, return_dict=False)[0].to(x.dtype)

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W) in [0, 1], in fp32, with a graph where one is wanted."""
        images = self.pipe.vae.decode(x_0 / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    def embed(self, media: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to x_0, the mode of the VAE's posterior."""
        return self.pipe.vae.encode(media * 2 - 1).latent_dist.mode() * self.pipe.vae.config.scaling_factor

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base model while the block runs: LoRA switched off, or the frozen copy in the UNet's place."""
        if self.frozen is not None:
            trained, self.pipe.unet = self.pipe.unet, self.frozen
            try:
                yield
            finally:
                self.pipe.unet = trained
        elif getattr(self.pipe.unet, "peft_config", None):
            with adapter_off(self.pipe.unet):
                yield
        else:
            yield
