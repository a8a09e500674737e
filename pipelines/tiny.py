"""Tiny twins: each family's pipeline with random weights, for dry runs and tests: latents (B, 4, 8, 8), pictures (B, 3, 16, 16).

A builder draws its weights from torch's global generator, which it seeds.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# diffusers' annotations are narrower than what its constructors take.

from __future__ import annotations

from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
TEXT = dict(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
UNET = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16, attention_head_dim=8,
)  # fmt: skip
SD_2 = dict(use_linear_projection=True, attention_head_dim=(2, 4))  # what Stable Diffusion 2.x has otherwise
SDXL = dict(
    SD_2, cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=(1, 2),
)  # fmt: skip
FLOW_VAE = dict(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
)  # fmt: skip


def stable_diffusion(seed: int = 0, unet: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """`scheduler` overrides SD 1.5's scheduler configuration, `unet` the network's."""
    from diffusers import StableDiffusionPipeline

    return quiet(StableDiffusionPipeline(**_parts(seed, unet or {}, scheduler), **UNCHECKED))


def sdxl(seed: int = 0, unet: dict[str, Any] | None = None, force_zeros_for_empty_prompt: bool = True, **scheduler: Any) -> Any:
    """Two text encoders of different weights, and a UNet that is told sizes."""
    from diffusers import StableDiffusionXLPipeline

    zeros = {"force_zeros_for_empty_prompt": force_zeros_for_empty_prompt}
    return quiet(StableDiffusionXLPipeline(**_xl_parts(seed, unet or {}, scheduler), **zeros, add_watermarker=False))


def instruct_pix2pix(seed: int = 0, **scheduler: Any) -> Any:
    """Stable Diffusion with a UNet that sees the source's latents too."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    parts = {**stable_diffusion(seed, **scheduler).components, "image_encoder": None}
    unet = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 8})
    return quiet(StableDiffusionInstructPix2PixPipeline(**{**parts, "unet": unet}, requires_safety_checker=False))


def instruct_pix2pix_xl(seed: int = 0, is_cosxl_edit: bool = False, **scheduler: Any) -> Any:
    from diffusers import StableDiffusionXLInstructPix2PixPipeline

    parts = _xl_parts(seed, {"in_channels": 8}, scheduler)
    return quiet(StableDiffusionXLInstructPix2PixPipeline(**parts, is_cosxl_edit=is_cosxl_edit, add_watermarker=False))


def inpaint(seed: int = 0, unet: dict[str, Any] | None = None, certain: bool = True, **scheduler: Any) -> Any:
    """A UNet with 9 channels. `certain`: the VAE's posterior has no spread, since this pipeline draws from it."""
    from diffusers import StableDiffusionInpaintPipeline

    parts = _parts(seed, {"in_channels": 9, **(unet or {})}, scheduler)
    return quiet(StableDiffusionInpaintPipeline(**(_certain(parts) if certain else parts), **UNCHECKED))


def inpaint_xl(seed: int = 0, **scheduler: Any) -> Any:
    from diffusers import StableDiffusionXLInpaintPipeline

    return quiet(StableDiffusionXLInpaintPipeline(**_certain(_xl_parts(seed, {"in_channels": 9}, scheduler)), add_watermarker=False))


def sd3(seed: int = 0, t5: bool = True, transformer: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """`scheduler` overrides Stable Diffusion 3's scheduler configuration; without `t5` its third text encoder is absent."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = dict(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    network = SD3Transformer2DModel(**{**config, **(transformer or {})})
    clips = {f"text_encoder{n}": CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, projection_dim=16)) for n in ("", "_2")}
    tokenizers = {f"tokenizer{n}": _clip_tokenizer() for n in ("", "_2")}
    third = text_t5() if t5 else (None, None)
    return quiet(
        StableDiffusion3Pipeline(
            transformer=awake(network), scheduler=flow({"shift": 3.0, **scheduler}), vae=a_vae(**FLOW_VAE), **clips, **tokenizers,
            text_encoder_3=third[0], tokenizer_3=third[1],
        )
    )  # fmt: skip


def flux(seed: int = 0, guidance_embeds: bool = True, transformer: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """`scheduler` overrides FLUX.1-dev's scheduler configuration; without `guidance_embeds` it is as FLUX.1-schnell."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = dict(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    network = FluxTransformer2DModel(**{**config, **(transformer or {})})
    clip, (t5, words) = CLIPTextModel(CLIPTextConfig(**TEXT, projection_dim=16)), text_t5()
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True}
    pipe = FluxPipeline(
        transformer=awake(network), scheduler=flow({**dynamic, **scheduler}), vae=a_vae(**FLOW_VAE), text_encoder=clip,
        tokenizer=_clip_tokenizer(), text_encoder_2=t5, tokenizer_2=words,
    )  # fmt: skip
    pipe.default_sample_size = 8
    return quiet(pipe)


def z_image(seed: int = 0, transformer: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """`scheduler` overrides Z-Image's scheduler configuration."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    config = dict(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )  # fmt: skip
    network, words = ZImageTransformer2DModel(**{**config, **(transformer or {})}), _chat_tokenizer()
    language = Qwen3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    pipe = ZImagePipeline(
        transformer=awake(network), scheduler=flow({"shift": 3.0, **scheduler}), vae=a_vae(**FLOW_VAE),
        text_encoder=Qwen3Model(language), tokenizer=words,
    )  # fmt: skip
    pipe.default_sample_size = 8
    return quiet(pipe)


def _parts(seed: int, unet: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, Any]:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT))
    network = UNet2DConditionModel(**{**UNET, **unet})
    steps = DDIMScheduler(**{**SCHEDULER, **scheduler})
    return {"vae": a_vae(), "text_encoder": text_encoder, "tokenizer": _clip_tokenizer(), "unet": network, "scheduler": steps}


def _xl_parts(seed: int, unet: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    parts = _parts(seed, {**SDXL, **unet}, scheduler)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, projection_dim=16))
    return {**parts, "text_encoder_2": second, "tokenizer_2": _clip_tokenizer(pad_token=WORDS[2])}


@torch.no_grad()
def _certain(parts: dict[str, Any]) -> dict[str, Any]:
    parts["vae"].quant_conv.weight[4:] = 0
    parts["vae"].quant_conv.bias[4:] = -30
    return parts


@torch.no_grad()
def awake(network: Any) -> Any:
    """With random weights of a size at which text, guidance and time matter to the velocity."""
    for name, p in network.named_parameters():
        if p.ndim == 2:
            p.normal_(0, 0.6 / p.shape[1] ** 0.5 if "norm" in name else 1.5 / p.shape[1] ** 0.5)
    return network


def flow(config: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def a_vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, **{"sample_size": 16, **config},
    )  # fmt: skip


def _clip_tokenizer(**config: Any) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab={w: i for i, w in enumerate(WORDS)}, merges=[], model_max_length=16, **config)


def _chat_tokenizer() -> Any:
    """Letter by letter, with a template for chats."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: i for i, letter in enumerate(["<pad>", "<unk>", "<user>", " ", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("<user>|."), "isolated")
    words = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", unk_token="<unk>")
    words.chat_template = "{% for message in messages %}<user>{{ message.content }}{% endfor %}"
    return words


def text_t5(letters: str = LETTERS, **config: Any) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -2.0) for c in letters)]
    words = T5Tokenizer(vocab=pieces, extra_ids=0, **config)
    small = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(small), words


def quiet(pipe: Any) -> Any:
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()  # as from_pretrained leaves it: T5 has dropout
    pipe.set_progress_bar_config(disable=True)
    return pipe
