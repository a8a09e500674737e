"""`diffalign edits`: what a model makes of its instructions, good and bad, as the folder of edits that HIVE reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffalign.checkpoint import occupied
from diffalign.console import say, say_notes
from diffalign.data import PicturePrompt, check_fit, read_prompts, text_of
from diffalign.errors import InputError
from diffalign.evaluate import sample
from diffalign.media import to_pil
from diffalign.models import make_policy
from diffalign.settings import Settings

BLOCK = 64  # edits in memory at once


def make_edits(settings: Settings, folder: Path, samples: int) -> Path:
    """Write `samples` edits of each of the settings' prompts into `folder`: edits.jsonl, and the sources and edits in images/.

    Raises InputError for prompts without pictures, and for a folder that holds something.
    """
    if samples < 1:
        raise InputError(f"--samples is {samples}: give 1 or more.")
    if settings.prompts is None:
        raise InputError('No prompts: give --prompts FILE.jsonl of lines such as {"prompt": "make it red", "image": "picture.png"}.')
    if occupied(folder):
        raise InputError(f"{folder} exists already: choose another --output, or remove it.")
    prompts = [prompt for prompt in read_prompts(settings.prompts) for _ in range(samples)]
    policy = make_policy(settings, train=False)
    check_fit(prompts, policy)
    say_notes(policy)
    chosen: dict[str, Any] = {"steps": settings.sample_steps or 50, "batch_size": settings.batch_size}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draft = folder / "edits.jsonl.draft"  # renamed at the end: a folder that was stopped is no data
    with draft.open("w", encoding="utf-8") as file:
        for start in range(0, len(prompts), BLOCK):
            block = prompts[start : start + BLOCK]
            pictures = sample(policy, block, seed=settings.seed * 1_000_003 + start, **chosen)
            for i, (prompt, picture) in enumerate(zip(block, pictures, strict=True), start):
                source, edited = f"images/{i // samples + 1:06d}.png", f"images/{i // samples + 1:06d}-{i % samples}.png"
                if isinstance(prompt, PicturePrompt) and i % samples == 0:
                    prompt.open().save(folder / source)
                to_pil(picture).save(folder / edited)
                row = {"source": source, "instruction": text_of(prompt), "edited": edited}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    os.replace(draft, folder / "edits.jsonl")
    say(f"{folder}: {len(prompts):,} edits of {len(prompts) // samples:,} prompts.")
    return folder
