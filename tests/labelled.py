"""Folders of samples, and the page over them without a browser, for the tests of labelling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image

from diffalign import comparing, gathering
from diffalign.label_page import Asking, Choose, guarded, make_app
from diffalign.labels import Labels
from diffalign.sound import write_wav

COLOURS = ("red", "green", "blue", "black", "white", "gold")


def write_folder(folder: Path, prompts: Sequence[str] = ("a dog", "a cat", "a hen"), samples: int = 2, first: int = 0) -> Path:
    """Pictures of 16 px, each of its own, and samples.jsonl; `first` is another number for each model."""
    (folder / "images").mkdir(parents=True)
    lines = list[dict[str, Any]]()
    for i, prompt in enumerate(prompts):
        names = [f"images/{i}-{j}.png" for j in range(samples)]
        for j, name in enumerate(names):
            pixels = np.random.default_rng(1000 * first + 10 * i + j).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name)
        lines.append({"prompt": prompt, "images": names})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_sounds(folder: Path, count: int = 2) -> Path:
    (folder / "sounds").mkdir(parents=True)
    names = [f"sounds/{j}.wav" for j in range(count)]
    for j, name in enumerate(names):
        write_wav(folder / name, 0.3 * torch.sin(torch.arange(4000) * 0.1 * (j + 1)), 8000)
    line = {"prompt": "a calm voice", "transcript": "seven", "sounds": names, "scores": list(range(count))[::-1]}
    (folder / "ranks.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def begin(*folders: Path, labels: Path | None = None, compare: int = 2, rounds: int = 1, seed: int = 0) -> Labels:
    gathered = gathering.gather(folders)
    settings = {"compare": compare, "rounds": rounds, "seed": seed}
    found, _ = comparing.plan(gathered, **settings)
    return Labels.begin(labels or folders[0] / "labels.sqlite", gathered, found, settings)


class Page:
    """The application itself, called as a browser would: no socket, no thread."""

    def __init__(self, labels: Labels, choose: Choose = "random", **guards: Any) -> None:
        self.labels, self.app = labels, guarded(make_app(Asking(labels, choose)), **guards)

    def call(self, method: str, path: str, *, host: str = "127.0.0.1:8771", **given: Any) -> httpx2.Response:
        async def ask() -> httpx2.Response:
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app), base_url=f"http://{host}") as client:
                return await client.request(method, path, **given)

        return asyncio.run(ask())

    def state(self, rater: str) -> dict[str, Any]:
        answer = self.call("GET", "/state", params={"rater": rater})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def say(self, rater: str, ranks: Sequence[int] | None, comparison: int | None = None, **given: Any) -> httpx2.Response:
        number = self.state(rater)["comparison"]["id"] if comparison is None else comparison
        return self.call("POST", "/answer", json={"rater": rater, "comparison": number, "ranks": ranks}, **given)

    def undo(self, rater: str) -> dict[str, Any]:
        return self.call("POST", "/undo", json={"rater": rater}).json()

    def prefer(self, rater: str, better: Any) -> None:
        """Answer all that is left with the sample of the larger `better(medium)` first."""
        while (now := self.state(rater)["comparison"]) is not None:
            merits = [better(self.labels.gathered.media[n]) for n in now["media"]]
            order = sorted(set(merits), reverse=True)
            assert self.say(rater, [order.index(m) for m in merits], now["id"]).status_code == 200
