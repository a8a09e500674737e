"""What the pipeline adapters share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign import bare
from diffalign.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TextEncoding:
    """How texts become tensors: `encode(pipe, texts, device)` gives one tensor (n, ...) for each of `names`.

    `encoders` are the pipeline's text encoders with their tokenizers. `sized`: the network is told sizes besides, as SDXL is.
    """

    encode: Callable[[Any, list[str], str | torch.device], Sequence[Tensor]]
    names: tuple[str, ...] = ("encoder_hidden_states",)
    encoders: Mapping[str, str] = field(default_factory=lambda: {"text_encoder": "tokenizer"})
    sized: bool = False
    cached: int = 4096  # texts; of Stable Diffusion 1.5 each takes 0.24 MB


def clip(pipe: Any, texts: list[str], device: str | torch.device) -> Sequence[Tensor]:
    """Embeddings (n, tokens, width) of one CLIP text encoder."""
    return (pipe.encode_prompt(texts, device, 1, False)[0],)


def two_clips(pipe: Any, texts: list[str], device: str | torch.device) -> Sequence[Tensor]:
    """SDXL's embeddings: (n, tokens, width of both) and the second encoder's pooled one, (n, width)."""
    found = pipe.encode_prompt(texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return found[0], found[2]


ONE_ENCODER = TextEncoding(clip)
TWO_ENCODERS = TextEncoding(
    two_clips,
    ("encoder_hidden_states", "text_embeds"),
    {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    sized=True,
    cached=1024,  # 0.64 MB each
)


@contextmanager
def adapter_off(module: Any) -> Iterator[None]:
    """The base network, bit for bit, while the block runs."""
    if "disable_adapters" not in dir(type(module)):
        with bare.off(module):
            yield
        return
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()


def freeze(module: Any, device: str | torch.device, dtype: torch.dtype) -> None:
    """Move a module, and take its weights out of training. It is cast only where that changes something: diffusers warns at a cast."""
    module.to(device)
    if module.dtype != dtype:
        module.to(dtype)
        for name, parameter in module.named_parameters():
            if "lora_" in name:  # a LoRA that was loaded stays fp32, as it was trained
                parameter.data = parameter.data.float()
    module.requires_grad_(False).eval()


@contextmanager
def visiting(modules: Sequence[Any], device: torch.device, home: torch.device | None) -> Iterator[None]:
    """The modules on `device` while the block runs, and then at `home` again; without a home they are where they are."""
    for module in modules if home else ():
        module.to(device)
    try:
        yield
    finally:
        for module in modules if home else ():
            module.to(home)


def place(pipe: Any, device: str | torch.device, kinds: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Freeze those components on `device`, each in its dtype; the dtype in which each component with weights came."""
    came = {name: cast(Any, module).dtype for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    for name, kind in kinds.items():
        freeze(getattr(pipe, name), device, kind)
    return came


def check_parts(pipe: Any, *parts: str) -> None:
    """Raise InputError for a pipeline that lacks one."""
    for part in parts:
        if getattr(pipe, part) is None:
            raise InputError(f"This {type(pipe).__name__} has no {part}: load it whole.")


def frozen_copy(module: Any) -> Any:
    """A copy that takes no gradient: the reference of a full fine-tuning."""
    return copy.deepcopy(module).requires_grad_(False)


def vae_dtype(vae: Any, precision: str) -> torch.dtype:
    """What the VAE computes in: fp32 in the place of fp16 where its configuration says that it overflows there, as in diffusers."""
    if precision == "fp16" and vae.config.get("force_upcast"):
        return torch.float32
    return PRECISIONS[precision]


def in_chunks(work: Callable[[Tensor], Tensor], x: Tensor, size: int | None) -> Tensor:
    """`work` on at most `size` rows of x at a time. With a gradient a chunk keeps its input alone and works again in the backward pass, so
    that only one chunk's activations are there at once."""
    if size is None or len(x) <= size:
        return work(x)
    again = torch.is_grad_enabled() and x.requires_grad
    return torch.cat([checkpoint(work, part, use_reentrant=False) if again else work(part) for part in x.split(size)])


def decode_images(vae: Any, x_0: Tensor) -> Tensor:
    """Latents to images (B, 3, H, W) in [0, 1], fp32, computed in the VAE's dtype, with a graph where one is wanted."""
    latents, normal, shift = x_0 / vae.config.scaling_factor, _statistics(vae, x_0), vae.config.get("shift_factor")
    if normal is not None:
        latents = latents * normal[1] + normal[0]
    if shift is not None:
        latents = latents + shift
    images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
    return (images / 2 + 0.5).clamp(0, 1)


def embed_images(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to x_0, fp32: the mode of the VAE's posterior, scaled."""
    latents, shift = posterior_mode(vae, images), vae.config.get("shift_factor")
    normal = _statistics(vae, latents)
    if shift is not None:
        latents = latents - shift
    if normal is not None:
        latents = (latents - normal[0]) / normal[1]
    return latents * vae.config.scaling_factor


def posterior_mode(vae: Any, images: Tensor) -> Tensor:
    """The VAE's own latents of images (B, 3, H, W) in [0, 1], fp32, not scaled."""
    found = vae.encode((images * 2 - 1).to(vae.dtype), return_dict=False)[0]
    return (found if isinstance(found, Tensor) else found.mode()).float()  # an AutoencoderTiny has no posterior


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation (C, 1, 1) that some VAEs' latents are normalised with; None for the others."""
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    return None if mean is None or std is None else (torch.tensor(mean).to(like)[:, None, None], torch.tensor(std).to(like)[:, None, None])


def own_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """`(height, width)` in pixels of a UNet pipeline's pictures: those given, or the model's own.

    Raises InputError for a size that does not fit.
    """
    size, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
    own = [int(n) * factor for n in ((size, size) if isinstance(size, int) else size)]
    height, width = int(own[0] if height is None else height), int(own[1] if width is None else width)
    check_size(height, width, factor)
    return height, width


def check_size(height: int, width: int, multiple: int) -> None:
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise InputError(f"A picture of {height} x {width} does not fit this model: give multiples of {multiple}.")


def sampled_with(pipe: Any) -> tuple[str, ...]:
    """A line for the person where a diffusion pipeline's own scheduler is another than the one that it is sampled with here."""
    name = type(pipe.scheduler).__name__
    twin = f"Sampled with DDIM in the place of the pipeline's {name}, on its betas, spacing and prediction type."
    return () if name == "DDIMScheduler" else (twin,)


def notes_of(pipe: Any, vae_precision: str) -> tuple[str, ...]:
    """What is otherwise here than in the pipeline's own call: lines for the person."""
    notes = list[str]()
    if pipe.components.get("safety_checker") is not None:
        notes.append("The pipeline's safety checker stays in the pipeline; the training, and its pictures, do not pass through it.")
    if vars(pipe).get("watermark") is not None:
        notes.append("The pipeline's watermark stays in the pipeline; the training's pictures carry none.")
    if vae_dtype(pipe.vae, vae_precision) != PRECISIONS[vae_precision]:
        notes.append("The VAE overflows in fp16 (force_upcast in its configuration): it computes in fp32.")
    return tuple(notes)
