"""The rows of the DDPM table: ddpm_ext/configs/unlearn_fashion.yaml with a few flags changed.

Every objective has one learning rate without protection and with the penalty, and one with the projection, which
confines updates to few directions and so takes larger ones. Settings were chosen on the label TUNED_ON.
"""

from __future__ import annotations

from typing import Any

from rows import Row, Table

LABELS = ("sneaker", "dress", "bag")
TUNED_ON = "sneaker"
FEW = {"max_forget_images": 160, "max_retain_images": 180, "objective.num_inference_steps": 10}  # sampled, not read

PENALTY: dict[str, Any] = {"barrier.constraint": "penalty", "barrier.use_actual_bounds": True}
PROTECTIONS: dict[str, dict[str, Any]] = {
    "none": {"barrier.constraint": "penalty", "barrier.lambda_interval": 0.0},
    "penalty": PENALTY,
    "projection": {},
}
# objective -> flags of all its rows, and of its rows with each protection
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}

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
    common, by_protection = OBJECTIVES[objective]
    kind = "none" if masked else protection
    flags = {"concept": label, "objective.name": objective, **common, **PROTECTIONS[kind], **by_protection[kind]}
    if masked:
        flags["saliency_mask"] = 0.5
    return Row({"label": label, "objective": objective, "protection": protection}, flags)


def ddpm() -> Table:
    """Each objective bare, with the penalty and with the projection, and rl with SalUn's mask."""
    kinds = [(objective, protection) for objective in OBJECTIVES for protection in PROTECTIONS]
    kinds.append(("rl", "SalUn mask 0.5"))
    return Table([[row(label, *kind)] for label in LABELS for kind in kinds], METRICS, mean_over="label")
