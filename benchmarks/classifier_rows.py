"""The rows of the classifier table: every method on every case with every seed, as flags of classification_ext.

A case is one class of the embedded data, or a random tenth of its photos. Every method's settings were chosen on
TUNED_ON with seed 100 (and forget_seed 100 for random photos), which the table does not use.
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

NO_PENALTY = {"barrier.lambda_interval": 0.0, "barrier.use_actual_bounds": False}
ALL = {**NO_PENALTY, "trained_weights": "all"}
PROJECTION = {"barrier.constraint": "projection", "barrier.use_actual_bounds": False}
PROJECTION |= {"barrier.projection_energy": 0.8}
# random photos need more of the weights than a class does
EVERY_MAP = {
    "barrier.targets": ["Conv2d", "fc"],
    "barrier.use_actual_bounds": False,
}

Flags = dict[str, Any]


def how(name: str, rate: float, epochs: int, alpha: float = 0.0, **more: Any) -> Flags:
    """Flags of a method that trains; epochs over the images it is about."""
    return {
        "method.name": name,
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "method.alpha": alpha,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def edit(name: str, **options: float) -> Flags:
    """Flags of a method without training steps."""
    return {**ALL, "method.name": name, "method.alpha": 0.0, **{f"method.{key}": v for key, v in options.items()}}


def both(flags: Flags) -> tuple[Flags, Flags]:
    """The same for a class and for random photos."""
    return flags, flags


def penalty(weight: float) -> Flags:
    """The paper's protection loss."""
    return {"barrier.lambda_interval": weight}


RL_CLASS, RL_RANDOM = how("rl", 3e-3, 10, 10.0), {**how("rl", 1e-3, 10, 10.0), **EVERY_MAP}
GA_CLASS, GA_RANDOM = how("ga", 1e-3, 5, 5.0), {**how("ga", 2e-3, 10, 3.0), **EVERY_MAP}
RL_ALONE = how("rl", 3e-3, 5)  # without any retain loss

# method -> (flags for a class, flags for random photos), beyond the configuration file's
METHODS: dict[str, tuple[Flags, Flags]] = {
    "ft": ({**ALL, **how("ft", 2e-3, 4)}, {**ALL, **how("ft", 1e-3, 2)}),
    "l1-sparse": ({**ALL, **how("l1_sparse", 1e-3, 4)}, {**ALL, **how("l1_sparse", 1e-3, 2)}),
    "ga": ({**ALL, **how("ga", 5e-5, 5)}, {**ALL, **how("ga", 3e-5, 5)}),
    "ga with retain loss": ({**ALL, **how("ga", 2e-4, 5, 10.0)}, {**ALL, **how("ga", 1e-3, 10, 3.0)}),
    "rl with retain loss": both({**ALL, **how("rl", 1e-3, 10, 10.0)}),
    "SalUn": both({**ALL, **how("rl", 1e-3, 10, 10.0), "saliency_mask": 0.5}),
    "boundary shrink": ({**ALL, **how("boundary_shrink", 1e-4, 5)}, {**ALL, **how("boundary_shrink", 3e-5, 5)}),
    "boundary expand": ({**ALL, **how("boundary_expand", 1e-4, 5)}, {**ALL, **how("boundary_expand", 3e-5, 5)}),
    "fisher": both(edit("fisher", noise=1e-5)),
    "influence": (edit("wfisher", damping=1.0), edit("wfisher", damping=0.1)),
    "rl on targets": ({**RL_CLASS, **NO_PENALTY}, {**RL_RANDOM, **NO_PENALTY}),
    "rl, BARRIER": ({**RL_CLASS, **penalty(0.1)}, {**RL_RANDOM, **penalty(0.01)}),
    "rl, projection": both({**how("rl", 1e-2, 10, 10.0), **PROJECTION}),
    "ga on targets": ({**GA_CLASS, **NO_PENALTY}, {**GA_RANDOM, **NO_PENALTY}),
    "ga, BARRIER": ({**GA_CLASS, **penalty(0.1)}, {**GA_RANDOM, **penalty(0.1)}),
    "ga, projection": both({**how("ga", 3e-2, 5, 5.0), **PROJECTION}),
    "rl on targets, no retain loss": both({**RL_ALONE, **NO_PENALTY}),
    "rl, BARRIER, no retain loss": both({**RL_ALONE, **penalty(1.0)}),
}


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
