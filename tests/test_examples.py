"""Data on disk: its layouts, what is refused, and that everything is embedded once."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffalign import examples, records
from diffalign.cache import Shelf, cache_root, digest, fingerprint
from diffalign.contract import CheckedReward, FunctionReward
from diffalign.errors import InputError
from diffalign.examples import ExampleSet
from diffalign.media import decode_image, fit
from diffalign.pipelines.latent import LatentPolicy
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.types import Prompts


@pytest.fixture(scope="module")
def policy() -> LatentPolicy:
    return StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for each test: what it counts does not hang on the order of the tests."""
    folder = tmp_path_factory.mktemp("embedded")
    monkeypatch.setenv("DIFFALIGN_CACHE", str(folder))
    return folder


def png(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """The bytes of picture `seed`."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


SEED = {digest(png(seed)): seed for seed in range(40)}  # by key


def pictures(folder: Path, *seeds: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"{seed}.png").write_bytes(png(seed))


def lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def read(source: Path | str, policy: Any, kind: Any = "pairs", **given: Any) -> tuple[ExampleSet, ExampleSet]:
    return examples.read(str(source), kind, policy, **{"reward": None, "limit": None, "skip": False, "seed": 0, "say": print, **given})


def found(source: Path | str, policy: Any, kind: Any = "pairs", **given: Any) -> list[tuple[Any, ...]]:
    """Examples as (prompt, seed of x_0, seed of rejected or label)."""
    train, _ = read(source, policy, kind, **given)
    return [(e.prompt, SEED[e.x_0], SEED[e.rejected] if e.rejected else e.desirable) for e in train.examples]


# Layouts: each writes its files, and says which pairs they are.


def write_pairs(folder: Path) -> None:
    pictures(folder / "images", 0, 1, 2)
    lines(
        folder / "pairs.jsonl",
        {"prompt": "a", "chosen": "images/0.png", "rejected": "images/1.png", "chosen_score": 2, "rejected_score": 1.5},
        {"prompt": " b ", "chosen": "images/2.png", "rejected": "images/0.png"},
    )


def write_ranks(folder: Path) -> None:
    pictures(folder, 0, 1, 2)
    lines(
        folder / "ranks.jsonl",
        {"prompt": "a", "images": ["2.png", "0.png", "1.png"], "scores": [3, 1, 1]},
        {"prompt": "b", "images": ["1.png", "0.png"]},
        {"prompt": "c", "images": ["1.png", "0.png"], "scores": [1, 1]},
    )


def write_hpd(folder: Path) -> None:
    pictures(folder / "train", 0, 1, 2)
    rows = [
        {"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": [0, 1], "user_hash": "x"},
        {"prompt": "b", "file_path": ["2.png", "1.png"], "human_preference": [1, 0], "user_hash": "y"},
    ]
    (folder / "train.json").write_text(json.dumps(rows, indent=1))
    (folder / "test.json").write_text("[]")  # not what is trained on


def write_hpd_test(folder: Path) -> None:
    pictures(folder / "test", 0, 1, 2)
    (folder / "test.json").write_text(json.dumps([{"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 3, 1]}]))


def write_image_reward(folder: Path) -> None:
    pictures(folder / "images" / "train", 0, 1, 2, 3)
    names = {seed: f"images/train/{seed}.png" for seed in range(4)}
    rows = [("p", "a", 0, 2), ("q", "b", 1, 1), ("p", "a", 2, 1), ("q", "b", 3, 1), ("r", "c", 3, 1)]
    keys = ("prompt_id", "prompt", "image_path", "rank")
    parquet(folder / "metadata-train.parquet", [dict(zip(keys, (p, t, names[s], r), strict=True)) for p, t, s, r in rows])


def write_image_reward_bytes(folder: Path) -> None:
    rows = [("p", "a", 0, 6), ("p", "a", 2, 7), ("q", "b", 1, 3), ("q", "b", 3, 5)]
    keys = ("prompt_id", "prompt", "image", "overall_rating")
    parquet(folder / "data.parquet", [dict(zip(keys, (p, t, {"bytes": png(s), "path": None}, r), strict=True)) for p, t, s, r in rows])


def write_image_reward_json(folder: Path) -> None:
    pictures(folder, 0, 1, 2)
    (folder / "train.json").write_text(json.dumps([{"prompt": "a", "generations": ["0.png", "1.png", "2.png"], "ranking": [1, 2, 2]}]))


def pick_a_pic(prompt: str, zero: int, one: int, label_0: float | None, label_1: float | None, **more: Any) -> dict[str, Any]:
    return {"caption": prompt, "jpg_0": png(zero), "jpg_1": png(one), "label_0": label_0, "label_1": label_1, "has_label": True, **more}


def write_pick_a_pic(folder: Path) -> None:
    rows = [
        pick_a_pic("a", 0, 1, 1.0, 0.0),
        pick_a_pic("b", 2, 1, 0.5, 0.5),
        pick_a_pic("c", 2, 1, 0.0, 1.0),
        pick_a_pic("d", 2, 1, 0.0, 0.0, has_label=False),
        pick_a_pic("e", 2, 1, None, None),
    ]
    parquet(folder / "data" / "train-00000-of-00002.parquet", rows[:2])
    parquet(folder / "data" / "train-00001-of-00002.parquet", rows[2:])
    parquet(folder / "data" / "validation-00000-of-00001.parquet", [pick_a_pic("z", 0, 1, 1.0, 0.0)])


LAYOUTS: dict[str, tuple[Callable[[Path], None], str, list[tuple[str, int, int]]]] = {
    "pairs": (write_pairs, "", [("a", 0, 1), ("b", 2, 0)]),
    "ranks": (write_ranks, "", [("a", 2, 0), ("a", 2, 1), ("b", 1, 0)]),
    "hpd": (write_hpd, "", [("a", 1, 0), ("b", 2, 1)]),
    "hpd-test": (write_hpd_test, "test.json", [("a", 0, 1), ("a", 2, 0), ("a", 2, 1)]),
    "image-reward": (write_image_reward, "", [("a", 2, 0)]),
    "image-reward-bytes": (write_image_reward_bytes, "", [("a", 2, 0), ("b", 3, 1)]),
    "image-reward-json": (write_image_reward_json, "", [("a", 0, 1), ("a", 0, 2)]),
    "pick-a-pic": (write_pick_a_pic, "", [("a", 0, 1), ("c", 1, 2)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_its_pairs(name: str, tmp_path: Path, policy: LatentPolicy) -> None:
    write, file, expected = LAYOUTS[name]
    write(tmp_path)
    examples.check(str(tmp_path / file), "pairs")
    assert sorted(found(tmp_path / file, policy)) == expected


def test_ties_and_rows_without_a_label_are_counted(tmp_path: Path, policy: LatentPolicy) -> None:
    said: list[str] = []
    write_pick_a_pic(tmp_path)
    read(tmp_path, policy, say=said.append)
    assert any("ties 1; rows without a label 2" in line for line in said)


def test_labels_come_from_labels_or_from_pairs(tmp_path: Path, policy: LatentPolicy) -> None:
    pictures(tmp_path, 0, 1, 2, 3)
    values = (True, False, 1, 0, -1, 1.0)
    lines(tmp_path / "labels.jsonl", *({"prompt": str(i), "image": "0.png", "label": value} for i, value in enumerate(values)))
    assert [label for _, _, label in found(tmp_path, policy, "labels")] == [True, False, True, False, False, True]
    (tmp_path / "labels.jsonl").unlink()
    write_pairs(tmp_path)
    assert found(tmp_path, policy, "labels") == [("a", 0, True), ("a", 1, False), ("b", 2, True), ("b", 0, False)]
    lines(tmp_path / "ranks.jsonl", {"prompt": "a", "images": ["0.png", "1.png", "2.png", "3.png"], "scores": [3, 2, 1, 1]})
    assert found(tmp_path / "ranks.jsonl", policy, "labels") == [("a", 0, True), ("a", 2, False), ("a", 3, False)]
    train, _ = read(tmp_path, policy, "labels")
    batch = train.take([1, 0])
    assert batch.desirable is not None
    assert batch.desirable.dtype == torch.bool
    assert batch.desirable.tolist() == [False, True]
    assert batch.rejected is None


def test_pictures_come_with_captions(tmp_path: Path, policy: LatentPolicy) -> None:
    pictures(tmp_path / "plain" / "deeper", 0, 1)
    for seed, text in ((0, "a dog\n"), (1, "a cat")):
        (tmp_path / "plain" / "deeper" / f"{seed}.txt").write_text(text)
    pictures(tmp_path / "folder", 0, 1)
    lines(tmp_path / "folder" / "metadata.jsonl", {"file_name": "0.png", "text": "a dog"}, {"file_name": "1.png", "prompt": "a cat"})
    pictures(tmp_path / "ours", 0, 1)
    lines(tmp_path / "ours" / "pictures.jsonl", {"image": "0.png", "prompt": "a dog"}, {"image": "1.png", "prompt": "a cat"})
    for name in ("plain", "folder", "ours"):
        examples.check(str(tmp_path / name), "pictures")
        assert found(tmp_path / name, policy, "pictures") == [("a dog", 0, None), ("a cat", 1, None)]


def test_a_batch_holds_what_the_model_makes_of_the_pictures(tmp_path: Path, policy: LatentPolicy) -> None:
    """Scaled to cover the model's size and cut around the centre; a picture of that size goes in as it is."""
    write_pairs(tmp_path)
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (8, 0, 56, 32))
    wide.save(tmp_path / "images" / "1.png")
    train, _ = read(tmp_path, policy)
    batch = train.take([1, 0])
    assert batch.prompts.text == ("b", "a")
    assert batch.rejected is not None
    assert batch.x_0.dtype == torch.float32
    assert batch.scores is None  # not all examples have one
    blue = torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 16, 16)
    exact = torch.from_numpy(np.array(Image.open(io.BytesIO(png(2))))).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = policy.embed(torch.stack([exact, blue]))
    torch.testing.assert_close(torch.stack([batch.x_0[0], batch.rejected[1]]), expected)
    assert fit(Image.new("RGB", (4, 9)), 16, 24).shape == (3, 16, 24)


# The cache


def counted(monkeypatch: pytest.MonkeyPatch, policy: LatentPolicy) -> dict[str, int]:
    """How often the VAE and the text encoder are called."""
    calls = {"embed": 0, "encode": 0}
    embed, encode = policy.embed, policy.texts.encode

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(policy, "embed", counting("embed", embed))
    monkeypatch.setattr(policy.texts, "encode", counting("encode", encode))
    return calls


def fresh() -> LatentPolicy:
    """The policy of another process: nothing in memory."""
    return StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=1.0)


def test_everything_is_embedded_once_and_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path)
    first = fresh()
    plain = first.encode(Prompts(("b", "a"))).tensors["encoder_hidden_states"]  # without a shelf
    calls = counted(monkeypatch, first)
    train, _ = read(tmp_path, first)
    assert calls["embed"] == 1  # three pictures, one batch
    first.texts.rows.clear()
    assert torch.equal(first.encode(Prompts(("b", "a"))).tensors["encoder_hidden_states"], plain)
    batch = train.take([0, 1])
    for _ in range(3):
        train.take([1, 0])
        first.encode(batch.prompts)
    assert calls == {"embed": 1, "encode": 1}
    second = fresh()
    calls = counted(monkeypatch, second)
    again, _ = read(tmp_path, second)
    assert torch.equal(again.take([0, 1]).x_0, batch.x_0)
    assert torch.equal(second.encode(Prompts(("b", "a"))).tensors["encoder_hidden_states"], plain)
    assert calls == {"embed": 0, "encode": 0}


def test_a_row_does_not_depend_on_what_else_was_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path)
    whole, _ = read(tmp_path, fresh())
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "other"))
    one, _ = read(tmp_path, fresh(), limit=1)
    assert len(one) == 1
    parts, _ = read(tmp_path, fresh())
    assert torch.equal(parts.take([0, 1]).x_0, whole.take([0, 1]).x_0)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""])
def test_a_damaged_row_is_made_anew(damage: Callable[[bytes], bytes], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path)
    before = read(tmp_path, fresh())[0].take([0, 1])
    rows = sorted(path for path in cache.rglob("latents/*/*/*") if path.is_file())
    assert len(rows) == 3
    rows[1].write_bytes(damage(rows[1].read_bytes()))
    policy = fresh()
    calls = counted(monkeypatch, policy)
    train, _ = read(tmp_path, policy)
    assert calls["embed"] == 1
    assert torch.equal(train.take([0, 1]).x_0, before.x_0)
    for row in rows:
        row.unlink()
    with pytest.raises(InputError, match=r"gone or damaged. Start the same command again"):
        train.take([0])


def test_another_model_or_size_has_another_shelf(policy: LatentPolicy, tmp_path: Path) -> None:
    import dataclasses

    other = StableDiffusion.of(tiny.stable_diffusion(seed=1), guidance_scale=1.0)
    larger = dataclasses.replace(policy, height=32)
    again = fresh()
    folders = [p.shelve(tmp_path).folder for p in (policy, other, larger, again)]
    texts = [p.texts.shelf.folder for p in (policy, other, again) if p.texts.shelf]
    assert len(set(folders)) == 3
    assert folders[0] == folders[3]
    assert texts[0] == texts[2] != texts[1]
    policy.texts.shelf = None
    linear = torch.nn.Linear(2, 2)
    name = fingerprint(linear, 1)
    assert fingerprint(linear, 2) != name
    with torch.no_grad():
        linear.weight[1, 1] += 1e-6
    assert fingerprint(linear, 1) != name


def test_several_may_write_the_same_row(tmp_path: Path) -> None:
    shelf, row, failed = Shelf(tmp_path), torch.randn(4, 8, 8), list[BaseException]()

    def work() -> None:
        try:
            for _ in range(20):
                shelf.put("abcd", row)
                assert (got := shelf.get("abcd")) is not None
                assert torch.equal(got, row)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cd"]
    assert shelf.get("abce") is None


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_root().parent == tmp_path / "shared" / "diffalign"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root().parent == tmp_path / ".cache" / "diffalign"
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be made .* name another in DIFFALIGN_CACHE"):
        cache_root()


# What is held out, how much is read, and scores


def many(folder: Path, count: int) -> Path:
    pictures(folder, *range(8))
    rows = [{"prompt": f"prompt {i % count}", "chosen": f"{i % 4}.png", "rejected": f"{4 + i % 4}.png"} for i in range(3 * count)]
    lines(folder / "pairs.jsonl", *rows)
    return folder


def test_prompts_are_held_out_with_all_their_pairs(tmp_path: Path, policy: LatentPolicy) -> None:
    train, held = read(many(tmp_path, 30), policy)
    assert (len(train), len(held)) == (81, 9)
    assert not set(train.prompts) & set(held.prompts)
    assert len(set(held.prompts)) == 3
    assert read(tmp_path, policy)[1].prompts == held.prompts
    assert read(tmp_path, policy, seed=1)[1].prompts != held.prompts
    assert len(read(tmp_path, policy, limit=40)[0]) + len(read(tmp_path, policy, limit=40)[1]) == 40


def test_few_prompts_are_not_held_out(tmp_path: Path, policy: LatentPolicy) -> None:
    said: list[str] = []
    train, held = read(many(tmp_path, 9), policy, say=said.append)
    assert train.examples == held.examples
    assert any("Fewer than ten prompts" in line for line in said)


def test_a_reward_scores_the_preferred_pictures(tmp_path: Path, policy: LatentPolicy) -> None:
    write_pairs(tmp_path)

    def brightness(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        return images.mean((1, 2, 3)) + torch.tensor([10.0 * (text == "b") for text in prompts.text])

    for _ in range(2):  # also where nothing is embedded
        train, _ = read(tmp_path, policy, reward=CheckedReward(FunctionReward(brightness), "brightness"))
        scores = train.take([0, 1]).scores
        assert scores is not None
        expected = [float(fit(decode_image(png(seed), ""), 16, 16).mean()) for seed in (0, 2)]
        torch.testing.assert_close(scores, torch.tensor([expected[0], expected[1] + 10]))
    lines(tmp_path / "pairs.jsonl", *({"prompt": "a", "chosen": f"images/{i}.png", "rejected": f"images/{1 - i}.png"} | {
        "chosen_score": i + 3, "rejected_score": 0} for i in (0, 1)))  # fmt: skip
    scores = read(tmp_path, policy)[0].take([1, 0]).scores
    assert scores is not None
    assert scores.tolist() == [4.0, 3.0]  # the data's own


# What is wrong with the data


def bomb(side: int) -> bytes:
    """A PNG of a kilobyte that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


GOOD = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
ROWS: dict[str, tuple[dict[str, Any] | str, str]] = {  # a line of pairs.jsonl beside a good one; always an error
    "no json": ("{", r"pairs.jsonl, line 2: no JSON"),
    "no object": ("[1]", r"line 2: expected a JSON object"),
    "no key": ({"prompt": "a", "chosen": "0.png"}, r"line 2: the key rejected is missing. It holds prompt, chosen"),
    "no text": ({**GOOD, "prompt": 3}, "line 2: prompt is no text"),
    "no path": ({**GOOD, "chosen": 3}, "line 2: chosen is no picture: give its path"),
    "no number": ({**GOOD, "chosen_score": "high", "rejected_score": 0}, "line 2: chosen_score is 'high': give a number"),
    "nan": ('{"prompt": "a", "chosen": "0.png", "rejected": "1.png", "chosen_score": NaN, "rejected_score": 0}', "give a number"),
    "up": ({**GOOD, "chosen": "../outside.png"}, r"line 2: the path '../outside.png' leads out of .*Keep pictures in the folder"),
    "absolute": ({**GOOD, "chosen": "/etc/passwd"}, "line 2: the path '/etc/passwd' leads out of"),
    "link": ({**GOOD, "chosen": "link.png"}, "line 2: the path 'link.png' leads out of"),
    "nul": ({**GOOD, "chosen": "0\0.png"}, "leads out of"),
    "long": ({**GOOD, "chosen": "x" * 5000}, "line 2: 'xxx.* is no path"),
    "half a letter": ('{"prompt": "\\ud800", "chosen": "0.png", "rejected": "1.png"}', "line 2: prompt is no text"),
    "deep": ("[" * 100_000, "line 2: no JSON"),
    "large number": ({**GOOD, "chosen_score": 10**400, "rejected_score": 0}, "give a number"),
}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {  # the same, and left out with --bad-pictures skip
    "missing": ({**GOOD, "chosen": "none.png"}, r"There is no picture .*none.png \(.*pairs.jsonl, line 2\)"),
    "empty": ({**GOOD, "chosen": ""}, "line 2: chosen holds no picture"),
    "folder": ({**GOOD, "chosen": "."}, "There is no picture"),
    "cut": ({**GOOD, "rejected": "cut.png"}, r"cut.png \(.*line 2\) is no picture that can be read .*truncated"),
    "text": ({**GOOD, "chosen": "text.png"}, r"text.png .* is no picture that can be read"),
    "bomb": ({**GOOD, "chosen": "bomb.png"}, r"bomb.png .* too large a picture, perhaps a decompression bomb"),
    "large": ({**GOOD, "chosen": "large.png"}, r"large.png .* too large a picture, perhaps a decompression bomb"),
    "prompt": ({**GOOD, "prompt": "  "}, "line 2: prompt is empty"),
    "twice": ({**GOOD, "rejected": "0.png"}, r"line 2: the better and the worse picture are the same one"),
    "copy": ({**GOOD, "rejected": "copy.png"}, r"line 2: the better and the worse picture are the same one"),
    "contradiction": ({**GOOD, "chosen_score": 1, "rejected_score": 2}, "line 2: the labels contradict: chosen_score 1 is below"),
}


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder with two good pictures and every bad one."""
    folder = tmp_path / "data"
    pictures(folder, 0, 1)
    (tmp_path / "outside.png").write_bytes(png(2))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "copy.png").write_bytes(png(0))
    (folder / "cut.png").write_bytes(png(3)[:200])
    (folder / "text.png").write_text("no picture")
    (folder / "bomb.png").write_bytes(bomb(50_000))
    (folder / "large.png").write_bytes(bomb(10_000))
    return folder


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("skip", [False, True])
def test_what_is_no_data_is_refused_with_its_line(name: str, skip: bool, damaged: Path, policy: LatentPolicy) -> None:
    row, message = ROWS[name]
    text = row if isinstance(row, str) else json.dumps(row)
    (damaged / "pairs.jsonl").write_text(f"{json.dumps(GOOD)}\n{text}\n")
    with pytest.raises(InputError, match=message):
        read(damaged, policy, skip=skip)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_refused_or_left_out_as_the_flag_says(name: str, damaged: Path, policy: LatentPolicy) -> None:
    row, message = FAULTS[name]
    lines(damaged / "pairs.jsonl", GOOD, row, row)
    with pytest.raises(InputError, match=message) as caught:
        read(damaged, policy)
    assert "--bad-pictures skip" in str(caught.value)
    said: list[str] = []
    assert found(damaged, policy, skip=True, say=said.append) == [("a", 0, 1)]
    assert any(re.search(rf"Left out: .* 2 \(.*{message}", line) for line in said)
    lines(damaged / "pairs.jsonl", row)
    with pytest.raises(InputError, match=r"no pairs are left\. Left out: .* 1 \("):
        read(damaged, policy, skip=True)


@pytest.mark.parametrize(("label_0", "label_1"), [(1.0, 1.0), (0.0, 0.0), (0.5, 1.0), (2.0, -1.0)])
def test_labels_that_contradict(label_0: float, label_1: float, tmp_path: Path, policy: LatentPolicy) -> None:
    parquet(tmp_path / "p.parquet", [pick_a_pic("a", 0, 1, 1.0, 0.0), pick_a_pic("b", 0, 1, label_0, label_1)])
    with pytest.raises(InputError, match=r"p.parquet, row 2: the labels contradict: label_0 is"):
        read(tmp_path, policy)
    assert found(tmp_path, policy, skip=True) == [("a", 0, 1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "image_path": ["0.png", "1.png"], "human_preference": [1, 1]}, r"human_preference is \[1, 1\]; one of them is 1"),
        ({"prompt": "a", "image_path": ["0.png", "1.png"], "human_preference": [1]}, "human_preference has 1 numbers for 2 pictures"),
        ({"prompt": "a", "image_path": ["0.png", "1.png"], "rank": [1, 2, 3]}, "rank has 3 numbers for 2 pictures"),
        ({"prompt": "a", "images": ["0.png", "1.png"], "scores": [1, 2]}, "images stand best first, and scores do not fall"),
        ({"prompt": "a", "images": "0.png"}, "images is no list of two or more pictures"),
        ({"prompt": "a", "images": ["0.png", "1.png"], "scores": "ab"}, "scores is no list of numbers"),
    ],
)
def test_lists_that_contradict(row: dict[str, Any], message: str, tmp_path: Path, policy: LatentPolicy) -> None:
    pictures(tmp_path, 0, 1)
    (tmp_path / "train.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match=f"train.json, entry 1: .*{message}"):
        read(tmp_path, policy)


def test_single_pictures_and_equal_scores_are_left_out(tmp_path: Path, policy: LatentPolicy) -> None:
    pictures(tmp_path, 0, 1)
    good = {"prompt": "b", "images": ["0.png", "1.png"]}
    lines(tmp_path / "ranks.jsonl", {"prompt": "a", "images": ["0.png"]}, {"prompt": "a", "images": []}, good)
    assert found(tmp_path, policy) == [("b", 0, 1)]
    tie = {"prompt": "a", "chosen": "0.png", "rejected": "1.png", "chosen_score": 2, "rejected_score": 2}
    lines(tmp_path / "pairs.jsonl", tie, {"prompt": "b", "chosen": "0.png", "rejected": "1.png"})
    assert found(tmp_path, policy) == [("b", 0, 1)]


def test_ranks_and_ratings_of_one_prompt_are_not_mixed(tmp_path: Path, policy: LatentPolicy) -> None:
    """Ranks count where all pictures have one, else ratings where all have one."""
    pictures(tmp_path, 0, 1)

    def rows(*labels: tuple[int | None, float | None]) -> None:
        keys = ("prompt_id", "prompt", "image_path", "rank", "overall_rating")
        made = [("p", "a", f"{i}.png", *label) for i, label in enumerate(labels)]
        parquet(tmp_path / "metadata-train.parquet", [dict(zip(keys, values, strict=True)) for values in made])

    rows((1, 2.0), (2, 7.0))
    assert found(tmp_path, policy) == [("a", 0, 1)]
    rows((1, 2.0), (None, 7.0))
    assert found(tmp_path, policy) == [("a", 1, 0)]
    rows((1, 7.0), (None, 2.0))
    assert found(tmp_path, policy) == [("a", 0, 1)]
    rows((1, None), (None, 7.0))
    with pytest.raises(InputError, match="a rank each, or an overall_rating each"):
        read(tmp_path, policy)


def test_labels_of_one_picture_contradict(tmp_path: Path, policy: LatentPolicy) -> None:
    pictures(tmp_path, 0, 1)
    rows = [{"prompt": "a", "image": "0.png", "label": True}, {"prompt": "a", "image": "0.png", "label": False}]
    lines(tmp_path / "labels.jsonl", *rows)
    with pytest.raises(InputError, match="an answer to 'a' is labelled true in one row, and false in another"):
        read(tmp_path, policy, "labels")
    said: list[str] = []
    assert len(read(tmp_path, policy, "labels", skip=True, say=said.append)[0]) == 1
    assert any("All pictures are liked" in line for line in said)
    (tmp_path / "labels.jsonl").unlink()
    pair = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    lines(tmp_path / "pairs.jsonl", pair, {**pair, "chosen": "1.png", "rejected": "0.png"})
    assert len(read(tmp_path, policy, say=said.append)[0]) == 2
    assert "1 pairs stand in both orders: people disagreed, and both count." in said


def test_no_data_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    def refused(source: Path | str, kind: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            examples.check(str(source), kind)

    examples.check(None, "pairs")
    examples.check("nowhere", None)
    refused(tmp_path / "none", "pairs", "There is no data")
    refused(tmp_path, "pairs", r"holds no pairs: expected pairs.jsonl, ranks.jsonl, train.json, metadata-train.parquet, \*.parquet")
    refused(tmp_path, "pictures", "pictures with a .txt file of the same name")
    (tmp_path / "pairs.jsonl").touch()
    refused(tmp_path, "pairs", "is empty: it holds no pairs")
    lines(tmp_path / "pairs.jsonl", {"question": 1, "answer": 2})
    refused(tmp_path, "pairs", "line 1: the keys question, answer are no known layout of pairs. Known: pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe")
    refused(tmp_path, "pairs", "is no text file")
    (tmp_path / "data.csv").touch()
    refused(tmp_path / "data.csv", "pairs", "give a folder, or one of its .jsonl, .json or .parquet files")
    lines(tmp_path / "labels.jsonl", {"prompt": "a", "image": "0.png", "label": "yes"})
    refused(tmp_path, "labels", "line 1: the label is 'yes': give true or false")
    lists = (
        ("{}", "no JSON list"),
        ('[{"a": 1}', "are no known"),
        ("[1]", "entry 1: expected"),
        ("[", "cut short"),
        ("[]", "is empty"),
    )
    for text, message in lists:
        (tmp_path / "list.json").write_text(text)
        refused(tmp_path / "list.json", "pairs", message)
    pytest.importorskip("datasets")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    refused(tmp_path / "bad.parquet", "pairs", "bad.parquet is no parquet file that can be read .* Fetch it again")


def test_without_the_package_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "data.parquet").touch()
    for source in (str(tmp_path), "hf:someone/pairs"):
        with pytest.raises(InputError, match=r"is read with the package datasets, .* pip install 'diffalign\[data\]'"):
            examples.check(source, "pairs")


def test_rows_of_a_prompt_stand_together_where_they_hold_pictures(tmp_path: Path, policy: LatentPolicy) -> None:
    rows = [{"prompt_id": p, "prompt": p, "image": png(s), "rank": r} for p, s, r in (("p", 0, 1), ("q", 1, 1), ("p", 2, 2))]
    parquet(tmp_path / "data.parquet", rows)
    with pytest.raises(InputError, match=r"row 3: prompt_id p came before. The rows of a prompt must stand together"):
        read(tmp_path, policy)


def test_a_list_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK", 7)
    rows = [{"prompt": "é" * i, "n": [i, {"deep": "]}"}]} for i in range(20)]
    for indent in (None, 2):
        (tmp_path / "list.json").write_text("\ufeff " + json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert [dict(record.values) for record in records.read(tmp_path / "list.json")] == rows


def test_the_hub_is_streamed(tmp_path: Path, policy: LatentPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub serves it, from a file: pictures stay bytes."""
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"prompt {i}", "chosen": png(i), "rejected": png(i + 10)} for i in range(10)]
    data = datasets.Dataset.from_list(rows)
    for name in ("chosen", "rejected"):
        data = data.cast_column(name, datasets.Image())
    data.to_parquet(str(tmp_path / "hub.parquet"))
    load, asked = datasets.load_dataset, list[Any]()

    def local(name: str, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        return load("parquet", data_files=str(tmp_path / "hub.parquet"), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert found("hf:someone/pairs:validation", policy, limit=3) == [(f"prompt {i}", i, i + 10) for i in range(3)]
    assert asked == [("someone/pairs", "validation", True)]
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"hf:someone/pairs cannot be streamed .* Check the name"):
        read("hf:someone/pairs", policy)
    examples.check("hf:someone/pairs", "pairs")  # is looked at when it is read


def test_a_policy_that_cannot_embed(tmp_path: Path) -> None:
    from toy import Exact, Toy, diffusion

    path = diffusion()
    with pytest.raises(InputError, match="Toy cannot embed data"):
        read(tmp_path, Toy(path, Exact(path)))


def test_postscript_is_never_run() -> None:
    with pytest.raises(InputError, match=r"x is no picture that can be read .cannot identify image file"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0", "x")
