"""ImageReward (Xu et al., NeurIPS 2023, arXiv 2304.05977): BLIP and a head on its text encoder, which sees the picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.cache import TextCache
from diffalign.errors import InputError
from diffalign.rewards import packages, tiny
from diffalign.rewards.common import DTYPES, Precision, View, Words, check_fields, check_pictures, in_chunks
from diffalign.rewards.packages import Backend, check_backend
from diffalign.rewards.weights import (
    TOKENIZER,
    Source,
    build,
    convert,
    count,
    fetch,
    linears,
    load_tokenizer,
    read_weights,
    require,
    snapshot,
)  # fmt: skip
from diffalign.types import Modality, Prompts

REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER_REPO = "google-bert/bert-base-uncased"
TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores in the training data
HEAD = 64  # width of the attention heads of ViT-L and of BERT, which the weights do not say


@dataclass(frozen=True)
class Judge:
    """BLIP's two encoders, the text one with cross-attention to the picture's tokens, and the head, with what they read."""

    networks: nn.ModuleDict  # vision, text, head
    words: Words
    view: View
    tokens: TextCache

    def score(self, media: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] and tokens (n, 35) to (n,)."""
        return self.rate(self.view(media), ids, mask)

    def rate(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pixels (n, 3, 224, 224), resized and normalised, and tokens (n, 35) to (n,)."""
        networks: Any = self.networks
        vision, text, head = (networks[name] for name in ("vision", "text", "head"))
        seen = vision(pixel_values=pixels.to(vision.dtype)).last_hidden_state
        read = text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (head(read[:, 0].float())[:, 0] - MEAN) / STD


@dataclass(frozen=True)
class ImageReward:
    """The normalised score of a picture for a prompt: mean 0 and standard deviation 1 over the authors' training data."""

    checkpoint: Path | None = None
    """The checkpoint as a local file, in place of the download."""
    tokenizer: Path | None = None
    """A folder with the tokenizer of bert-base-uncased, in place of the download."""
    revision: str = "main"
    """Revision of the checkpoint on the Hub: a commit is always the same file."""
    sha256: str | None = None
    """Checksum that the checkpoint must have."""
    precision: Precision = "fp32"
    """Of the encoders; the head is fp32."""
    batch_size: int = 8
    """Pictures that go through the network at once."""
    backend: Backend = "native"
    """`package`: the authors' package image-reward scores, 8-bit pictures one by one and without a gradient."""

    modality: ClassVar[Modality] = "image"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    resolution: ClassVar[int] = 224

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)
        check_backend(self.backend, bf16=self.precision == "bf16")

    @property
    def differentiable(self) -> bool:
        """Whether the gradient reaches the images: the package's own way of scoring has none."""
        return self.backend == "native"

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to (B,); with the native back end the gradient reaches the images."""
        if self.backend == "package":
            return packages.score(self.original, media, prompts)
        check_pictures(media, prompts)
        judge = self.judge
        judge.networks.to(media.device)
        judge.words.note(prompts.text)
        read = judge.tokens(prompts.text)
        return in_chunks(judge.score, self.batch_size, media, *(read[name].to(media.device) for name in judge.tokens.names))

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.judge if self.backend == "native" else self.original

    @cached_property
    def original(self) -> packages.Scorer:
        """The authors' package with the checkpoint."""
        packages.imported("image-reward", "ImageReward")  # before the download
        checkpoint = fetch(REPO, FILE, self.revision, self.checkpoint, self.sha256)
        return packages.image_reward(checkpoint, snapshot(TOKENIZER_REPO, "main", self.tokenizer, "tokenizer", TOKENIZER))

    @cached_property
    def judge(self) -> Judge:
        """The networks, frozen, with what they read."""
        from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

        path = fetch(REPO, FILE, self.revision, self.checkpoint, self.sha256)
        weights = {key: tensor for key, tensor in read_weights(path).items() if not re.match(UNUSED, key)}
        vision_config, text_config = architecture(weights, path)
        head, head_source = linears(weights, "mlp.layers.", "ImageReward", path)
        with torch.device("meta"):
            vision, text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
        networks = {"vision": (vision, vision_source), "text": (text, text_source), "head": (head, head_source)}
        states = convert(weights, networks, path)
        head.load_state_dict({name: tensor.float() for name, tensor in states["head"].items()}, assign=True)
        # the tokenizer's repository has branches of its own, so `revision` is not for it
        folder, size = snapshot(TOKENIZER_REPO, "main", self.tokenizer, "tokenizer", TOKENIZER), text_config.vocab_size
        tokenizer = load_tokenizer(BertTokenizer, folder, size, at_least=size - 2)
        if len(tokenizer) != size:
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})  # BLIP's two; the prompt's first token is [CLS] all the same
            tokenizer.add_tokens(["[ENC]"], special_tokens=True)
        if len(tokenizer) != size:
            raise InputError(
                f"The tokenizer in {folder} has {len(tokenizer):,} tokens and the network {size:,}: they do not belong together."
            )
        words, dtype = Words(tokenizer, TOKENS, "image-reward"), DTYPES[self.precision]
        return Judge(
            nn.ModuleDict(
                {
                    "vision": build(BlipVisionModel, vision_config, states["vision"], dtype),
                    "text": build(BlipTextModel, text_config, states["text"], dtype, add_pooling_layer=False),
                    "head": head.requires_grad_(False).eval(),
                }
            ),
            words,
            View(vision_config.image_size, rounds=True),
            TextCache(
                lambda texts: [words(texts)[name] for name in ("input_ids", "attention_mask")], names=("input_ids", "attention_mask")
            ),
        )

    def tiny(self, folder: Path) -> ImageReward:
        """The same reward with tiny random weights, which are written into `folder` as the real ones lie on the Hub."""
        from transformers import BlipTextModel, BlipVisionModel

        packages.refuse_twin(self.backend)
        size = len(tiny.bert_tokenizer(folder)) + 2
        vision_config, text_config = configs(
            vision=128, vision_inner=256, vision_layers=2, text=64, text_inner=128, text_layers=2, tokens=size
        )
        head_sizes = {0: (64, 32), 2: (32, 16), 4: (16, 8), 6: (8, 4), 7: (4, 1)}

        def make() -> dict[str, Tensor]:
            vision = BlipVisionModel(vision_config).requires_grad_(False)
            for parameter in (vision.embeddings.class_embedding, vision.embeddings.position_embedding):
                parameter.normal_(std=0.02)
            text = BlipTextModel(text_config, add_pooling_layer=False)
            layers = {f"mlp.layers.{n}.{k}": v for n, size in head_sizes.items() for k, v in nn.Linear(*size).state_dict().items()}
            found = tiny.unconverted(vision.state_dict(), vision_source) | tiny.unconverted(text.state_dict(), text_source)
            return found | layers

        torch.save(tiny.seeded(make), folder / FILE)
        return replace(self, checkpoint=folder / FILE, tokenizer=folder, sha256=None)


def configs(
    *, vision: int, vision_inner: int, vision_layers: int, text: int, text_inner: int, text_layers: int, tokens: int,
    size: int = 224, patch: int = 16, positions: int = 512,
) -> tuple[Any, Any]:  # fmt: skip
    """BLIP's vision and text configurations, with what transformers' defaults have otherwise: epsilons, heads, the encoder's width."""
    from transformers import BlipTextConfig, BlipVisionConfig

    return BlipVisionConfig(
        hidden_size=vision, intermediate_size=vision_inner, num_hidden_layers=vision_layers, num_attention_heads=vision // HEAD,
        image_size=size, patch_size=patch, layer_norm_eps=1e-6, initializer_range=0.02,
    ), BlipTextConfig(
        vocab_size=tokens, hidden_size=text, intermediate_size=text_inner, num_hidden_layers=text_layers, num_attention_heads=text // HEAD,
        encoder_hidden_size=vision, max_position_embeddings=positions, layer_norm_eps=1e-12,
        bos_token_id=None, sep_token_id=None,  # of text generation alone
        is_decoder=True,  # makes the cross-attention; the calls stay bidirectional
    )  # fmt: skip


def architecture(weights: Mapping[str, Tensor], path: Path) -> tuple[Any, Any]:
    """The two configurations of an ImageReward checkpoint, from its tensors' shapes. Raises InputError for other checkpoints."""
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    keys = [vision + "patch_embed.proj.weight", vision + "pos_embed", vision + "blocks.0.mlp.fc1.weight"]
    keys += [text + "embeddings.word_embeddings.weight", text + "embeddings.position_embeddings.weight"]
    keys += [text + "encoder.layer.0.intermediate.dense.weight"]
    require(weights, keys, "ImageReward", path)
    patch, places, inner, tokens, positions, text_inner = (weights[key].shape for key in keys)
    if patch[0] % HEAD or tokens[1] % HEAD:
        raise InputError(f"{path} is no checkpoint of ImageReward: its encoders are {patch[0]} and {tokens[1]} wide, not 1024 and 768.")
    return configs(
        vision=patch[0], vision_inner=inner[0], vision_layers=count(weights, r"blip\.visual_encoder\.blocks\.(\d+)\."),
        text=tokens[1], text_inner=text_inner[0], text_layers=count(weights, r"blip\.text_encoder\.encoder\.layer\.(\d+)\."),
        tokens=tokens[0], size=isqrt(places[1] - 1) * patch[-1], patch=patch[-1], positions=positions[0],
    )  # fmt: skip


UNUSED = r"blip\.(text_encoder\.embeddings\.position_ids|vision_proj\.|text_proj\.)"  # BLIP's pretraining
NAMES = [  # transformers' and BLIP's
    (r"^embeddings\.class_embedding", "cls_token"),
    (r"^embeddings\.position_embedding", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
]


def vision_source(name: str) -> Source:
    """Where a parameter of transformers' BlipVisionModel stands in an ImageReward checkpoint."""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return Source(f"blip.visual_encoder.{name}")


def text_source(name: str) -> Source:
    return Source(f"blip.text_encoder.{name}")
