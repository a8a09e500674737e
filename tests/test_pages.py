"""The page of a run: what the folder says stands in it, whole and escaped; what is damaged is said; and no training fails of it."""

from __future__ import annotations

import errno
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import run_folders
import tiny
import torch
from PIL import Image
from run_folders import HOSTILE

from diffalign import exhibits, pages
from diffalign.api import evaluate_run
from diffalign.charts import POINTS, Traced, charts
from diffalign.cli import main
from diffalign.data import PicturePrompt
from diffalign.errors import InputError
from diffalign.evaluate import sheet
from diffalign.exhibits import evenly, through_training
from diffalign.media import cells, to_tensor
from diffalign.run import Run


class Page(HTMLParser):
    """What a page holds: its elements, its words, and the data of its charts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements, self.words, self.data, self._in = list[tuple[str, dict[str, str | None]]](), "", "", ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = (dict(attrs).get("type") or "text/javascript") if tag == "script" else tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "application/json":
            self.data += data
        elif self._in not in ("text/javascript", "style"):
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def charts(self) -> dict[str, Any]:
        return json.loads(self.data)


def of(run: Run) -> Page:
    return Page(pages.write_report(run))


def test_lines_by_hand() -> None:
    rows = [
        {"step": 1, "reward": 1.0, "reward_queries": 2, "seconds": 0.5},
        {"step": 2, "reward": None, "reward_queries": 4, "seconds": 1.0},
    ]
    found = charts([Traced("a", "draft", "red", rows), Traced("b", "draft", "blue", rows[:1]), Traced("c", "ddpo", "red", rows[:1])])
    assert found["tracks"][0] == {"every": 1, "x": {"step": [1.0, 2.0], "reward_queries": [2.0, 4.0], "seconds": [0.5, 1.0]}}
    assert [(chart["of"], [(line["run"], line["y"]) for line in chart["lines"]]) for chart in found["charts"]] == [
        ("red", [(0, [1.0, None]), (2, [1.0])]),
        ("blue", [(1, [1.0])]),
    ], "rewards of two kinds are on no one scale"


def test_long_trainings_are_thinned_to_means() -> None:
    rows = [{"step": i, "reward": float(i % 2), "reward_queries": 0, "seconds": i} for i in range(1, 5 * POINTS + 2)]
    found = charts([Traced("a", "draft", "red", rows)])
    (track,), (line,) = found["tracks"], found["charts"][0]["lines"]
    assert track["every"] == 6
    assert len(line["y"]) == len(track["x"]["step"]) <= POINTS
    assert line["y"][:3] == [0.5, 0.5, 0.5]
    assert track["x"]["step"][-1] == 5 * POINTS + 1
    assert [axis["key"] for axis in found["axes"]] == ["step", "seconds"], "it asked no reward"


def test_guard_lines_by_hand(tmp_path: Path) -> None:
    run = run_folders.make(tmp_path / "run")
    run_folders.add_guard(run)
    found = of(run).charts
    (watched,) = (chart["lines"][0] for chart in found["charts"] if chart["title"] == "watched")
    assert found["tracks"][watched["track"]]["x"] == {"step": [0, 2], "reward_queries": [0, 16], "seconds": [0, 3]}
    assert (watched["y"], watched["limit"]) == ([0.8, 0.3], [0.55, 0.55])
    assert (watched["low"], watched["high"]) == ([0.8, 0.2], [0.8, 0.4])


def test_the_cells_of_a_sheet_are_the_pictures_of_its_grid(tmp_path: Path) -> None:
    rows = [(name, torch.rand(3, 3, 32, 16, generator=torch.Generator().manual_seed(i))) for i, name in enumerate("ab")]
    drawn = sheet(rows, ["one", "two", "three"])
    for (_, images), row in zip(rows, cells(drawn, 2, 3), strict=True):
        for image, cell in zip(images, row, strict=True):
            assert cell.size == (64, 128)
            small = to_tensor(cell.resize((16, 32), Image.Resampling.NEAREST))
            assert torch.equal(small, (image * 255).round() / 255)
    with pytest.raises(InputError, match="no sheet of 2 x 5 pictures"):
        cells(drawn, 2, 5)


def test_what_the_folder_says_stands_in_the_page(tmp_path: Path) -> None:
    run = run_folders.make(tmp_path / "my run", config={"negative_prompt": HOSTILE})
    run_folders.add_guard(run)
    page = of(run)
    for words in (
        "finished, 4 steps", "0.500", "0.750", "+0.250", "[+0.125, +0.375]", "all <b>right</b>", "32", "shapes-clip", HOSTILE,
        f"diffalign train --config '{run.path / 'config.yaml'}'", f"diffalign report '{run.path}'", "--prompt 'a red circle'",
        "lora.rank", run.config["versions"]["torch"], "failed, 2 in a row", "best evaluation so far",
    ):  # fmt: skip
        assert words in page.words, words
    assert "What could not be read" not in page.words
    titles = [(chart["title"], chart["group"]) for chart in page.charts["charts"]]
    assert titles[:2] == [("reward", "training"), ("reward/clear", "training")]
    assert {("watched", "held out"), ("kl", "held out"), ("grad_norm", "training"), ("learning_rate", "costs")} < {*titles}
    (norm,) = (chart["lines"][0]["y"] for chart in page.charts["charts"] if chart["title"] == "grad_norm")
    assert norm == [0.25, None, 0.25, 0.25]
    slider = next(element for element in page.all("input") if element.get("type") == "range")
    assert (slider["min"], slider["max"]) == ("0", "2")
    pictures = [image for image in page.all("img") if (image["alt"] or "").startswith("Picture of step")]
    assert len(pictures) == 3 * 8
    assert len({image["src"] for image in pictures}) == 3 * 8
    assert pictures[1]["alt"] == f"Picture of step 0: {HOSTILE}"


def test_nothing_is_executed_and_nothing_loaded(tmp_path: Path) -> None:
    run = run_folders.make(
        tmp_path / HOSTILE.replace("/", ""), config={"reward": {"name": HOSTILE}}, prompts=[HOSTILE, "half a \ud800 character"]
    )
    page = of(run)
    assert [element.get("type") for element in page.all("script")] == ["application/json", None]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    asked = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href", "srcset", "action")]
    assert asked
    assert all((value or "").startswith("data:") for value in asked)
    (policy,) = (element["content"] for element in page.all("meta") if element.get("http-equiv"))
    assert "default-src 'none'" in (policy or "")
    assert "unsafe" not in (policy or "")
    assert all(image.get("alt") for image in page.all("img"))


def test_edits_show_what_was_edited(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "source.png")
    run = run_folders.make(tmp_path / "run", prompts=[PicturePrompt("make it blue", tmp_path / "source.png")])
    shown = through_training(run)
    assert shown is not None
    assert len(shown.sources) == 8
    assert len({*shown.sources}) == 1
    assert "What was to be edited: make it blue" in (tmp_path / "run" / pages.write_report(run).name).read_text()


def test_sounds_are_heard_and_seen_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folders.make(tmp_path / "run", prompts=run_folders.spoken("one", "two"), rate=8000)
    page = of(run)
    assert len(page.all("audio")) == 3 * 8
    assert page.all("audio")[0]["aria-label"] == 'Sound of step 0: woman: one: "one"'
    size = (run.path / "samples" / "step-000000-0.wav").stat().st_size
    monkeypatch.setattr(exhibits, "SOUND_BYTES", 17 * size)
    page = of(run)
    assert len(page.all("audio")) == 2 * 8
    assert "2 of 3 saved steps are shown" in page.words
    monkeypatch.setattr(exhibits, "SOUND_BYTES", 6 * size)
    page = of(run)
    assert len(page.all("audio")) == 2 * 3
    assert "the first 3 of each step" in page.words


def test_the_page_of_a_long_run_is_no_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = exhibits.STEPS
    monkeypatch.setattr(exhibits, "STEPS", 3)
    page = of(run_folders.make(tmp_path / "run", saved=range(5), side=264))
    shown = [str(image["src"]) for image in page.all("img") if (image["alt"] or "").startswith("Picture of step")]
    assert len(shown) == 3 * 8
    assert allowed * 8 * max(map(len, shown)) < 12e6, "noise, which compresses worst"
    assert "3 of 5 saved steps are shown" in page.words
    assert "scaled to 256 pixels" in page.words
    assert evenly(range(20), 4) == [0, 6, 13, 19]
    assert evenly([3, 5], 12) == [3, 5]


def test_what_cannot_be_read_is_said(tmp_path: Path, run_cli: Any) -> None:
    run = run_folders.make(tmp_path / "run")
    run_folders.add_guard(run)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert "What could not be read" not in of(run).words, "a line that is being written is none yet"
    (run.path / "samples" / "step-000002.png").write_bytes(b"no picture")
    page = of(run)
    assert "Step 2 is not shown: step-000002.png is no picture that can be read" in page.words
    assert len([image for image in page.all("img") if (image["alt"] or "").startswith("Picture of step")]) == 2 * 8
    for name, damage, words in (
        ("metrics.jsonl", "[1]\n", "What the run logged cannot be shown: a line of metrics.jsonl is no object"),
        ("metrics.jsonl", "{\n{}\n", "metrics.jsonl is damaged: a line of it is no JSON"),
        ("guard.jsonl", '{"step": 1}\n', "What the guard found cannot be shown"),
        ("eval.json", "{", "eval.json is damaged. Write it again: diffalign eval"),
        ("eval.json", '{"rewards": {"a": {}}}', "The held-out table cannot be shown"),
        ("prompts/heldout.jsonl", "", "heldout.jsonl holds no prompts"),
        ("samples/before-after.png", "", "The evaluation's pictures cannot be shown"),
        ("config.yaml", "a: [", "The settings cannot be shown"),
    ):
        (run.path / name).write_text(damage)
        outcome = run_cli("report", run.path)
        assert (outcome.status, outcome.out) == (0, f"{run.path / 'report.html'}\n"), outcome.err
        assert words in Page(run.path / "report.html").words, words


@pytest.mark.parametrize(
    ("rows", "fired", "state"),
    [(2, False, "unfinished, at step 2 of 4"), (2, True, "ended by its guard at step 2"), (0, False, "at step 0")],
)
def test_runs_that_are_not_finished(tmp_path: Path, rows: int, fired: bool, state: str) -> None:
    run = run_folders.make(tmp_path / "run")
    lines = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_text("".join(lines[:rows]))
    (run.path / "eval.json").unlink()
    if fired:
        run_folders.add_guard(run, fired=True)
    page = of(run)
    assert state in page.words
    assert "no held-out evaluation" in page.words
    assert "What could not be read" not in page.words
    assert ("Nothing was logged yet" in page.words) == (rows == 0)


def test_a_folder_with_settings_alone_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    page = of(Run.open(tmp_path))
    assert "unfinished, at step 0 of 3" in page.words
    assert "No pictures were saved yet" in page.words


def test_several_processes_and_live_objects_are_run_again_as_they_were(tmp_path: Path) -> None:
    assert "torchrun --nproc_per_node 4 -m diffalign train" in of(run_folders.make(tmp_path / "four", config={"processes": 4})).words
    page = of(run_folders.make(tmp_path / "live", config={"pipeline": "live object"}))
    assert "diffalign.align(pipe" in page.words
    assert "diffalign train" not in page.words.replace("diffalign train --config\n", "").split("config.yaml, for")[0]


def test_bad_input(tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ([tmp_path / "nothing"], "is no run: it holds no config.yaml"),
        ([tmp_path], "is no run"),
        ([], "The following arguments are required: run"),
        ([tmp_path, "--limit", 3], "Unrecognized arguments: --limit 3"),
    ):
        outcome = run_cli("report", *arguments)
        assert outcome.status == 2
        assert message in outcome.err
    run = run_folders.make(tmp_path / "run")

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = pages.write_report(run).read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    outcome = run_cli("report", run.path)
    assert outcome.status == 2
    assert "report.html cannot be written (No space left on device)" in outcome.err
    assert (run.path / "report.html").read_bytes() == before


REWARD = """
import diffalign
asked = 0

@diffalign.reward(differentiable=True)
def tired(images, prompts):
    global asked
    asked += 1
    return images[:, 0].mean((1, 2)) * (float("nan") if asked > 2 else 1)
"""


def test_a_training_leaves_a_page_at_its_end_where_it_fails_and_when_it_is_evaluated(
    files: Path, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tired.py").write_text(REWARD)
    chosen = {
        "pipeline": files / "model", "prompts": files / "prompts.txt", "method.inference_steps": 1, "steps": 2, "batch_size": 2,
        "guidance_scale": 1, "lora.rank": 2, "eval_size": 2, "sample_every": 2,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in chosen.items()]
    outcome = run_cli("train", *flags, f"--reward={tmp_path / 'tired.py'}:tired", "--output", "failed")
    assert outcome.status == 2
    assert "unfinished, at step " in Page(tmp_path / "failed" / "report.html").words

    outcome = run_cli("train", *flags, f"--reward={files / 'rewards.py'}:red", "--output", "run")
    assert outcome.status == 0, outcome.err
    assert f"Page: {Path('run') / 'report.html'}" in outcome.err
    page = Page(tmp_path / "run" / "report.html")
    assert "finished, 2 steps" in page.words
    assert "What could not be read" not in page.words
    rows = Run.open("run").metrics
    assert [chart["lines"][0]["y"] for chart in page.charts["charts"] if chart["title"] == "reward"] == [
        [pytest.approx(row["reward"], rel=1e-5) for row in rows]
    ]
    assert all(prompt in page.words for prompt in tiny.PROMPTS if prompt in (tmp_path / "run" / "prompts" / "heldout.jsonl").read_text())

    (tmp_path / "run" / "report.html").unlink()
    evaluate_run(Run.open("run"), ["jpeg-compressibility"], limit=1)
    assert "jpeg-compressibility" in Page(tmp_path / "run" / "report.html").words
    evaluate_run(Run.open("run"), ["jpeg-incompressibility"], limit=1, output="other.json")
    assert "jpeg-incompressibility" not in Page(tmp_path / "run" / "report.html").words

    def broken(*_: Any) -> Path:
        raise RuntimeError("a page like\nthis")

    monkeypatch.setattr(pages, "write_report", broken)
    outcome = run_cli("train", "--resume", "run", "--steps", 3)
    assert outcome.status == 0, outcome.err
    assert "report.html was not written (a page like this). Write it again: diffalign report run" in outcome.err


def test_a_comparison_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run_folders.make(tmp_path / "one")
    two = run_folders.make(tmp_path / "<two>", config={"reward": {"name": "jpeg-compressibility"}, "lora": {"rank": 4}, "seed": 1})
    assert main(["compare", str(one.path), str(two.path), "--limit", "0", "--output", str(tmp_path / "out")]) == 0
    page = Page(tmp_path / "out" / "compare.html")
    assert page.charts["names"] == ["one", "<two>"]
    for chart in page.charts["charts"]:
        assert len(chart["lines"]) == (1 if chart["title"].startswith("reward") else 2), chart["title"]
    table = page.words.partition("Settings that differ")[2]
    for name in ("reward.name", "lora.rank", "seed"):
        assert name in table
    assert "method.k" not in table
    assert page.words.count("[+0.125, +0.375]") == 2
    assert "compare.html" in capsys.readouterr().err
    (two.path / "eval.json").write_text('{"prompts": 3, "rewards": {"a": {"before": 1}}}')
    assert main(["compare", str(one.path), str(two.path), "--limit", "0", "--output", str(tmp_path / "out")]) == 2
    assert f"{two.path}/eval.json is damaged. Write it again: diffalign eval" in capsys.readouterr().err
