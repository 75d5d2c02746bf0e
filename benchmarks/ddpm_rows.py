"""The rows of the DDPM table: ddpm_ext/configs/unlearn_fashion.yaml with a few flags changed.

The class embedding has the configuration file's learning rate in every row of the table but those with one learning
rate for all. That of queries, keys and values is each protection's own, the same for all objectives: a projection
confines updates to few directions and so takes larger ones. Chosen on sneaker and bag with rl; that of one learning
rate for all as high as sneaker needs, and as high as dress needs. rl answers with the nearest label.
"""

from __future__ import annotations

from typing import Any

from rows import ANCHORS, SHORT_LIST, Row, Table

from barrier_diffusers import BarrierConfig

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


def ddpm() -> Table:
    """rl on every label without protection and with a projection, on three with the others; the other objectives on
    one."""
    rows = [row(label, "rl", kind) for label in SHORT_LIST for kind in PROTECTIONS]
    rows += [row(TUNED_ON, objective, kind) for objective in OBJECTIVES if objective != "rl" for kind in EVERY_LABEL]
    rows += [row(label, "rl", kind) for label in LABELS if label not in SHORT_LIST for kind in EVERY_LABEL]
    return Table([[entry] for entry in rows], METRICS, mean_over="label", mean_of=len(LABELS))
