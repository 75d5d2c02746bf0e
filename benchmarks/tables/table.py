"""What every table is: rows, the runs behind them, and which of them are finished."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from accelerate.state import AcceleratorState

from barrier_diffusers.utils.command_line import parse_config

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    cells: dict[str, str]  # heading -> what tells this line from the others
    flags: dict[str, Any]  # dotted settings that differ from the configuration file

    @property
    def name(self) -> str:
        """Of the run's folder and log, and in the JSON file."""
        return re.sub(r"[^\w.-]+", "_", "-".join(self.cells.values()).replace("%", "percent"))


@dataclass(kw_only=True)
class Table:
    """Rows in chains, which run independently of one another; a subclass says how a chain runs and what is shown.

    A row is finished if the JSON file has it with the same flags and the same hash of the files that decide about it.
    """

    config: ClassVar[str]  # configuration file whose settings hold where a row has no flag of its own

    name: str  # of the JSON file in docs/tables
    chains: list[list[Row]]
    pages: tuple[str, ...] = ()  # Markdown pages that have the table between marks

    @property
    def rows(self) -> list[Row]:
        """All rows in their order in the table."""
        return [row for chain in self.chains for row in chain]

    def files(self, row: Row) -> list[str]:
        """The files that decide about the row's numbers."""
        return [self.config]

    def hash_of(self, row: Row) -> str:
        """SHA-256 of the files that decide about the row's numbers, its first 16 digits."""
        return hashlib.sha256(b"".join(Path(path).read_bytes() for path in self.files(row))).hexdigest()[:16]

    def made_of(self, row: Row) -> dict[str, Any]:
        """What decides about the row's numbers, as the JSON file notes it."""
        return {"config": self.hash_of(row), "flags": row.flags}

    def result(self, row: Row, metrics: Metrics) -> dict[str, Any]:
        """What the JSON file says of a row."""
        return {"name": row.name, "cells": row.cells, **self.made_of(row), "metrics": metrics}

    def finished(self, path: Path) -> dict[str, dict[str, Any]]:
        """Row name -> what the JSON file says of it, of the rows that need not run again."""
        found = {result["name"]: result for result in (json.loads(path.read_text()) if path.is_file() else [])}
        return {
            row.name: found[row.name]
            for row in self.rows
            if row.name in found and self.made_of(row).items() <= found[row.name].items()
        }

    def missing(self, results: Mapping[str, Any], output: Path, rows: str = "") -> list[list[list[Row]]]:
        """The chains that have to run, in waves; a wave starts when the one before has ended.

        Args:
            results: of the finished rows; what has to run again is taken out.
            output: folder of the runs.
            rows: regular expression; only chains with a row whose name it matches somewhere.
        """
        wanted = [chain for chain in self.chains if any(re.search(rows, row.name) for row in chain)]
        return [[chain for chain in wanted if any(row.name not in results for row in chain)]]

    def run(self, chain: Sequence[Row], output: Path) -> list[Metrics]:
        """Run the rows of a chain one after another; the numbers that are kept of each."""
        raise NotImplementedError

    def markdown(self, results: Mapping[str, Any]) -> dict[str, str]:
        """Name of a Markdown file in docs/tables -> the finished rows as a table."""
        raise NotImplementedError

    def picture(self, results: Mapping[str, Any]) -> bytes | None:
        """The finished rows as a PNG file; None: the table has no picture."""
        return None

    def short_forms(self, results: Mapping[str, Any]) -> dict[str, str]:
        """Name of the marks in `pages` -> what stands between them; here what `markdown` gives."""
        return self.markdown(results)


def words_of(config: Path | str | None, flags: Mapping[str, Any]) -> list[str]:
    """A configuration file and the settings that differ from it, as words of a command line."""
    words = ["--config", str(config)] if config is not None else []
    for name, value in flags.items():
        words += [f"--{name}", "null" if value is None else str(value)]
    return words


@dataclass(frozen=True)
class Script:
    """A script of the repository that is run in this process."""

    module: str  # has `main`
    settings: str  # "module:class" of its dataclass

    def parse(self, config: str | None, flags: Mapping[str, Any]) -> Any:
        """Its settings from a configuration file and the flags that differ."""
        module, name = self.settings.split(":")
        return parse_config(getattr(importlib.import_module(module), name), words_of(config, flags))

    def run(self, config: str | None, flags: Mapping[str, Any], log: Path) -> None:
        """Run it; what it prints goes into a log file."""
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the last run's precision
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            importlib.import_module(self.module).main(self.parse(config, flags))


def log_of(output: Path, name: str) -> Path:
    """The log file of a run."""
    return output / "logs" / f"{name}.log"


def lines_of(headings: Sequence[str], num_words: int, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first `num_words` columns are words and whose others are numbers."""
    lines = ["| " + " | ".join(headings) + " |"]
    lines.append("|" + "---|" * num_words + "---:|" * (len(headings) - num_words))
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def value_of(metrics: Mapping[str, Any], key: str) -> float | None:
    """A metric, or the difference "a - b" of two; None where the run has none."""
    names = key.split(" - ")
    if any(name not in metrics for name in names):
        return None
    values = [metrics[name] for name in names]
    return values[0] if len(values) == 1 else values[0] - values[1]


@dataclass(kw_only=True)
class MeansTable(Table):
    """A table with a column for each metric, and below it the means over blocks of rows."""

    metrics: dict[str, str] = field(default_factory=dict)  # heading -> key in a row's numbers, or "a - b"
    mean_over: str | None = None  # heading whose rows are averaged below the table
    mean_of: int = 2  # at least so many rows, so that means below one another are of the same ones
    across: tuple[str, ...] = ()  # headings that run across the page in the short form

    def _numbers(self, group: Sequence[Metrics]) -> list[str]:
        """The means of the rows' metrics as cells."""
        cells = []
        for key in (*self.metrics.values(), "seconds_training"):
            values = [value for metrics in group if (value := value_of(metrics, key)) is not None]
            digits = 0 if key == "seconds_training" else 1
            cells.append(f"{sum(values) / len(values) + 0.0:.{digits}f}" if values else "")
        return cells

    def markdown(self, results: Mapping[str, Any]) -> dict[str, str]:
        """The finished rows, means of the blocks below."""
        rows = [row for row in self.rows if row.name in results]
        headings = list(rows[0].cells)
        lines: list[list[str]] = []
        blocks: dict[tuple[str, ...], list[Metrics]] = {}
        for row in rows:
            metrics = results[row.name]["metrics"]
            lines.append([*row.cells.values(), *self._numbers([metrics])])
            if self.mean_over:
                key = tuple(value for heading, value in row.cells.items() if heading != self.mean_over)
                blocks.setdefault(key, []).append(metrics)
        position = headings.index(self.mean_over) if self.mean_over else 0
        for key, group in blocks.items():
            if len(group) >= self.mean_of:
                words = [*key[:position], f"**mean of {len(group)}**", *key[position:]]
                lines.append([*words, *self._numbers(group)])
        return {self.name: lines_of([*headings, *self.metrics, "seconds"], len(headings), lines)}

    def short_forms(self, results: Mapping[str, Any]) -> dict[str, str]:
        """The headings of `across` as columns; each cell is unlearning accuracy / retain accuracy after."""
        if not self.across:
            return self.markdown(results)
        rows = [row for row in self.rows if row.name in results]
        down = [heading for heading in rows[0].cells if heading not in self.across]
        columns = list(dict.fromkeys(tuple(row.cells[heading] for heading in self.across) for row in rows))
        groups: dict[tuple[str, ...], dict[tuple[str, ...], list[Metrics]]] = {}
        for averaged in (False, True):  # the means of the rows' blocks come last
            for row in rows:
                key = tuple(
                    "**mean**" if averaged and heading == self.mean_over else row.cells[heading] for heading in down
                )
                column = tuple(row.cells[heading] for heading in self.across)
                groups.setdefault(key, {}).setdefault(column, []).append(results[row.name]["metrics"])
        titles = [
            ", ".join(f"{head} {value}" for head, value in zip(self.across, column, strict=True)) for column in columns
        ]
        lines = []
        for key, found in groups.items():
            every = [metrics for group in found.values() for metrics in group]
            cells = [*key, f"{mean(every, 'retain_accuracy_before'):.1f}"]
            for column in columns:
                pair = ("unlearning_accuracy", "retain_accuracy_after")
                cells.append(
                    " / ".join(f"{mean(found[column], name):.1f}" for name in pair) if column in found else ""
                )
            lines.append(cells)
        return {self.name: lines_of([*down, "retain before", *titles], len(down), lines)}


def mean(group: Sequence[Metrics], key: str) -> float:
    """Mean of a metric over runs."""
    return sum(metrics[key] for metrics in group) / len(group)
