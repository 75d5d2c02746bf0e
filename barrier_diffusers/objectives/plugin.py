"""An objective of the user's own, from a file or module that he names; nothing else is ever imported."""

from __future__ import annotations

from typing import Any

from barrier_diffusers.objectives.base import OBJECTIVES, Objective, get_objective
from barrier_diffusers.utils import registry


def load_module(module: str) -> None:
    """Run the .py file, or import the dotted module name, so that it registers its objectives; once a process.

    Raises:
        ValueError: there is no such file or module, or running it fails.
    """
    registry.load_module(module, "objective.module", OBJECTIVES)


def load_objective(options: Any) -> Objective:
    """The objective that the settings name, from the user's module if they name one, checked against the others.

    Raises:
        ValueError: a module that does not load, an unknown name, or a setting that the objective does not read.
    """
    if options.module is not None:
        load_module(options.module)
    objective = get_objective(options.name)
    objective.check(options)
    return objective
