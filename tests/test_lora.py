"""A LoRA to continue from: what does not fit is refused, and leaves a live pipeline as it came; what fits keeps its rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity import lora_from_elsewhere, policy_of

import diffalign
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.types import Prompts


@diffalign.reward(differentiable=True)
def bright(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    return images.mean((1, 2, 3))


def pictures_of(pipe: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return pipe("a dog", num_inference_steps=2, height=16, width=16, generator=rng, output_type="pt").images


def of_text_too(folder: Path, network: bool = True) -> Path:
    """A LoRA of the text encoder, and where `network` of the UNet too."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, layers = tiny.stable_diffusion(), dict[str, Any]()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(config)
    layers["text_encoder_lora_layers"] = get_peft_model_state_dict(pipe.text_encoder)
    if network:
        pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
        layers["unet_lora_layers"] = get_peft_model_state_dict(pipe.unet)
    type(pipe).save_lora_weights(folder, **layers)
    return folder


def of_a_deeper_network(folder: Path) -> Path:
    pipe = tiny.flux(transformer={"num_layers": 3})
    policy = policy_of(pipe, true_cfg_scale=1.0)
    policy.adapt(LoRA(rank=2))
    policy.save(folder)
    return folder


def of_other_sizes(folder: Path) -> Path:
    """Of the same names and other shapes: diffusers fails half-way."""
    return lora_from_elsewhere(tiny.sdxl(), folder)


@pytest.mark.parametrize(
    ("make", "write", "says"),
    [
        (tiny.stable_diffusion, of_text_too, "also adapts the text_encoder, which is not trained"),
        (tiny.stable_diffusion, lambda folder: of_text_too(folder, network=False), "also adapts the text_encoder"),
        (tiny.stable_diffusion, of_other_sizes, "is no LoRA that fits this pipeline|made for another network"),
        (tiny.flux, of_a_deeper_network, r"adapts \d+ layers, of which a FluxTransformer2DModel like this has \d+"),
    ],
    ids=["text encoder too", "text encoder alone", "other sizes", "deeper"],
)
def test_a_lora_that_is_refused_leaves_the_pipeline_as_it_came(make: Any, write: Any, says: str, tmp_path: Path):
    folder, pipe = write(tmp_path / "lora"), make()
    before = pictures_of(pipe)
    for _ in range(2):
        with pytest.raises(InputError, match=says):
            diffalign.align(pipe, reward=bright, prompts=["a dog"], output=tmp_path / "run", lora={"init": str(folder)}, inference_steps=2)
    assert torch.equal(pictures_of(pipe), before)
    assert not any(pipe.get_list_adapters().values())
    assert not (tmp_path / "run").exists()
    diffalign.align(pipe, reward=bright, prompts=["a dog"], output=tmp_path / "run", steps=1, inference_steps=2, eval_size=0)


def test_a_continued_lora_is_recorded_with_its_own_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = lora_from_elsewhere(tiny.stable_diffusion(), tmp_path / "theirs", rank=3)
    given: dict[str, Any] = {"reward": bright, "prompts": ["a dog"], "steps": 1, "inference_steps": 2, "eval_size": 0}
    run = diffalign.align(tiny.stable_diffusion(), output=tmp_path / "run", lora={"init": str(folder), "rank": 16, "alpha": 1.0}, **given)
    assert (run.config["lora"]["rank"], run.config["lora"]["alpha"]) == (3, 3.0)
    assert "a LoRA of rank 3 (" in capsys.readouterr().err
