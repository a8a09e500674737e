"""`diffalign label`: what is compared, what is written down whatever happens, what comes of it, and who is kept out. Without a browser."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import yaml
from labelled import Page, begin, write_folder, write_sounds
from PIL import Image
from served import at_once

from diffalign import examples, gathering
from diffalign.checkpoint import whole_by_one
from diffalign.comparing import plan, shown
from diffalign.errors import InputError
from diffalign.label_export import export, majority
from diffalign.label_page import Fence, check_origins
from diffalign.label_results import agreement, strengths
from diffalign.labels import Answer, Labels
from diffalign.models import make_policy
from diffalign.settings import Settings
from diffalign.types import Data


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(begin(write_folder(tmp_path / "mine", [f"prompt {i}" for i in range(5)])))


# --- what is compared


def test_one_model_every_sample_is_met_and_none_meets_itself(tmp_path: Path) -> None:
    gathered = gathering.gather([write_folder(tmp_path / "mine", ["a", "b"], samples=5)])
    for compare, hands in ((2, [2, 2, 2]), (3, [3, 2]), (4, [4, 2])):
        found, note = plan(gathered, compare=compare, rounds=1, seed=3)
        assert [len(c.media) for c in found if c.asked == 0] == hands
        assert {n for c in found for n in c.media} == set(range(10))
        assert note == ""
    many, _ = plan(gathered, compare=2, rounds=40, seed=3)
    assert {c.media for c in many if c.asked == 1} == set(combinations(range(5, 10), 2)), "each two once, however many rounds"
    assert plan(gathered, compare=3, rounds=2, seed=3) == plan(gathered, compare=3, rounds=2, seed=3)
    assert plan(gathered, compare=3, rounds=2, seed=3) != plan(gathered, compare=3, rounds=2, seed=4)


def test_several_models_meet_each_other_alone(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / name, ["a", "b"], samples=2, first=i) for i, name in enumerate(("x", "y", "z"))]
    shutil.copy(folders[0] / "images/1-0.png", folders[1] / "images/1-0.png")  # two models that make the same picture
    gathered = gathering.gather(folders)
    found, note = plan(gathered, compare=2, rounds=2, seed=0)
    models = [tuple(gathered.media[n].model for n in c.media) for c in found]
    assert sorted(models) == sorted([(0, 1), (0, 2), (1, 2)] * 4)[1:]
    assert note == "Left out: comparisons of files that are the same 1."
    (three, *_), _ = plan(gathered, compare=4, rounds=1, seed=0)
    assert [gathered.media[n].path for n in three.media] == ["images/0-0.png"] * 3, "the r-th of each: the same noise"


def test_sides_and_order_are_random_from_the_seed_and_logged(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / name, [f"p {i}" for i in range(16)], 1, i) for i, name in enumerate("ab")]
    page = Page(begin(*folders))
    seen = dict[str, list[Any]]()
    for rater in ("Ada", "Bob"):
        seen[rater] = []
        for _ in range(16):
            now = page.state(rater)["comparison"]
            seen[rater].append((now["id"], tuple(now["media"])))
            page.say(rater, [0, 1])
    assert sorted(i for i, _ in seen["Ada"]) == sorted(i for i, _ in seen["Bob"]) == list(range(16))
    assert [i for i, _ in seen["Ada"]] != [i for i, _ in seen["Bob"]]
    left = [page.labels.gathered.media[media[0]].model for _, media in seen["Ada"]]
    assert 2 < sum(left) < 14, "neither model has a side"
    assert [(a.comparison, a.shown) for a in page.labels.answers("Ada")] == seen["Ada"]
    again = Page(begin(*folders, labels=tmp_path / "again.sqlite"))
    assert again.state("Ada")["comparison"]["media"] == list(seen["Ada"][0][1])
    other = Page(begin(*folders, labels=tmp_path / "other.sqlite", seed=1))
    assert other.state("Ada")["comparison"]["prompt"] != again.state("Ada")["comparison"]["prompt"]


def test_uncertain_asks_about_the_models_that_are_known_least(tmp_path: Path) -> None:
    """Three models: the one that nobody has judged yet comes next."""
    folders = [write_folder(tmp_path / name, [f"p {i}" for i in range(8)], 1, i) for i, name in enumerate("abc")]
    page = Page(begin(*folders), "uncertain")
    media = page.labels.gathered.media
    both = [i for i, c in enumerate(page.labels.comparisons) if [media[n].model for n in c.media] == [0, 1]]
    for number in both[:4]:
        assert page.say("Bob", [0, 0], number).status_code == 200
    for _ in range(2):
        now = page.state("Ada")["comparison"]
        assert 2 in {media[n].model for n in now["media"]}
        page.say("Ada", [0, 1], now["id"])
    models = {media[n].model for n in now["media"]}
    for number, comparison in enumerate(page.labels.comparisons):  # these models are known well by now
        if {media[n].model for n in comparison.media} == models:
            page.say("Bob", [0, 1], number)
    assert page.undo("Ada")["comparison"]["id"] == now["id"], "what was taken back comes first"


# --- the page


def test_answers_undo_tie_skip_and_the_log(page: Page) -> None:
    first = page.state("Ada")
    assert (first["done"], first["total"], first["comparison"]["kind"]) == (0, 5, "picture")
    assert not {"model", "models", "path"} & {*first, *first["comparison"]}, "nobody is told which model it is"
    assert page.say("Ada", [1, 0]).json()["done"] == 1
    second = page.state("Ada")["comparison"]["id"]
    assert page.say("Ada", [0, 0]).json()["done"] == 2
    assert page.undo("Ada")["comparison"]["id"] == second
    assert page.undo("Ada")["comparison"]["id"] == first["comparison"]["id"]
    assert page.undo("Ada")["done"] == 0, "nothing is left to undo"
    page.say("Ada", None)
    assert page.state("Ada")["comparison"]["id"] == second
    assert page.state("Ada")["skipped"] == 1
    assert [(a.comparison, a.ranks) for a in page.labels.answers()] == [(first["comparison"]["id"], None)]
    log = sqlite3.connect(page.labels.path).execute("select ranks, undone is null from answers order by id").fetchall()
    assert log == [("[1, 0]", 0), ("[0, 0]", 0), (None, 1)], "what was taken back stays in the log"
    page.prefer("Ada", lambda medium: medium.sha256)
    assert page.state("Ada")["comparison"] is None


def test_an_answer_is_taken_once(page: Page) -> None:
    number = page.state("Ada")["comparison"]["id"]
    for _ in range(2):  # sent again because the answer to it was lost
        assert page.say("Ada", [0, 1], number).status_code == 200
    other = page.say("Ada", [1, 0], number)
    assert other.status_code == 409
    assert other.json()["detail"] == "Ada has answered this comparison already: undo that first."
    assert [a.ranks for a in page.labels.answers()] == [(0, 1)]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"ranks": [0]}, "ranks are [0]: give 2 numbers from 0, the best, without a gap."),
        ({"ranks": [0, 2]}, "without a gap"),
        ({"ranks": [-1, 0]}, "without a gap"),
        ({"ranks": [0] * 9}, "at most 4 items"),
        ({"comparison": 99}, "There is no comparison 99."),
        ({"comparison": "x"}, "valid integer"),
        ({"comparison": True}, "valid integer"),
        ({"ranks": [False, True]}, "valid integer"),
        ({"rater": " "}, "1 to 40 characters"),
        ({"rater": "x" * 41}, "1 to 40 characters"),
        ({"rater": "a\u202eb"}, "1 to 40 characters"),
        ({"more": 1}, "Extra inputs"),
    ],
)
def test_what_no_page_sends_is_refused(page: Page, said: dict[str, Any], why: str) -> None:
    answer = page.call("POST", "/answer", json={"rater": "Ada", "comparison": 0, "ranks": [0, 1], **said})
    assert answer.status_code == 422
    assert why in answer.json()["detail"]
    assert page.labels.answers() == []


def test_who_is_kept_out(page: Page) -> None:
    said = {"rater": "Ada", "comparison": 0, "ranks": [0, 1]}

    def post(host: str = "127.0.0.1:8771", **headers: str) -> int:
        return page.call("POST", "/answer", host=host, json=said, headers=headers).status_code

    assert page.call("GET", "/", host="attacker.example").status_code == 403, "a name that was made to point here"
    assert page.call("GET", "/media/0", host="attacker.example:8771").status_code == 403
    said_so = page.call("GET", "/", host="attacker.example").json()["detail"]
    assert said_so.startswith("This page answers to the addresses that diffalign label has printed, not to 'attacker.example'")
    for broken in ("http://[x", "http://a:b", "http://a:99999"):
        assert post(Origin=broken) == 403, broken
    assert post("attacker.example") == 403
    assert post(Origin="https://attacker.example") == 403
    assert post(Origin="http://127.0.0.1:9999") == 403, "another page on this machine"
    assert post(Origin="null") == 403
    assert post(**{"Sec-Fetch-Site": "cross-site"}) == 403
    assert page.call("POST", "/undo", json={"rater": "Ada"}, headers={"Origin": "https://a.example"}).status_code == 403
    large = page.call("POST", "/answer", content=b"x" * 20_000)
    assert (large.status_code, large.json()["detail"]) == (413, "20,000 bytes: this page takes at most 16,384.")
    assert page.labels.answers() == []
    assert post(Origin="http://127.0.0.1:8771", **{"Sec-Fetch-Site": "same-origin"}) == 200
    tunnel = Page(page.labels, origins=["https://label.example"])
    ours: dict[str, Any] = {"host": "label.example", "headers": {"Origin": "https://label.example"}}
    assert tunnel.say("Bob", [0, 1], 0, **ours).status_code == 200
    assert tunnel.say("Eve", [0, 1], 0, **{**ours, "headers": {"Origin": "https://attacker.example"}}).status_code == 403


def test_a_key_stands_before_everything(page: Page) -> None:
    keyed = Page(page.labels, host="192.168.1.5", key="s3cret")
    for path in ("/", "/state?rater=a", "/media/0", "/label.js", "/state?rater=a&key=s3cret", "/?key=wrong"):
        assert keyed.call("GET", path, host="192.168.1.5:8771").status_code == 401, path
    enter = keyed.call("GET", "/?key=s3cret", host="192.168.1.5:8771")
    assert (enter.status_code, enter.headers["location"]) == (303, "/")
    assert enter.headers["set-cookie"] == "diffalign-label-8771=s3cret; HttpOnly; Path=/; SameSite=lax", "gone with the browser"
    cookie = {"Cookie": enter.headers["set-cookie"].partition(";")[0]}
    assert keyed.call("GET", "/media/0", host="192.168.1.5:8771", headers=cookie).status_code == 200
    assert keyed.call("GET", "/media/0", host="192.168.1.5:9", headers=cookie).status_code == 401, "a cookie of another port's page"
    assert keyed.call("GET", "/media/0", host="attacker.example:8771", headers=cookie).status_code == 403
    tunnel = Page(page.labels, origins=["https://label.example"], key="s3cret")
    enter = tunnel.call("GET", "/?key=s3cret", host="label.example")
    assert enter.headers["set-cookie"] == "diffalign-label=s3cret; HttpOnly; Path=/; SameSite=lax; Secure"
    assert tunnel.call("GET", "/?key=s3cret", host="[x").status_code == 303


def test_only_its_own_files_and_nothing_from_elsewhere(page: Page, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in ("/media/10", "/media/-1", "/media/..%2f..%2fsecret.png", "/media/0/../../secret.png", "/labels.sqlite", "/../secret.png"):
        answer = page.call("GET", path)
        assert answer.status_code in (404, 422), path
        assert "secret" not in answer.text
    shown = page.call("GET", "/media/3")
    assert shown.headers["content-type"] == "image/png"
    assert shown.content == (tmp_path / "mine" / page.labels.gathered.media[3].path).read_bytes()
    first = tmp_path / "mine" / page.labels.gathered.media[3].path
    first.unlink()
    first.symlink_to(tmp_path / "secret.png")  # after the folder was read
    assert page.call("GET", "/media/3").status_code == 404
    for path in ("/", "/label.js", "/label.css"):
        answer = page.call("GET", path)
        assert answer.status_code == 200
        assert not re.search(r"(src|href|url|import)\W{1,3}(https?:)?//", answer.text), "all of the page comes from here"
        assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    assert "innerHTML" not in page.call("GET", "/label.js").text


def test_sounds_and_pictures_that_no_browser_shows(tmp_path: Path) -> None:
    sounds = Page(begin(write_sounds(tmp_path / "sounds", 3), compare=3))
    now = sounds.state("Ada")["comparison"]
    assert (now["kind"], now["transcript"], len(now["media"])) == ("sound", "seven", 3)
    part = sounds.call("GET", f"/media/{now['media'][0]}", headers={"Range": "bytes=0-3"})
    assert (part.status_code, part.content, part.headers["content-type"]) == (206, b"RIFF", "audio/wav")
    folder = write_folder(tmp_path / "tiff", ["a"])
    for j in range(2):
        Image.open(folder / f"images/0-{j}.png").save(folder / f"images/0-{j}.tif")
    (folder / "samples.jsonl").write_text('{"prompt": "a", "images": ["images/0-0.tif", "images/0-1.tif"]}\n')
    assert Page(begin(folder)).call("GET", "/media/0").content.startswith(b"\x89PNG")


def test_two_at_once(page: Page) -> None:
    """Eight raters in eight threads, and a second server on the same database."""
    other = Page(Labels.open(page.labels.path))

    def work(i: int) -> None:
        (page if i % 2 else other).prefer(f"rater {i // 2}", lambda medium: medium.sha256)

    at_once(work, 8)  # of each name two pages: each comparison is still answered once
    answers = page.labels.answers()
    assert len(answers) == len({(a.rater, a.comparison) for a in answers}) == 4 * 5
    assert agreement(answers).share == 1


def test_kill_9_keeps_every_answer(tmp_path: Path) -> None:
    """The command itself, killed while four people answer: what was acknowledged is there, and it goes on from there."""
    folder = write_folder(tmp_path / "mine", [f"p {i}" for i in range(200)])
    command = [sys.executable, "-m", "diffalign", "label", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    taken = list[tuple[str, int]]()

    def work(i: int) -> None:
        rater = f"rater {i}"
        with httpx2.Client(base_url=url, trust_env=False) as client:
            now = client.get("/state", params={"rater": rater}).json()["comparison"]
            while True:
                try:
                    answer = client.post("/answer", json={"rater": rater, "comparison": now["id"], "ranks": [0, 1]})
                except httpx2.HTTPError:
                    return
                taken.append((rater, now["id"]))
                now = answer.json()["comparison"]
                if len(taken) >= 40:
                    os.kill(server.pid, signal.SIGKILL)

    at_once(work, 4)
    assert server.wait() == -signal.SIGKILL
    labels = Labels.open(folder / "labels.sqlite")
    kept = [(a.rater, a.comparison) for a in labels.answers()]
    assert len(taken) >= 40
    assert set(taken) <= set(kept)
    assert len(kept) - len(taken) <= 4, "and no more than the answers that were on their way"
    assert Page(labels).state("rater 1")["done"] == sum(rater == "rater 1" for rater, _ in kept)


# --- what comes of it


def test_agreement_of_two_and_of_three(tmp_path: Path) -> None:
    page = Page(begin(write_folder(tmp_path / "mine", [f"p {i}" for i in range(8)])))
    better = {c.media[0] for c in page.labels.comparisons[:6]} | {c.media[1] for c in page.labels.comparisons[6:]}

    def give(rater: str, wrong: set[int]) -> None:
        for i, comparison in enumerate(page.labels.comparisons):
            merits = {n: (n in better) != (i in wrong) for n in comparison.media}
            page.say(rater, [int(not merits[n]) for n in shown(comparison, 0, rater)], i)

    give("Ada", set())
    give("Bob", {0, 7})
    found = agreement(page.labels.answers())
    assert (found.common, found.share, found.name) == (8, 0.75, "Cohen's")
    assert found.kappa == pytest.approx((0.75 - (6 * 6 + 2 * 2) / 64) / (1 - (6 * 6 + 2 * 2) / 64))
    give("Cyd", set())
    found = agreement(page.labels.answers())
    assert found.name == "Fleiss'"
    assert found.share == pytest.approx((6 * 1 + 2 / 3) / 8)
    expected = (18 / 24) ** 2 + (6 / 24) ** 2
    assert found.kappa == pytest.approx((found.share - expected) / (1 - expected))
    assert page.call("GET", "/agreement").json()["name"] == "Fleiss'"


def test_majority_votes() -> None:
    def answer(rater: str, ranks: tuple[int, ...] | None, shown: tuple[int, ...] = (4, 7)) -> Answer:
        return Answer(0, "", rater, 0, shown, ranks, None)

    assert majority([answer("a", (0, 1)), answer("b", (0, 1), (7, 4)), answer("c", (1, 0))]).pairs == ((7, 4, 2, 1),)
    assert majority([answer("a", (0, 1)), answer("b", (0, 0)), answer("c", (0, 0))]).pairs == ((4, 7, 1, 0),), "a tie is no vote"
    found = majority([answer("a", (0, 1)), answer("b", (1, 0)), answer("a", (0, 0), (1, 2)), answer("b", None, (1, 2))])
    assert (found.pairs, found.ties, found.divided, found.skipped) == ((), 1, 1, 1)
    assert found.in_words() == "0 pairs. Left out: ties 1; people are divided 1; skipped 1."
    three = majority([answer("a", (0, 2, 1), (1, 2, 3)), answer("b", (0, 1, 1), (1, 2, 3))])
    assert three.pairs == ((1, 2, 2, 0), (1, 3, 2, 0), (3, 2, 1, 0))


def test_export_is_what_the_offline_methods_read(tmp_path: Path, files: Path, run_cli: Callable[..., Any]) -> None:
    """Rankings of three: pairs for Diffusion-DPO, likes for KTO without a contradiction, and a step of training."""
    folder = write_folder(tmp_path / "mine", [f"a {w} dog" for w in ("red", "blue", "<script>")], samples=3)
    page = Page(begin(folder, compare=3))
    page.prefer("Ada", lambda medium: medium.path)  # the last sample is the best
    outcome = run_cli("pairs", "--from-labels", folder / "labels.sqlite", "--output", "out")
    assert outcome.status == 0, outcome.err
    assert (outcome.out, outcome.err) == ("out\n", "out: 9 pairs.\n")
    lines, likes = rows(tmp_path / "out/pairs.jsonl"), rows(tmp_path / "out/labels.jsonl")
    assert lines[0] == {"prompt": "a red dog", "chosen": "images/000002.png", "rejected": "images/000001.png", "votes": [1, 0]}
    assert (tmp_path / "out/images/000002.png").read_bytes() == (folder / "images/0-1.png").read_bytes()
    assert [(like["image"], like["label"]) for like in likes[:2]] == [("images/000001.png", False), ("images/000003.png", True)]
    made = yaml.safe_load((tmp_path / "out/labels.yaml").read_text())
    assert (made["raters"], made["pairs"], made["ties"], made["agreement"]) == ({"Ada": 3}, 9, 0, None)
    policy = make_policy(Settings(pipeline=str(files / "model"), guidance_scale=1.0), train=False)
    given: dict[str, Any] = {"reward": None, "limit": None, "skip": False, "seed": 0, "say": print}
    kinds: dict[Data, int] = {"pairs": 9, "labels": 6}
    for kind, count in kinds.items():
        train, _ = examples.read("out", kind, policy, **given)
        assert len(train) == count
    again = run_cli("pairs", "--from-labels", folder / "labels.sqlite", "--output", "out")
    assert again.status == 2
    assert "out exists already, and is never overwritten" in again.err
    with whole_by_one(tmp_path / "o3"), pytest.raises(InputError, match="o3 is being written by another process"):
        export(page.labels, tmp_path / "o3")
    (folder / "images/0-1.png").write_bytes((folder / "images/0-2.png").read_bytes())
    assert "0-1.png has changed since people judged it" in run_cli("pairs", "--from-labels", folder / "labels.sqlite", "--output", "o2").err
    assert not (tmp_path / "o2").exists()


def test_export_keeps_transcripts_sources_and_trajectories(tmp_path: Path) -> None:
    sounds = Page(begin(write_sounds(tmp_path / "sounds")))
    sounds.prefer("Ada", lambda medium: medium.path)
    export(sounds.labels, tmp_path / "out")
    (line,) = rows(tmp_path / "out/pairs.jsonl")
    assert (line["transcript"], line["chosen"]) == ("seven", "sounds/000002.wav")
    assert rows(tmp_path / "out/labels.jsonl")[0]["audio"] == "sounds/000001.wav"
    folder = write_folder(tmp_path / "edits", ["make it red"])
    shutil.copy(folder / "images/0-0.png", folder / "source.png")
    line = {"prompt": "make it red", "image": "source.png", "images": ["images/0-0.png", "images/0-1.png"], "scores": [1, 0]}
    (folder / "samples.jsonl").unlink()
    (folder / "ranks.jsonl").write_text(json.dumps(line) + "\n")
    for j in range(2):
        (folder / f"images/0-{j}.safetensors").write_bytes(b"states")
    edits = Page(begin(folder))
    assert edits.call("GET", f"/media/{edits.state('Ada')['comparison']['source']}").status_code == 200
    edits.prefer("Ada", lambda medium: medium.path)
    export(edits.labels, tmp_path / "edited")
    (line,) = rows(tmp_path / "edited/pairs.jsonl")
    assert (line["chosen"], line["image"]) == ("images/000002.png", "images/000003.png")
    assert (tmp_path / "edited/images/000002.safetensors").is_file()


def test_the_table_of_models(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """30 prompts, two people: x beats y in 24 comparisons and loses 6; what both say of one comparison counts once."""
    folders = [write_folder(tmp_path / name, [f"p {i}" for i in range(30)], 1, i) for i, name in enumerate("xy")]
    page = Page(begin(*folders))
    for rater in ("Ada", "Bob"):
        page.prefer(rater, lambda medium: (medium.model == 0) != (int(medium.path[7:-6]) % 5 == 0))
    (values, low, high), wins = strengths(page.labels, page.labels.answers())
    assert wins.tolist() == [[0, 24], [6, 0]]
    assert values[0] - values[1] == pytest.approx(1.386, abs=2e-3)  # log 4
    assert low[0] < values[0] < high[0]
    printed = run_cli("label", "--table", folders[0] / "labels.sqlite")
    assert printed.status == 0
    for word in ("Ada", "100%", "80%", "+0.69", "-0.69", "Cohen's kappa", "±"):
        assert word in printed.out


# --- what is wrong is said

MADE_FIRST = ("--pipeline", "shapes", "--prompts", "prompts.txt", "--output", "new")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "Nothing to label: give a folder of samples"),
        (["none"], "There is no folder"),
        (["empty"], "holds no samples: expected samples.jsonl or ranks.jsonl"),
        (["run"], "is a run. Its samples: diffalign label --pipeline"),
        (["single"], "has one sample of each prompt: there is nothing to compare. Make two or more of each (--samples 2)"),
        (["single", "other"], "has samples of one model alone of each prompt"),
        (["mine", "mine"], "One folder is named twice"),
        (["mine", "sounds"], "There are both pictures and sounds"),
        (["damaged"], "images/0-1.png is no picture that can be read"),
        (["gone"], "line 1) cannot be read (No such file or directory)"),
        (["outside"], "leads out of"),
        (["mine", "--compare", "5"], "--compare is 5: give 2, 3 or 4."),
        (["mine", "--rounds", "0"], "--rounds is 0: give 1 or more."),
        (["mine", "--choose", "uncertain"], "--choose uncertain is between models, and there is one"),
        (["mine", "--host", "0.0.0.0"], "say by which one people come: --allow-origin http://NAME:PORT"),
        (["mine", "--allow-origin", "label.example"], "--allow-origin label.example: give the address of the page"),
        (["mine", "--allow-origin", "http://[x"], "--allow-origin http://[x: give the address of the page"),
        (["mine", "--allow-origin", "http://a:99999"], "--allow-origin http://a:99999: give the address of the page"),
        (["mine", "--labels", "none/labels.sqlite"], "none/labels.sqlite cannot be written (No such file or directory): choose another"),
        ([*MADE_FIRST, "--labels", "none/labels.sqlite"], "none/labels.sqlite cannot be written (No such file or directory)"),
        ([*MADE_FIRST, "--labels", "prompts.txt"], "is no database of labels, or a damaged one"),
        ([*MADE_FIRST, "--labels", "begun.sqlite", "--compare", "3"], "begun.sqlite was begun with --compare 2: leave that out"),
        ([*MADE_FIRST, "--choose", "uncertain"], "--choose uncertain is between models, and there is one"),
        ([*MADE_FIRST, "empty"], "holds no samples: expected samples.jsonl"),
        (["mine", "--labels", "prompts.txt"], "is no database of labels, or a damaged one"),
        (["mine", "--labels", "foreign.sqlite"], "is a database, and none of labels"),
        (["mine", "--samples", "3"], "--samples is about making samples: give --pipeline too"),
        (["--pipeline", "shapes", "--prompts", "prompts.txt"], "say where the samples go, --output DIR"),
        (["--pipeline", "shapes", "--prompts", "prompts.txt", "--output", "."], "shapes exists already, and was not made by"),
        (["--pipeline", "no-such-folder/x/y", "--prompts", "prompts.txt", "--output", "o"], "no-such-folder"),
        (["--table", "empty.sqlite"], "empty.sqlite is an empty database: diffalign label FOLDER --labels empty.sqlite begins it."),
        (["--table", "none.sqlite"], "There is no database none.sqlite: diffalign label FOLDER makes one."),
    ],
)  # fmt: skip
def test_bad_input(flags: list[str], says: str, tmp_path: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffalign.label_page.serve", lambda *_: pytest.fail("It serves the page."))
    monkeypatch.setattr("diffalign.label_making.make", lambda *_: pytest.fail("It makes samples."))
    for name, samples in (("mine", 2), ("single", 1), ("damaged", 2), ("gone", 2), ("outside", 2)):
        write_folder(tmp_path / name, ["a"], samples)
    write_folder(tmp_path / "other", ["b"], 1)
    write_sounds(tmp_path / "sounds")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("method: draft\n")
    (tmp_path / "prompts.txt").write_text("a dog\n" * 300)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/file").write_text("mine\n")
    damaged = tmp_path / "damaged/images/0-1.png"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    (tmp_path / "gone/images/0-1.png").unlink()
    (tmp_path / "outside/samples.jsonl").write_text('{"prompt": "a", "images": ["../mine/images/0-0.png", "images/0-1.png"]}\n')
    sqlite3.connect(tmp_path / "foreign.sqlite").execute("create table mine (a)")
    (tmp_path / "empty.sqlite").touch()
    begin(tmp_path / "mine", labels=tmp_path / "begun.sqlite").close()
    outcome = run_cli("label", *flags, "--port", "0")
    assert outcome.status == 2, outcome.err
    assert says in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err


def test_a_database_of_other_samples_or_settings(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    folder = write_folder(tmp_path / "mine", ["a", "b"])
    begin(folder).close()
    outcome = run_cli("label", folder, "--compare", 3, "--port", 0)
    assert outcome.status == 2
    assert "was begun with --compare 2: leave that out" in outcome.err
    (tmp_path / "moved").mkdir()
    moved = shutil.move(folder, tmp_path / "moved/mine")
    labels = Labels.open(Path(moved) / "labels.sqlite")
    labels.check_same(gathering.gather([moved]))  # it has moved, and is the same
    assert Labels.open(labels.path).gathered.roots == (Path(moved),)
    (Path(moved) / "images/1-0.png").unlink()
    shutil.copy(Path(moved) / "images/1-1.png", Path(moved) / "images/1-0.png")
    outcome = run_cli("label", moved, "--port", 0)
    assert outcome.status == 2
    assert "was begun on other samples: 1 have changed. Give its own folders" in outcome.err


@pytest.mark.parametrize("left", ["empty", "wal"])
def test_a_database_that_was_cut_off_before_its_first_commit_is_begun(
    left: str, tmp_path: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "mine")
    (folder / "labels.sqlite").touch()
    if left == "wal":  # killed between the first statement and the commit
        sqlite3.connect(folder / "labels.sqlite").execute("pragma journal_mode = wal")
    monkeypatch.setattr("diffalign.label_page.serve", lambda *_: None)
    outcome = run_cli("label", folder, "--port", 0)
    assert outcome.status == 0, outcome.err
    assert len(Labels.open(folder / "labels.sqlite").comparisons) == 3
    assert not list(folder.glob(".labels-*"))


def test_a_port_in_use_and_a_missing_extra(tmp_path: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import socket

    write_folder(tmp_path / "mine")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = run_cli("label", "mine", "--port", taken.getsockname()[1])
    assert outcome.status == 2
    assert "cannot be listened on" in outcome.err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest))
    outcome = run_cli("label", "mine")
    assert (outcome.status, outcome.err) == (2, "error: diffalign label needs uvicorn: pip install 'diffalign[serve]'\n")


@pytest.mark.parametrize(
    ("flags", "links"),
    [
        ([], [r"http://127.0.0.1:\d+"]),
        (["--allow-origin", "http://localhost:9"], [r"http://127.0.0.1:\d+", "http://localhost:9"]),
        (["--allow-origin", "https://a.example"], [r"http://127.0.0.1:\d+/\?key=([\w-]{22})", r"https://a.example/\?key=([\w-]{22})"]),
        (["--host", "0.0.0.0", "--allow-origin", "http://10.0.0.5:8"], [r"http://0.0.0.0:\d+/\?key=(.*)", r"http://10.0.0.5:8/\?key=(.*)"]),
    ],
)
def test_links_have_a_key_where_others_can_come(
    flags: list[str], links: list[str], tmp_path: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fences = list[Fence]()
    monkeypatch.setattr("diffalign.label_page.serve", lambda fence, sockets: fences.append(fence))
    outcome = run_cli("label", write_folder(tmp_path / "mine"), *flags, "--port", 0)
    assert outcome.status == 0, outcome.err
    said = [outcome.out.strip(), *re.findall("Also as (.*)", outcome.err)]
    keys = [found.groups() for link, text in zip(links, said, strict=True) if (found := re.fullmatch(link, text))]
    assert len(keys) == len(links)
    assert set(keys) == {() if fences[0].key is None else (fences[0].key,)}


def test_no_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = begin(write_folder(tmp_path / "mine"))
    labels.close()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write everywhere
    with pytest.raises(InputError, match=r"labels.sqlite cannot be used \(no write permission\). Is its folder there, and may you write"):
        Labels.open(labels.path)


def test_origins() -> None:
    check_origins(["http://192.168.1.5:8771"], "0.0.0.0")
    for origin in ("192.168.1.5", "http://a.example/", "ftp://a.example", "http://"):
        with pytest.raises(InputError, match="give the address of the page up to the port"):
            check_origins([origin], "127.0.0.1")


# --- where samples come from


def test_samples_of_models_are_made_and_gone_on_with(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models whose own settings have other batches, same prompts and noise; and what `Run.sample` writes is a folder of samples too."""
    import diffalign
    from diffalign import label_making

    starts, rollout = list[torch.Tensor](), label_making.rollout
    monkeypatch.setattr(label_making, "rollout", lambda *given, **named: starts.append(named["start"]) or rollout(*given, **named))

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\na hen\n")
    run = diffalign.align(
        files / "model", reward=f"{files}/rewards.py:red", prompts=str(files / "prompts.txt"), steps=1, inference_steps=2, eval_size=0,
        learning_rate=0.1, guidance_scale=1.0, batch_size=2, output=tmp_path / "tuned",
    )  # fmt: skip
    given = {"prompts": str(prompts), "sample_steps": 2, "guidance_scale": 1.0, "seed": 3}
    settled = label_making.settle([str(files / "model"), str(run.path)], tmp_path / "made", given)
    for path, (making, asked) in settled.items():
        label_making.make(path, making, asked, 1)
    assert list(map(len, starts)) == [3, 2, 1]
    assert torch.equal(starts[0], torch.cat(starts[1:])), "of the same prompt both start from the same noise"
    assert len({start.numpy().tobytes() for start in starts[0]}) == 3
    gathered = gathering.gather(list(settled))
    assert gathered.models == ("model", "tuned")
    assert [len(asked.samples) for asked in gathered.asked] == [2, 2, 2]
    found, _ = plan(gathered, compare=2, rounds=1, seed=0)
    assert len(found) == 3, "training has changed every picture"
    model = tmp_path / "made/model"
    before = {path.name: path.read_bytes() for path in (model / "samples").iterdir()}
    with (model / "samples.jsonl").open("r+b") as file:  # killed within the last line
        file.truncate(file.seek(0, 2) - 5)
    (model / "samples/000003-0.png").unlink()
    (model / "samples/000001-0.png").unlink()
    starts.clear()
    ((path, (making, asked)),) = label_making.settle([str(files / "model")], tmp_path / "made", {**given, "batch_size": 1}).items()
    label_making.make(path, making, asked, 1)
    assert list(map(len, starts)) == [1, 1], "what is there already is not made again"
    after = {path.name: path.read_bytes() for path in (model / "samples").iterdir()}
    assert after.keys() == before.keys()
    assert after["000002-0.png"] == before["000002-0.png"]
    for name in ("000001-0.png", "000003-0.png"):
        pixels = (np.array(Image.open(io.BytesIO(data)), int) for data in (after[name], before[name]))
        assert abs(np.subtract(*pixels)).max() <= 1, "the same noise in another batch"
    with pytest.raises(InputError, match="No prompts: give --prompts FILE"):
        label_making.settle([str(files / "model")], tmp_path / "made", {})
    with pytest.raises(InputError, match=r"was made with other settings \(seed\)"):
        label_making.settle([str(files / "model")], tmp_path / "made", {**given, "seed": 4})
    for seed in (0, 1, 1):
        run.sample(["a dog", "a cat"], seed=seed, steps=2, output=tmp_path / "sampled")
    sampled = gathering.gather([tmp_path / "sampled"])
    assert [(asked.text, len(asked.samples)) for asked in sampled.asked] == [("a dog", 2), ("a cat", 2)]
