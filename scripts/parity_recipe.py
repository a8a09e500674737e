"""What the original packages and ours are given by parity_rewards.py: pictures, prompts, and checkpoints of random weights.

Needs numpy alone, and draws nothing but uniform numbers: the same in every environment. tests/test_parity_rewards.py reads it too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SIZES = ((240, 240), (180, 333), (300, 200))  # height, width of the pictures
PROMPTS = (
    "A photo of a corgi on a red sofa, 85mm, f/1.8 -- award-winning!",
    "tom &amp; jerry  (1940), ein K\u00e4se f\u00fcr 3\u20ac",
    "an astronaut's 12 horses, " + "very long and detailed, " * 30,
)
HEAD_WIDTHS = {"hpsv2": (80, 64), "image-reward": (64, 64)}  # of pictures and of texts
SMALL = {
    "hpsv2": {"vision": 160, "text": 64, "out": 24, "layers": 3, "text_layers": 2, "patch": 56, "tokens": 49408},
    "image-reward": {"vision": 128, "text": 192, "layers": 2, "text_layers": 2, "patch": 56},
}
# WordPieces that spell: the package names bert-base-uncased, and any folder of that name will do
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDPIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS))


def wordpieces(size: int) -> list[str]:
    """A vocabulary of `size` words: those that spell, and words that no text has."""
    return [*WORDPIECES, *(f"[unused{i}]" for i in range(size - len(WORDPIECES)))]


def picture(number: int) -> np.ndarray:
    """Picture `number` as uint8 (H, W, 3): waves and, where the channels' waves meet, hard edges. Whole numbers all the way."""
    height, width = SIZES[number]
    y, x = np.mgrid[:height, :width]
    channels = [np.abs((x * (2 + c) + y * (3 - c) + number * 37) % 510 - 255) for c in range(3)]
    inside = (x - width // 2) ** 2 + (y - height // 3) ** 2 < (min(height, width) // 4) ** 2
    return np.where(inside[..., None], np.array([230, 25, 60]), np.stack(channels, -1)).astype(np.uint8)


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """float32 weights for these names and shapes, each from a generator of its own name: scales of norms around 1, all others around 0.

    Matrices keep the size of what goes through, so that every layer has its say.
    """
    return {name: _weight(name, tuple(shape)) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draws = np.random.default_rng([2026, zlib.crc32(name.encode())]).random(shape, dtype=np.float32) * 2 - 1
    if len(shape) < 2:
        return np.asarray(draws * np.float32(0.1) + np.float32(name.endswith("weight")), np.float32)
    fan_in = math.prod(shape[1:]) if math.prod(shape[1:]) > 1 else shape[0]
    return draws * np.float32(math.sqrt(3 / fan_in))


def merges_of(texts: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[tuple[str, str, int]]:
    """Of CLIP's merges, with their ranks, those that can be made within these words: with them alone the texts have the same tokens."""
    marked = [f"{text}</w>" for text in texts]
    parts = {text[i:j] for text in marked for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    found = [pair for pair in ranks if {*pair, "".join(pair)} <= parts]
    return [(*pair, ranks[pair]) for pair in sorted(found, key=lambda pair: ranks[pair])]


def clip_vocabulary(merges: Sequence[tuple[str, str, int]]) -> dict[str, int]:
    """CLIP's 49,408 tokens, of which those that these merges do not make are nothing that a text has."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]
    known = {letter: i for i, letter in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    known |= {first + second: 512 + rank for first, second, rank in merges}
    known |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    taken = set(known.values())
    return known | {f"<unused {i}>": i for i in range(49408) if i not in taken}


def digest(values: Any) -> list[float]:
    """Some numbers of an array that tell it from others: its norm, its largest, and ten values at even distances."""
    flat = np.asarray(values, np.float64).ravel()
    return [float(np.linalg.norm(flat)), float(np.abs(flat).max()), *(float(x) for x in flat[:: len(flat) // 10][:10])]
