"""Flow-matching pipelines with a transformer: what tells one family from another, and what makes a policy of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.cache import TextCache
from diffalign.errors import InputError
from diffalign.noise import RectifiedFlow, path_of
from diffalign.pipelines.common import PRECISIONS, check_parts, check_size, notes_of, place, vae_dtype
from diffalign.pipelines.latent import LatentPolicy, Named
from diffalign.types import Modality

OWN_GUIDANCE = 3.5  # what FLUX.1-dev is told by default
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")  # where the text has a stream of its own


def _own_size(pipe: Any) -> int:
    return pipe.default_sample_size * pipe.vae_scale_factor


@dataclass(frozen=True)
class TransformerFamily:
    """One family of pipelines; `of` makes a policy of a live one. An adapter is a value of this class.

    `encode(pipe, texts, tokens, device)` gives one tensor (n, ...) for each of `names`, with `tokens` of the longest encoder, by default
    as in the pipeline's own call; those that `call` reads as numbers are `counts`, and stay on the CPU. `encoders` are the text encoders
    with their tokenizers, `spare` those that may be absent.
    `call(pipe, x_t, t, tensors, told)` is the network's velocity, x_t and the result being (B, C, h, w) and t (B,) diffusers' timesteps.
    `size(pipe)` is the side of its own pictures, `multiple(pipe)` what sides are multiples of. `check(pipe, height, width)` raises
    InputError for what does not fit.
    `distilled`: guidance_scale is told to the network, where it takes one, and classifier-free guidance is true_cfg_scale.
    `tiny` makes such a pipeline with random weights, for dry runs.
    """

    encode: Callable[[Any, list[str], int, str | torch.device], Sequence[Tensor]]
    call: Callable[[Any, Tensor, Tensor, Named, float | None], Tensor]
    encoders: Mapping[str, str]
    tokens: int
    multiple: Callable[[Any], int]
    check: Callable[[Any, int, int], None]
    names: tuple[str, ...] = ("encoder_hidden_states", "pooled_projections")
    counts: tuple[str, ...] = ()
    size: Callable[[Any], int] = _own_size
    lora_targets: tuple[str, ...] = ATTENTION + TEXT_ATTENTION
    spare: tuple[str, ...] = ()
    spacing: Literal["scheduler", "linear"] = "scheduler"
    distilled: bool = False
    modality: Modality = "image"
    tiny: Callable[[], Any] | None = None

    def of(
        self,
        pipe: Any,
        *,
        guidance_scale: float = 4.5,
        true_cfg_scale: float = 1.0,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        precision: str = "fp32",
        vae_precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> LatentPolicy:
        """Wrap a live pipeline: moves it to `device`, its transformer and text encoders to `precision`, and its VAE to `vae_precision`.

        Classifier-free guidance is on where its scale is above 1; without a `negative_prompt` the unconditional branch is the empty
        text's. Raises InputError for what this pipeline does not take.
        """
        if true_cfg_scale != 1 and not self.distilled:
            raise InputError(f"true_cfg_scale is for FLUX: of a {type(pipe).__name__} guidance_scale is the true guidance.")
        check_parts(pipe, "transformer", "vae", *(name for name in self.encoders if name not in self.spare))
        tokens = self.tokens if max_sequence_length is None else max_sequence_length
        if not 1 <= tokens <= 512:
            raise InputError(f"max_sequence_length is {tokens}: give 1 to 512.")
        multiple, own = self.multiple(pipe), self.size(pipe)
        height, width = int(own if height is None else height), int(own if width is None else width)
        check_size(height, width, multiple)
        self.check(pipe, height, width)
        path = replace(flow_of(pipe, (height // multiple) * (width // multiple)), spacing=self.spacing)
        encoders = [name for name in self.encoders if getattr(pipe, name) is not None]
        dtype = PRECISIONS[precision]
        came = place(pipe, device, {"vae": vae_dtype(pipe.vae, vae_precision), **dict.fromkeys(("transformer", *encoders), dtype)})

        @torch.no_grad()
        def encode(texts: list[str]) -> list[Tensor]:
            return [part.float() for part in self.encode(pipe, texts, tokens, device)]

        told = guidance_scale if self.distilled and pipe.transformer.config.guidance_embeds else None
        return LatentPolicy(
            pipe=pipe,
            component="transformer",
            lora_targets=list(self.lora_targets),
            network=lambda x_t, t, tensors: self.call(pipe, x_t, t, tensors, told),
            path=path,
            texts=TextCache(encode, device, self.names, capacity=256, on_cpu=self.counts),  # 512 tokens of T5-XXL are 8 MB a text
            encoders=self.encoders,
            guidance_scale=true_cfg_scale if self.distilled else guidance_scale,
            told=told,
            negative_prompt=negative_prompt or "",
            height=height,
            width=width,
            tokens=tokens,
            dtype=dtype,
            came=came,
            notes=(*_notes(pipe, self, told, guidance_scale), *notes_of(pipe, vae_precision)),
        )


def flow_of(pipe: Any, tokens: int) -> RectifiedFlow:
    """The path of a pipeline's scheduler for pictures of so many tokens, with the shift that the pipeline's call gives them.

    Raises InputError for a scheduler that has no rectified flow.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler: Any = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        shift = _shift_of(scheduler)
        if shift is None:
            raise InputError(
                f"This {type(pipe).__name__} predicts a velocity, and no flow is known for its {type(scheduler).__name__}. "
                "Give it a FlowMatchEulerDiscreteScheduler: pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(..., "
                'subfolder="scheduler").'
            )
        scheduler = FlowMatchEulerDiscreteScheduler(scheduler.config.num_train_timesteps, shift)
    config: Any = scheduler.config
    if config.invert_sigmas:
        raise InputError("This scheduler runs from data to noise (invert_sigmas), which is not supported: set invert_sigmas=False.")
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    path = path_of(scheduler, calculate_shift(tokens, *(config[name] for name in names)) if config.use_dynamic_shifting else None)
    assert isinstance(path, RectifiedFlow)
    return path


def _shift_of(scheduler: Any) -> float | None:
    """The shift of a scheduler of another class whose levels are a flow's; None where they are not."""
    config: Any = scheduler.config
    if config.get("use_dynamic_shifting"):
        return None
    if config.get("use_flow_sigmas"):
        return config.flow_shift
    return config.shift if type(scheduler).__name__.startswith("FlowMatch") else None


def _notes(pipe: Any, family: TransformerFamily, told: float | None, guidance_scale: float) -> tuple[str, ...]:
    notes, scheduler = list[str](), type(pipe.scheduler).__name__
    if scheduler != "FlowMatchEulerDiscreteScheduler":
        notes.append(f"Sampled with Euler steps of the flow in the place of the pipeline's {scheduler}, with its shift.")
    if told not in (None, OWN_GUIDANCE):
        notes.append(f"The network is told guidance {told:g}; {OWN_GUIDANCE} is that of its pipeline's own call (--guidance-scale).")
    if pipe.scheduler.config.get("stochastic_sampling"):
        notes.append("The pipeline's scheduler samples at random (stochastic_sampling); evaluation and pictures are of the ODE.")
    if family.distilled and told is None:
        notes.append(f"This model is told no guidance: guidance_scale {guidance_scale:g} has no effect. true_cfg_scale has.")
    absent = [name for name in family.spare if getattr(pipe, name) is None]
    if absent:
        notes.append(f"The pipeline has no {', '.join(absent)}: zeros in the place of its embeddings, as in diffusers.")
    return tuple(notes)
