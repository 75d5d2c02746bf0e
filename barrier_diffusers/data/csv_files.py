"""CSV files, read strictly: what does not fit is refused with the file and the line, never guessed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a mark at its beginning.

    Raises:
        ValueError: another encoding; the message names the file.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{str(path)!r} is not in UTF-8 ({at}): save it in UTF-8") from error


class CsvFile:
    """A CSV file with a line of column names.

    Args:
        path: the file.
        must_fill: a column whose absence from a short row is left to the caller, who knows a better message.

    Raises:
        ValueError: not in UTF-8, or no readable first line.
    """

    def __init__(self, path: Path, must_fill: str | None = None):
        self.path, self.must_fill = path, must_fill
        self.reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        try:
            self.columns = list(self.reader.fieldnames or [])
        except csv.Error as error:
            raise ValueError(f"{str(path)!r}, line 1: {error}") from error
        twice = next((name for name in self.columns if self.columns.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{str(path)!r} has two columns {twice!r}")

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        """(line, cells by column) of every row.

        Raises:
            ValueError: a quote that is never closed, or another number of cells than there are columns.
        """
        while True:
            try:
                row = next(self.reader, None)
            except csv.Error as error:
                said = "a quote is never closed" if "unexpected end" in str(error) else str(error)
                begun = self.reader.line_num + 1  # the row begins where the last whole one ended
                raise ValueError(f"{str(self.path)!r}, line {begun}: {said}") from error
            if row is None:
                return
            line, short = self.reader.line_num, None in row.values()
            if None in row or (short and (self.must_fill is None or row.get(self.must_fill) is not None)):
                raise ValueError(
                    f"{str(self.path)!r}, line {line}: {'fewer' if short else 'more'} cells than columns; text with a "
                    "comma stands in double quotes"
                )
            yield line, {name: cell or "" for name, cell in row.items()}
