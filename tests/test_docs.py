"""The documentation holds together: on GitHub, on the site, and with what was measured."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import diffalign
from diffalign.commands import COMMANDS

TOP = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOP / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs_comments, docs_site, method_tables = map(script, ("docs_comments", "docs_site", "method_tables"))
PAGES = sorted(p for p in (*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md")))
WHICH = (TOP / "docs" / "which-method.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def prose(text: str) -> list[tuple[int, str]]:
    """The numbered lines that are no code."""
    fenced, found = False, list[tuple[int, str]]()
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            found.append((number, line))
    return found


def anchors(page: Path) -> list[str]:
    return [docs_site.anchor(line.lstrip("#")) for _, line in prose(page.read_text(encoding="utf-8")) if re.match(r"#+ ", line)]


def broken_links(page: Path) -> list[str]:
    """The links that lead nowhere on GitHub."""
    found: list[str] = []
    for number, line in prose(page.read_text(encoding="utf-8")):
        for path, anchor in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                found.append(f"{page.name}:{number}: {path}#{anchor}")
    return found


def unlike(text: str) -> list[str]:
    """Lines that GitHub or the site does not show as meant: rows with other cells than their table, lists that are none on the site."""
    found, before, cells = list[str](), "", 0
    for number, line in prose(text):
        count = len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if cells and count and count != cells:
            found.append(f"{number}: {count - 2} cells, and {cells - 2} in the row before")
        if re.match(r"(-|\*|\d+\.) ", line) and before.strip() and not re.match(r"(-|\*|\d+\.|  |#)", before.strip() and before):
            found.append(f"{number}: a list without an empty line before it")
        if re.match(r" {1,3}(-|\*|\d+\.) ", line):
            found.append(f"{number}: a list in a list wants four spaces")
        before, cells = line, count
    return found


def test_links_lead_somewhere_on_github(tmp_path: Path) -> None:
    assert [link for page in PAGES for link in broken_links(page)] == []
    (tmp_path / "a.md").write_text("# A\n\n[b](b.md) [c](#a) [d](#b)\n")
    assert broken_links(tmp_path / "a.md") == ["a.md:3: b.md#", "a.md:3: #b"]


def test_tables_and_lists_are_shown_as_meant() -> None:
    assert {str(page): wrong for page in PAGES if (wrong := unlike(page.read_text(encoding="utf-8")))} == {}
    assert unlike("| a |\n| --- | --- |\n") == ["2: 2 cells, and 1 in the row before"]
    assert unlike("so:\n- a\n- b\n") == ["2: a list without an empty line before it"]


def test_the_front_page_is_the_readme_with_the_sites_links() -> None:
    text = "[a](docs/methods/README.md#b) ![i](docs/images/x.png) [c](CONTRIBUTING.md) [l](LICENSE) [d](https://x.org/docs/) [e](#docs)"
    made = "[a](methods/README.md#b) ![i](images/x.png) [c](contributing.md) [l](LICENSE.txt) [d](https://x.org/docs/) [e](#docs)"
    assert docs_site.as_page(text) == made


def test_every_command_stands_in_the_reference_with_its_help(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = docs_site.help_of
    assert ours("list").startswith("usage: diffalign list")
    with pytest.raises(RuntimeError, match="ended with status 2"):
        ours("no-such-command")
    # the others' own help takes seconds: the build of the site prints it
    monkeypatch.setattr(docs_site, "help_of", lambda *words: ours(*words) if words == ("reward",) else f"usage: {' '.join(words)} <x>")
    made = "".join(docs_site.help_pages())
    assert re.findall(r"^## diffalign (\w+)$", made, re.MULTILINE) == list(COMMANDS)
    assert re.findall(r"^### (.+)$", made, re.MULTILINE) == ["diffalign reward train", "diffalign reward eval"]
    assert '<pre class="help"><code>usage: reward eval &lt;x&gt;</code></pre>' in made


def test_every_public_name_stands_in_the_reference() -> None:
    text = (TOP / "docs" / "reference" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: diffalign\.(\w+)$", text, re.MULTILINE)) == sorted(diffalign.__all__)
    for kind in ("methods", "rewards"):
        for target in re.findall(r"::: diffalign\.(\S+)\.(\w+)\n", "".join(docs_site.classes(kind))):
            file = TOP / (target[0].replace(".", "/") + ".py" if kind == "rewards" else f"diffalign/{target[0].replace('.', '/')}.py")
            assert f"class {target[1]}" in file.read_text(encoding="utf-8")


def test_pages_and_examples_open_the_embedded_models_by_name() -> None:
    """A path in the checkout is none in an installed package."""
    pages = [*(TOP / "docs").glob("shapes*.md"), *(TOP / "docs" / "examples").iterdir()]
    assert [page.name for page in pages if page.is_file() and re.search(r'assets(/|" / ")shapes[\w-]*"', page.read_text("utf-8"))] == []
    assert sum("diffalign.model_folder(" in page.read_text("utf-8") for page in pages if page.is_file()) >= 5


def missing(targets: list[str]) -> list[str]:
    """The targets of `:::` that cannot be imported."""
    lost = list[str]()
    for target in targets:
        module, _, name = target.rpartition(".")
        try:
            found = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(target) is not None
        except ModuleNotFoundError:
            found = False
        lost += [] if found else [target]
    return lost


def test_what_the_reference_names_can_be_imported() -> None:
    pages = [page.read_text(encoding="utf-8") for page in sorted((TOP / "docs" / "reference").glob("*.md"))]
    targets = re.findall(r"^::: (\S+)", "".join([*pages, *docs_site.classes("methods"), *docs_site.classes("rewards")]), re.MULTILINE)
    assert len(targets) > 40
    assert missing(targets) == []
    assert missing(["diffalign.noise", "diffalign.noise.Gone", "diffalign.gone.Gone"]) == ["diffalign.noise.Gone", "diffalign.gone.Gone"]


def test_a_comment_behind_a_field_is_its_docstring() -> None:
    assert docs_comments.comment_of("    image: Tensor | None = None  # (B, 3, H, W): the picture") == "(B, 3, H, W): the picture"
    assert docs_comments.comment_of('    name: str = "# no comment"') is None
    assert docs_comments.comment_of("    # a comment on a line of its own") is None
    assert docs_comments.comment_of(")") is None


def test_the_tables_of_which_method_are_those_that_were_measured(tmp_path: Path) -> None:
    assert method_tables.written(WHICH) == WHICH, "run python scripts/method_tables.py"
    with pytest.raises(SystemExit, match="lacks one of its marks"):
        method_tables.written("# A page without marks\n")
    with pytest.raises(SystemExit, match=r"holds no benchmarks-methods\*\.json"):
        list(method_tables.tables(tmp_path))


def test_a_gain_is_the_mean_of_the_seeds_with_their_outermost_ends() -> None:
    runs = [{"evaluation": {"rewards": {"r": {"difference": d, "interval": [a, b]}}}} for d, a, b in [(0.1, 0.0, 0.2), (0.3, -0.1, 0.4)]]
    assert method_tables.gain(runs, "r") == "+0.200 [-0.100, +0.400]"


def test_every_number_of_the_guide_was_measured() -> None:
    """Gains, queries and megabytes of the page's own words stand in its tables or on the pages that it links."""
    words, mark, tables = WHICH.partition(method_tables.BEGIN)
    pages = {path for path, _ in LINK.findall(words) if path.endswith(".md")}
    known = tables + "".join((TOP / "docs" / path).read_text(encoding="utf-8") for path in pages)
    numbers = re.findall(r"[+-]\d+\.\d+(?: \[[^]]+\])?|[\d,]+(?= (?:MB|queries|pairs))", words)
    assert mark
    assert len(numbers) > 40
    assert sorted({number for number in numbers if not re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d,]*\d)", known)}) == []


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[a](index.md#here)", None),
        ("[a](missing.md)", "'missing.md', but the target is not found"),
        ("[a](index.md#no)", "no such anchor"),
    ],
)
def test_a_broken_link_or_anchor_breaks_the_build(link: str, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Here\n\n{link}\n")
    chosen = {"nav": ["index.md"], "hooks": [], "plugins": [], "extra_css": [], "theme": {"name": "mkdocs"}}
    config = load_config(str(TOP / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), site_dir=str(tmp_path / "site"), **chosen)
    if said is None:
        build(config)
    else:
        with pytest.raises(Abort):
            build(config)
        assert said in caplog.text
    assert (tmp_path / "site" / "index.html").is_file()
