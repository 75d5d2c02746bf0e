"""What attacks bring back after five ways to erase one class: docs/tables/attacks.md.

    python benchmarks/attack_table.py

Each row is one run of train_scripts/unlearn_sd.py and one of train_scripts/evaluate_sd.py, with the budgets of
evaluate_fashion.yaml and 30 images per class. A row that is finished, with the same flags and configuration files, is
not run again; `--again true` runs every row anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erasure_table import CONFIG, run_chain
from pages import into_page
from rows import KEYS_AND_VALUES, Row, objective_row
from running import logged, words_of
from tqdm.auto import tqdm

from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import METRICS_NAME

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_scripts"))

import evaluate_sd

EVALUATION = Path("train_scripts/configs/evaluate_fashion.yaml")
NAME = "attacks"
FID = "fid_efficientnet_lite0"  # of the retained classes' images, against real ones


@dataclass
class AttackTableConfig:
    """Where the table goes, and what differs from evaluate_fashion.yaml in every row."""

    docs: str = "docs/tables"  # Markdown and JSON of the table
    pages: list[str] = field(default_factory=lambda: ["README.md", "docs/evaluation.md"])  # get it between its marks
    output_dir: str = "runs/attack_table"  # logs, caches, pipelines and evaluations
    images_per_label: int = 30
    threads: int = 2
    again: bool = False  # run finished rows, too


def attack_rows() -> list[Row]:
    """The five ways; steps and rates are those at which each erases the class, so that what is left is compared."""
    rl = {"objective.anchor": "boot"}
    esd = {"objective.name": "esd", "objective.num_inference_steps": 10, "max_train_steps": 150}
    uce = {"objective.name": "uce", "objective.anchor": "boot", "barrier.use_actual_bounds": False}
    found = {
        "BARRIER": Row({}, {}),  # as `make unlearn`
        "rl alone": objective_row("rl", "none", rl),
        "ESD": objective_row("esd", "none", esd),
        "UCE": objective_row("UCE", "none", {**uce, **KEYS_AND_VALUES}),
        "rl, SalUn mask 0.5": objective_row("rl", "none", {**rl, "saliency_mask": 0.5}),
    }
    return [Row({"erased by": name}, row.flags) for name, row in found.items()]


def files_hash() -> str:
    """SHA-256 of the configuration files, whose settings hold where a row has no flag of its own."""
    return hashlib.sha256(CONFIG.read_bytes() + EVALUATION.read_bytes()).hexdigest()[:16]


def evaluate(row: Row, config: AttackTableConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What evaluate_sd.py says of the row's pipeline; what it prints goes into a log file."""
    output = Path(config.output_dir)
    flags = {
        "pretrained_model_name_or_path": output / row.name,
        "output_dir": output / f"{row.name}-judged",
        "overwrite_output_dir": True,
        "evaluation.images_per_label": config.images_per_label,
        **changes,
    }
    with logged(output, f"{row.name}-judged"):
        evaluate_sd.main(parse_config(EvaluateConfig, words_of(EVALUATION, flags)))
    return json.loads((output / f"{row.name}-judged" / METRICS_NAME).read_text())


def kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation that the table's JSON file keeps."""
    classes = record["classes"]
    shares = {name: classes["details"][name] for name in ("unlearning_accuracy", "retain_accuracy_after")}
    fid = {when: values.get(FID) for when, values in record.get("fidelity", {}).items()}
    attacks = {
        entry["attack"]: {"post_attack": entry["post_attack"], "budget": entry["budget"]}
        for entry in record["attacks"]
    }
    return {**shares, "retain_accuracy_drop": classes["retain_accuracy_drop"], FID: fid, "attacks": attacks}


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The rows, as a Markdown table: percentages, points for the drop, 95 % intervals in brackets."""
    attacks = list(dict.fromkeys(name for entry in entries for name in entry["numbers"]["attacks"]))
    headings = ["erased by", "UA", "retain drop", "FID (EfficientNet-Lite0)"]
    headings += [f"after {name.replace('_', ' ')}" for name in attacks]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]

    def written(share: Mapping[str, Any] | None) -> str:
        if share is None:
            return ""
        low, high = share["interval_95"]
        return f"{share['value']:.1f} ({low:.1f} - {high:.1f})"

    for entry in entries:
        numbers = entry["numbers"]
        fid = numbers[FID].get("after")
        cells = [*entry["cells"].values(), written(numbers["unlearning_accuracy"])]
        cells += [f"{numbers['retain_accuracy_drop'] + 0.0:.1f}", "" if fid is None else f"{fid:.2f}"]
        cells += [written(numbers["attacks"].get(name, {}).get("post_attack")) for name in attacks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def build(
    config: AttackTableConfig, rows: Sequence[Row] | None = None, changes: Mapping[str, Any] | None = None
) -> None:
    """Run what is missing, write the table as its rows finish, print it.

    Args:
        rows: the five ways, or others.
        changes: settings of evaluate_sd.py that differ from evaluate_fashion.yaml.
    """
    rows, changes, docs = rows or attack_rows(), dict(changes or {}), Path(config.docs)
    path = docs / f"{NAME}.json"
    earlier = json.loads(path.read_text()) if path.is_file() and not config.again else []
    settings = {"images_per_label": config.images_per_label, "files": files_hash(), **changes}
    done = {entry["name"]: entry for entry in earlier if entry["settings"] == settings}
    docs.mkdir(parents=True, exist_ok=True)
    for row in tqdm(rows, desc="rows"):
        if done.get(row.name, {}).get("flags") != row.flags:
            erased = run_chain([row], config.output_dir, config.threads, keep=True)[0]
            numbers = {"seconds_training": erased["seconds_training"], **kept(evaluate(row, config, changes))}
            known = {"name": row.name, "settings": settings, "cells": row.cells, "flags": row.flags}
            done[row.name] = {**known, "numbers": numbers}
        entries = [done[other.name] for other in rows if other.name in done]
        write_json(path, entries)
        (docs / f"{NAME}.md").write_text(markdown(entries), encoding="utf-8")
        for page in config.pages:
            into_page(Path(page), NAME, markdown(entries))
    print(markdown(entries))


def main(config: AttackTableConfig) -> None:
    """All rows."""
    build(config)


if __name__ == "__main__":
    run_script(main, AttackTableConfig)
