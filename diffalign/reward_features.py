"""What a reward that trains sees of pictures and prompts: features computed once where a tower is frozen, and each time where it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.cache import Shelf, TextCache, cache_root, digest, fingerprint
from diffalign.intake import SAY_EVERY, contents, decoded
from diffalign.layouts import Picture
from diffalign.media import to_tensor
from diffalign.records import Fault, Tally
from diffalign.reward_model import RewardModel

KEPT = 2**30  # bytes of prepared pictures that stay in memory while a tower trains
BATCH = 32


@dataclass
class Pictures:
    """Pictures by the digests of their files. Of a frozen tower their features are kept, on the shelf too; else the pictures themselves,
    as files, or as the bytes of their rows.
    """

    model: RewardModel
    tally: Tally
    device: torch.device
    shelf: Shelf | None
    say: Callable[[str], None]
    files: dict[str, Picture] = field(default_factory=dict[str, Picture])
    rows: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    waiting: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    computed: int = 0
    said: float = field(default_factory=time.monotonic)

    def take(self, picture: Picture) -> str | None:
        """The picture's key; None where it is missing or damaged, and the tally lets that pass."""
        try:
            data = contents(picture)
            key = digest(data)
            if key in self.rows or key in self.waiting or key in self.files:
                return key
            row = None if self.shelf is None else self.shelf.get(key)
            if row is not None:
                self.rows[key] = row
                return key
            pixels = self._prepared(data, picture.name)
        except Fault as fault:
            self.tally.note(fault)
            return None
        if self.shelf is None:
            self.files[key] = picture
            self._keep(key, pixels)
            return key
        self.waiting[key] = pixels
        if len(self.waiting) == BATCH:
            self.finish()
        return key

    def seen(self, keys: Sequence[str]) -> Tensor:
        """(n, D) features, on the device; with a graph where the tower trains."""
        if self.shelf is not None:
            return torch.stack([self.rows[key] for key in keys]).to(self.device)
        distinct = list(dict.fromkeys(keys))
        found = self.model.see(torch.stack([self._pixels(key) for key in distinct]).to(self.device))
        return found[[distinct.index(key) for key in keys]] if len(distinct) < len(keys) else found

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the features that are still missing, in batches of one size: a row's last bits depend on it."""
        if not self.waiting or self.shelf is None:
            return
        keys, pixels = list(self.waiting), torch.stack(list(self.waiting.values()))
        filled = torch.cat([pixels, pixels.new_zeros(BATCH - len(pixels), *pixels.shape[1:])])
        for key, row in zip(keys, self.model.see(filled.to(self.device)).cpu(), strict=False):
            self.shelf.put(key, row)
            self.rows[key] = row
        self.computed += len(keys)
        self.waiting.clear()
        if time.monotonic() - self.said > SAY_EVERY:
            self.said = time.monotonic()
            self.say(f"Embedding the data: {self.computed:,} pictures so far.")

    def _prepared(self, data: bytes, name: str) -> Tensor:
        return self.model.base.view(to_tensor(decoded(data, name))[None])[0]

    def _keep(self, key: str, pixels: Tensor) -> None:
        if (len(self.rows) + 1) * pixels.numel() * pixels.element_size() <= KEPT:
            self.rows[key] = pixels

    def _pixels(self, key: str) -> Tensor:
        kept = self.rows.get(key)
        return self._prepared(contents(self.files[key]), self.files[key].name) if kept is None else kept


@dataclass
class Texts:
    """Features of prompts: of a frozen tower each is computed once."""

    model: RewardModel
    device: torch.device
    trained: bool
    cache: TextCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = TextCache(self._read, self.device, ("features",), batch_size=BATCH, capacity=2**20)

    def read(self, texts: Sequence[str]) -> Tensor:
        """(n, D) features, on the device; with a graph where the tower trains."""
        if not self.trained:
            return self.cache(texts)["features"]
        distinct = list(dict.fromkeys(texts))
        return self.model.read(distinct)[[distinct.index(text) for text in texts]]

    @torch.no_grad()
    def _read(self, texts: list[str]) -> tuple[Tensor]:
        return (self.model.read(texts),)


def pictures_of(model: RewardModel, tally: Tally, device: torch.device, say: Callable[[str], None]) -> Pictures:
    """Where a model's pictures go; the shelf is named after the frozen tower and how it is shown pictures."""
    trained = model.architecture.train_tower != "none"
    base = model.base
    shelf = None if trained else Shelf(cache_root() / f"features-{fingerprint(base.network, base.view)}")
    return Pictures(model, tally, device, shelf, say)
