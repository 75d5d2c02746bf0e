"""Text that users wrote (labels, prompts, names of folders), made plain for every place where it is shown.

A label may hold anything: `[/x]` is markup to rich, `$` begins a formula for matplotlib, `<script>` runs in a page.
HTML pages are made from templates that escape by themselves.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from urllib.parse import quote

from rich.console import Console

P = ParamSpec("P")
R = TypeVar("R")


def plain_console(width: int = 80) -> Console:
    """A console of rich that prints text as it is: no markup, no emoji."""
    return Console(width=width, markup=False, emoji=False)


def as_written(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator: labels of a matplotlib figure are text, in which a dollar sign begins no formula."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return drawn


def for_markdown(text: str) -> str:
    """Text for a line or a table's cell of Markdown; it stays on its line, and holds no HTML.

    >>> for_markdown("fashion_sd"), for_markdown("<b>*[x]|")
    ('fashion_sd', '&lt;b&gt;\\\\*\\\\[x\\\\]\\\\|')
    """
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = re.sub(r"([\\`*\[\]|~$!])", r"\\\1", plain)
    plain = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", plain)  # within a word it is none of Markdown's
    plain = re.sub(r"^(#+|[+-])(?=\s)", r"\\\1", plain)  # a heading, a list
    return re.sub(r"^(\d+)([.)]\s)", r"\1\\\2", plain)


def markdown_link(text: str, target: str) -> str:
    """A Markdown link; a target may hold any character."""
    return f"[{for_markdown(text)}]({quote(target, safe='/:.-_~')})"


def python_string(text: str) -> str:
    """Text as a literal of Python in double quotes."""
    return json.dumps(text, ensure_ascii=False)
