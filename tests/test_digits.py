"""The embedded speech model: what is said and held out, that it is heard, and a short training that makes it better understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffalign
from diffalign import digits, registry
from diffalign.data import SpokenPrompt, batch_of, read_prompts
from diffalign.errors import InputError
from diffalign.evaluate import sample, score
from diffalign.inputs import named_rewards
from diffalign.models import load_pipeline
from diffalign.pipelines.longcat_audio import LongCatAudio
from diffalign.types import Policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return LongCatAudio.of(load_pipeline("digits"), guidance_scale=1.0, audio_seconds=1.024, max_sequence_length=16)


def test_the_split_is_by_prompt_and_leaves_every_word_in() -> None:
    train, held = digits.split()
    assert (len(train), len(held)) == (522, 108)
    assert not {*train} & {*held}
    assert {words for _, words in train} >= {*digits.WORDS}, "no single word is held out"
    for part, pairs in (("train", train), ("heldout", held)):
        shipped = read_prompts("digits", part)
        assert shipped == [SpokenPrompt(digits.prompt(*pair), pair[1]) for pair in pairs]


def test_it_is_small_and_whole() -> None:
    folder = registry.MODELS["digits"]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 12e6
    assert not [*folder.rglob("*.bin"), *folder.rglob("*.pt")]


def test_most_of_its_words_are_understood_and_noise_is_heard(policy: Policy) -> None:
    prompts = read_prompts("digits", "heldout")[::3]
    media = sample(policy, prompts, steps=10, seed=0, batch_size=36)
    assert media.shape == (36, 8192)
    assert media.abs().max() <= 1
    noisy = (media + 0.1 * torch.randn(media.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    wer, ctc, quality = named_rewards(["digits-wer", "digits-ctc", "digits-quality"])
    understood = [float(score(wer, x, prompts, policy, batch_size=36).mean()) for x in (media, noisy)]
    assert -0.6 < understood[0] < -0.15, "much is understood, and there is something to be learned"
    assert understood[1] < understood[0] - 0.2
    assert float(score(ctc, media, prompts, policy, batch_size=36).mean()) > -1
    clean, dirty = (float(score(quality, x, prompts, policy, batch_size=36).mean()) for x in (media, noisy))
    assert clean > 3.5 > 2.5 > dirty


def test_a_held_out_prompt_that_a_reward_cannot_read_is_refused_before_the_training(tmp_path: Path, run_cli: Any) -> None:
    (tmp_path / "good.jsonl").write_text('{"prompt": "man: one", "transcript": "one"}')
    long = " ".join(["seven"] * 9)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": f"man: {long}", "transcript": long}))
    (tmp_path / "other.jsonl").write_text('{"prompt": "man: café", "transcript": "café"}')
    cut = " ".join(["go"] * 20)
    (tmp_path / "cut.jsonl").write_text(json.dumps({"prompt": f"man: {cut}", "transcript": cut}))
    flags = ["train", "--pipeline", "digits", "--method", "ddpo", "--prompts", "good.jsonl", "--output", "run"]
    for held, rewards, says in (
        ("long.jsonl", ["--reward", "loudness", "--eval-rewards", "digits-ctc"], "takes 53 frames at least, and a sound of 1.02 s has 50"),
        ("long.jsonl", ["--reward", "loudness", "--eval-rewards", "loudness", "--guard", "digits-ctc"], "takes 53 frames at least"),
        ("other.jsonl", ["--reward", "loudness", "--eval-rewards", "loudness"], "cannot be said: its tokenizer lacks 'café'"),
        ("cut.jsonl", ["--reward", "loudness", "--eval-rewards", "loudness"], "cannot be said: it has 22 tokens, and the model says 16"),
    ):
        outcome = run_cli(*flags, *rewards, "--eval-prompts", held)
        assert outcome.status == 2
        assert says in outcome.err
        assert not (tmp_path / "run").exists()


def test_the_transcript_is_what_rewards_hear_for_and_must_be_in_the_text(policy: Policy) -> None:
    batch = batch_of([SpokenPrompt("man: seven go", "seven go"), SpokenPrompt("child: no", "no")], policy)
    assert batch.spoken == ("seven go", "no")
    assert batch.text == ("man: seven go", "child: no")
    with pytest.raises(InputError, match="the transcript is in it"):
        batch_of([SpokenPrompt("man: seven", "eight")], policy)


@pytest.mark.parametrize("method", ["draft", "dlpo"])
def test_a_short_training_is_heard_by_a_judge_that_it_was_not_trained_on(method: str, tmp_path: Path) -> None:
    short: dict[str, Any] = {"draft": {"steps": 8, "batch_size": 12, "k": 4, "inference_steps": 5}, "dlpo": {"steps": 4}}[method]
    run = diffalign.align("digits", method=method, output=tmp_path / "run", eval_size=36, **short)
    found = run.evaluation["rewards"]["digits-quality"]
    assert found["interval"][0] > 0
    assert len(list((tmp_path / "run" / "samples").glob("*.wav"))) >= 16
