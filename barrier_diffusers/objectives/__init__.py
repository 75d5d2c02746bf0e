"""Base objectives, one file each; importing a file registers it. See base.py for the one signature they share."""

from barrier_diffusers.objectives import concept, esd, ga, kl, rl, uce
from barrier_diffusers.objectives.base import (
    OBJECTIVES,
    DiffusionStep,
    Objective,
    PromptEdit,
    get_objective,
    register_objective,
)
from barrier_diffusers.objectives.config import ObjectiveConfig
from barrier_diffusers.objectives.plugin import load_module, load_objective

register = register_objective  # its name in earlier versions, which users' own files import

__all__ = [
    "OBJECTIVES",
    "DiffusionStep",
    "Objective",
    "ObjectiveConfig",
    "PromptEdit",
    "concept",
    "esd",
    "ga",
    "get_objective",
    "kl",
    "load_module",
    "load_objective",
    "register",
    "register_objective",
    "rl",
    "uce",
]
