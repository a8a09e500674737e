"""The commands, and for live objects the calls, that do again what a run did."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.data import PicturePrompt, Prompt, SpokenPrompt, text_of
from diffalign.run import Run
from diffalign.settings import LIVE


def commands(run: Run, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`(what it does, the command or call)`: to train again, to go on, to sample, to evaluate, to write the page."""
    folder, live = shlex.quote(str(run.path)), LIVE in (config.get("pipeline"), (config.get("reward") or {}).get("name"))
    if run.merged:
        return [("The same merge, into a new folder", merging(run)), *_looking(run, folder, live)]
    processes = int(config.get("processes") or 1)
    start = "diffalign" if processes == 1 else f"torchrun --nproc_per_node {processes} -m diffalign"
    if live:
        found = [("The same training, with its objects and the settings below", "diffalign.align(pipe, reward=reward, ...)")]
        found += [("Go on with it", f"diffalign.resume({str(run.path)!r}, pipe=pipe, reward=reward)")]
    else:
        found = [("The same training, into a new folder", f"{start} train --config {shlex.quote(str(run.path / 'config.yaml'))}")]
        found += [("Go on with it; a finished one takes --steps", f"{start} train --resume {folder}")]
    return [*found, *_looking(run, folder, live)]


def _looking(run: Run, folder: str, live: bool) -> list[tuple[str, str]]:
    held_out = run.read_prompts("heldout")
    found = [("Sample, before and after", again(run.path, held_out[0], run.config.get("pipeline") == LIVE))]
    if not live:
        found += [("Evaluate on held-out prompts again", f"diffalign eval {folder}")]
    return [*found, ("This page again", f"diffalign report {folder}")]


def merging(run: Run) -> str:
    """The `diffalign merge` that makes the merged run again, with what was extrapolated folded into its weights."""
    merged = run.merged or {}
    folders = " ".join(shlex.quote(part["run"]) for part in merged["runs"])
    weights = " ".join(f"{part['weight']!r}" for part in merged["runs"])
    rank = f" --rank {merged['rank']}" if "rank" in merged else ""
    return f"diffalign merge {folders} --weights {weights}{rank} --output NEW"


def again(path: Path, prompt: Prompt, live: bool) -> str:
    """What samples a run: a command, or where it was made from a `live` pipeline, which no command can have, a call."""
    files = (prompt.picture, prompt.mask) if isinstance(prompt, PicturePrompt) else ()
    named = {flag: file for flag, file in zip(("image", "mask"), files, strict=False) if file is not None}
    if live:
        asked = [text_of(prompt), *(str(file) if isinstance(file, Path) else f"{flag}.png" for flag, file in named.items())]
        given = f"diffalign.SpokenPrompt({prompt.text!r}, {prompt.transcript!r})" if isinstance(prompt, SpokenPrompt) else repr(asked[0])
        return f"diffalign.load({str(path)!r}, pipe=pipe).sample([{tuple(asked) if named else given}])"
    flags = [f"--{flag} {shlex.quote(str(file)) if isinstance(file, Path) else 'FILE'}" for flag, file in named.items()]
    texts = [("prompt", text_of(prompt))] if text_of(prompt) else []
    texts += [("transcript", prompt.transcript)] if isinstance(prompt, SpokenPrompt) else []
    asked = [f"--{flag} {shlex.quote(text)}" for flag, text in texts]
    return " ".join(["diffalign sample", shlex.quote(str(path)), *asked, *flags])
