"""The rows of the DDPM table: ddpm_ext/configs/unlearn_fashion.yaml with a few flags changed.

Learning rates and steps are each objective's and protection's own (a projection confines updates to few directions and
so takes larger ones), chosen on the label TUNED_ON so that it is erased. rl answers with the nearest label.
"""

from __future__ import annotations

from typing import Any

from rows import ANCHORS, Row, Table

from barrier_diffusers import BarrierConfig

LABELS = ("sneaker", "dress", "bag")
TUNED_ON = "sneaker"
SHORT = {"train_batch_size": 32, "max_train_steps": 60}
SHORT |= {"evaluation.images_per_label": 60, "evaluation.images_per_retained_label": 20}
LONGER = {"max_train_steps": 120}
NO_PROJECTION = {"barrier.constraint": "penalty", "barrier.projection_energy": BarrierConfig().projection_energy}
PENALTY = {**NO_PROJECTION, "barrier.use_actual_bounds": True, "barrier.lambda_interval": 0.1}
PROTECTIONS: dict[str, dict[str, Any]] = {
    "none": {**NO_PROJECTION, "barrier.lambda_interval": 0.0, "learning_rate": 1e-4},
    "penalty": {**PENALTY, **LONGER, "learning_rate": 1e-4},
    "projection": {"barrier.constraint": "projection", "learning_rate": 2e-3},
}
# esd samples its own x_t with the model, for the statistics as well: fewer rows
OWN = {"max_forget_images": 160, "max_retain_images": 180, "objective.num_inference_steps": 10}
# objective -> flags of all its rows, and by protection
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "rl": ({}, {"none": {"learning_rate": 5e-5}, "projection": {**LONGER, "learning_rate": 4e-3}}),
    "kl": ({}, {"none": {"learning_rate": 3e-4}}),
    "esd": (OWN, {"projection": LONGER}),
    "ga": ({}, {"none": {"learning_rate": 2e-4}, "projection": {"learning_rate": 1e-2}}),
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
}


def row(label: str, objective: str, protection: str) -> Row:
    """One label with one objective; protection is "none", "penalty", "projection" or "SalUn mask 0.5"."""
    masked = protection.startswith("SalUn")
    common, own = OBJECTIVES[objective]
    kind = "none" if masked else protection
    flags = {**SHORT, "concept": label, "objective.name": objective, **common, **PROTECTIONS[kind]}
    flags |= own.get(kind, {})
    flags["objective.anchor"] = ANCHORS[label] if objective == "rl" else None
    if masked:
        flags["saliency_mask"] = 0.5
    return Row({"label": label, "objective": objective, "protection": protection}, flags)


def ddpm() -> Table:
    """rl with each protection and with SalUn's mask on every label; the other objectives on the first one."""
    kinds = [("rl", protection) for protection in (*PROTECTIONS, "SalUn mask 0.5")]
    rows = [row(label, *kind) for label in LABELS for kind in kinds]
    others = [objective for objective in OBJECTIVES if objective != "rl"]
    rows += [row(TUNED_ON, objective, kind) for objective in others for kind in ("none", "projection")]
    return Table([[entry] for entry in rows], METRICS, mean_over="label")
