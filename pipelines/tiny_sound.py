"""Tiny twins of sound: 0.32 s at 16 kHz from latents (B, 4, 16, 8), and 5 s at 2 kHz from latents (B, 50, 8); see `tiny`."""

# pyright: reportArgumentType=false, reportCallIssue=false
# diffusers' annotations are narrower than what its constructors take.

from __future__ import annotations

import json
from pathlib import Path
from string import punctuation
from tempfile import TemporaryDirectory
from typing import Any

import torch

from diffalign.pipelines.tiny import LETTERS, SCHEDULER, UNET, a_vae, awake, flow, quiet, text_t5


def audioldm2(seed: int = 0, speech: bool = False, unet: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """`speech`: with VITS in the place of T5, so that prompts come with transcripts, of letters, digits and blanks."""
    from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel, DDIMScheduler
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        GPT2Config,
        GPT2LMHeadModel,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    torch.manual_seed(seed)
    config = dict(
        UNET, sample_size=16, norm_num_groups=8, cross_attention_dim=([None, 16, 32], [None, 16, 32]), attention_head_dim=2
    )  # fmt: skip
    words = dict(
        vocab_size=len(LETTERS) + 5, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=0, pad_token_id=1, eos_token_id=2, projection_dim=16,
    )  # fmt: skip
    ears = dict(
        spec_size=32, num_mel_bins=8, patch_embeds_hidden_size=8, hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2],
        num_hidden_layers=2, window_size=2, num_classes=2, projection_dim=16,
    )  # fmt: skip
    second, tokenizer = _vits() if speech else text_t5(model_max_length=64)
    places = dict(use_learned_position_embedding=True, max_seq_length=tokenizer.model_max_length) if speech else {}
    voice = SpeechT5HifiGanConfig(
        model_in_dim=16, sampling_rate=16000, upsample_initial_channel=32, upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[9, 8, 8, 4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], normalize_before=False,
    )  # fmt: skip
    pipe = AudioLDM2Pipeline(
        vae=a_vae(in_channels=1, out_channels=1),
        text_encoder=ClapModel(ClapConfig(text_config=words, audio_config=ears, projection_dim=16)),
        text_encoder_2=second,
        projection_model=awake(AudioLDM2ProjectionModel(16, 32, 16, **places)),
        language_model=GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=4, n_positions=200, bos_token_id=0, eos_token_id=0, max_new_tokens=4)
        ),
        tokenizer=_roberta(),
        tokenizer_2=tokenizer,
        feature_extractor=ClapFeatureExtractor(feature_size=8, sampling_rate=16000, max_length_s=1),
        unet=AudioLDM2UNet2DConditionModel(**{**config, **(unet or {})}),
        scheduler=DDIMScheduler(**{**SCHEDULER, **scheduler}),
        vocoder=_loud(SpeechT5HifiGan(voice)),
    )
    return quiet(pipe)


def longcat_audio(seed: int = 0, transformer: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """`scheduler` overrides LongCat-AudioDiT's scheduler configuration."""
    from diffusers import LongCatAudioDiTPipeline, LongCatAudioDiTTransformer, LongCatAudioDiTVae
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = dict(dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=8)
    network = LongCatAudioDiTTransformer(**{**config, **(transformer or {})})
    words = text_t5()[1]
    text = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = LongCatAudioDiTVae(
        channels=8, c_mults=[1, 2, 2], strides=[2, 10, 10], latent_dim=8, encoder_latent_dim=16, downsampling_ratio=200, sample_rate=2000
    )
    with torch.no_grad():
        vae.decoder.layers[-2].weight_g.mul_(0.05)  # within full scale
    text_encoder = UMT5EncoderModel(text)
    with torch.random.fork_rng(devices=[]):  # punctuation besides, as the real one has it
        words = text_t5(LETTERS + punctuation)[1]
        text_encoder.resize_token_embeddings(len(words), mean_resizing=False)
    return quiet(
        LongCatAudioDiTPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=words, transformer=awake(network),
            scheduler=flow({"shift": 1.0, "invert_sigmas": True, **scheduler}),
        )
    )  # fmt: skip


@torch.no_grad()
def _loud(vocoder: Any) -> Any:
    """With random weights of a size at which the mel spectrogram is heard."""
    for p in vocoder.parameters():
        if p.ndim > 1:
            p.normal_(0, 1.2 / p[0].numel() ** 0.5)
    return vocoder


def _roberta() -> Any:
    from transformers import RobertaTokenizer

    words = ["<s>", "<pad>", "</s>", "<unk>", "\u0120", *LETTERS]
    return RobertaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=32)


def _vits() -> tuple[Any, Any]:
    """Letter by letter. The pipeline puts token 182 behind a transcript."""
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    with TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({word: i for i, word in enumerate(["<pad>", "<unk>", " ", *LETTERS, *"0123456789"])}))
        words = VitsTokenizer(str(file), add_blank=False, normalize=True, phonemize=False, model_max_length=24)
    small = dict(
        vocab_size=183, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, flow_size=16, spectrogram_bins=9,
        upsample_initial_channel=8, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]], prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
        prior_encoder_num_flows=1, wavenet_kernel_size=3, duration_predictor_num_flows=1, duration_predictor_filter_channels=8,
    )  # fmt: skip
    return VitsModel(VitsConfig(**small)), words
