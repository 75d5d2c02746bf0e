"""Base objectives, one file each; importing a file registers it. See base.py for the one signature they share."""

from barrier_diffusers.objectives import ga, rl
from barrier_diffusers.objectives.base import OBJECTIVES, Condition, DiffusionStep, Objective, get_objective, register

__all__ = ["OBJECTIVES", "Condition", "DiffusionStep", "Objective", "ga", "get_objective", "register", "rl"]
