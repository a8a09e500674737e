"""Prompt files, what is held out, and the order in which a run sees them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from torch import Generator

from diffalign.data import check_prompts, hold_out, read_prompts
from diffalign.errors import InputError
from diffalign.streams import PromptList, Stream


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\n\n  a cat \r\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "a.txt")) == ["a dog", "a cat"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "ein Hund \\u2028 oder zwei"}\n', encoding="utf-8")
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["ein Hund \u2028 oder zwei"]
    for text in ("{", '{"prompt": 3}', '{"prompt": " "}', "[]"):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(InputError, match="line 1"):
            read_prompts(str(tmp_path / "b.jsonl"))
    with pytest.raises(InputError, match="give hf:user/dataset/path"):
        read_prompts("hf:nothing")


def test_a_pipe() -> None:
    end, start = os.pipe()
    os.write(start, b"a dog\n\na cat\n")
    os.close(start)
    assert read_prompts(f"/dev/fd/{end}") == ["a dog", "a cat"]
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(f"/dev/fd/{end}")  # it is empty now
    os.close(end)


@pytest.mark.parametrize("prompts", [[], [""], ["a", "  "], ["a", 3]])
def test_lists_must_hold_text(prompts: list[str]) -> None:
    with pytest.raises(InputError, match="non-empty"):
        check_prompts(prompts)


def test_what_is_held_out_is_not_trained_on() -> None:
    prompts = [f"prompt {i % 50}" for i in range(100)]
    train, held = hold_out(prompts, seed=0)
    assert len(held) == 5
    assert not set(train) & set(held)
    assert len(train) == 90
    assert hold_out(prompts, seed=0) == (train, held)
    assert hold_out(prompts, seed=1)[1] != held
    assert hold_out(["a", "b"], seed=0) == (["a", "b"], ["a", "b"])


def test_an_epoch_sees_every_prompt_once_and_goes_on_as_saved() -> None:
    prompts = [str(i) for i in range(10)]
    stream = Stream(PromptList(prompts), 4, Generator().manual_seed(3))
    seen = [text for _ in range(5) for text in stream.next().text]
    assert Counter(seen) == Counter({p: 2 for p in prompts})
    assert Counter(seen[:10]) == Counter(prompts)
    stream.next()
    state = stream.state()
    ahead = [stream.next().text for _ in range(7)]
    again = Stream(PromptList(prompts), 4, Generator().manual_seed(99))
    again.restore(state)
    assert [again.next().text for _ in range(7)] == ahead


def test_processes_share_one_order() -> None:
    prompts = [str(i) for i in range(12)]
    whole = Stream(PromptList(prompts), 4, Generator().manual_seed(3))
    parts = [Stream(PromptList(prompts), 2, Generator().manual_seed(3), processes=2, rank=rank) for rank in (0, 1)]
    for _ in range(5):
        assert whole.next().text == parts[0].next().text + parts[1].next().text
