"""An extension of griffe, which reads the docstrings for the site: a comment behind a field, or a protocol's member, is its docstring."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path
from typing import Any

import griffe


class Comments(griffe.Extension):
    """`image: Tensor | None = None  # (B, 3, H, W) in [0, 1]` says its shape where the field stands; the page shall say it too."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        add_comment(attr)

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        add_comment(func)


def add_comment(thing: griffe.Attribute | griffe.Function) -> None:
    file = thing.filepath
    if thing.docstring is None and thing.parent is not None and thing.parent.is_class and thing.endlineno and isinstance(file, Path):
        said = comment_of(thing.lines_collection[file][thing.endlineno - 1])
        if said:
            thing.docstring = griffe.Docstring(f"{said[0].upper()}{said[1:]}.", lineno=thing.endlineno, parent=thing)


def comment_of(line: str) -> str | None:
    """What stands behind the code of a line."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except tokenize.TokenError:  # the line is the end of a longer statement
        return None
    return next((token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT and token.start[1] > 0), None)
