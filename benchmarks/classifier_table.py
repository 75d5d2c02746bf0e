"""The classifier table: one run of classification_ext per row; rows that are finished are not run again.

    python benchmarks/classifier_table.py                  # everything, into docs/tables as the rows finish
    python benchmarks/classifier_table.py --methods '[retraining, "rl, BARRIER"]'

A row counts as finished if docs/tables/classifier.json holds it with the same flags, configuration file and base
weights; `--again true` runs every row anew. Gaps are taken between means over the seeds, case by case.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from classifier_rows import CLASSES, METHODS, ORIGINAL, RANDOM, REFERENCE, SEEDS, Row, rows
from pages import into_page
from running import logged, require_all, run_rows, words_of

from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.utils.files import write_json
from classification_ext import evaluate, unlearn
from classification_ext.metrics import HEADLINE, SHORT, gap
from classification_ext.settings import EvaluateConfig, UnlearnConfig

BASE = Path("assets/fashion_resnet/model.safetensors")
KEPT = (*HEADLINE, "unlearning_accuracy_test", "mia_features", "lira")
FACTS = ("num_steps", "seconds_training", "seconds_set_up", "trained_percent")


@dataclass
class TableConfig:
    """Which rows, where."""

    methods: list[str] = field(default_factory=lambda: [REFERENCE, ORIGINAL, *METHODS])
    cases: list[str] = field(default_factory=lambda: [*CLASSES, RANDOM])
    docs: str = "docs/tables"  # Markdown and JSON
    page: str = "classification_ext/README.md"  # gets the tables between its marks
    output_dir: str = "runs/classifier_table"  # logs, and the retrained classifiers
    workers: int = 1  # rows run at once, each with its share of the cores
    again: bool = False  # run finished rows, too

    def __post_init__(self) -> None:
        known = {"methods": [REFERENCE, ORIGINAL, *METHODS], "cases": [*CLASSES, RANDOM]}
        for name, values in known.items():
            for value in getattr(self, name):
                if value not in values:
                    raise ValueError(f"unknown value {value!r} in {name}; known are {', '.join(values)}")


def fingerprint(row: Row) -> str:
    """Of everything that decides about a row's numbers."""
    digest = hashlib.sha256(Path(row.config).read_bytes())
    if row.method != REFERENCE:
        digest.update(BASE.read_bytes())
    digest.update(json.dumps(row.flags, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def folder_of(row: Row, output_dir: str) -> Path:
    """Where its run writes."""
    return Path(output_dir) / row.name


def shadows(row: Row, output_dir: str) -> list[str]:
    """Retrained classifiers of the row's case with the other seeds: they never saw the forget photos."""
    if row.case != RANDOM:
        return []
    others = [Row(row.case, REFERENCE, seed) for seed in SEEDS if seed != row.seed]
    return [str(folder_of(other, output_dir)) for other in others]


def run_row(row: Row, output_dir: str, threads: int) -> dict[str, Any]:
    """The numbers of one row; what it prints goes into a log file."""
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the last run's precision
    folder = folder_of(row, output_dir)
    flags = {**row.flags, "output_dir": folder, "overwrite_output_dir": True}
    if row.method != REFERENCE:  # a retrained model would be its own shadow's equal
        flags["evaluation.shadow_models"] = json.dumps(shadows(row, output_dir))
    with logged(output_dir, row.name):
        config = parse_config(UnlearnConfig, words_of(row.config, flags))
        if row.method == ORIGINAL:
            judged = {name: getattr(config, name) for name in EvaluateConfig.__dataclass_fields__}
            evaluate.main(EvaluateConfig(**judged))
            content = json.loads((folder / evaluate.EVALUATION_NAME).read_text())["metrics"]
        else:
            unlearn.main(config)
            content = json.loads((folder / "metrics.json").read_text())
    if row.method != REFERENCE:
        for path in folder.glob("*.safetensors"):  # the table needs the numbers only
            path.unlink()
    return {name: content[name] for name in (*KEPT, *FACTS) if name in content}


def finished(path: Path, wanted: Sequence[Row], output_dir: str) -> dict[str, dict[str, Any]]:
    """Row name -> its entry in the JSON file, where nothing that decides about it has changed since.

    A retrained classifier of the random photos that is gone is made again as long as another row needs it.
    """
    entries = json.loads(path.read_text()) if path.is_file() else {}
    valid = {row.name for row in rows() if entries.get(row.name, {}).get("fingerprint") == fingerprint(row)}
    kept = {name: entry for name, entry in entries.items() if name in valid}
    if any(row.case == RANDOM and row.method != REFERENCE and row.name not in kept for row in wanted):
        for seed in SEEDS:
            shadow = Row(RANDOM, REFERENCE, seed)
            if not (folder_of(shadow, output_dir) / "model.safetensors").is_file():
                kept.pop(shadow.name, None)
    return kept


def mean_and_spread(values: Sequence[float]) -> str:
    """ "mean ± standard deviation"."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


def means(entries: dict[str, Any], case: str, method: str) -> dict[str, float] | None:
    """UA, RA, TA, MIA of a method on a case, averaged over the seeds; None while any is missing."""
    found = [entries.get(Row(case, method, seed).name) for seed in SEEDS]
    if any(entry is None for entry in found):
        return None
    return {name: statistics.mean(entry["metrics"][name] for entry in found) for name in HEADLINE}


def other_seeds(entries: dict[str, Any], case: str) -> float:
    """The average gap of one retrained model to the mean of the other two, over the seeds: what chance alone does."""
    numbers = [entries[Row(case, REFERENCE, seed).name]["metrics"] for seed in SEEDS]
    gaps = []
    for index, own in enumerate(numbers):
        others = [entry for place, entry in enumerate(numbers) if place != index]
        gaps.append(gap(own, {name: statistics.mean(e[name] for e in others) for name in HEADLINE})["average_gap"])
    return statistics.mean(gaps)


def table_line(entries: dict[str, Any], cases: Sequence[str], method: str) -> str | None:
    """A method over some cases: means over the cases with the spread over the seeds; None while rows are missing."""
    by_case = {case: means(entries, case, method) for case in cases}
    reference = {case: means(entries, case, REFERENCE) for case in cases}
    if any(values is None for values in (*by_case.values(), *reference.values())):
        return None
    runs = {seed: [entries[Row(case, method, seed).name]["metrics"] for case in cases] for seed in SEEDS}

    def over_seeds(read: Any) -> list[float]:
        return [statistics.mean(read(entry) for entry in group) for group in runs.values()]

    cells = [method]
    cells += [mean_and_spread(over_seeds(lambda entry, name=name: entry[name])) for name in HEADLINE]
    if method == REFERENCE:
        gaps = [other_seeds(entries, case) for case in cases]
    else:
        gaps = [gap(by_case[case], reference[case])["average_gap"] for case in cases]
    cells.append(f"{statistics.mean(gaps):.2f}")
    cells.append(f"{max(gaps):.2f}" if len(cases) > 1 else _lira(runs))
    has_run = method != ORIGINAL
    seconds = over_seeds(lambda entry: entry.get("seconds_training", 0.0) + entry.get("seconds_set_up", 0.0))
    cells.append(f"{statistics.mean(seconds):.1f}" if has_run else "")
    cells.append(f"{runs[SEEDS[0]][0]['trained_percent']:.2f}" if has_run else "")
    return "| " + " | ".join(cells) + " |"


def _lira(runs: dict[int, list[dict[str, Any]]]) -> str:
    found = [entry["lira"]["auc"] for group in runs.values() for entry in group if "lira" in entry]
    return mean_and_spread(found) if found else ""


def markdown(entries: dict[str, Any], cases: Sequence[str]) -> str:
    """The methods whose rows are all finished, as a Markdown table."""
    last = "largest gap" if len(cases) > 1 else "LiRA AUC"
    headings = ["method", *SHORT.values(), "average gap", last, "seconds", "trained %"]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    every = [table_line(entries, cases, method) for method in (ORIGINAL, REFERENCE, *METHODS)]
    return "\n".join(lines + [found for found in every if found]) + "\n"


def write(entries: dict[str, Any], docs: Path, page: Path) -> None:
    """JSON of the rows, and the Markdown of both tables, also in the page."""
    docs.mkdir(parents=True, exist_ok=True)
    order = [row.name for row in rows() if row.name in entries]
    write_json(docs / "classifier.json", {name: entries[name] for name in order})
    for name, cases in (("classifier_classes", CLASSES), ("classifier_random", (RANDOM,))):
        text = markdown(entries, cases)
        (docs / f"{name}.md").write_text(text, encoding="utf-8")
        if page.is_file():
            into_page(page, name, text)


def build(config: TableConfig) -> None:
    """Run what is missing, write the tables as rows finish, print them."""
    docs, page = Path(config.docs), Path(config.page)
    wanted = [row for row in rows() if row.method in config.methods and row.case in config.cases]
    entries = {} if config.again else finished(docs / "classifier.json", wanted, config.output_dir)
    missing = {row.name: row for row in wanted if row.name not in entries}
    first = {name: row for name, row in missing.items() if row.method == REFERENCE and row.case == RANDOM}
    failed: list[str] = []
    for wave in (first, {name: row for name, row in missing.items() if name not in first}):
        for name, metrics in run_rows(run_row, wave, config.output_dir, config.workers, failed):
            entries[name] = {"fingerprint": fingerprint(wave[name]), "metrics": metrics}
            write(entries, docs, page)
    write(entries, docs, page)
    for cases in (CLASSES, (RANDOM,)):
        print(f"{', '.join(cases)}\n\n{markdown(entries, cases)}")
    require_all(failed)


if __name__ == "__main__":
    run_script(build, TableConfig)
