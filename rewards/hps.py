"""Human Preference Score v2 and v2.1 (Wu et al., 2023, arXiv 2306.09341): CLIP ViT-H-14 tuned on which picture people preferred."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards import packages, tiny
from diffalign.rewards.common import DTYPES, Precision, Towers, View, Words, check_fields, towers
from diffalign.rewards.packages import Backend, check_backend
from diffalign.rewards.weights import TOKENIZER, Source, build, convert, count, fetch, load_tokenizer, read_weights, require, snapshot
from diffalign.types import Modality, Prompts

REPO = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
TOKENIZER_REPO = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model that was tuned
VISION_HEAD, TEXT_HEAD = 80, 64  # widths of the attention heads of ViT-H-14, which the weights do not say


@dataclass(frozen=True)
class HPS:
    """Cosine of the picture's and the prompt's features, not times CLIP's logit scale; the networks' pictures are padded, not cut."""

    version: Literal["v2.0", "v2.1"] = "v2.0"
    """Which of the two checkpoints."""
    checkpoint: Path | None = None
    """The checkpoint as a local file, in place of the download."""
    tokenizer: Path | None = None
    """A folder with CLIP's tokenizer, in place of the download."""
    revision: str = "main"
    """Revision of the checkpoint on the Hub: a commit is always the same file."""
    sha256: str | None = None
    """Checksum that the checkpoint must have."""
    precision: Precision = "fp32"
    """Of the networks; cosines are fp32."""
    batch_size: int = 8
    """Pictures that go through the network at once."""
    backend: Backend = "native"
    """`package`: the authors' package hpsv2 scores, 8-bit pictures one by one and without a gradient."""

    modality: ClassVar[Modality] = "image"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    resolution: ClassVar[int] = 224

    def __post_init__(self) -> None:
        check_fields(self.precision, self.batch_size)
        check_backend(self.backend, tokenizer=self.tokenizer, bf16=self.precision == "bf16")
        if self.version not in FILES:
            raise InputError(f"version is {self.version}: give {' or '.join(FILES)}.")

    @property
    def differentiable(self) -> bool:
        """Whether the gradient reaches the images: the package's own way of scoring has none."""
        return self.backend == "native"

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to (B,) in [-1, 1]; with the native back end the gradient reaches the images."""
        if self.backend == "package":
            return packages.score(self.original, media, prompts)
        return self.towers.cosine(media, prompts, self.batch_size)

    def open(self) -> None:
        """Load the weights, now rather than at the first call. Raises InputError where they cannot be had."""
        _ = self.towers if self.backend == "native" else self.original

    @cached_property
    def original(self) -> packages.Scorer:
        """The authors' package with the checkpoint."""
        packages.imported("hpsv2", "hpsv2.src.open_clip")  # before the download
        return packages.hps(fetch(REPO, FILES[self.version], self.revision, self.checkpoint, self.sha256))

    @cached_property
    def towers(self) -> Towers:
        """The networks, frozen, with what they read."""
        from transformers import CLIPModel, CLIPTokenizer

        path = fetch(REPO, FILES[self.version], self.revision, self.checkpoint, self.sha256)
        weights = read_weights(path)
        config = architecture(weights, path)
        size = config.text_config.vocab_size
        # the tokenizer's repository has branches of its own, so `revision` is not for it
        tokenizer = load_tokenizer(CLIPTokenizer, snapshot(TOKENIZER_REPO, "main", self.tokenizer, "tokenizer", TOKENIZER), size)
        with torch.device("meta"):
            skeleton = CLIPModel(config)
        state = convert(weights, {"clip": (skeleton, source_of)}, path)["clip"]
        model = build(CLIPModel, config, {name: tensor.contiguous() for name, tensor in state.items()}, DTYPES[self.precision])
        words = Words(tokenizer, config.text_config.max_position_embeddings, f"hps-{self.version}", unescape=True)
        return towers(model, words, View(config.vision_config.image_size, "pad"))

    def tiny(self, folder: Path) -> HPS:
        """The same reward with tiny random weights, which are written into `folder` as the real ones lie on the Hub."""
        packages.refuse_twin(self.backend)
        tiny.clip_tokenizer(folder)
        weights = tiny.unconverted(tiny.clip(head=VISION_HEAD).state_dict(), source_of)
        torch.save({"state_dict": weights}, folder / FILES[self.version])
        return replace(self, checkpoint=folder / FILES[self.version], tokenizer=folder, sha256=None)


def architecture(weights: Mapping[str, Tensor], path: Path) -> Any:
    """transformers' CLIPConfig of an open_clip checkpoint, from its tensors' shapes. Raises InputError for other checkpoints."""
    from transformers import CLIPConfig

    needed = ["visual.conv1.weight", "visual.positional_embedding", "visual.transformer.resblocks.0.mlp.c_fc.weight", "text_projection"]
    needed += ["token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"]
    require(weights, needed, "open_clip's CLIP", path)
    patch, tokens = weights["visual.conv1.weight"], weights["token_embedding.weight"]
    if patch.shape[0] % VISION_HEAD or tokens.shape[1] % TEXT_HEAD:
        raise InputError(f"{path} is no ViT-H-14: its networks are {patch.shape[0]} and {tokens.shape[1]} wide, not 1280 and 1024.")
    text = dict(
        vocab_size=tokens.shape[0], hidden_size=tokens.shape[1], num_attention_heads=tokens.shape[1] // TEXT_HEAD, hidden_act="gelu",
        intermediate_size=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=count(weights, r"transformer\.resblocks\.(\d+)\."),
        max_position_embeddings=weights["positional_embedding"].shape[0],
        bos_token_id=tokens.shape[0] - 2, eos_token_id=tokens.shape[0] - 1, pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        hidden_size=patch.shape[0], num_attention_heads=patch.shape[0] // VISION_HEAD, patch_size=patch.shape[-1], hidden_act="gelu",
        intermediate_size=weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=count(weights, r"visual\.transformer\.resblocks\.(\d+)\."),
        image_size=isqrt(weights["visual.positional_embedding"].shape[0] - 1) * patch.shape[-1],
    )  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=weights["text_projection"].shape[1])


NAMES = [  # ours, with transformers' spelling of pre_layrnorm, and open_clip's
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_projection\.weight", "text_projection"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"visual_projection\.weight", "visual.proj"),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]


def source_of(name: str) -> Source:
    """Where a parameter of transformers' CLIPModel stands in an open_clip checkpoint."""
    key = name
    for ours, theirs in NAMES:
        key = re.sub(ours, theirs, key)
    part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
    return Source(key, "qkv".index(part[1]) if part else None, name in ("text_projection.weight", "visual_projection.weight"))
