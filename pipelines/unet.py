"""Pipelines with a UNet on the latents of a VAE: the policy that all of them are, and what tells one family from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from diffalign import lora
from diffalign.cache import Shelf
from diffalign.errors import InputError
from diffalign.noise import draw_noise, path_of
from diffalign.pipelines.common import (
    PRECISIONS,
    TextCache,
    TextEncoding,
    base_unet,
    call_unet,
    decode_images,
    embed_images,
    freeze,
    frozen_copy,
    notes_of,
    own_size,
    shelve,
    vae_dtype,
)
from diffalign.types import Condition, Level, Modality, NoisePath, PictureField, Prompts

Named = Mapping[str, Tensor]
Size = tuple[int, int]


def no_picture(pipe: Any, prompts: Prompts) -> tuple[Named, Named]:
    """What the network is shown besides x_t, and in the unconditional branch: nothing."""
    return {}, {}


def without_and_with(condition: Condition) -> list[Named]:
    """The branches of classifier-free guidance, in diffusers' order: unconditional, conditional."""
    assert condition.null is not None
    return [condition.null, condition.tensors]


def classifier_free(outputs: Sequence[Tensor], text_scale: float, image_scale: float) -> Tensor:
    """`e(0) + s (e(c) - e(0))`, arXiv 2207.12598."""
    unconditional, conditional = outputs
    return unconditional + text_scale * (conditional - unconditional)


@dataclass(frozen=True)
class UNetFamily:
    """One family of pipelines; `of` makes a policy of a live one. An adapter is a value of this class.

    `takes` says which pictures prompts come with; `show` makes them into condition tensors, `beside` are those that the UNet sees as
    channels after x_t's. `branches` and `mix` are its guidance.
    """

    texts: TextEncoding
    takes: tuple[PictureField, ...] = ()
    beside: tuple[str, ...] = ()
    show: Callable[[Any, Prompts], tuple[Named, Named]] = no_picture
    branches: Callable[[Condition], list[Named]] = without_and_with
    mix: Callable[[Sequence[Tensor], float, float], Tensor] = classifier_free

    def of(
        self,
        pipe: Any,
        *,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size | None = None,
        target_size: Size | None = None,
        precision: str = "fp32",
        vae_precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> UNetPolicy:
        """Wrap a live pipeline: moves it to `device`, its UNet and text encoders to `precision`, and its VAE to `vae_precision`.

        Guidance is on where `guidance_scale` is above 1, as in diffusers; `image_guidance_scale` is for the families that edit. Without
        a `negative_prompt` the unconditional branch is the pipeline's own. The sizes, (height, width) in pixels, are for SDXL; by
        default the picture's own, and no crop. Raises InputError for what this pipeline does not take.
        """
        if not 1 <= image_guidance_scale < float("inf"):
            raise InputError(f"image_guidance_scale is {image_guidance_scale}: give 1 (none) or more.")
        self._check(pipe)
        height, width = own_size(pipe, height, width)
        told = {"original_size": original_size, "crops_coords_top_left": crops_coords_top_left, "target_size": target_size}
        sizes = self._sizes(pipe, height, width, told)
        dtype = PRECISIONS[precision]
        kinds = {"vae": vae_dtype(pipe.vae, vae_precision), "unet": dtype, **dict.fromkeys(self.texts.encoders, dtype)}
        for name, kind in kinds.items():
            freeze(getattr(pipe, name), device, kind)

        @torch.no_grad()
        def encode(texts: list[str]) -> list[Tensor]:
            return [part.float() for part in self.texts.encode(pipe, texts, device)]

        cache = TextCache(encode, device, self.texts.names, capacity=self.texts.cached)
        path, notes = path_of(pipe.scheduler), notes_of(pipe, vae_precision)
        return UNetPolicy(
            pipe, self, path, cache, guidance_scale, image_guidance_scale, negative_prompt, height, width, dtype, sizes, notes
        )  # fmt: skip

    def _check(self, pipe: Any) -> None:
        """Raise InputError for a pipeline that lacks a part, or whose network wants more than this family gives it."""
        name = type(pipe).__name__
        for part in ("unet", "vae", *self.texts.encoders, *self.texts.encoders.values()):
            if getattr(pipe, part) is None:
                raise InputError(f"This {name} has no {part}: load it whole.")
        if "mask" in self.takes and type(pipe.vae).__name__ == "AsymmetricAutoencoderKL":
            raise InputError(
                "An AsymmetricAutoencoderKL decodes with the picture at hand: not supported. Give the pipeline an AutoencoderKL."
            )
        unet, latent = pipe.unet.config, pipe.vae.config.latent_channels
        wanted = latent + sum(1 if shown == "mask" else latent for shown in self.beside)
        if unet.in_channels != wanted:
            raise InputError(
                f"The UNet has {unet.in_channels} input channels, and that of a {name} has {wanted} here. "
                "Load the checkpoint with the pipeline class that it was made for: 9 channels are for inpainting, 8 for InstructPix2Pix."
            )
        if unet.get("time_cond_proj_dim") is not None:
            raise InputError("This UNet was distilled to be told its guidance (an LCM), which is not supported: align the model it is of.")
        if unet.get("encoder_hid_dim_type") is not None:
            raise InputError("This UNet wants pictures from an IP-Adapter: pipe.unload_ip_adapter() first.")

    def _sizes(self, pipe: Any, height: int, width: int, told: Mapping[str, Size | None]) -> Tensor | None:
        """SDXL's micro-conditioning (1, 6), arXiv 2307.01952, section 2.2; None for other families."""
        if not self.texts.sized:
            for name, value in told.items():
                if value is not None:
                    raise InputError(f"{name} is for SDXL: a {type(pipe).__name__} is told no sizes.")
            return None
        defaults = {"original_size": (height, width), "crops_coords_top_left": (0, 0), "target_size": (height, width)}
        numbers = [float(n) for name, default in defaults.items() for n in (told[name] or default)]
        given = pipe.unet.config.addition_time_embed_dim * len(numbers) + pipe.text_encoder_2.config.projection_dim
        if given != pipe.unet.add_embedding.linear_1.in_features:
            raise InputError("This UNet is told other numbers than six sizes (SDXL's refiner is told a score): align SDXL's base model.")
        return torch.tensor([numbers])


@dataclass
class UNetPolicy:
    """A pipeline of a `UNetFamily` as a policy. Latents (B, 4, H/8, W/8), images (B, 3, H, W) in [0, 1].

    The pipeline's modules are used as they are, never copied: its UNet is what trains. `notes` are what a person should be told.
    """

    component: ClassVar[str] = "unet"
    lora_targets: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0"]

    pipe: Any
    family: UNetFamily
    path: NoisePath
    texts: TextCache
    guidance_scale: float
    image_guidance_scale: float
    negative_prompt: str | None
    height: int
    width: int
    dtype: torch.dtype
    sizes: Tensor | None = None
    notes: tuple[str, ...] = ()
    frozen: Any = field(default=None, repr=False)

    @property
    def modality(self) -> Modality:
        return "image"

    @property
    def module(self) -> Any:
        """The UNet."""
        return self.pipe.unet

    @property
    def takes(self) -> tuple[PictureField, ...]:
        """Which pictures its prompts come with."""
        return self.family.takes

    def adapt(self, settings: lora.LoRA, seed: int = 0) -> None:
        """Put a trainable LoRA on the UNet."""
        lora.attach(self.pipe, self.component, settings, self.lora_targets, seed)

    def unfreeze(self) -> None:
        """Train every weight of the UNet, in fp32; a frozen copy stays behind as the reference."""
        self.frozen = frozen_copy(self.pipe.unet)
        self.pipe.unet.float().requires_grad_(True)

    def release(self) -> None:
        """Leave the pipeline on one device and in one dtype, fp32, so that it can be called: also what the training had no use for."""
        for module in self.pipe.components.values():
            if isinstance(module, nn.Module):
                module.to(self.pipe.unet.device)
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
        """Text embeddings, from the cache where they are known, SDXL's sizes, and what the family makes of pictures and masks.

        Raises InputError for prompts without the pictures that the family takes.
        """
        texts = self.texts(prompts.text)
        shown, unshown = self.family.show(self.pipe, prompts)
        sizes = {} if self.sizes is None else {"time_ids": self.sizes.to(self.texts.device).expand(len(prompts), -1)}
        tensors = {**texts, **sizes, **shown}
        if self.guidance_scale <= 1:
            return Condition(tensors)
        return Condition(tensors, {**self._no_text(texts), **sizes, **unshown}, self.guidance_scale)

    def _no_text(self, texts: Named) -> dict[str, Tensor]:
        """The unconditional branch's embeddings: of the negative prompt; without one of the empty text, or zeros where SDXL says so."""
        if self.negative_prompt is None and self.pipe.config.get("force_zeros_for_empty_prompt"):
            return {name: torch.zeros_like(value) for name, value in texts.items()}
        row = self.texts([self.negative_prompt or ""])
        return {name: row[name].expand_as(value) for name, value in texts.items()}

    def blind(self, condition: Condition, rows: Tensor) -> Condition:
        """The condition with no source in `rows`, bool (B,): what a model that is guided towards the source is trained on too."""
        if self.takes != ("image",):
            raise InputError("Only a pipeline that edits pictures is trained without them: StableDiffusionInstructPix2PixPipeline.")
        source = condition.tensors["source"]
        unseen = rows.to(source.device)[:, None, None, None]
        return replace(condition, tensors={**condition.tensors, "source": source.masked_fill(unseen, 0.0)})

    def prior(self, condition: Condition, rng: Generator | None = None) -> Tensor:
        """x_T ~ N(0, I), (B, *latent)."""
        channels, factor = self.pipe.vae.config.latent_channels, self.pipe.vae_scale_factor
        shape = (len(condition), channels, self.height // factor, self.width // factor)
        return draw_noise(shape, condition.tensors["encoder_hidden_states"], rng)

    def predict(self, x_t: Tensor, at: Level, condition: Condition) -> Tensor:
        """The UNet's guided output in fp32, (B, *latent); with guidance all branches go through in one call."""
        t = at.t.to(x_t.device, x_t.dtype).expand(len(x_t))
        if condition.null is None:
            return self._unet(x_t, t, condition.tensors)
        branches = self.family.branches(condition)
        n, tensors = len(branches), {name: torch.cat([branch[name] for branch in branches]) for name in condition.tensors}
        outputs = self._unet(torch.cat([x_t] * n), torch.cat([t] * n), tensors).chunk(n)
        return self.family.mix(outputs, condition.guidance_scale, self.image_guidance_scale)

    def _unet(self, x_t: Tensor, t: Tensor, tensors: Named) -> Tensor:
        x = torch.cat([x_t, *(tensors[name] for name in self.family.beside)], 1)
        added = None if self.sizes is None else {name: tensors[name] for name in ("text_embeds", "time_ids")}
        return call_unet(self.pipe.unet, self.dtype, x, t, tensors["encoder_hidden_states"], added)

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W) in [0, 1], in fp32, with a graph where one is wanted."""
        return decode_images(self.pipe.vae, x_0)

    def embed(self, media: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to x_0, the mode of the VAE's posterior."""
        return embed_images(self.pipe.vae, media)

    def shelve(self, root: Path) -> Shelf:
        """Keep text embeddings under `root` from now on; the shelf there of this VAE's latents at this size."""
        return shelve(self.pipe, self.texts, self.family.texts.encoders, self.height, self.width, root)

    def reference(self) -> AbstractContextManager[None]:
        """The base model while the block runs: LoRA switched off, or the frozen copy in the UNet's place."""
        return base_unet(self.pipe, self.frozen)
