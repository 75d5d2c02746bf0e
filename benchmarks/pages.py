"""Tables between marks in Markdown pages."""

from __future__ import annotations

from pathlib import Path


def into_page(page: Path, name: str, text: str) -> None:
    """Put a table between its two marks in a Markdown page, if the page has them."""
    begin, end = f"<!-- table {name} -->\n", f"<!-- end of table {name} -->"
    content = page.read_text(encoding="utf-8")
    if begin in content:
        head, rest = content.split(begin, 1)
        page.write_text(head + begin + text + end + rest.split(end, 1)[1], encoding="utf-8")
