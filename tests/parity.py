"""A policy's pictures, and those of its pipeline's own `__call__` from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from diffalign.lora import LoRA
from diffalign.models import adapter_of, network_of
from diffalign.sampling import Kernel, noisy, rollout
from diffalign.types import Prompts, Trajectory

STEPS = 4
TEXTS = ("a red fox", "two cats")


SHORT = {"guidance_scale": 4.0, "max_sequence_length": 12}
GUIDED: dict[str, dict[str, Any]] = {  # FLUX calls classifier-free guidance true
    "StableDiffusion3Pipeline": SHORT, "ZImagePipeline": SHORT, "FluxPipeline": {**SHORT, "guidance_scale": 3.5, "true_cfg_scale": 4.0},
}  # fmt: skip


def policy_of(pipe: Any, lora: LoRA | None = None, **options: Any) -> Any:
    """The policy of a live pipeline, as its class has it, with classifier-free guidance; with a `lora`, that on its network."""
    name = type(pipe).__name__
    policy = adapter_of(name).of(pipe, **{**GUIDED.get(name, {"guidance_scale": 5.0}), **options})
    if lora is not None:
        policy.adapt(lora)
    return policy


def prompts_for(policy: Any, texts: tuple[str, ...] = TEXTS) -> Prompts:
    """Texts, and the pictures and masks that the policy takes: of the masks the left half, or all but the top row."""
    size, rng = (len(texts), 3, policy.height, policy.width), Generator().manual_seed(1)
    mask = torch.zeros(len(texts), 1, policy.height, policy.width)
    mask[::2, :, :, : policy.width // 2] = 1
    mask[1::2, :, 4:] = 1
    return Prompts(
        texts, torch.rand(size, generator=rng) if "image" in policy.takes else None, mask if "mask" in policy.takes else None
    )  # fmt: skip


def run(
    policy: Any, prompts: Prompts | None = None, eta: float = 0.0, steps: int = STEPS, kernel: Kernel | None = None, **options: Any
) -> Trajectory:
    condition = policy.encode(prompts_for(policy) if prompts is None else prompts)
    kernel = kernel or noisy(policy.path, eta)
    return rollout(policy, condition, steps=steps, kernel=kernel, rng=Generator().manual_seed(0), **options)


@torch.no_grad()
def pictures(policy: Any, prompts: Prompts | None = None, **options: Any) -> Tensor:
    return policy.decode(run(policy, prompts, **options).final)


@torch.no_grad()
def own_pictures(policy: Any, prompts: Prompts | None = None, steps: int = STEPS, pipe: Any = None, **options: Any) -> Tensor:
    """What `pipe`, by default the policy's own, makes of the prompts by itself."""
    pipe, prompts = pipe or policy.pipe, prompts_for(policy) if prompts is None else prompts
    given: dict[str, Any] = {"latents": policy.prior(policy.encode(prompts), Generator().manual_seed(0))}
    given |= {"guidance_scale": policy.guidance_scale, "num_inference_steps": steps, "output_type": "pt"}
    given |= {} if policy.negative_prompt is None else {"negative_prompt": [policy.negative_prompt] * len(prompts)}
    given |= {} if prompts.image is None else {"image": prompts.image}
    given |= {"mask_image": prompts.mask, "strength": 1.0} if prompts.mask is not None else {}
    given |= {"image_guidance_scale": policy.image_guidance_scale} if policy.takes == ("image",) else {}
    given |= {} if policy.tokens is None else {"max_sequence_length": policy.tokens}
    if policy.takes != ("image",) or "XL" in type(pipe).__name__:
        given |= {"height": policy.height, "width": policy.width}
    if type(pipe).__name__ == "FluxPipeline":
        given["latents"] = pipe._pack_latents(given["latents"], *given["latents"].shape)
        given |= {"guidance_scale": policy.told or 1.0, "true_cfg_scale": policy.guidance_scale}
    if type(pipe).__name__ == "ZImagePipeline":
        given["guidance_scale"] = policy.guidance_scale - 1  # which it adds to 1
    return pipe(list(prompts.text), **{**given, **options}).images


def trainable(policy: Any) -> list[Tensor]:
    return [p for p in policy.module.parameters() if p.requires_grad]


@torch.no_grad()
def perturb(policy: Any, scale: float | None = None) -> None:
    """Move the weights that train. Not much further: the sampler of a wild network multiplies the last bits of fp32."""
    rng = Generator().manual_seed(7)
    scale = scale or (0.1 if policy.component == "unet" else 0.3)
    for p in trainable(policy):
        p.add_(scale * torch.randn(p.shape, generator=rng))


def lora_from_elsewhere(pipe: Any, folder: Path, rank: int = 3) -> Path:
    """A LoRA in diffusers' layout that peft and diffusers made alone, without metadata, on other layers than ours. `pipe` is as before."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    component = network_of(pipe)
    network, scale = getattr(pipe, component), 0.1 if component == "unet" else 0.3
    layers = ["to_q", "to_v", "proj_in" if component == "unet" else "proj_out"]
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    rng = Generator().manual_seed(3)
    for name, p in network.named_parameters():
        if "lora_" in name:
            p.data = scale * torch.randn(p.shape, generator=rng)
    type(pipe).save_lora_weights(folder, **{f"{component}_lora_layers": get_peft_model_state_dict(network)})
    network.delete_adapters("default")
    return folder
