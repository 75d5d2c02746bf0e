"""The rows of the classifier table: every method on every case with every seed, as flags of classification_ext.

A case is one class of the embedded data, or a random tenth of its photos. Settings were chosen on the cases TUNED_ON
with seed 100, which the table does not use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
RANDOM = "random 10 %"
SEEDS = (0, 1, 2)
TUNED_ON = ("shirt", "sneaker", RANDOM)
UNLEARN = "classification_ext/configs/fashion_class.yaml"
RETRAIN = "classification_ext/configs/fashion_retrain.yaml"
ORIGINAL, REFERENCE = "original", "retraining"  # no run at all; what the others are measured against

NOTHING = {"barrier.lambda_interval": 0.0, "barrier.use_actual_bounds": False}
BARE = {**NOTHING, "trained_weights": "all"}

# method -> (flags for a class, flags for random photos), beyond the configuration file's
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}


@dataclass(frozen=True)
class Row:
    """One run."""

    case: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of the run's folder and log, and its key in the JSON file."""
        return f"{self.case}-{self.method}-{self.seed}".replace(" ", "_").replace("%", "percent").replace(",", "")

    @property
    def config(self) -> str:
        """The configuration file whose settings hold where the row has no flag of its own."""
        return RETRAIN if self.method == REFERENCE else UNLEARN

    @property
    def flags(self) -> dict[str, Any]:
        """What differs from it."""
        flags: dict[str, Any] = {"seed": self.seed, "evaluation.before": False}
        if self.case == RANDOM:
            flags |= {"forget_class": None, "forget_fraction": 0.1}  # the same photos for all seeds: forget_seed 0
        else:
            flags |= {"forget_class": self.case}
        if self.method in METHODS:
            flags |= METHODS[self.method][self.case == RANDOM]
        return flags


def rows(cases: tuple[str, ...] = (*CLASSES, RANDOM), seeds: tuple[int, ...] = SEEDS) -> list[Row]:
    """All rows; the retrained models of the random photos come first, as the others' shadow models."""
    methods = (REFERENCE, ORIGINAL, *METHODS)
    found = [Row(case, method, seed) for method in methods for case in cases for seed in seeds]
    return sorted(found, key=lambda row: not (row.method == REFERENCE and row.case == RANDOM))
