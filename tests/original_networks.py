"""The networks of the reward models in plain torch, with the parameter names of the original code: what the loaders are held against."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def spread(module: nn.Module, scale: float = 0.08) -> Any:
    """Random weights that are large enough for a mistake to show: 1 + noise for the norms' scales, noise for all the others."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            one = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale + one)
    return module.eval()


def smooth(count: int, height: int, width: int) -> Tensor:
    """Pictures (count, 3, height, width) in [0, 1]: coarse noise, enlarged."""
    noise = torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(2))
    return F.interpolate(noise, (height, width), mode="bilinear").clamp(0, 1)


class ResidualBlock(nn.Module):
    """open_clip's: pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, wide: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, wide * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(wide * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, wide: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, wide) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, wide: int, patch: int, size: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers, wide)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """open_clip's CLIP with the head widths of ViT-H-14: 80 in the vision tower, 64 in the text tower."""

    def __init__(
        self, vision: int = 160, text: int = 128, out: int = 24, tokens: int = 74, patch: int = 56, size: int = 224, layers: int = 3,
        text_layers: int = 2, wide: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.visual = VisionTower(vision, vision // 80, layers, wide, patch, size, out)
        self.token_embedding = nn.Embedding(tokens, text)
        self.positional_embedding = nn.Parameter(torch.zeros(77, text))
        self.transformer = Transformer(text, text // 64, text_layers, wide)
        self.ln_final = nn.LayerNorm(text)
        self.text_projection = nn.Parameter(torch.zeros(text, out))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Of ids (n, 77) padded with 0: the end of the text is its largest id."""
        mask = torch.full((77, 77), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection

    def cosine(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return (F.normalize(self.visual(pixels), dim=-1) * F.normalize(self.encode_text(ids), dim=-1)).sum(-1)


class ViTBlock(nn.Module):
    """timm's: pre-norm, one matrix for q, k and v, epsilon 1e-6."""

    def __init__(self, width: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, wide * width), "fc2": nn.Linear(wide * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(b, n, width))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width: int, layers: int, wide: int, patch: int, size: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.Sequential(*(ViTBlock(width, width // 64, wide) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed))


def attention(width: int, seen: int) -> nn.ModuleDict:
    """BERT's, with its output layer; `seen` is how wide what it looks at is."""
    inner = {"query": nn.Linear(width, width), "key": nn.Linear(seen, width), "value": nn.Linear(seen, width)}
    return nn.ModuleDict({"self": nn.ModuleDict(inner), "output": dense(width, width)})


def dense(inner: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})


class MED(nn.Module):
    """BLIP's text encoder: post-norm BERT with cross-attention in every layer, no token types, bidirectional."""

    def __init__(self, width: int, seen: int, layers: int, wide: int, tokens: int) -> None:
        super().__init__()
        self.heads = width // 64
        embeddings = {"word_embeddings": nn.Embedding(tokens, width), "position_embeddings": nn.Embedding(512, width)}
        self.embeddings = nn.ModuleDict({**embeddings, "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
        self.embeddings.register_buffer("position_ids", torch.arange(512)[None])
        layer = [
            nn.ModuleDict(
                {
                    "attention": attention(width, width),
                    "crossattention": attention(width, seen),
                    "intermediate": nn.ModuleDict({"dense": nn.Linear(width, wide * width)}),
                    "output": dense(wide * width, width),
                }
            )
            for _ in range(layers)
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layer)})

    def attend(self, module: Any, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            module["self"][n](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for n, y in zip(("query", "key", "value"), (x, seen, seen), strict=False)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores + (1 - mask[:, None, None].float()) * -10000
        found = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return module["output"]["LayerNorm"](module["output"]["dense"](found) + x)

    def forward(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        positions: Any = self.embeddings["position_embeddings"]
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](ids) + positions.weight[: ids.shape[1]])
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x = self.attend(layer["attention"], x, x, mask)
            x = self.attend(layer["crossattention"], x, seen, None)
            y = layer["output"]["dense"](F.gelu(layer["intermediate"]["dense"](x)))
            x = layer["output"]["LayerNorm"](y + x)
        return x


def head(sizes: tuple[int, ...]) -> nn.Sequential:
    """Five linear layers with dropout after the first three, and no activations."""
    dropout = {1: 0.2, 2: 0.2, 3: 0.1}
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(itertools.pairwise(sizes), 1):
        layers += [nn.Linear(wide, narrow), *([nn.Dropout(dropout[i])] if i in dropout else [])]
    return nn.Sequential(*layers)


class ImageReward(nn.Module):
    """ImageReward whole, at another size: vision heads and text heads are 64 wide."""

    def __init__(
        self, vision: int = 128, text: int = 192, tokens: int = 79, patch: int = 56, layers: int = 2, text_layers: int = 2, wide: int = 2,
        head_sizes: tuple[int, ...] = (192, 40, 24, 16, 8, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        text_encoder = MED(text, vision, text_layers, wide, tokens)
        parts: dict[str, nn.Module] = {"visual_encoder": ViT(vision, layers, wide, patch, 224), "text_encoder": text_encoder}
        self.blip = nn.ModuleDict({**parts, "vision_proj": nn.Linear(vision, 8), "text_proj": nn.Linear(text, 8)})
        self.mlp = nn.ModuleDict({"layers": head(head_sizes)})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        read = self.blip["text_encoder"](ids, mask, self.blip["visual_encoder"](pixels))
        return (self.mlp["layers"](read[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
