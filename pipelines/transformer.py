"""Flow-matching pipelines, a transformer on the latents of a VAE: the policy that all of them are, and what tells families apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from diffalign import lora
from diffalign.cache import Shelf, fingerprint
from diffalign.errors import InputError
from diffalign.noise import RectifiedFlow, draw_noise, path_of
from diffalign.pipelines.common import PRECISIONS, TextCache, adapter_off, check_size, freeze, frozen_copy
from diffalign.types import Condition, Level, Modality, Prompts

Named = Mapping[str, Tensor]
NAMES = ("encoder_hidden_states", "pooled_projections")
ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
ATTENTION += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]  # of the text's stream


@dataclass(frozen=True)
class TransformerFamily:
    """One family of pipelines; `of` makes a policy of a live one. An adapter is a value of this class.

    `encode(pipe, texts, tokens, device)` gives embeddings (n, length, width) and pooled ones (n, width), with `tokens` of T5, by default
    as in the pipeline's own call. `encoders` are the text encoders with their tokenizers, `spare` those that may be absent.
    `call(pipe, x_t, t, tensors, told)` is the network's velocity, x_t and the result being (B, C, h, w) and t (B,) diffusers' timesteps.
    `multiple(pipe)` is what a picture's sides are multiples of. `check(pipe, height, width)` raises InputError for what does not fit.
    `distilled`: guidance_scale is told to the network, where it takes one, and classifier-free guidance is true_cfg_scale.
    """

    encode: Callable[[Any, list[str], int, str | torch.device], Sequence[Tensor]]
    call: Callable[[Any, Tensor, Tensor, Named, float | None], Tensor]
    encoders: Mapping[str, str]
    tokens: int
    multiple: Callable[[Any], int]
    check: Callable[[Any, int, int], None]
    spare: tuple[str, ...] = ()
    spacing: Literal["scheduler", "linear"] = "scheduler"
    distilled: bool = False

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
    ) -> TransformerPolicy:
        """Wrap a live pipeline: moves it to `device`, its transformer and text encoders to `precision`, and its VAE to `vae_precision`.

        Classifier-free guidance is on where its scale is above 1; without a `negative_prompt` the unconditional branch is the empty
        text's. Raises InputError for what this pipeline does not take.
        """
        if true_cfg_scale != 1 and not self.distilled:
            raise InputError(f"true_cfg_scale is for FLUX: of a {type(pipe).__name__} guidance_scale is the true guidance.")
        for name in ("transformer", "vae", *self.encoders):
            if getattr(pipe, name) is None and name not in self.spare:
                raise InputError(f"This {type(pipe).__name__} has no {name}: load it whole.")
        tokens = self.tokens if max_sequence_length is None else max_sequence_length
        if not 1 <= tokens <= 512:
            raise InputError(f"max_sequence_length is {tokens}: give 1 to 512.")
        multiple, own = self.multiple(pipe), pipe.default_sample_size * pipe.vae_scale_factor
        height, width = int(own if height is None else height), int(own if width is None else width)
        check_size(height, width, multiple)
        self.check(pipe, height, width)
        path = replace(flow_of(pipe, (height // multiple) * (width // multiple)), spacing=self.spacing)
        encoders = [name for name in self.encoders if getattr(pipe, name) is not None]
        dtype = PRECISIONS[precision]
        overflows = vae_precision == "fp16" and pipe.vae.config.get("force_upcast")
        kinds = {"vae": torch.float32 if overflows else PRECISIONS[vae_precision], "transformer": dtype, **dict.fromkeys(encoders, dtype)}
        for name, kind in kinds.items():
            freeze(getattr(pipe, name), device, kind)

        @torch.no_grad()
        def encode(texts: list[str]) -> list[Tensor]:
            return [part.float() for part in self.encode(pipe, texts, tokens, device)]

        # 512 tokens of T5-XXL are 8 MB a text
        texts = TextCache(encode, device, NAMES, capacity=256)
        told = guidance_scale if self.distilled and pipe.transformer.config.guidance_embeds else None
        scale = true_cfg_scale if self.distilled else guidance_scale
        notes = _notes(pipe, self, told, guidance_scale)
        return TransformerPolicy(pipe, self, path, texts, scale, told, negative_prompt or "", height, width, tokens, dtype, notes)


def flow_of(pipe: Any, tokens: int) -> RectifiedFlow:
    """The path of a pipeline's scheduler for pictures of so many tokens, with the shift that the pipeline's call gives them.

    Raises InputError for a scheduler that has no rectified flow.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler, config = pipe.scheduler, pipe.scheduler.config
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise InputError(
            f"This {type(pipe).__name__} predicts a velocity, and no flow is known for its {type(scheduler).__name__}. "
            "Give it a FlowMatchEulerDiscreteScheduler: pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(..., "
            'subfolder="scheduler").'
        )
    if config.invert_sigmas:
        raise InputError("This scheduler runs from data to noise (invert_sigmas), which is not supported: set invert_sigmas=False.")
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    path = path_of(scheduler, calculate_shift(tokens, *(config[name] for name in names)) if config.use_dynamic_shifting else None)
    assert isinstance(path, RectifiedFlow)
    return path


def _notes(pipe: Any, family: TransformerFamily, told: float | None, guidance_scale: float) -> tuple[str, ...]:
    notes = list[str]()
    if pipe.scheduler.config.stochastic_sampling:
        notes.append("The pipeline's scheduler samples at random (stochastic_sampling); evaluation and pictures are of the ODE.")
    if family.distilled and told is None:
        notes.append(f"This model is told no guidance: guidance_scale {guidance_scale:g} has no effect. true_cfg_scale has.")
    absent = [name for name in family.spare if getattr(pipe, name) is None]
    if absent:
        notes.append(f"The pipeline has no {', '.join(absent)}: zeros in the place of its embeddings, as in diffusers.")
    return tuple(notes)


@dataclass
class TransformerPolicy:
    """A pipeline of a `TransformerFamily` as a policy. Latents (B, C, H/8, W/8), images (B, 3, H, W) in [0, 1].

    Latents are kept as the VAE has them, and packed into patches where a network wants them so. The pipeline's modules are used as they
    are, never copied: its transformer is what trains. `told` is the guidance that the network is told, `tokens` the length of T5's text.
    `notes` are what a person should be told.
    """

    component: ClassVar[str] = "transformer"
    lora_targets: ClassVar[list[str]] = ATTENTION

    pipe: Any
    family: TransformerFamily
    path: RectifiedFlow
    texts: TextCache
    guidance_scale: float
    told: float | None
    negative_prompt: str
    height: int
    width: int
    tokens: int
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    frozen: Any = field(default=None, repr=False)

    @property
    def modality(self) -> Modality:
        return "image"

    @property
    def takes(self) -> tuple[Literal["image", "mask"], ...]:
        """Which pictures its prompts come with: none."""
        return ()

    @property
    def module(self) -> Any:
        """The transformer."""
        return self.pipe.transformer

    def adapt(self, settings: lora.LoRA, seed: int = 0) -> None:
        """Put a trainable LoRA on the transformer."""
        lora.attach(self.pipe, self.component, settings, self.lora_targets, seed)

    def unfreeze(self) -> None:
        """Train every weight of the transformer, in fp32; a frozen copy stays behind as the reference."""
        self.frozen = frozen_copy(self.pipe.transformer)
        self.pipe.transformer.float().requires_grad_(True)

    def release(self) -> None:
        """Leave the pipeline in one dtype, so that it can be called: the transformer's, since in fp32 it may not fit."""
        kind = self.pipe.transformer.dtype if self.frozen is None else torch.float32
        for name in ("vae", *self.family.encoders):
            module = getattr(self.pipe, name)
            if module is not None and module.dtype != kind:
                module.to(kind)

    def save(self, folder: Path) -> None:
        """Write what plain diffusers loads: a LoRA, or after full fine-tuning the transformer's folder."""
        if self.frozen is None:
            lora.save(self.pipe, self.component, folder)
        else:
            self.pipe.transformer.save_pretrained(folder)

    def encode(self, prompts: Prompts) -> Condition:
        """Text embeddings (B, length, width) and pooled ones (B, width), from the cache where they are known."""
        tensors = self.texts(prompts.text)
        if self.guidance_scale <= 1:
            return Condition(tensors, guidance_scale=self.told or 1.0)  # stored trajectories record it
        row = self.texts([self.negative_prompt])
        null = {name: row[name].expand_as(value) for name, value in tensors.items()}
        return Condition(tensors, null, self.guidance_scale)

    def prior(self, condition: Condition, rng: Generator | None = None) -> Tensor:
        """x_T ~ N(0, I), (B, *latent)."""
        channels, factor = self.pipe.vae.config.latent_channels, self.pipe.vae_scale_factor
        shape = (len(condition), channels, self.height // factor, self.width // factor)
        return draw_noise(shape, condition.tensors[NAMES[0]], rng)

    def predict(self, x_t: Tensor, at: Level, condition: Condition) -> Tensor:
        """The transformer's velocity in fp32, (B, *latent); with classifier-free guidance both branches go through in one call of 2B."""
        t = at.t.to(x_t.device, x_t.dtype).expand(len(x_t))
        if condition.null is None:
            return self._transformer(x_t, t, condition.tensors)
        both = {name: torch.cat([condition.null[name], value]) for name, value in condition.tensors.items()}
        unconditional, conditional = self._transformer(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return unconditional + condition.guidance_scale * (conditional - unconditional)

    def _transformer(self, x_t: Tensor, t: Tensor, tensors: Named) -> Tensor:
        # Each weight is used once a call, and older torch handed a step with a graph the casts made without one: no cache.
        half = self.dtype != torch.float32
        with torch.autocast(x_t.device.type, self.dtype if half else None, enabled=half, cache_enabled=False):
            return self.family.call(self.pipe, x_t, t, tensors, self.told).to(x_t.dtype)

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W) in [0, 1], fp32, computed in the VAE's dtype, with a graph where one is wanted."""
        vae = self.pipe.vae
        latents = x_0 / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1)

    def embed(self, media: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to x_0, fp32: the mode of the VAE's posterior."""
        vae = self.pipe.vae
        latents = vae.encode((media * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def shelve(self, root: Path) -> Shelf:
        """Keep text embeddings under `root` from now on; the shelf there of this VAE's latents at this size."""
        marks = [f"{self.tokens}"]
        for encoder, tokenizer in self.family.encoders.items():
            module, words = getattr(self.pipe, encoder), getattr(self.pipe, tokenizer)
            marks.append("none" if module is None else fingerprint(module, sorted(words.get_vocab().items()), words.model_max_length))
        self.texts.shelf = Shelf(root / "texts" / "-".join(marks))
        vae = self.pipe.vae
        mark = fingerprint(vae, vae.config.scaling_factor, vae.config.shift_factor)
        return Shelf(root / "latents" / f"{mark}-{self.height}x{self.width}")

    def reference(self) -> AbstractContextManager[None]:
        """The base model while the block runs: LoRA switched off, or the frozen copy in the transformer's place."""
        return _base(self.pipe, self.frozen)


@contextmanager
def _base(pipe: Any, frozen: Any) -> Iterator[None]:
    if frozen is not None:
        trained, pipe.transformer = pipe.transformer, frozen
        try:
            yield
        finally:
            pipe.transformer = trained
    elif getattr(pipe.transformer, "peft_config", None):
        with adapter_off(pipe.transformer):
            yield
    else:
        yield
