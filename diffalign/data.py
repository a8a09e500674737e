"""Prompts: where they come from, and the order in which a run sees them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from diffalign.errors import InputError
from diffalign.registry import MODELS
from diffalign.types import Prompts


def read_prompts(source: str, part: str = "train") -> list[str]:
    """Prompts from a file (.txt: one a line; .jsonl: the key 'prompt'), `shapes`, or `hf:user/dataset/path/in/it.txt`.

    `part` ('train' or 'heldout') picks the list of an embedded model. Raises InputError for a file that is missing, empty or no text.
    """
    if source in MODELS:
        path = MODELS[source] / "prompts" / f"{part}.txt"
    elif source.startswith("hf:"):
        path = _download(source.removeprefix("hf:"))
    else:
        path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"There is no prompt file {path}. Give a text file with one prompt a line, or one of: {', '.join(MODELS)}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file (UTF-8). Give one prompt a line.") from error
    if "\0" in text:
        raise InputError(f"{path} is a binary file. Give one prompt a line.")
    lines = [line.strip() for line in text.splitlines()]
    prompts = [_of_json(line, path, i) if path.suffix == ".jsonl" else line for i, line in enumerate(lines, 1) if line]
    if not prompts:
        raise InputError(f"{path} holds no prompts. Give one prompt a line.")
    return prompts


def _of_json(line: str, path: Path, number: int) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path}, line {number}: expected an object with the key "prompt", such as {{"prompt": "a dog"}}.') from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{path}, line {number}: the prompt is no text, or empty.")
    return prompt.strip()


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = name.split("/", 2)
    if len(parts) < 3:
        raise InputError(f"hf:{name}: give hf:user/dataset/path/in/it.txt.")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except Exception as error:
        raise InputError(f"hf:{name} could not be fetched ({type(error).__name__}). Check the name, the network and your token.") from error


def check_prompts(prompts: list[str]) -> list[str]:
    """The prompts of a Python caller; raises InputError where there are none, or one is empty."""
    if not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
        raise InputError("prompts: give a non-empty list of non-empty strings.")
    return [prompt.strip() for prompt in prompts]


def hold_out(prompts: list[str], seed: int, share: float = 0.1, most: int = 256) -> tuple[list[str], list[str]]:
    """Split distinct prompts into training and held-out ones. Fewer than ten cannot spare any: both lists are then all of them."""
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 10:
        return prompts, distinct
    order = torch.randperm(len(distinct), generator=Generator().manual_seed(seed)).tolist()
    held = {distinct[i] for i in order[: min(most, int(len(distinct) * share))]}
    return [p for p in prompts if p not in held], [p for p in distinct if p in held]


@dataclass
class PromptStream:
    """Batches of prompts without end: each epoch in a new order, drawn from the stream's own generator.

    With several processes every one calls `next` and takes its own part of the same order.
    """

    prompts: list[str]
    batch_size: int
    rng: Generator
    processes: int = 1
    rank: int = 0
    queue: list[int] = field(default_factory=list[int])

    def next(self) -> Prompts:
        need = self.batch_size * self.processes
        while len(self.queue) < need:
            self.queue += torch.randperm(len(self.prompts), generator=self.rng).tolist()
        taken, self.queue = self.queue[:need], self.queue[need:]
        mine = taken[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return Prompts(tuple(self.prompts[i] for i in mine))

    def state(self) -> dict[str, Any]:
        return {"rng": self.rng.get_state(), "queue": torch.tensor(self.queue, dtype=torch.int64)}

    def restore(self, state: dict[str, Any]) -> None:
        self.rng.set_state(state["rng"])
        self.queue = state["queue"].tolist()
