"""The README's table: every class erased with and without protection; finished rows are not run again.

    python benchmarks/erasure_table.py                # all rows, into docs/erasure_table.md and .json as they finish
    python benchmarks/erasure_table.py --only sneaker # the rows of one class

Each row is one run of train_scripts/unlearn_sd.py with the settings of its manifest.json under runs/table: the default
configuration, but for the flags of `Row.overrides` and shorter (100 steps on a cosine schedule, 30 images a class).
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from barrier_diffusers.settings import UnlearnConfig
from barrier_diffusers.training import parse_config, run_script

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_scripts"))

from unlearn_sd import main

CONFIG = Path("train_scripts/configs/fashion_class.yaml")
# The class whose pictures are nearest: what the erased class's prompt shows instead.
ANCHORS = {
    "bag": "boot",
    "boot": "sneaker",
    "coat": "pullover",
    "dress": "shirt",
    "pullover": "coat",
    "sandal": "sneaker",
    "shirt": "t-shirt",
    "sneaker": "boot",
    "t-shirt": "shirt",
    "trouser": "dress",
}
SHORT_LIST = ("sneaker", "dress", "bag")  # classes of the ga and LoRA rows


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    concept: str
    objective: str
    weights: str  # full, or "LoRA 16"
    alpha: float
    weight: float  # lambda_interval; 0 = no protection

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        weights = self.weights.replace(" ", "").lower()
        return f"{self.concept}-{self.objective}-{weights}-alpha{self.alpha:g}-lambda{self.weight:g}"

    def overrides(self) -> list[str]:
        """The flags that turn the default configuration into this row."""
        flags = {
            "concept": self.concept,
            "objective.name": self.objective,
            "objective.anchor": ANCHORS[self.concept] if self.objective == "rl" else "null",
            "objective.alpha": self.alpha,
            "barrier.lambda_interval": self.weight,
            "max_train_steps": 100,
            "lr_scheduler": "cosine",
            "evaluation.images_per_label": 30,
        }
        if self.weights != "full":
            flags |= {"rank": self.weights.split()[1], "learning_rate": LORA_LEARNING_RATE}
        if self.objective == "ga":
            flags |= {"max_train_steps": GA_STEPS, "learning_rate": GA_LEARNING_RATE}
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


WEIGHTS = {0.0: 1.0, 1.0: 0.1}  # alpha -> lambda_interval of the protected rows
LORA_LEARNING_RATE = 1e-3
GA_STEPS = 40
GA_LEARNING_RATE = 1e-4


def all_rows() -> list[Row]:
    """Ten classes with rl and full weights, three with ga and with LoRA; each with and without protection."""
    rows = []
    for alpha, weight in WEIGHTS.items():
        for lambda_interval in (0.0, weight):
            rows += [Row(concept, "rl", "full", alpha, lambda_interval) for concept in ANCHORS]
    for alpha, weight in WEIGHTS.items():
        for lambda_interval in (0.0, weight):
            rows += [Row(concept, "ga", "full", alpha, lambda_interval) for concept in SHORT_LIST]
            rows += [Row(concept, "rl", "LoRA 16", alpha, lambda_interval) for concept in SHORT_LIST]
    return rows


@dataclass
class TableConfig:
    """Which rows, where."""

    output_dir: str = "runs/table"
    markdown: str = "docs/erasure_table.md"
    only: str | None = None  # a class name: just its rows, nothing written to docs
    workers: int = 2  # rows run at once, each with its share of the cores


def run_row(row: Row, output_dir: str, threads: int) -> dict[str, Any]:
    """Run one row unless its metrics are there with the same settings; returns the metrics."""
    torch.set_num_threads(threads)
    folder = Path(output_dir) / row.folder
    fixed = ["--output_dir", str(folder), "--cache_dir", str(Path(output_dir) / "cache"), "--report_to", "none"]
    fixed += ["--overwrite_output_dir", "true"]
    config = parse_config(UnlearnConfig, ["--config", str(CONFIG), *fixed, *row.overrides()])
    manifest = folder / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text())["settings"] == json.loads(json.dumps(asdict(config))):
        return json.loads((folder / "metrics.json").read_text())
    main(config)
    for heavy in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):  # the table needs the numbers only
        shutil.rmtree(folder / heavy, ignore_errors=True)
    return json.loads((folder / "metrics.json").read_text())


def run_quietly(arguments: tuple[Row, str, int]) -> dict[str, Any]:
    """`run_row` with its output in the row's own log file."""
    row, output_dir, threads = arguments
    log = Path(output_dir) / "logs" / f"{row.folder}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        sys.stdout = sys.stderr = file
        try:
            return run_row(row, output_dir, threads)
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def markdown_table(results: list[tuple[Row, dict[str, Any]]]) -> str:
    """One line per row of the table, means of the ten-class blocks below."""
    lines = [
        "| class | objective | weights | alpha | lambda | UA | retain before | retain after | drop | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    blocks: dict[tuple, list[dict[str, Any]]] = {}
    for row, metrics in results:
        key = (row.objective, row.weights, row.alpha, row.weight)
        blocks.setdefault(key, []).append(metrics)
        lines.append(table_line(row.concept, key, [metrics]))
    lines += [table_line(f"**mean of {len(block)}**", key, block) for key, block in blocks.items()]
    return "\n".join(lines) + "\n"


def table_line(name: str, key: tuple, metrics: list[dict[str, Any]]) -> str:
    """A line with the means of the metrics."""
    columns = ("unlearning_accuracy", "retain_accuracy_before", "retain_accuracy_after", "retain_accuracy_drop")
    means = [sum(entry[column] for entry in metrics) / len(metrics) for column in columns]
    seconds = sum(entry["seconds_training"] for entry in metrics) / len(metrics)
    objective, weights, alpha, weight = key
    settings = f"{objective} | {weights} | {alpha:g} | {weight:g}"
    return f"| {name} | {settings} | " + " | ".join(f"{value:.1f}" for value in means) + f" | {seconds:.0f} |"


def write_table(results: list[tuple[Row, dict[str, Any]]], path: Path) -> None:
    """The finished rows as Markdown, and with all their metrics as JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown_table(results))
    content = [{**asdict(row), "metrics": entry} for row, entry in results]
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def build(config: TableConfig) -> None:
    """Run what is missing, write the table."""
    rows = [row for row in all_rows() if config.only in (None, row.concept)]
    if not rows:
        raise SystemExit(f"error: no row for class {config.only!r}; the classes are {', '.join(ANCHORS)}")
    threads = max(1, torch.get_num_threads() // config.workers)
    jobs = [(row, config.output_dir, threads) for row in rows]
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        results = []
        for row, metrics in zip(rows, tqdm(pool.map(run_quietly, jobs), total=len(jobs), desc="rows"), strict=True):
            results.append((row, metrics))
            if config.only is None:
                write_table(results, Path(config.markdown))
    print(markdown_table(results))


if __name__ == "__main__":
    run_script(build, TableConfig)
