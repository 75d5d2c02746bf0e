"""The DDPM table: one run of ddpm_ext/unlearn.py per row; rows that are finished are not run again.

    python benchmarks/ddpm_table.py                       # all rows, into docs/tables as they finish
    python benchmarks/ddpm_table.py --labels '[sneaker]'

A row counts as finished if docs/tables/ddpm.json holds it with the same flags, configuration file and base weights;
`--again true` runs every row anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from ddpm_rows import LABELS, ddpm
from erasure_table import markdown, write
from rows import Row
from running import logged, require_all, run_rows, words_of

from barrier_diffusers.utils.command_line import parse_config, run_script
from ddpm_ext.settings import UnlearnConfig
from ddpm_ext.unlearn import main

CONFIG = Path("ddpm_ext/configs/unlearn_fashion.yaml")
WEIGHTS = Path("assets/fashion_ddpm/unet/diffusion_pytorch_model.safetensors")
NAME = "ddpm"
KEPT = ("unlearning_accuracy", "retain_accuracy_before", "retain_accuracy_after")  # their counts and intervals stay


@dataclass
class TableConfig:
    """Which rows, where."""

    labels: list[str] = field(default_factory=lambda: list(LABELS))
    docs: str = "docs/tables"  # Markdown and JSON
    page: str = "ddpm_ext/README.md"  # gets the table between its marks
    output_dir: str = "runs/ddpm_table"  # logs, caches and the runs
    workers: int = 2  # rows run at once, each with its share of the cores
    again: bool = False  # run finished rows, too

    def __post_init__(self) -> None:
        for label in self.labels:
            if label not in LABELS:
                raise ValueError(f"unknown label {label!r} in labels; known are {', '.join(LABELS)}")


def base_hash() -> str:
    """Of the configuration file and the base weights, which every row depends on."""
    return hashlib.sha256(CONFIG.read_bytes() + WEIGHTS.read_bytes()).hexdigest()[:16]


def numbers_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the table and its JSON file keep of a run's metrics, in one level."""
    kept = {key: value for key, value in metrics.items() if not isinstance(value, dict | list)}
    after = metrics["retained_after"]
    kept |= {key: value for key, value in after.items() if key != "details"}
    kept |= {f"{key}_before": value for key, value in metrics["retained_before"].items() if key != "details"}
    kept |= {f"after_{entry['attack']}": entry["post_attack"]["value"] for entry in metrics["attacks"]}
    intervals = {key: metrics["details"][key] for key in KEPT}
    per_label = {key: value for key, value in metrics.items() if key.startswith("per_class")}
    facts = {key: metrics[key] for key in ("drift", "seeds", "sampling", "judge", "attacks")}
    return {**kept, **per_label, **facts, "intervals": intervals, "fidelity": after["details"]}


def run_row(row: Row, output_dir: str, threads: int) -> dict[str, Any]:
    """The numbers of one row; what it prints goes into a log file."""
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the last run's precision
    folder = Path(output_dir) / row.name
    flags = {**row.flags, "output_dir": folder, "cache_dir": Path(output_dir) / "cache", "report_to": "none"}
    flags |= {"overwrite_output_dir": True}
    with logged(output_dir, row.name):
        main(parse_config(UnlearnConfig, words_of(CONFIG, flags)))
    for part in ("unet", "scheduler"):  # the table needs the numbers and the pictures only
        shutil.rmtree(folder / part, ignore_errors=True)
    return numbers_of(json.loads((folder / "metrics.json").read_text()))


def build(config: TableConfig) -> None:
    """Run what is missing, write the table as its rows finish, print it."""
    docs, page, table, base = Path(config.docs), Path(config.page), ddpm(), base_hash()
    path, every = docs / f"{NAME}.json", {row.name: row for chain in table.chains for row in chain}
    known = json.loads(path.read_text()) if path.is_file() else []
    done = {
        entry["name"]: entry
        for entry in known
        if entry["name"] in every and (entry["flags"], entry["config"]) == (every[entry["name"]].flags, base)
    }
    wanted = [row for row in every.values() if row.cells["label"] in config.labels]
    missing = {row.name: row for row in wanted if config.again or row.name not in done}
    failed: list[str] = []
    for name, metrics in run_rows(run_row, missing, config.output_dir, config.workers, failed):
        row = missing[name]
        known = {"name": name, "config": base, "cells": row.cells, "flags": row.flags}
        done[name] = {**known, "metrics": metrics}
        write(NAME, table, done, docs, page)
    if done:
        print(markdown(table, done))
    require_all(failed)


if __name__ == "__main__":
    run_script(build, TableConfig)
