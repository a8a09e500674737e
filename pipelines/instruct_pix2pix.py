"""InstructPix2Pix: Stable Diffusion that edits a picture as an instruction says (Brooks et al., CVPR 2023, arXiv 2211.09800)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from diffalign import lora
from diffalign.cache import Shelf
from diffalign.errors import InputError
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
class InstructPix2Pix:
    """A `StableDiffusionInstructPix2PixPipeline` as a policy. Latents (B, 4, H/8, W/8), images (B, 3, H, W) in [0, 1].

    The UNet sees the noisy latents and, beside them, the latents of `prompts.image`. Make one with `InstructPix2Pix.of(pipe)`. The
    pipeline's modules are used as they are, never copied: its UNet is what trains.
    """

    component: ClassVar[str] = "unet"
    lora_targets: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0"]

    pipe: Any
    path: NoisePath
    guidance_scale: float
    image_guidance_scale: float
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
        image_guidance_scale: float = 1.5,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> InstructPix2Pix:
        """Wrap a live pipeline: moves it to `device`, its UNet and text encoder to `precision`, and its VAE to fp32.

        Guidance is on where `guidance_scale` is above 1, as in diffusers. Raises InputError for an `image_guidance_scale` below 1.
        """
        if not 1 <= image_guidance_scale < float("inf"):
            raise InputError(f"image_guidance_scale is {image_guidance_scale}: give 1 (none) or more.")
        dtype = PRECISIONS[precision]
        for module, kind in ((pipe.vae, torch.float32), (pipe.unet, dtype), (pipe.text_encoder, dtype)):
            freeze(module, device, kind)
        height, width = own_size(pipe, height, width)

        @torch.no_grad()
        def encode(texts: list[str]) -> list[Tensor]:
            return [pipe._encode_prompt(texts, device, 1, False).float()]

        path, texts = path_of(pipe.scheduler), TextCache(encode, device)
        return cls(pipe, path, guidance_scale, image_guidance_scale, negative_prompt, height, width, dtype, texts)

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

    @torch.no_grad()
    def encode(self, prompts: Prompts) -> Condition:
        """Embeddings (B, tokens, width) of the instructions, and the sources' latents: the mode of the posterior, not scaled.

        Raises InputError for prompts without pictures.
        """
        if prompts.image is None:
            raise InputError("This pipeline edits pictures, and the prompts have none.")
        hidden = self.texts(prompts.text)["encoder_hidden_states"]
        source = self.pipe.vae.encode(prompts.image.to(hidden.device, torch.float32) * 2 - 1).latent_dist.mode()
        tensors = {"encoder_hidden_states": hidden, "source": source}
        if self.guidance_scale <= 1:
            return Condition(tensors)
        empty = self.texts([self.negative_prompt])["encoder_hidden_states"].expand_as(hidden)
        null = {"encoder_hidden_states": empty, "source": torch.zeros_like(source)}
        return Condition(tensors, null, self.guidance_scale)

    def blind(self, condition: Condition, rows: Tensor) -> Condition:
        """The condition with no source in `rows`, bool (B,): what a model that is guided towards the source is trained on too."""
        source = condition.tensors["source"]
        unseen = rows.to(source.device)[:, None, None, None]
        return replace(condition, tensors={**condition.tensors, "source": source.masked_fill(unseen, 0.0)})

    def prior(self, condition: Condition, rng: Generator | None = None) -> Tensor:
        """x_T ~ N(0, I), (B, *latent), of the sources' size."""
        source = condition.tensors["source"]
        return draw_noise((len(source), self.pipe.vae.config.latent_channels, *source.shape[-2:]), source, rng)

    def predict(self, x_t: Tensor, at: Level, condition: Condition) -> Tensor:
        """The UNet's guided output in fp32, (B, *latent); with guidance all three branches go through in one call of 3B.

        `e(0, 0) + s_I (e(I, 0) - e(0, 0)) + s_T (e(I, T) - e(I, 0))`, arXiv 2211.09800, eq. 3.
        """
        hidden, source = condition.tensors["encoder_hidden_states"], condition.tensors["source"]
        t = at.t.to(x_t.device, x_t.dtype).expand(len(x_t))
        if condition.null is None:
            return self._unet(x_t, source, t, hidden)
        null, nothing = condition.null["encoder_hidden_states"], condition.null["source"]
        branches = torch.cat([x_t] * 3), torch.cat([source, source, nothing]), torch.cat([t] * 3), torch.cat([hidden, null, null])
        text, image, neither = self._unet(*branches).chunk(3)
        return neither + condition.guidance_scale * (text - image) + self.image_guidance_scale * (image - neither)

    def _unet(self, x_t: Tensor, source: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        return call_unet(self.pipe.unet, self.dtype, torch.cat([x_t, source], 1), t, hidden)

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
