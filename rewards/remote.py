"""A reward that another process has: `diffalign serve` elsewhere, or any server that speaks the schema of docs/rewards/remote.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign import wire
from diffalign.errors import InputError
from diffalign.rewards import tiny
from diffalign.rewards.common import check_pictures
from diffalign.rewards.http import Endpoint, check_fields, in_parallel, line
from diffalign.types import Modality, Prompts

MEND = "Start the server (diffalign serve --reward NAME), or name another with --reward.url. See docs/rewards/remote.md."


@dataclass(frozen=True)
class Remote:
    """The scores of a reward server. The answers are the server's alone: the run's generators are not touched."""

    url: str | None = None
    """The server's address, such as http://127.0.0.1:8770."""
    token_env: str | None = None
    """Environment variable that holds the server's token; the token itself is recorded nowhere."""
    timeout: float = 60.0
    """Seconds for one answer."""
    retries: int = 3
    """How often a request that fails in passing is made again,"""
    wait: float = 300.0
    """and for how many seconds at least a server that is away, or busy, is waited for."""
    batch_size: int | None = None
    """Samples in a request; by default as many as the server scores at once, or fewer where its bodies are to be smaller."""
    parallel: int = 4
    """Requests at a time."""
    encoding: wire.Encoding = "png"
    """Of pictures. png: 8 bits; float16, float32: safetensors, which are larger. Sound is float32, or float16 where that is said."""

    differentiable: ClassVar[bool] = False
    learns: ClassVar[bool] = False  # its state is the server's name
    said: dict[str, Any] = field(default_factory=dict[str, Any], init=False, repr=False, compare=False)
    bound: dict[str, str] = field(default_factory=dict[str, str], init=False, repr=False, compare=False)  # a resumed run's `name`

    def __post_init__(self) -> None:
        check_fields(self.url, self.token_env, self.timeout, self.retries, self.wait, self.parallel)
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"reward.batch_size is {self.batch_size}: give 1 or more.")

    @property
    def told(self) -> bool:
        """Whether the server has said what it judges; one that says null judges whatever it is sent."""
        return self.said.get("modality") is not None

    @property
    def modality(self) -> Modality:
        return self.said.get("modality") or "image"

    @property
    def sample_rate(self) -> int | None:
        """What the server wants to hear sounds at, Hz; None where any will do, and of pictures."""
        return self.said.get("sample_rate")

    def open(self) -> None:
        """Ask the server what it is. Raises InputError where it is not there, wants another token, or cannot take what would be sent."""
        self.endpoint.token()
        said = self.endpoint.ask("/", at_once=True)
        if not isinstance(said, dict) or said.get("modality", "") not in ("image", "audio", None) or not isinstance(said.get("name"), str):
            raise InputError(f"{self.url} is no reward server: GET / gave no 'name' and 'modality' (image or audio). {MEND}")
        accepts, most, rate = said.get("accepts", ["png"]), said.get("max_batch", 8), said.get("sample_rate")
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int) or rate < 1):
            raise InputError(f"{self.url} is no reward server: 'sample_rate' is a whole number of Hz, or null. {MEND}")
        if not isinstance(accepts, list) or not isinstance(most, int) or most < 1:
            raise InputError(f"{self.url} is no reward server: 'accepts' is a list, and 'max_batch' a whole number from 1. {MEND}")
        self._same(said["name"], self.bound)
        kind = "png" if self.encoding == "png" and said["modality"] == "image" else "safetensors"
        if kind not in accepts and said["modality"] is not None:
            raise InputError(f"{self.url} takes {', '.join(map(str, accepts))} and no {kind}: choose another --reward.encoding.")
        self.said.update(said)

    def learn(self, scores: Tensor) -> None:
        """Nothing of the scores: the state is whose they are."""

    def state(self) -> dict[str, Any]:
        """The `name` of the reward that the server has, None where it was not asked yet."""
        return {"name": self.said.get("name", self.bound.get("name"))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the reward of that name alone; raises InputError where the server has another."""
        self.bound.clear()
        if state["name"] is not None:
            self.bound["name"] = state["name"]
        if self.said:
            self._same(self.said["name"], self.bound)

    def _same(self, name: Any, before: Mapping[str, Any]) -> None:
        if name != before.get("name", name):
            ours = line(before["name"])
            raise InputError(
                f"{self.url} now serves the reward '{line(str(name))}', and this run began with '{ours}': serve that one again."
            )

    def tiny(self, folder: Path) -> Remote:
        """The same client, of a server in this process whose scores are the brightness of the pictures, or the mean of the sounds."""
        return replace(self, url=tiny.server(_mean), token_env=None, encoding="png", batch_size=self.batch_size or 2)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        """Media (B, ...) and B prompts, with what they carry, to (B,), fp32. Raises InputError where the server stays away, fails,
        or has become another reward, and for pictures that are no float (B, 3, H, W) in [0, 1]."""
        if not self.said:
            self.open()
        if self.said.get("modality") == "image":  # the twin takes both
            check_pictures(media, prompts)
        size = self.batch_size or self._fitting(media, prompts)
        starts = range(0, len(prompts), size)
        media, prompts = media.detach().cpu(), _at_home(prompts)  # once, not in every thread
        parts = in_parallel(lambda i, stop: self._score(media[i : i + size], prompts[i : i + size], stop), starts, self.parallel)
        return torch.tensor([score for part in parts for score in part], dtype=torch.float32)

    def _fitting(self, media: Tensor, prompts: Prompts) -> int:
        """Samples in a request: as many as the server scores at once, or fewer where so many would be more bytes than it takes."""
        most, limit = self.said.get("max_batch", 8), self.said.get("max_bytes")
        if not isinstance(limit, int):
            return most
        wide = {"png": 1, "float16": 2, "float32": 4}[self._encoding(media[0])]
        numbers = sum(x[0].numel() for x in (media, prompts.image, prompts.mask) if x is not None)
        each = numbers * wide * 4 / 3 + max(len(text) for text in prompts.text) * 6 + 1000  # base64, JSON's escapes, and names
        return max(1, min(most, int(limit / (1.02 * each))))

    def _score(self, media: Tensor, prompts: Prompts, stop: Event) -> list[float]:
        items = [self._item(media, prompts, i) for i in range(len(prompts))]
        answer = self.endpoint.ask("/score", {"items": items}, stop=stop)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise InputError(f"{self.url} answered without 'scores', a list of numbers. See docs/rewards/remote.md.")
        self._same(answer.get("name", self.said["name"]), self.said)
        if len(scores) != len(items):
            raise InputError(f"{self.url} gave {len(scores)} scores for {len(items)} items: one for each, in their order, is expected.")
        if bad := [s for s in scores if isinstance(s, bool) or not isinstance(s, int | float) or not math.isfinite(s)]:
            raise InputError(f"{self.url} gave the score {bad[0]!r}: finite numbers are expected.")
        return scores

    def _item(self, media: Tensor, prompts: Prompts, i: int) -> dict[str, Any]:
        item: dict[str, Any] = {"prompt": prompts.text[i], "media": wire.encode(media[i], self._encoding(media[i]))}
        for name, batch in (("image", prompts.image), ("mask", prompts.mask)):
            if batch is not None:
                item[name] = wire.encode(batch[i], self.encoding)
        if prompts.transcript is not None:
            item["transcript"] = prompts.transcript[i]
        if prompts.sample_rate is not None:
            item["sample_rate"] = prompts.sample_rate
        if prompts.metadata is not None:
            item["metadata"] = dict(prompts.metadata[i])
        return item

    def _encoding(self, medium: Tensor) -> wire.Encoding:
        """Of a picture (3, H, W) or a sound (samples,), which no PNG can hold."""
        return "float32" if self.encoding == "png" and medium.ndim == 1 else self.encoding

    @cached_property
    def endpoint(self) -> Endpoint:
        assert self.url is not None
        return Endpoint(self.url, self.token_env, self.timeout, self.retries, self.wait, MEND)


def _at_home(prompts: Prompts) -> Prompts:
    image, mask = (None if x is None else x.detach().cpu() for x in (prompts.image, prompts.mask))
    return replace(prompts, image=image, mask=mask)


def _mean(path: str, body: Any) -> Any:
    """What the twin's server answers, which nobody has told what the real one judges."""
    if body is None:
        return {"name": "mean", "modality": None}
    return {"name": "mean", "scores": [_mean_of(item["media"]) for item in body["items"]]}


def _mean_of(payload: dict[str, str]) -> float:
    data = wire.from_base64(payload["data"], "media")
    if payload["type"] == "png":
        return float(wire.picture("png", data, "media", 2**31).mean())
    return float(wire.sound("safetensors", data, "media")[0].mean())
