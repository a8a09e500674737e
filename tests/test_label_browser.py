"""`diffalign label` as a person meets it, in headless Chromium: keys and touch, undo, tie, skip, and training on what was said."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from labelled import begin, write_folder, write_sounds
from PIL import Image

from diffalign.label_page import Asking, guarded, make_app, make_server
from diffalign.labels import Labels
from diffalign.listening import bind, url_of

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium in the PATH")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
NASTY = "<script>hacked = 1</script><img src=x onerror='hacked = 1'> a <b>dog</b>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def served(labels: Labels) -> Iterator[str]:
    sock = bind("127.0.0.1", 0)
    server = make_server(guarded(make_app(Asking(labels))))
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    try:
        yield url_of(sock)
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


@contextmanager
def opened(chromium: Any, url: str, rater: str, *, phone: bool = False) -> Iterator[Any]:
    """The page after the rater has said who it is; it must have asked nobody but its server, and have had no trouble."""
    size = {"width": 375, "height": 667} if phone else {"width": 1280, "height": 800}
    context = chromium.new_context(viewport=size, has_touch=phone, color_scheme="dark" if phone else "light")
    context.set_default_timeout(60_000)
    page, said, asked = context.new_page(), list[str](), list[str]()
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.fill("#name", rater)
    page.keyboard.press("Enter")
    page.wait_for_selector("#stage.ready")
    yield page
    assert said == []
    assert all(address.startswith((url, "data:")) for address in asked)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing lies beside the screen"
    context.close()


def shows(page: Any, selector: str, text: str) -> None:
    """Wait until the element holds the text."""
    pytest.importorskip("playwright.sync_api").expect(page.locator(selector)).to_contain_text(text, timeout=60_000)


def press(page: Any, key: str, then: str) -> None:
    """Press a key on a comparison that is there, and wait for the count."""
    page.wait_for_selector("#stage.ready")
    page.keyboard.press(key)
    shows(page, "#count", then)


def test_label_export_train(chromium: Any, tmp_path: Path, files: Path, run_cli: Callable[..., Any]) -> None:
    folder = write_folder(tmp_path / "mine", [NASTY, "a cat", "a hen", "a cow", "a fox"])
    labels = begin(folder)
    with served(labels) as url, opened(chromium, url, "Ada") as page:
        texts = list[str]()
        keys = (("1", "1 of 5"), ("t", "2 of 5"), ("s", "1 skipped"), ("u", "2 of 5"), ("ArrowRight", "3 of 5"), ("2", "4 of 5"))
        for key, then in keys:
            texts.append(page.inner_text("#prompt"))
            press(page, key, then)
        assert texts[4] == texts[2], "what was taken back is asked again"
        page.reload()  # the browser is closed and opened again: nothing is lost
        page.keyboard.press("Enter")
        page.wait_for_selector("#stage.ready")
        texts.append(page.inner_text("#prompt"))
        press(page, "1", "5 of 5")
        page.wait_for_selector(".end")
        assert page.inner_text("#prompt") == "All done. Thank you!"
        assert NASTY in texts, "shown as what it is"
        assert page.evaluate("typeof hacked") == "undefined"
        with opened(chromium, url, "Bob", phone=True) as phone:
            assert phone.locator("#stage.wide").count() == 0
            phone.tap(".card:nth-child(1)")
            shows(phone, "#count", "1 of 5")
            shows(phone, "#agreement", "of 1 common pair")
            phone.tap("#undo")
            shows(phone, "#count", "0 of 5")
    sides = [answer.ranks for answer in labels.answers("Ada")]
    assert sides == [(0, 1), (0, 0), (1, 0), (1, 0), (0, 1)]
    assert labels.answers("Bob") == []
    outcome = run_cli("pairs", "--from-labels", labels.path, "--output", "pairs")
    assert outcome.err == "pairs: 4 pairs. Left out: ties 1.\n"
    flags = ("--steps", 1, "--batch-size", 2, "--accumulate", 1, "--eval-size", 0, "--guidance-scale", 1, "--sample-steps", 2)
    outcome = run_cli("train", "--method", "diffusion-dpo", "--pipeline", files / "model", "--data", "pairs", *flags, "--output", "run")
    assert outcome.status == 0, outcome.err
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["grad_norm"] > 0


def test_wide_pictures_lie_above_one_another_on_a_phone(chromium: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", ["a dog"], samples=3)
    for path in (folder / "images").iterdir():
        Image.open(path).resize((320, 180)).save(path)
    with served(begin(folder, compare=3)) as url, opened(chromium, url, "Ada", phone=True) as page:
        widths = [box["width"] for box in (card.bounding_box() for card in page.locator(".card").all())]
        assert len(widths) == 3
        assert min(widths) > 300


def test_sounds_are_played_and_ranked_by_keys(chromium: Any, tmp_path: Path) -> None:
    labels = begin(write_sounds(tmp_path / "sounds", 4), compare=4)
    with served(labels) as url, opened(chromium, url, "Ada", phone=True) as page:
        assert page.inner_text("#transcript") == "“seven”"
        page.keyboard.press("w")
        page.wait_for_selector(".sound:nth-child(2).playing")
        page.keyboard.press("e")
        page.wait_for_selector(".sound:nth-child(3).playing")
        assert page.locator(".playing").count() == 1, "one at a time"
        page.keyboard.press("3")
        page.keyboard.press("1")
        assert page.locator(".place").all_inner_texts() == ["2nd", "2", "1st", "4"]
        page.keyboard.press("u")
        assert page.locator(".place").all_inner_texts() == ["1", "2", "1st", "4"]
        page.keyboard.press("4")
        press(page, "t", "1 of 1")  # the rest ties
        assert [answer.ranks for answer in labels.answers()] == [(2, 2, 0, 1)]
