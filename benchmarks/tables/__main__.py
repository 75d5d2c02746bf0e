"""The documentation's tables: each row is one run; rows that are finished are not run again.

    python -m benchmarks.tables                                  # what is missing of every table, into docs/tables
    python -m benchmarks.tables --tables classes --rows sneaker  # of one table, rows with a name that matches

A row is finished if the table's JSON file in docs/tables holds it with the same flags and the same files that it
depends on (configuration, base weights); `--again true` runs every row anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.locks import FolderLock
from benchmarks.pages import into_page
from benchmarks.tables import TABLES
from benchmarks.tables.table import Table
from benchmarks.tables.workers import run_all


@dataclass
class TableConfig:
    """Which rows of which tables, and where they go."""

    tables: list[str] = field(default_factory=lambda: list(TABLES))
    rows: str = ""  # regular expression; only rows with a name that it matches somewhere
    docs: str = "docs/tables"  # Markdown and JSON of each table
    output_dir: str = "runs/tables"  # logs, caches and the runs
    workers: int = 2  # chains of rows run at once, each with its share of the cores
    again: bool = False  # run finished rows, too

    def __post_init__(self) -> None:
        for name in self.tables:
            if name not in TABLES:
                raise ValueError(f"unknown table {name!r}; known are {', '.join(TABLES)}")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, but must be at least 1")
        try:
            re.compile(self.rows)
        except re.error as error:
            raise ValueError(f"rows is no regular expression: {error}") from error


def write(table: Table, fresh: Mapping[str, Any], docs: Path) -> dict[str, Any]:
    """All finished rows, these among them, which are written in the table's order as JSON, as Markdown and as a
    picture, and into the pages that have their marks. What another command has finished meanwhile is kept."""
    docs.mkdir(parents=True, exist_ok=True)
    path = docs / f"{table.name}.json"
    with FolderLock(docs, wait_seconds=60):
        results = table.finished(path) | dict(fresh)
        if results:
            write_json(path, [results[row.name] for row in table.rows if row.name in results])
            for name, text in table.markdown(results).items():
                (docs / f"{name}.md").write_text(text, encoding="utf-8")
            if (picture := table.picture(results)) is not None:
                (docs / f"{table.name}.png").write_bytes(picture)
            for name, text in table.short_forms(results).items():
                for page in table.pages:
                    into_page(Path(page), name, text)
    return results


def build(table: Table, config: TableConfig) -> list[str]:
    """Run what is missing of a table, write it as its rows finish, print it; a line for each row that failed."""
    docs, output, failed = Path(config.docs), Path(config.output_dir), list[str]()
    fresh: dict[str, Any] = {}
    finished = {} if config.again else table.finished(docs / f"{table.name}.json")
    for wave in table.missing(finished, output, config.rows):
        chains = {chain[0].name: chain for chain in wave}
        jobs = {name: (chain, output) for name, chain in chains.items()}
        for name, metrics in run_all(table.run, jobs, config.workers, failed):
            fresh |= {
                row.name: table.result(row, row_metrics)
                for row, row_metrics in zip(chains[name], metrics, strict=True)
            }
            write(table, fresh, docs)
    if results := write(table, fresh, docs):
        for name, text in table.markdown(results).items():
            print(f"{name}\n\n{text}")
    return failed


def main(config: TableConfig) -> None:
    """All tables that were asked for.

    Raises:
        ValueError: rows failed; the others are written.
    """
    failed = [line for name in config.tables for line in build(TABLES[name](), config)]
    if failed:
        raise ValueError("rows failed, the others are written; " + "; ".join(failed))


if __name__ == "__main__":
    run_script(main, TableConfig)
