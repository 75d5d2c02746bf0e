"""Attacks, one file each; importing a file of this folder registers its attack. See base.py for what they share."""

import importlib
import pkgutil

from barrier_diffusers.evaluation.attacks.base import (
    ATTACKS,
    Attack,
    Attempt,
    Budget,
    Forgotten,
    ImageBudget,
    LearningBudget,
    Mark,
    Variant,
    register_attack,
)

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "ATTACKS",
    "Attack",
    "Attempt",
    "Budget",
    "Forgotten",
    "ImageBudget",
    "LearningBudget",
    "Mark",
    "Variant",
    "register_attack",
]
