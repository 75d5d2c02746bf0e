"""The DDPM table: each row is ddpm_ext/configs/unlearn_fashion.yaml with a few flags changed.

The class embedding has the configuration file's learning rate in every row of the table but those with one learning
rate for all. That of queries, keys and values is each protection's own, the same for all objectives: a projection
confines updates to few directions and so takes larger ones. Chosen on sneaker and bag with rl; that of one learning
rate for all as high as sneaker needs, and as high as dress needs. rl answers with the nearest label.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from barrier_diffusers import BarrierConfig
from barrier_diffusers.utils.run_records import METRICS_NAME
from benchmarks.tables.stable_diffusion import ANCHORS, SHORT_LIST
from benchmarks.tables.table import MeansTable, Metrics, Row, Script, log_of

UNLEARN = Script("ddpm_ext.unlearn", "ddpm_ext.settings:UnlearnConfig")
WEIGHTS = "assets/fashion_ddpm/unet/diffusion_pytorch_model.safetensors"
KEPT = ("unlearning_accuracy", "retain_accuracy_before", "retain_accuracy_after")  # their counts and intervals stay

LABELS = tuple(ANCHORS)
TUNED_ON = SHORT_LIST[0]
SHORT = {"evaluation.images_per_label": 60, "evaluation.images_per_retained_label": 20}
NO_PROJECTION = {"barrier.constraint": "penalty", "barrier.projection_energy": BarrierConfig().projection_energy}
BARE = {**NO_PROJECTION, "barrier.lambda_interval": 0.0, "learning_rate": 5e-5}
ONE_RATE, HIGHER, MASKED = "none, one learning rate", "none, one learning rate, higher", "SalUn mask 0.5"
PROTECTIONS: dict[str, dict[str, Any]] = {
    "none": BARE,
    "projection": {},
    ONE_RATE: {**BARE, "learning_rates": {}, "max_train_steps": 60},
    HIGHER: {**BARE, "learning_rates": {}, "learning_rate": 1e-4},
    "penalty": {
        **NO_PROJECTION,
        "barrier.use_actual_bounds": True,
        "barrier.lambda_interval": 0.1,
        "learning_rate": 1e-4,
    },
    MASKED: {**BARE, "saliency_mask": 0.5},
}
EVERY_LABEL = ("none", "projection")  # the protections that are tried on all ten
# objective -> flags of its rows. esd samples its own x_t with the model, for the statistics as well: fewer rows
OBJECTIVES: dict[str, dict[str, Any]] = {
    "rl": {},
    "kl": {"max_train_steps": 60},
    "esd": {
        "max_train_steps": 100,
        "max_forget_images": 160,
        "max_retain_images": 180,
        "objective.num_inference_steps": 10,
    },
    "ga": {"max_train_steps": 60},
}

METRICS = {
    "UA": "unlearning_accuracy",
    "TA before": "retain_accuracy_before",
    "TA": "retain_accuracy_after",
    "drop": "retain_accuracy_drop",
    "entropy": "forget_entropy_after",
    "FID": "fid_classifier",
    "IS": "is_classifier",
    "precision": "precision_classifier",
    "recall": "recall_classifier",
    "trained %": "percent_trainable",
    "seconds to set up": "seconds_setup",
    "after inversion": "after_inversion",
}


@dataclass(kw_only=True)
class DdpmTable(MeansTable):
    """One run of ddpm_ext/unlearn.py per row."""

    config: ClassVar[str] = "ddpm_ext/configs/unlearn_fashion.yaml"
    pages: tuple[str, ...] = ("ddpm_ext/README.md",)

    def files(self, row: Row) -> list[str]:
        """The base weights as well."""
        return [self.config, WEIGHTS]

    def run(self, chain: Sequence[Row], output: Path) -> list[Metrics]:
        """Erase and judge; the numbers and the pictures alone stay."""
        results = list[Metrics]()
        for row in chain:
            folder = output / row.name
            flags = {**row.flags, "output_dir": folder, "cache_dir": output / "cache", "report_to": "none"}
            UNLEARN.run(self.config, {**flags, "overwrite_output_dir": True}, log_of(output, row.name))
            for part in ("unet", "scheduler"):
                shutil.rmtree(folder / part, ignore_errors=True)
            results.append(numbers_of(json.loads((folder / METRICS_NAME).read_text())))
        return results


def numbers_of(metrics: dict[str, Any]) -> Metrics:
    """What the table and its JSON file keep of a run's metrics, in one level."""
    kept = {key: value for key, value in metrics.items() if not isinstance(value, dict | list)}
    after = metrics["retained_after"]
    kept |= {key: value for key, value in after.items() if key != "details"}
    kept |= {f"{key}_before": value for key, value in metrics["retained_before"].items() if key != "details"}
    kept |= {f"after_{found['attack']}": found["post_attack"]["value"] for found in metrics["attacks"]}
    intervals = {key: metrics["details"][key] for key in KEPT}
    per_label = {key: value for key, value in metrics.items() if key.startswith("per_class")}
    facts = {key: metrics[key] for key in ("drift", "seeds", "sampling", "judge", "attacks")}
    return {**kept, **per_label, **facts, "intervals": intervals, "fidelity": after["details"]}


def row(label: str, objective: str, protection: str) -> Row:
    """One label with one objective and one of PROTECTIONS."""
    flags = {
        **SHORT,
        "concept": label,
        "objective.name": objective,
        **OBJECTIVES[objective],
        **PROTECTIONS[protection],
    }
    flags["objective.anchor"] = ANCHORS[label] if objective == "rl" else None
    if objective != "rl":  # they throw the label's row far away: an attacker starts from its neighbour's
        flags["evaluation.inversion.initial_label"] = ANCHORS[label]
    return Row({"label": label, "objective": objective, "protection": protection}, flags)


def ddpm() -> DdpmTable:
    """rl on every label without protection and with a projection, on three with the others; the other objectives on
    one."""
    rows = [row(label, "rl", kind) for label in SHORT_LIST for kind in PROTECTIONS]
    rows += [row(TUNED_ON, objective, kind) for objective in OBJECTIVES if objective != "rl" for kind in EVERY_LABEL]
    rows += [row(label, "rl", kind) for label in LABELS if label not in SHORT_LIST for kind in EVERY_LABEL]
    chains = [[found] for found in rows]
    return DdpmTable(name="ddpm", chains=chains, metrics=METRICS, mean_over="label", mean_of=len(LABELS))
