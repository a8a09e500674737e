"""The digits world: what is said, in whose voice, and which of it is held out. Speech at 8 kHz, in clips of 8,192 samples."""

from __future__ import annotations

import hashlib

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "yes", "no", "stop", "go")
VOICES = ("man", "woman", "child")
RATE, SAMPLES = 8_000, 8_192


def transcripts() -> list[str]:
    """Every word, and every two of them."""
    return [*WORDS, *(f"{first} {second}" for first in WORDS for second in WORDS)]


def prompt(voice: str, transcript: str) -> str:
    """What the model is asked for: `woman: seven three`."""
    return f"{voice}: {transcript}"


def split() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(voice, transcript) to train on, and those held out: the same ones ever, about one in six. Single words are never held out."""
    every = [(voice, transcript) for voice in VOICES for transcript in transcripts()]
    held = [pair for pair in every if " " in pair[1] and hashlib.sha256(prompt(*pair).encode()).digest()[0] < 43]
    return [pair for pair in every if pair not in held], held
