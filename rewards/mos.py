"""UTMOS (Saeki et al., Interspeech 2022, arXiv 2204.02152): the naturalness of speech. The strong learner, from SpeechMOS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import InputError
from diffalign.rewards import tiny
from diffalign.rewards.common import DTYPES, Precision, check_fields, in_chunks
from diffalign.rewards.hearing import check_sounds, frames
from diffalign.rewards.weights import Source, build, convert, count, fetch_url, read_weights, require
from diffalign.types import Modality, Prompts

FILE = "utmos22_strong_step7459_v1.pt"
URL = f"https://github.com/tarepan/SpeechMOS/releases/download/v1.0.0/{FILE}"
HEAD = 64  # width of wav2vec 2.0's attention heads, which the weights do not say
STRIDES = (5, 2, 2, 2, 2, 2, 2)  # of its convolutions, which they do not say either
NAMES = [  # transformers' and fairseq's
    (r"^feature_extractor\.conv_layers\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
    (r"^feature_extractor\.conv_layers\.0\.layer_norm\.", "feature_extractor.conv_layers.0.2."),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0", "encoder.pos_conv.0.weight_g"),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1", "encoder.pos_conv.0.weight_v"),
    (r"^encoder\.pos_conv_embed\.conv\.bias", "encoder.pos_conv.0.bias"),
    (r"^(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"^(encoder\.layers\.\d+)\.feed_forward\.intermediate_dense\.", r"\1.fc1."),
    (r"^(encoder\.layers\.\d+)\.feed_forward\.output_dense\.", r"\1.fc2."),
    (r"^masked_spec_embed", "mask_emb"),
]


class Judge(nn.Module):
    """Frames (n, frames, width) to scores (n,): beside each the data set's and the judge's embeddings, a BLSTM, two layers, the mean."""

    def __init__(self, width: int, domain: int, judge: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.domain_emb, self.judge_emb = nn.Parameter(torch.empty(1, domain)), nn.Parameter(torch.empty(1, judge))
        self.blstm = nn.LSTM(width + domain + judge, hidden, batch_first=True, bidirectional=True)
        self.projection = nn.Sequential(nn.Linear(2 * hidden, inner), nn.ReLU(), nn.Linear(inner, 1))

    def forward(self, seen: Tensor) -> Tensor:
        beside = [x.expand(*seen.shape[:2], -1) for x in (self.domain_emb, self.judge_emb)]
        found: Tensor = self.projection(self.blstm(torch.cat([seen, *beside], -1))[0])
        return found[..., 0].mean(1) * 2 + 3


@dataclass(frozen=True)
class MOS:
    """The mean opinion score of naturalness that UTMOS' strong learner expects, made for 1 to 5. Reads no prompt."""

    checkpoint: Path | None = None
    """The checkpoint as a local file, in place of the download."""
    sha256: str | None = None
    """Checksum that the checkpoint must have."""
    precision: Precision = "fp32"
    """Of the encoder; the rest is fp32."""
    batch_size: int = 8
    """Sounds that go through the network at once."""

    differentiable: ClassVar[bool] = True
    modality: ClassVar[Modality] = "audio"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    sample_rate: ClassVar[int] = 16000

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Sounds (B, samples) in [-1, 1] at 16 kHz to (B,), of which most are from 1 to 5; the gradient reaches the sounds."""
        check_sounds(media, prompts)
        networks = self.networks.to(media.device)
        frames(networks["encoder"], media.shape[1], self.sample_rate)
        return in_chunks(self._score, self.batch_size, media)

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.networks

    def _score(self, media: Tensor) -> Tensor:
        encoder = self.networks["encoder"]
        return self.networks["judge"](encoder(media.to(encoder.dtype)).last_hidden_state.float())

    @cached_property
    def networks(self) -> Any:
        """`encoder` and `judge`, frozen."""
        from transformers import Wav2Vec2Model

        path = fetch_url(URL, self.checkpoint, self.sha256)
        weights = read_weights(path)
        config = architecture(weights, path)
        width, (hidden, inner) = config.hidden_size, (weights["projection.0.weight"].shape[1] // 2, weights["projection.0.weight"].shape[0])
        with torch.device("meta"):
            encoder = Wav2Vec2Model(config)
            judge = Judge(width, weights["domain_emb"].shape[-1], weights["judge_emb"].shape[-1], hidden, inner)
        states = convert(weights, {"encoder": (encoder, encoder_source), "judge": (judge, Source)}, path)
        judge.load_state_dict({name: tensor.float() for name, tensor in states["judge"].items()}, assign=True)
        judge.requires_grad_(False).eval()
        judge.blstm.train()  # without dropout the same; and cuDNN has no backward pass of an LSTM that is not in training
        return nn.ModuleDict({"encoder": build(Wav2Vec2Model, config, states["encoder"], DTYPES[self.precision]), "judge": judge})

    def tiny(self, folder: Path) -> MOS:
        """The same reward with tiny random weights, which are written into `folder` as the real ones lie on GitHub."""
        from transformers import Wav2Vec2Model

        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(width=128, inner=64, layers=2, conv=[16] * 7, kernels=[10, 3, 3, 3, 3, 2, 2], places=16, groups=16)

        def make() -> dict[str, Tensor]:
            judge = Judge(128, 8, 8, 16, 16).requires_grad_(False)
            for embedding in (judge.domain_emb, judge.judge_emb):
                embedding.normal_()
            return {**tiny.unconverted(Wav2Vec2Model(config).state_dict(), encoder_source), **judge.state_dict()}

        torch.save({key: tensor.detach().clone() for key, tensor in tiny.seeded(make).items()}, folder / FILE)
        return replace(self, checkpoint=folder / FILE, sha256=None)


def encoder_source(name: str) -> Source:
    """Where a parameter of transformers' Wav2Vec2Model stands in the checkpoint."""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return Source(f"wav2vec2.{name}")


def config_of(*, width: int, inner: int, layers: int, conv: list[int], kernels: list[int], places: int, groups: int) -> Any:
    """wav2vec 2.0 base: group norm in the first convolution, norms after attention and feed-forward layers."""
    from transformers import Wav2Vec2Config

    return Wav2Vec2Config(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // HEAD, conv_dim=conv,
        conv_kernel=kernels, conv_stride=list(STRIDES), num_conv_pos_embeddings=places,
        num_conv_pos_embedding_groups=groups, feat_extract_norm="group", conv_bias=False, do_stable_layer_norm=False, hidden_act="gelu",
    )  # fmt: skip


def architecture(weights: Mapping[str, Tensor], path: Path) -> Any:
    """The encoder's configuration, from its tensors' shapes. Raises InputError for other checkpoints."""
    prefix = "wav2vec2."
    convs = [f"{prefix}feature_extractor.conv_layers.{n}.0.weight" for n in range(len(STRIDES))]
    keys = [prefix + "post_extract_proj.weight", prefix + "encoder.pos_conv.0.weight_v", prefix + "encoder.layers.0.fc1.weight", *convs]
    require(weights, [*keys, "domain_emb", "judge_emb", "projection.0.weight"], "UTMOS", path)
    width, places, inner = (weights[key].shape for key in keys[:3])
    if width[0] % HEAD:
        raise InputError(f"{path} is no checkpoint of UTMOS: its encoder is {width[0]} wide, not 768.")
    return config_of(
        width=width[0], inner=inner[0], layers=count(weights, r"wav2vec2\.encoder\.layers\.(\d+)\."), places=places[2],
        groups=width[0] // places[1], conv=[weights[key].shape[0] for key in convs], kernels=[weights[key].shape[2] for key in convs],
    )  # fmt: skip
