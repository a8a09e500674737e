"""What pipelines of sound share: how long their sounds are, and what they refuse."""

from __future__ import annotations

from typing import Any

from diffalign.errors import InputError
from diffalign.types import Prompts


def check_given(pipe: Any, height: int | None, width: int | None, audio_seconds: float | None) -> None:
    """Raise InputError for settings of pictures, and for a length that is none."""
    if height is not None or width is not None:
        raise InputError(f"height and width are of pictures, and a {type(pipe).__name__} makes sound: --audio-seconds.")
    if audio_seconds is not None and not 0 < audio_seconds < float("inf"):
        raise InputError(f"audio_seconds is {audio_seconds}: give a number above 0.")


def check_parts(pipe: Any, *parts: str) -> None:
    for part in parts:
        if getattr(pipe, part) is None:
            raise InputError(f"This {type(pipe).__name__} has no {part}: load it whole.")


def check_said(prompts: Prompts, speech: bool) -> None:
    """Raise InputError for transcripts that the pipeline would leave out: of those that are told the text alone, what is not in it."""
    for text, said in zip(prompts.text, () if speech else prompts.transcript or (), strict=False):
        if said.lower() not in text.lower():
            raise InputError(f"This pipeline says the text itself, and the transcript '{said}' is not in '{text}'.")


def check_tokens(text: str, found: int, tokens: int) -> None:
    """Raise InputError for a text that does not fit into the tokens that are kept of each."""
    if found > tokens:
        raise InputError(f"The prompt '{text}' has {found} tokens, and {tokens} are kept of each: --max-sequence-length {found}.")
