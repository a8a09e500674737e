"""What the memory and speed settings change in a live pipeline, and how that is undone. What each is worth: docs/memory.md."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import InputError
from diffalign.settings import Settings


def check(settings: Settings) -> None:
    """Raise InputError for a setting whose package is not installed; nothing is loaded."""
    wanted = {"xformers": settings.attention == "xformers", "bitsandbytes": settings.optimizer == "adamw8bit"}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed: pip install 'diffalign[{package}]'")


def check_device(settings: Settings, device: torch.device) -> None:
    """Raise InputError for a setting that cannot be had on this device."""
    if settings.offload and device.type == "cpu":
        raise InputError("offload brings what rests to the CPU, and this trains on it: drop --offload, or give --device cuda.")
    if settings.attention == "xformers" and device.type != "cuda":
        raise InputError(f"attention xformers needs a CUDA GPU, and this is {device.type}: torch's own is as fast here, --attention sdpa.")
    if settings.optimizer == "adamw8bit" and device.type in ("cpu", "mps"):
        raise InputError(f"optimizer adamw8bit needs a GPU that bitsandbytes knows, and this is {device.type}: --optimizer adamw.")


def to_sample(settings: Settings, device: torch.device) -> Settings:
    """The settings of a run that was trained, perhaps elsewhere, and is now only sampled: without what cannot be had here. The pictures are
    the same."""
    xformers = settings.attention == "xformers" and (device.type != "cuda" or importlib.util.find_spec("xformers") is None)
    attention = "sdpa" if xformers else settings.attention
    return replace(settings, optimizer="adamw", attention=attention, offload=settings.offload and device.type != "cpu")


def install(policy: Any, settings: Settings) -> None:
    """What holds for sampling and training alike, on a policy that is made. `policy.release()` undoes it on the pipeline.

    Raises InputError for what this network does not have.
    """
    if settings.channels_last:
        for module in (policy.module, policy.pipe.vae):
            _channels_last(policy, module)
    if settings.attention != "sdpa":
        _attention(policy, settings.attention)
    if settings.vae_batch_size is not None:
        policy.vae_batch_size = settings.vae_batch_size
    if settings.offload:
        policy.offload(torch.device("cpu"))


def install_for_training(policy: Any, settings: Settings) -> None:
    """What is only for training, on a network that has its LoRA, or its frozen copy, already."""
    if settings.gradient_checkpointing:
        _checkpoint(policy, policy.module)
        if policy.pipe.vae._supports_gradient_checkpointing:
            _checkpoint(policy, policy.pipe.vae)
    if settings.compile:
        _check_compiler(policy.module.device)
        compile_networks(policy)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Settings) -> Any:
    """AdamW, or bitsandbytes' with states of 8 bits."""
    chosen: dict[str, Any] = dict(lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw8bit":
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
        return bitsandbytes.optim.AdamW8bit(parameters, **chosen)
    return torch.optim.AdamW(parameters, **chosen)


def _channels_last(policy: Any, module: Any) -> None:
    def in_order(module: nn.Module, weights: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        weights.update({name: weight.contiguous() for name, weight in weights.items()})  # safetensors takes no other

    module.to(memory_format=torch.channels_last)
    policy.undo.callback(module.register_state_dict_post_hook(in_order).remove)
    policy.undo.callback(module.to, memory_format=torch.contiguous_format)


def _attention(policy: Any, kind: str) -> None:
    network = policy.module
    if "attn_processors" not in dir(network):
        raise InputError(f"attention {kind}: a {type(network).__name__} has no other attention than torch's own. Use --attention sdpa.")
    before = {name: copy.copy(processor) for name, processor in network.attn_processors.items()}
    if kind == "xformers":
        try:
            network.enable_xformers_memory_efficient_attention()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"attention xformers does not run here ({reason}): use --attention sdpa.") from error
    elif policy.component != "unet":
        raise InputError(f"attention {kind} is for UNets, and this is a {type(network).__name__}: sdpa or xformers.")
    elif kind == "sliced":
        network.set_attention_slice("max")
    else:
        from diffusers.models.attention_processor import AttnProcessor

        network.set_attn_processor(AttnProcessor())
    policy.undo.callback(network.set_attn_processor, before)


def _checkpoint(policy: Any, module: Any) -> None:
    if not module._supports_gradient_checkpointing:
        raise InputError(f"gradient_checkpointing: a {type(module).__name__} has none. Lower --batch-size and raise --accumulate instead.")
    if not module.is_gradient_checkpointing:
        module.enable_gradient_checkpointing()
        policy.undo.callback(module.disable_gradient_checkpointing)


def _check_compiler(device: torch.device) -> None:
    """Compile two operations: what torch.compile needs (a C++ compiler, Python's headers, triton) shows only when it is used."""

    def little(x: Tensor) -> Tensor:
        return x.cos() + 1

    try:
        torch.compile(little)(torch.zeros(8, device=device))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(
            f"torch.compile does not work here ({reason}). It needs a C++ compiler, on a GPU triton: drop --compile."
        ) from error


def compile_networks(policy: Any, backend: str = "inductor") -> None:
    """torch.compile of the network's forward, and of the frozen copy's, in place: names and keys of the weights stay.

    The forward alone, not `module.compile()`: that would compile hooks into the graph, and the loop counts calls with one.
    """
    for network in (policy.module, policy.frozen):
        if network is not None:
            network.forward = torch.compile(network.forward, backend=backend)
            policy.undo.callback(vars(network).pop, "forward")
