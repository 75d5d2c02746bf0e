"""The README's tables: one run of train_scripts/unlearn_sd.py per row; rows that are finished are not run again.

    python benchmarks/erasure_table.py                     # all tables, into docs/tables as the rows finish
    python benchmarks/erasure_table.py --tables '[classes]' # one of them

A row counts as finished if the table's JSON file in docs/tables holds it with the same flags and the same
configuration file; `--again true` runs every row anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pages import into_page
from rows import TABLES, Row, Table
from running import logged, require_all, run_rows, words_of

from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.workflow.settings import UnlearnConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_scripts"))

from unlearn_sd import main

CONFIG = Path("train_scripts/configs/fashion_class.yaml")
KEPT = ("unlearning_accuracy", "retain_accuracy_after")  # metrics whose count and 95 % interval stay in the JSON file


@dataclass
class TableConfig:
    """Which tables, where."""

    tables: list[str] = field(default_factory=lambda: list(TABLES))
    docs: str = "docs/tables"  # Markdown and JSON of each table
    readme: str = "README.md"  # gets each table between its marks
    output_dir: str = "runs/tables"  # logs, caches and the runs
    workers: int = 2  # chains of rows run at once, each with its share of the cores
    again: bool = False  # run finished rows, too

    def __post_init__(self) -> None:
        for name in self.tables:
            if name not in TABLES:
                raise ValueError(f"unknown table {name!r}; known are {', '.join(TABLES)}")


def run_chain(rows: Sequence[Row], output_dir: str, threads: int, keep: bool = False) -> list[dict[str, Any]]:
    """The metrics of each row, run one after another; what they print goes into log files. With `keep` the pipelines
    stay."""
    torch.set_num_threads(threads)
    results, base = [], None
    for row in rows:
        folder = Path(output_dir) / row.name
        flags = {**row.flags, "output_dir": folder, "cache_dir": Path(output_dir) / "cache", "report_to": "none"}
        flags |= {"overwrite_output_dir": True} | ({"pretrained_model_name_or_path": base} if base else {})
        with logged(output_dir, row.name):
            main(parse_config(UnlearnConfig, words_of(CONFIG, flags)))
        metrics, base = json.loads((folder / "metrics.json").read_text()), folder
        intervals = {key: metrics["details"][key] for key in KEPT}
        results.append({**{key: value for key, value in metrics.items() if key != "details"}, "intervals": intervals})
    for row in rows if not keep else []:  # the table needs the numbers and the pictures only
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            shutil.rmtree(Path(output_dir) / row.name / part, ignore_errors=True)
    return results


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Row name -> its entry in the table's JSON file, of rows run with today's configuration file."""
    entries = json.loads(path.read_text()) if path.is_file() else []
    return {entry["name"]: entry for entry in entries if entry["config"] == config_hash()}


def config_hash() -> str:
    """SHA-256 of the configuration file, whose settings hold where a row has no flag of its own."""
    return hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:16]


def value_of(metrics: dict[str, Any], key: str) -> float | None:
    """A metric, or the difference "a - b" of two; None where the run has none."""
    names = key.split(" - ")
    if any(name not in metrics for name in names):
        return None
    values = [metrics[name] for name in names]
    return values[0] if len(values) == 1 else values[0] - values[1]


def line(cells: Sequence[str], table: Table, group: Sequence[dict[str, Any]]) -> str:
    """A line with the means of the rows' metrics."""
    numbers = []
    for key in (*table.metrics.values(), "seconds_training"):
        values = [value for metrics in group if (value := value_of(metrics, key)) is not None]
        digits = 0 if key == "seconds_training" else 1
        numbers.append(f"{sum(values) / len(values) + 0.0:.{digits}f}" if values else "")
    return "| " + " | ".join([*cells, *numbers]) + " |"


def markdown(table: Table, entries: dict[str, dict[str, Any]]) -> str:
    """The finished rows as a Markdown table, means of the blocks below."""
    rows = [row for chain in table.chains for row in chain if row.name in entries]
    headings = list(rows[0].cells)
    lines = ["| " + " | ".join([*headings, *table.metrics, "seconds"]) + " |"]
    lines.append("|" + "---|" * len(headings) + "---:|" * (len(table.metrics) + 1))
    blocks: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        metrics = entries[row.name]["metrics"]
        lines.append(line(list(row.cells.values()), table, [metrics]))
        if table.mean_over:
            key = tuple(value for heading, value in row.cells.items() if heading != table.mean_over)
            blocks.setdefault(key, []).append(metrics)
    place = headings.index(table.mean_over) if table.mean_over else 0
    for key, group in blocks.items():
        if len(group) >= table.mean_of:
            lines.append(line([*key[:place], f"**mean of {len(group)}**", *key[place:]], table, group))
    return "\n".join(lines) + "\n"


def short_form(table: Table, entries: dict[str, dict[str, Any]]) -> str:
    """The headings of `table.across` as columns; each cell is unlearning accuracy / retain accuracy after."""
    rows = [row for chain in table.chains for row in chain if row.name in entries]
    down = [heading for heading in rows[0].cells if heading not in table.across]
    columns = list(dict.fromkeys(tuple(row.cells[heading] for heading in table.across) for row in rows))
    groups: dict[tuple[str, ...], dict[tuple[str, ...], list[dict[str, Any]]]] = {}
    for kind in ("rows", "means"):  # the means of the rows' blocks come last
        for row in rows:
            key = tuple(row.cells[heading] for heading in down)
            if kind == "means":
                key = tuple("**mean**" if heading == table.mean_over else row.cells[heading] for heading in down)
            column = tuple(row.cells[heading] for heading in table.across)
            groups.setdefault(key, {}).setdefault(column, []).append(entries[row.name]["metrics"])
    titles = [
        ", ".join(f"{head} {value}" for head, value in zip(table.across, column, strict=True)) for column in columns
    ]
    lines = ["| " + " | ".join([*down, "retain before", *titles]) + " |"]
    lines.append("|" + "---|" * len(down) + "---:|" * (len(columns) + 1))
    for key, found in groups.items():
        every = [metrics for group in found.values() for metrics in group]
        cells = [*key, f"{mean(every, 'retain_accuracy_before'):.1f}"]
        for column in columns:
            pair = ("unlearning_accuracy", "retain_accuracy_after")
            cells.append(" / ".join(f"{mean(found[column], name):.1f}" for name in pair) if column in found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean(group: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of a metric over runs."""
    return sum(metrics[key] for metrics in group) / len(group)


def write(name: str, table: Table, entries: dict[str, dict[str, Any]], docs: Path, page: Path) -> None:
    """The finished rows, in the table's order, as JSON and as Markdown, and in the README."""
    docs.mkdir(parents=True, exist_ok=True)
    order = [row.name for chain in table.chains for row in chain if row.name in entries]
    write_json(docs / f"{name}.json", [entries[row] for row in order])
    (docs / f"{name}.md").write_text(markdown(table, entries), encoding="utf-8")
    into_page(page, name, short_form(table, entries) if table.across else markdown(table, entries))


def build(config: TableConfig) -> None:
    """Run what is missing, write each table as its rows finish, print them."""
    docs = Path(config.docs)
    tables = {name: TABLES[name]() for name in config.tables}
    done = {name: {} if config.again else finished(docs / f"{name}.json") for name in tables}
    missing = {
        f"{name}/{chain[0].name}": chain
        for name, table in tables.items()
        for chain in table.chains
        if any(done[name].get(row.name, {}).get("flags") != row.flags for row in chain)
    }
    failed: list[str] = []
    for place, results in run_rows(run_chain, missing, config.output_dir, config.workers, failed):
        name = place.partition("/")[0]
        for row, metrics in zip(missing[place], results, strict=True):
            known = {"name": row.name, "config": config_hash(), "cells": row.cells, "flags": row.flags}
            done[name][row.name] = {**known, "metrics": metrics}
        write(name, tables[name], done[name], docs, Path(config.readme))
    require_all(failed)
    for name, table in tables.items():
        write(name, table, done[name], docs, Path(config.readme))
        print(f"{name}\n\n{markdown(table, done[name])}")


if __name__ == "__main__":
    run_script(build, TableConfig)
