"""The settings of a training: every flag of `diffalign train` but those of the method and the reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffalign.errors import InputError
from diffalign.guard import Guard
from diffalign.lora import LoRA

LIVE = "live object"


@dataclass(frozen=True)
class Settings:
    """Training."""

    pipeline: str = "shapes"
    """Model to align: shapes (embedded), a Hub id, or a folder in diffusers layout."""
    revision: str | None = None
    """Revision of a Hub model."""
    pipeline_class: str | None = None
    """Diffusers class of the model, such as StableDiffusionPipeline: what its own index says is held against it, and a dry run of a Hub
    model asks no network then."""
    tiny: bool = False
    """A dry run: model and rewards with tiny random weights, few steps, prompts and data made here in the place of those on the Hub."""
    prompts: str | None = None
    """Training prompts: a .txt, .jsonl or .json file, shapes, animals, hf:user/dataset/file.txt, or a pipe, one prompt a line."""
    data: str | None = None
    """Data of the methods that need some (pairs, labels, edits, pictures): a folder, or hf:user/dataset; see docs/data.md."""
    data_limit: int | None = None
    """Use so many examples of the data, the first ones."""
    bad_pictures: Literal["refuse", "skip"] = "refuse"
    """What to do with pictures, or sounds, of the data that are missing or damaged."""
    eval_prompts: str | None = None
    """Held-out prompts; by default a tenth of the prompts is held out."""
    eval_rewards: list[str] | None = None
    """Rewards of the evaluation; by default the one that is trained on."""
    eval_size: int = 64
    """Held-out prompts to evaluate on, before and after; 0 for no evaluation."""
    eval_draws: int = 1
    """Samples of each held-out prompt, whose scores are averaged: more of them make the interval narrower."""
    guidance_scale: float = 7.5
    """Classifier-free guidance, in sampling and in training; 1 for none."""
    image_guidance_scale: float = 1.5
    """Guidance towards the picture that an editing pipeline edits; takes part where guidance_scale is above 1."""
    true_cfg_scale: float = 1.0
    """Classifier-free guidance of models that are told guidance_scale (FLUX), with negative_prompt; 1 for none."""
    max_sequence_length: int | None = None
    """Tokens of the long text encoder of Stable Diffusion 3, FLUX, Z-Image and the pipelines of sound; by default the pipeline's own."""
    negative_prompt: str | None = None
    """Prompt of the unconditional branch; by default the pipeline's own: the empty one, or none at all for SDXL."""
    height: int | None = None
    """Height of the pictures in pixels; by default the model's own."""
    width: int | None = None
    """Width of the pictures in pixels; by default the model's own."""
    audio_seconds: float | None = None
    """Length of the sounds; by default the model's own (AudioLDM 2), or 5 (LongCat-AudioDiT)."""
    original_size: tuple[int, int] | None = None
    """What SDXL is told: height and width of the picture before it was scaled; by default the picture's."""
    crops_coords_top_left: tuple[int, int] | None = None
    """What SDXL is told: how much was cut off at the top and at the left; by default nothing."""
    target_size: tuple[int, int] | None = None
    """What SDXL is told: height and width of the picture; by default the picture's."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network; weights that train and log-probabilities stay fp32."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the VAE. Where its configuration says that it overflows in fp16 (force_upcast), fp16 is fp32, as in diffusers."""
    device: str | None = None
    """By default cuda, mps or cpu, the first there is."""
    gradient_checkpointing: bool = False
    """Keep of each block of the network, and of the VAE, only its input, and run it again in the backward pass."""
    vae_batch_size: int | None = None
    """Pictures that the VAE decodes or embeds at a time; by default all of a forward. With a gradient each such part runs twice."""
    offload: bool = False
    """Text encoders are on the GPU only while they encode; the VAE too, as long as no gradient goes through it."""
    memory_budget: float | None = None
    """GB (10^9 bytes) that a step may take: the largest batches that fit are found, and more of them make a step of as many samples."""
    attention: Literal["sdpa", "xformers", "sliced", "eager"] = "sdpa"
    """sdpa: torch's own; xformers: its package's, on CUDA. Of UNets, sliced: one head at a time; eager: plain matrix products."""
    channels_last: bool = False
    """Convolutions of the UNet and the VAE with the channels innermost in memory."""
    compile: bool = False
    """torch.compile of the network, which takes minutes at the first steps."""
    full: bool = False
    """Train all of the network instead of a LoRA."""
    fsdp: bool = False
    """With full: the processes of torchrun share the network out, with its gradients and the optimiser's states."""
    lora: LoRA = field(default_factory=LoRA)
    guard: Guard = field(default_factory=Guard)
    steps: int = 100
    """Optimiser steps."""
    batch_size: int = 4
    """Samples of one forward, for each process."""
    accumulate: int = 1
    """Batches that are averaged into one optimiser step."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: with states of 8 bits, of the package bitsandbytes, on a GPU."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Schedule of the learning rate."""
    warmup_steps: int = 0
    """Steps until the learning rate is whole."""
    ema: float | None = None
    """Decay of an exponential moving average of the trained weights, which is then what is saved."""
    seed: int = 0
    """Of everything that is drawn."""
    checkpoint_every: int = 100
    """Optimiser steps between checkpoints."""
    keep_checkpoints: int = 2
    """The newest that are kept."""
    sample_every: int | None = None
    """Optimiser steps between sample pictures; by default a quarter of the steps."""
    sample_steps: int | None = None
    """Denoising steps of sample pictures and evaluation; by default the method's."""
    log: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Trackers besides metrics.jsonl, each with its extra."""

    def __post_init__(self) -> None:
        whole = dict(steps=1, batch_size=1, accumulate=1, eval_size=0, eval_draws=1, warmup_steps=0, checkpoint_every=1, keep_checkpoints=1)
        for name, least in whole.items():
            if not vars(self)[name] >= least:  # said so that NaN, which compares as false, is refused too
                raise InputError(f"{name} is {vars(self)[name]}: give {least} or more.")
        for name in ("learning_rate", "max_grad_norm", "audio_seconds"):
            if vars(self)[name] is not None and not 0 < vars(self)[name] < float("inf"):
                raise InputError(f"{name} is {vars(self)[name]}: give a number above 0.")
        for name in ("sample_every", "sample_steps", "data_limit", "height", "width", "max_sequence_length", "vae_batch_size"):
            if vars(self)[name] is not None and not vars(self)[name] >= 1:
                raise InputError(f"{name} is {vars(self)[name]}: give 1 or more.")
        if self.memory_budget is not None and not 0 < self.memory_budget < float("inf"):
            raise InputError(f"memory_budget is {self.memory_budget}: give GB, a number above 0.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema is {self.ema}: give a decay between 0 and 1, such as 0.99.")
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError(f"guidance_scale is {self.guidance_scale}: give 1 (none) or more.")
        for name in ("image_guidance_scale", "true_cfg_scale"):
            if not 1 <= vars(self)[name] < float("inf"):
                raise InputError(f"{name} is {vars(self)[name]}: give 1 (none) or more.")
        for name, least in {"original_size": 1, "crops_coords_top_left": 0, "target_size": 1}.items():
            pair = vars(self)[name]
            if pair is not None and (len(pair) != 2 or not all(n >= least for n in pair)):
                raise InputError(f"{name} is {list(pair)}: give two numbers of pixels, each {least} or more.")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}: give a whole number from 0 to 2147483647.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas is {list(self.betas)}: give two numbers from 0 to below 1.")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight_decay is {self.weight_decay}: give 0 or more.")
        if not self.batch_size <= 65_536:
            raise InputError(f"batch_size is {self.batch_size}: give at most 65536, and raise accumulate.")
        if self.full and self.lora.init:
            raise InputError("full and lora.init: a run trains all the weights, or a LoRA that it continues. Drop one.")
        if self.fsdp and not self.full:
            raise InputError("fsdp shares out all the weights of a network that trains, and a LoRA is small: add --full, or drop --fsdp.")
        unfit = {
            "precision fp16": self.precision == "fp16",
            "optimizer adamw8bit": self.optimizer == "adamw8bit",
            "channels_last": self.channels_last,
            "compile": self.compile,
            "memory_budget": self.memory_budget is not None,
        }
        for name, is_set in unfit.items():
            if self.fsdp and is_set:
                raise InputError(f"fsdp and {name} do not go together: drop one{', or use bf16' * (name == 'precision fp16')}.")
