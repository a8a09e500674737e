"""The policy that every pipeline on the latents of a VAE is: families of UNets and of transformers fill it in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from diffalign import fsdp, lora
from diffalign.cache import Shelf, TextCache, fingerprint
from diffalign.errors import InputError
from diffalign.noise import draw_noise
from diffalign.pipelines.common import adapter_off, decode_images, embed_images, frozen_copy, in_chunks, visiting
from diffalign.types import Condition, Level, Modality, NoisePath, PromptField, Prompts

Named = Mapping[str, Tensor]


def without_and_with(condition: Condition) -> list[Named]:
    """The branches of classifier-free guidance, in diffusers' order: unconditional, conditional."""
    assert condition.null is not None
    return [condition.null, condition.tensors]


def classifier_free(outputs: Sequence[Tensor], text_scale: float, image_scale: float) -> Tensor:
    """`e(0) + s (e(c) - e(0))`, arXiv 2207.12598."""
    unconditional, conditional = outputs
    return unconditional + text_scale * (conditional - unconditional)


def nothing(prompts: Prompts) -> tuple[Named, Named]:
    """What a network of text alone is shown besides, and in the unconditional branch."""
    return {}, {}


NULL = "null."  # before the names of what is cached for the unconditional branch


def texts_of(prompts: Prompts) -> Sequence[str]:
    return prompts.text


def to_images(pipe: Any, x_0: Tensor) -> Tensor:
    return decode_images(pipe.vae, x_0)


def of_images(pipe: Any, images: Tensor) -> Tensor:
    return embed_images(pipe.vae, images)


def says_nothing(transcript: str) -> str | None:
    return "this pipeline says nothing"


@dataclass
class LatentPolicy:
    """A diffusers pipeline as a policy. Of pictures: latents (B, C, H/8, W/8), images (B, 3, H, W) in [0, 1]. Of sound: (B, *latent), and
    waveforms (B, samples) in [-1, 1] at `sample_rate`; height and width are 0 then, as these two are of pictures.

    The pipeline's modules are used as they are, never copied; what trains is `pipe.<component>`. `network(x_t, t, tensors)` runs it, t
    (B,) being diffusers' timesteps. `show(prompts)` is what it is shown besides text, with guidance and in the unconditional branch.
    `branches` and `mix` are its guidance; `told` is the guidance that a distilled network is told. `zeros_for_none`: without a negative
    prompt the unconditional branch is zeros. `keys` are what the cache of texts knows prompts by; where it holds the unconditional branch
    of each too, under names with `NULL` before them, that is taken. `dropped` is what texts become that training leaves out in some rows,
    bool (B,); None: those of the empty text. `encoders` are the pipeline's text encoders, each with its tokenizer,
    `tokens` the length of a text where it can be chosen. The network computes in `dtype`; `came` is the dtype of each component before it
    was wrapped. `decoder` and `embedder` go from latents to media and back, through the pipeline's `coders`; `coding` is what they compute
    besides the weights. `uneven`: one batch may take more calls of the network than another. `notes` are what a person should be told.
    """

    pipe: Any
    component: str
    lora_targets: list[str]
    network: Callable[[Tensor, Tensor, Named], Tensor]
    path: NoisePath
    texts: TextCache
    encoders: Mapping[str, str]
    guidance_scale: float
    negative_prompt: str | None
    dtype: torch.dtype
    height: int = 0
    width: int = 0
    modality: Modality = "image"
    sample_rate: int = 0
    samples: int = 0
    latent: tuple[int, ...] | None = None
    decoder: Callable[[Any, Tensor], Tensor] = to_images
    embedder: Callable[[Any, Tensor], Tensor] = of_images
    coders: tuple[str, ...] = ("vae",)
    coding: tuple[object, ...] = ()
    unspeakable: Callable[[str], str | None] = says_nothing
    keys: Callable[[Prompts], Sequence[str]] = texts_of
    dropped: Callable[[Named, Tensor], Named] | None = None
    uneven: bool = False
    came: Mapping[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])
    takes: tuple[PromptField, ...] = ()
    show: Callable[[Prompts], tuple[Named, Named]] = nothing
    branches: Callable[[Condition], list[Named]] = without_and_with
    mix: Callable[[Sequence[Tensor], float, float], Tensor] = classifier_free
    image_guidance_scale: float = 1.0
    told: float | None = None
    zeros_for_none: bool = False
    tokens: int | None = None
    notes: tuple[str, ...] = ()
    vae_batch_size: int | None = None
    vae_home: torch.device | None = None
    undo: ExitStack = field(default_factory=ExitStack, repr=False)
    frozen: Any = field(default=None, repr=False)
    plain: Any = field(default=None, repr=False)

    @property
    def module(self) -> Any:
        """The network that trains."""
        return getattr(self.pipe, self.component)

    def adapt(self, settings: lora.LoRA, seed: int = 0) -> None:
        """Put a trainable LoRA on the network."""
        lora.attach(self.pipe, self.component, settings, self.lora_targets, seed)

    def unfreeze(self, mesh: Any = None) -> None:
        """Train every weight of the network, in fp32; a frozen copy stays behind as the reference.

        On a `mesh` of processes both are shared out: from now on all processes call them equally often.
        """
        if mesh is None:
            self.frozen = frozen_copy(self.module)
            self.module.float().requires_grad_(True)
            return
        if self.uneven:
            raise InputError(
                f"fsdp: a {type(self.module).__name__} is called as often as a batch has lengths of text, and processes would wait "
                "for one another for ever. Drop --fsdp."
            )
        self.module.float().requires_grad_(True)
        self.plain = fsdp.skeleton(self.module)
        fsdp.shard(self.module, mesh)
        self.frozen = fsdp.twin(self.plain, self.module, mesh)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In the first process a network that is shared out is whole while the block runs, on the CPU; every process must call."""
        if self.plain is None:
            yield
            return
        trained, weights = self.module, fsdp.whole(self.module.state_dict())
        if torch.distributed.get_rank() == 0:
            network = copy.deepcopy(self.plain)
            network.load_state_dict(weights, assign=True)
            setattr(self.pipe, self.component, network)
        try:
            yield
        finally:
            setattr(self.pipe, self.component, trained)

    def release(self) -> None:
        """Leave the pipeline on one device, each component in the dtype in which it came, and without what the settings of memory and speed
        changed in it, so that it can be called as before. Weights that all were trained stay fp32, and what works with them becomes it."""
        self.undo.close()
        for name, module in self.pipe.components.items():
            if isinstance(module, nn.Module):
                kind = self.came.get(name, torch.float32) if self.frozen is None else torch.float32
                module.to(self.module.device)
                if module.dtype != kind:
                    module.to(kind)
        if self.module.dtype != torch.float32:  # a network that came in half precision computes in it from now on, also as a policy
            self.dtype = self.module.dtype

    def save(self, folder: Path) -> None:
        """Write what plain diffusers loads: a LoRA, or after full fine-tuning the network's folder."""
        if self.frozen is None:
            lora.save(self.pipe, self.component, folder)
        else:
            self.module.save_pretrained(folder)

    @torch.no_grad()
    def encode(self, prompts: Prompts) -> Condition:
        """Text embeddings, from the cache where they are known, and what the family shows of pictures, masks and sizes.

        Raises InputError for prompts without the pictures or transcripts that the family takes.
        """
        found = self.texts(self.keys(prompts))
        texts = {name: value for name, value in found.items() if not name.startswith(NULL)}
        with self._vae() if {"image", "mask"} & {*self.takes} else nullcontext():
            shown, unshown = self.show(prompts)
        if self.guidance_scale <= 1:
            return Condition({**texts, **shown}, guidance_scale=self.told or 1.0)  # stored trajectories record it
        null = {name.removeprefix(NULL): value for name, value in found.items() if name.startswith(NULL)}
        return Condition({**texts, **shown}, {**(null or self._no_text(texts)), **unshown}, self.guidance_scale)

    def _no_text(self, texts: Named) -> dict[str, Tensor]:
        """The unconditional branch's embeddings: of the negative prompt; without one of the empty text, or zeros."""
        if self.negative_prompt is None and self.zeros_for_none:
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
        latent = self.latent
        if latent is None:
            channels, factor = self.pipe.vae.config.latent_channels, self.pipe.vae_scale_factor
            latent = (channels, self.height // factor, self.width // factor)
        return draw_noise((len(condition), *latent), condition.tensors["encoder_hidden_states"], rng)

    def predict(self, x_t: Tensor, at: Level, condition: Condition) -> Tensor:
        """The network's guided output in fp32, (B, *latent); with guidance all branches go through in one call."""
        t = at.t.to(x_t.device, x_t.dtype).expand(len(x_t))
        if condition.null is None:
            return self._call(x_t, t, condition.tensors)
        branches = self.branches(condition)
        n, tensors = len(branches), {name: torch.cat([branch[name] for branch in branches]) for name in condition.tensors}
        outputs = self._call(torch.cat([x_t] * n), torch.cat([t] * n), tensors).chunk(n)
        return self.mix(outputs, condition.guidance_scale, self.image_guidance_scale)

    def _call(self, x_t: Tensor, t: Tensor, tensors: Named) -> Tensor:
        # Each weight is used once a call, and older torch handed a step with a graph the casts made without one: no cache.
        half = self.dtype != torch.float32
        with torch.autocast(x_t.device.type, self.dtype if half else None, enabled=half, cache_enabled=False):
            return self.network(x_t, t, tensors).to(x_t.dtype)

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W) in [0, 1] or sounds (B, samples) in [-1, 1], fp32, computed in the VAE's dtype, with a graph where
        one is wanted."""
        with self._vae(stays=torch.is_grad_enabled() and x_0.requires_grad):
            return in_chunks(partial(self.decoder, self.pipe), x_0, self.vae_batch_size)

    def embed(self, media: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] or sounds (B, samples) in [-1, 1] to x_0, fp32: the mode of the VAE's posterior."""
        with self._vae(stays=torch.is_grad_enabled() and media.requires_grad):
            return in_chunks(partial(self.embedder, self.pipe), media, self.vae_batch_size)

    def offload(self, home: torch.device) -> None:
        """Text encoders and VAE live at `home`, and come to the network's device while they work."""
        texts, encode, modules = self.texts, self.texts.encode, self._encoders()

        def encode_there(words: list[str]) -> Sequence[Tensor]:
            with visiting(modules, self.module.device, home):
                return encode(words)

        self.undo.callback(setattr, texts, "encode", encode)
        self.undo.callback(setattr, self, "vae_home", None)
        texts.encode, self.vae_home = encode_there, home
        for module in (*modules, *self._coders()):
            module.to(home)

    def _encoders(self) -> list[Any]:
        return [module for name in self.encoders if (module := getattr(self.pipe, name)) is not None]

    def _coders(self) -> list[Any]:
        return [getattr(self.pipe, name) for name in self.coders]

    @contextmanager
    def _vae(self, stays: bool = False) -> Iterator[None]:
        """The VAE, and what works with it, on the network's device while the block runs; for good where it `stays`, since a backward pass
        will want it there."""
        if stays and self.vae_home is not None:
            for module in self._coders():
                module.to(self.module.device)
            self.vae_home = None
        with visiting(self._coders(), self.module.device, self.vae_home):
            yield

    def shelve(self, root: Path) -> Shelf:
        """Keep text embeddings under `root` from now on; the shelf there of the VAE's latents of media of this size.

        Both are named after what they are computed with, so a shelf of another model, or of another precision, is another one.
        """
        marks = [] if self.tokens is None else [f"{self.tokens}"]
        with visiting(self._encoders(), self.module.device, self.vae_home), self._vae():  # a shelf is also named after the device
            for encoder, tokenizer in self.encoders.items():
                module, words = getattr(self.pipe, encoder), getattr(self.pipe, tokenizer)
                marks.append("none" if module is None else fingerprint(module, sorted(words.get_vocab().items()), words.model_max_length))
            statistics = [self.pipe.vae.config.get(name) for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
            mark = fingerprint(self.pipe.vae, *(value for value in (*statistics, *self._how(), *self.coding) if value is not None))
        self.texts.shelf = Shelf(root / "texts" / "-".join(marks))
        size = f"{self.height}x{self.width}" if self.modality == "image" else f"{self.samples}at{self.sample_rate}"
        return Shelf(root / "latents" / f"{mark}-{size}")

    def _how(self) -> list[str | None]:
        """What changes the last bits of the VAE's latents, where it is another than usual."""
        permuted = any(not weight.is_contiguous() for weight in self.pipe.vae.parameters())
        return ["channels_last" if permuted else None, None if self.vae_batch_size is None else f"chunks of {self.vae_batch_size}"]

    @contextmanager
    def _base(self) -> Iterator[None]:
        if self.frozen is not None:
            trained = self.module
            setattr(self.pipe, self.component, self.frozen)
            try:
                yield
            finally:
                setattr(self.pipe, self.component, trained)
        elif getattr(self.module, "peft_config", None):
            with adapter_off(self.module):
                yield
        else:
            yield

    def reference(self) -> AbstractContextManager[None]:
        """The base model while the block runs: LoRA switched off, or the frozen copy in the network's place."""
        return self._base()
