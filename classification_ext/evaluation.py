"""One run of every measure on one classifier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.utils.run_records import METRICS_NAME
from classification_ext.data import Splits
from classification_ext.metrics import (
    HEADLINE,
    MIA_FEATURE,
    SHORT,
    attack_features,
    correct,
    gap,
    likelihood_ratio,
    log_odds,
    membership,
    predict,
)
from classification_ext.models import load_classifier
from classification_ext.settings import ClassifierEvaluationConfig


def evaluate(
    model: nn.Module, splits: Splits, config: ClassifierEvaluationConfig, seed: int, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """UA, RA, TA, MIA in percent, the likelihood-ratio attack with shadow models, the gap with a retrained one.

    Returns:
        `unlearning_accuracy` (100 - accuracy on the forget images), the same on test images of the forgotten labels,
        `retain_accuracy`, `test_accuracy` (test images of the retained labels), `mia` and its five features, `lira`,
        gaps; `details` holds counts and 95 % intervals.
    """
    size = config.eval_batch_size
    parts = {name: getattr(splits, name) for name in ("forget", "retain", "test", "forget_test")}
    logits = {name: predict(model, images, size, device) for name, images in parts.items()}
    right = {name: correct(logits[name], images.labels) for name, images in parts.items()}
    details = {
        "unlearning_accuracy": share(~right["forget"]),
        "unlearning_accuracy_test": share(~right["forget_test"]),
        "retain_accuracy": share(right["retain"]),
        "test_accuracy": share(right["test"]),
    }
    features = {name: attack_features(logits[name], parts[name].labels) for name in ("forget", "retain", "test")}
    shares = membership(features["retain"], features["test"], features["forget"], config.num_mia_samples, seed)
    metrics: dict[str, Any] = {name: entry["value"] for name, entry in details.items()}
    metrics |= {"mia": shares[MIA_FEATURE], "mia_features": shares}
    if config.shadow_models:
        metrics["lira"] = against_shadows(logits, splits, config, device)
    if config.retrained is not None:
        metrics |= gap(metrics, read_metrics(config.retrained))
    return {**metrics, "details": details}


def against_shadows(
    logits: Mapping[str, torch.Tensor], splits: Splits, config: ClassifierEvaluationConfig, device: torch.device | str
) -> dict[str, float]:
    """The likelihood-ratio attack: forget images against test images of the same labels."""
    names = ("forget", "forget_test")
    parts = {name: getattr(splits, name) for name in names}
    odds: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for folder in config.shadow_models:
        shadow = load_classifier(folder).to(device)
        for name, images in parts.items():
            odds[name].append(log_odds(predict(shadow, images, config.eval_batch_size, device), images.labels))
    forget, unseen = (log_odds(logits[name], images.labels) for name, images in parts.items())
    return likelihood_ratio(forget, unseen, odds["forget"], odds["forget_test"])


def read_metrics(folder: str) -> dict[str, Any]:
    """The metrics of a finished run.

    Raises:
        ValueError: the folder holds none, or not all that a gap needs.
    """
    path = Path(folder) / METRICS_NAME
    if not path.is_file():
        raise ValueError(f"{folder!r} holds no {METRICS_NAME}: name the output_dir of a finished run")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in HEADLINE if name not in metrics]
    if missing:
        raise ValueError(f"{str(path)!r} has no {', '.join(missing)}: it is not of a run that forgot something")
    return metrics


def print_table(before: Mapping[str, Any] | None, after: Mapping[str, Any], title: str) -> None:
    """UA, RA, TA, MIA before and after, and the gap where there is one."""
    table = Table(title=title)
    for heading in ("", "before", "after", "95 % interval", "gap to retraining"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in HEADLINE:
        ends = after["details"].get(name, {}).get("interval_95")
        cells = [f"{before[name]:.2f}" if before else "", f"{after[name]:.2f}"]
        cells += [f"{ends[0]:.1f} - {ends[1]:.1f}" if ends else ""]
        table.add_row(SHORT[name], *cells, f"{after[f'{name}_gap']:.2f}" if f"{name}_gap" in after else "")
    if "average_gap" in after:
        table.add_row("average", "", "", "", f"{after['average_gap']:.2f}", style="bold")
    Console(width=88).print(table)
    if "lira" in after:
        print(f"likelihood-ratio attack: AUC {after['lira']['auc']:.1f} % (50: nothing left to tell)")
