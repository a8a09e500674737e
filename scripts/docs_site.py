"""What mkdocs calls while it builds the site (mkdocs.yml, `make docs`): pages whose text stands elsewhere, so that nothing stands twice.

README.md is the front page; CONTRIBUTING.md and CHANGELOG.md are pages. Their links are those of the repository's top level, and are turned
to where the site has the same file. The page of the commands ends in what each command's `--help` prints.
"""

from __future__ import annotations

import contextlib
import html as markup
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

TOP = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "LICENSE": "LICENSE.txt"}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")
INTERVAL = re.compile(r"[+-]?\d+\.\d+ (\[[+-]?\d+\.\d+, [+-]?\d+\.\d+\]|\([+-]?\d+\.\d+ to [+-]?\d+\.\d+\))")
COLUMNS = "96"  # of the help pages: what a page is wide


def on_config(config: Any) -> Any:
    """Anchors are GitHub's, so that a link to a section works in both places."""
    config.mdx_configs["toc"]["slugify"] = anchor
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie at the top level."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (TOP / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=as_page(text) if page.endswith(".md") else text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Three pages end in what the code says."""
    ends = {
        "commands.md": help_pages,
        "reference/methods.md": lambda: classes("methods"),
        "reference/rewards.md": lambda: classes("rewards"),
    }
    made = ends.get(page.file.src_uri)
    return markdown + "".join(made()) if made else markdown


def on_page_content(html: str, **_: Any) -> str:
    """A number and its interval stay on one line: tables are hard to read otherwise."""
    return INTERVAL.sub(lambda found: found[0].replace(" ", "&nbsp;"), html)


def anchor(heading: str, separator: str = "-") -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def as_page(text: str) -> str:
    """A file of the top level as a page of the site: its links lead where the site has what they lead to."""
    return LINK.sub(lambda found: found[1] + (PAGES.get(found[2]) or found[2].removeprefix("docs/")), text)


def help_of(*words: str) -> str:
    """What `diffalign WORDS --help` prints."""
    from diffalign import cli

    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):  # argparse ends the process after its help
            if status := cli.main([*words, "--help"]):
                raise RuntimeError(f"diffalign {' '.join(words)} --help ended with status {status}.")
    finally:
        del os.environ["COLUMNS"]
        os.environ |= {} if before is None else {"COLUMNS": before}
    return printed.getvalue()


def help_pages() -> Iterator[str]:
    """Markdown: a section for each command, and for the commands of a command, with what its `--help` prints."""
    from diffalign.commands import COMMANDS

    for name, about in COMMANDS.items():
        text = help_of(name)
        yield f"\n\n## diffalign {name}\n\n{about[0].upper()}{about[1:]}.\n\n{_as_printed(text)}"
        for inner in dict.fromkeys(re.findall(rf"^(?:usage:)? +diffalign {name} (\w+)", text, re.MULTILINE)):
            yield f"\n\n### diffalign {name} {inner}\n\n{_as_printed(help_of(name, inner))}"


def classes(kind: Literal["methods", "rewards"]) -> Iterator[str]:
    """Markdown: a section for each class of a table of the registry, with the names that it goes by there."""
    from diffalign.registry import TABLES

    names: dict[str, list[str]] = {}
    for name, entry in TABLES[kind].items():
        names.setdefault(entry.target, []).append(name)
    for target, all_names in names.items():
        yield f"\n\n## {', '.join(all_names)}\n\n" + "\n".join(f"- `{name}`: {TABLES[kind][name].summary}" for name in all_names)
        yield f"\n\n::: {target.replace(':', '.')}\n    options: {{heading_level: 3, show_signature: false}}"


def _as_printed(text: str) -> str:
    return f'<pre class="help"><code>{markup.escape(text.strip())}</code></pre>'
