"""Pipelines with a UNet: what tells one family from another, and what makes a policy of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.cache import TextCache
from diffalign.errors import InputError
from diffalign.noise import path_of
from diffalign.pipelines.common import PRECISIONS, TextEncoding, check_parts, notes_of, own_size, place, sampled_with, vae_dtype
from diffalign.pipelines.latent import LatentPolicy, Named, classifier_free, without_and_with
from diffalign.types import Condition, Modality, PromptField, Prompts

Size = tuple[int, int]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
IMAGE_GUIDANCE = 1.5  # by default, towards the picture that is edited


def no_picture(pipe: Any, prompts: Prompts) -> tuple[Named, Named]:
    """What the network is shown besides x_t, and in the unconditional branch: nothing."""
    return {}, {}


@dataclass(frozen=True)
class UNetFamily:
    """One family of pipelines; `of` makes a policy of a live one. An adapter is a value of this class.

    `takes` says which pictures prompts come with; `show` makes them into condition tensors, `beside` are those that the UNet sees as
    channels after x_t's. `branches` and `mix` are its guidance. `tiny` makes such a pipeline with random weights, for dry runs.
    """

    texts: TextEncoding
    modality: Modality = "image"
    takes: tuple[PromptField, ...] = ()
    beside: tuple[str, ...] = ()
    show: Callable[[Any, Prompts], tuple[Named, Named]] = no_picture
    branches: Callable[[Condition], list[Named]] = without_and_with
    mix: Callable[[Sequence[Tensor], float, float], Tensor] = classifier_free
    tiny: Callable[[], Any] | None = None

    def of(
        self,
        pipe: Any,
        *,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = IMAGE_GUIDANCE,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size | None = None,
        target_size: Size | None = None,
        precision: str = "fp32",
        vae_precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> LatentPolicy:
        """Wrap a live pipeline: moves it to `device`, its UNet and text encoders to `precision`, and its VAE to `vae_precision`.

        Guidance is on where `guidance_scale` is above 1, as in diffusers; `image_guidance_scale` is for the families that edit. Without
        a `negative_prompt` the unconditional branch is the pipeline's own. The sizes, (height, width) in pixels, are for SDXL; by
        default the picture's own, and no crop. Raises InputError for what this pipeline does not take.
        """
        if not 1 <= image_guidance_scale < float("inf"):
            raise InputError(f"image_guidance_scale is {image_guidance_scale}: give 1 (none) or more.")
        if image_guidance_scale != IMAGE_GUIDANCE and self.takes != ("image",):
            raise InputError(f"image_guidance_scale is for pipelines that edit pictures, and a {type(pipe).__name__} edits none. Drop it.")
        self._check(pipe)
        height, width = own_size(pipe, height, width)
        told = {"original_size": original_size, "crops_coords_top_left": crops_coords_top_left, "target_size": target_size}
        sizes = self._sizes(pipe, height, width, told)
        dtype = PRECISIONS[precision]
        came = place(pipe, device, {"vae": vae_dtype(pipe.vae, vae_precision), **dict.fromkeys(("unet", *self.texts.encoders), dtype)})

        @torch.no_grad()
        def encode(texts: list[str]) -> list[Tensor]:
            return [part.float() for part in self.texts.encode(pipe, texts, device)]

        def show(prompts: Prompts) -> tuple[Named, Named]:
            shown, unshown = self.show(pipe, prompts)
            told = {} if sizes is None else {"time_ids": sizes.to(device).expand(len(prompts), -1)}
            return {**shown, **told}, {**unshown, **told}

        def network(x_t: Tensor, t: Tensor, tensors: Named) -> Tensor:
            x = torch.cat([x_t, *(tensors[name] for name in self.beside)], 1)
            added = None if sizes is None else {name: tensors[name] for name in ("text_embeds", "time_ids")}
            return pipe.unet(x, t, encoder_hidden_states=tensors["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)[0]

        return LatentPolicy(
            pipe=pipe,
            component="unet",
            lora_targets=list(ATTENTION),
            network=network,
            path=path_of(pipe.scheduler),
            texts=TextCache(encode, device, self.texts.names, capacity=self.texts.cached),
            encoders=self.texts.encoders,
            takes=self.takes,
            show=show,
            branches=self.branches,
            mix=self.mix,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            negative_prompt=negative_prompt,
            zeros_for_none=bool(pipe.config.get("force_zeros_for_empty_prompt")),
            height=height,
            width=width,
            dtype=dtype,
            came=came,
            notes=(*sampled_with(pipe), *notes_of(pipe, vae_precision)),
        )

    def _check(self, pipe: Any) -> None:
        """Raise InputError for a pipeline that lacks a part, or whose network wants more than this family gives it."""
        name = type(pipe).__name__
        check_parts(pipe, "unet", "vae", *self.texts.encoders, *self.texts.encoders.values())
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
