"""The network of UTMOS in plain torch, with the parameter names of its checkpoint (fairseq's for wav2vec 2.0)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


class PlacesConv(nn.Module):
    """A grouped convolution of even width with weight normalisation over its places, of which one is too many."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.zeros(width, width // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_g * self.weight_v / self.weight_v.square().sum((0, 1), keepdim=True).sqrt()
        return F.gelu(F.conv1d(x, weight, self.bias, padding=weight.shape[-1] // 2, groups=self.groups)[..., :-1])


class Block(nn.Module):
    """fairseq's: norms after attention and feed-forward layers."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.self_attn[f"{name}_proj"](x).unflatten(-1, (-1, 64)).transpose(1, 2) for name in "qkv")
        found = ((q @ k.transpose(-1, -2) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = self.self_attn_layer_norm(x + self.self_attn["out_proj"](found))
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


class Wav2Vec2(nn.Module):
    def __init__(self, width: int, inner: int, layers: int, conv: int, kernel: int, groups: int) -> None:
        super().__init__()
        convs: list[nn.Module] = []
        for i, size in enumerate(KERNELS):
            parts: list[nn.Module] = [nn.Conv1d(conv if i else 1, conv, size, STRIDES[i], bias=False), nn.Dropout(0)]
            convs.append(nn.Sequential(*parts, *([] if i else [nn.GroupNorm(conv, conv)]), nn.GELU()))
        self.feature_extractor = nn.ModuleDict({"conv_layers": nn.Sequential(*convs)})
        self.layer_norm, self.post_extract_proj = nn.LayerNorm(conv), nn.Linear(conv, width)
        self.mask_emb = nn.Parameter(torch.zeros(width))  # of training
        blocks = nn.Sequential(*(Block(width, inner) for _ in range(layers)))
        places = nn.Sequential(PlacesConv(width, kernel, groups))
        self.encoder = nn.ModuleDict({"pos_conv": places, "layer_norm": nn.LayerNorm(width), "layers": blocks})

    def forward(self, sounds: Tensor) -> Tensor:
        x = self.feature_extractor["conv_layers"](sounds[:, None]).transpose(1, 2)
        x = self.post_extract_proj(self.layer_norm(x))
        x = x + self.encoder["pos_conv"](x.transpose(1, 2)).transpose(1, 2)
        return self.encoder["layers"](self.encoder["layer_norm"](x))


class UTMOS(nn.Module):
    """`(B, samples) -> (B,)`; in the original 768, 3072, 12, 512, 128, 16; embeddings of 128, an LSTM of 512, 2048 in between."""

    def __init__(
        self, width: int = 128, inner: int = 96, layers: int = 2, conv: int = 24, kernel: int = 16, groups: int = 8, beside: int = 6,
        hidden: int = 20, between: int = 28,
    ) -> None:  # fmt: skip
        super().__init__()
        self.wav2vec2 = Wav2Vec2(width, inner, layers, conv, kernel, groups)
        self.domain_emb, self.judge_emb = (nn.Parameter(torch.zeros(1, beside)) for _ in range(2))
        self.blstm = nn.LSTM(width + 2 * beside, hidden, batch_first=True, bidirectional=True)
        self.projection = nn.Sequential(nn.Linear(2 * hidden, between), nn.ReLU(), nn.Linear(between, 1))

    def forward(self, sounds: Tensor) -> Tensor:
        seen = self.wav2vec2(sounds)
        rows = [
            torch.cat([seen, self.domain_emb.expand(len(seen), seen.shape[1], -1), self.judge_emb.expand(len(seen), seen.shape[1], -1)], 2)
        ]
        return self.projection(self.blstm(rows[0])[0]).mean(1)[:, 0] * 2 + 3
