"""The page of a run in a browser: its slider and its axes work, nothing is asked of a network, and it fits a phone.

Screenshots lie in the test's folder, or in the one that DIFFALIGN_SCREENSHOTS names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_folders
from run_folders import HOSTILE

from diffalign import pages
from diffalign.compare import compare_runs, write

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no package playwright")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of pictures with a guard that fired, one of sounds, one of a damaged run, and one over two runs."""
    folder = tmp_path_factory.mktemp("runs")
    pictures = run_folders.make(folder / "pictures", prompts=["a red circle", HOSTILE, "word" * 40])
    run_folders.add_guard(pictures, fired=True)
    sounds = run_folders.make(folder / "sounds", prompts=run_folders.spoken("one", "two"), rate=8000)
    damaged = run_folders.make(folder / "damaged", saved=())
    (damaged.path / "metrics.jsonl").write_text("{")
    (damaged.path / "eval.json").write_text("{")
    other = run_folders.make(folder / ("a-long-name-" * 6), config={"seed": 1, "prompts": "/a/very/long/path" * 8})
    found = {run.path.name: pages.write_report(run) for run in (pictures, sounds, damaged)}
    return {**found, "compare": write(compare_runs([sounds.path, other.path], limit=0), folder / "compare")[2]}


@pytest.fixture
def visit(browser: Any, files: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open a page by its name; afterwards neither a console error nor a request for anything but the file itself."""
    opened = list[Any]()
    errors, asked = list[str](), list[str]()

    def visit(name: str, width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}"))
        page.on("request", lambda wanted: asked.append(wanted.url))
        page.goto(files[name].as_uri())
        opened.append(page)
        return page

    yield visit
    allowed = ("data:", *(file.as_uri() for file in files.values()))
    folder = Path(os.environ.get("DIFFALIGN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for i, page in enumerate(opened):
        page.screenshot(path=folder / f"{request.node.name.strip(']').replace('[', '-')}-{i}.png", full_page=True)
        page.close()
    assert not errors
    assert not [url for url in asked if not url.startswith(allowed)]


def paths(page: Any) -> list[str]:
    return page.eval_on_selector_all("#charts svg path", "lines => lines.map(line => line.getAttribute('d'))")


@pytest.mark.parametrize("name", ["pictures", "sounds"])
def test_the_slider_moves_the_pictures(visit: Any, name: str) -> None:
    page = visit(name)
    seen = "() => [...document.querySelectorAll('.moment')].filter(m => m.offsetHeight).map(m => m.dataset.said)"
    assert page.evaluate(seen) == ["step 4"]
    page.focus("#moment")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(seen) == ["step 2"]
    assert page.get_attribute("#moment", "aria-valuetext") == page.text_content("#moment-said") == "step 2"
    page.keyboard.press("Home")
    assert page.evaluate(seen) == ["step 0, base model"]
    loaded = "() => [...document.images].filter(i => i.offsetHeight).every(i => i.complete && i.naturalWidth)"
    assert page.evaluate(loaded)
    if name == "sounds":
        sound = page.locator(".moment:not([hidden]) audio").first
        assert sound.evaluate("sound => new Promise(done => { sound.onloadedmetadata = () => done(sound.duration); sound.load(); })") == 0.1


def test_the_axis_can_be_switched(visit: Any) -> None:
    page = visit("pictures")
    label = "svg[aria-label^='reward against']"
    assert "against optimiser steps: from 0.6 to 0.9" in page.get_attribute(label, "aria-label")
    ticks = page.locator(f"{label} >> nth=0").text_content()
    page.check("input[value=seconds]")
    assert "against seconds: from 0.6 to 0.9" in page.get_attribute(label, "aria-label")
    assert page.locator(f"{label} >> nth=0").text_content() != ticks
    page.check("input[value=reward_queries]")
    assert "against reward queries" in page.get_attribute(label, "aria-label")


def test_a_chart_is_read_with_the_pointer(visit: Any) -> None:
    page = visit("pictures")
    chart = page.locator(".chart").first
    chart.locator("svg").hover(position={"x": 300, "y": 50})
    assert chart.locator(".at").text_content() == "0.9 at 4"
    gradient = page.locator(".chart", has_text="grad_norm").locator("path.raw").get_attribute("d")
    assert gradient.count("M") == 2, "the line is broken where the norm was infinite"
    assert page.locator(".chart", has_text="grad_norm").locator("circle").count() == 1, "what is alone beside the gap is a dot"


def test_prompts_are_shown_as_they_are_and_not_run(visit: Any) -> None:
    page = visit("pictures")
    assert page.locator(".moment:not([hidden]) figcaption").nth(1).text_content() == HOSTILE
    assert not page.evaluate("() => [...document.querySelectorAll('img')].some(image => image.getAttribute('src') === 'x')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["pictures", "sounds", "damaged", "compare"])
def test_it_fits_a_phone_and_both_schemes(visit: Any, name: str, scheme: str) -> None:
    for width in (375, 1280):
        page = visit(name, width, scheme)
        page.eval_on_selector_all("details", "boxes => boxes.forEach(box => box.open = true)")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        if name != "damaged":
            assert len(paths(page)) >= 3
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(251, 251, 249)", "dark": "rgb(20, 22, 26)",
    }[scheme]  # fmt: skip


def test_without_scripts_all_is_there(browser: Any, files: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(files["pictures"].as_uri())
    assert page.locator(".moment").count() == 3
    assert all(page.locator(".moment h3").nth(i).is_visible() for i in range(3))
    context.close()
