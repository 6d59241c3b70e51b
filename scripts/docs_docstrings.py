"""Griffe extension: docstrings as Markdown for the site."""

import re
from typing import Any

import griffe

SPAN = re.compile(r"^>>> (?:.+\n?)+|`[^`]+`|\]\[", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Fences doctests, and escapes shapes such as [N][T], which Markdown reads as links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object that was read from its source."""
        if obj.docstring:
            obj.docstring.value = SPAN.sub(_markdown, obj.docstring.value)


def _markdown(found: re.Match[str]) -> str:
    text = found[0]
    if text.startswith(">>>"):
        return f"```pycon\n{text.rstrip()}\n```\n"
    return "]\\[" if text == "][" else text
