"""Attacks, one file each; importing a file registers it. See base.py for the one signature they share."""

from barrier_diffusers.evaluation.attacks.base import (
    ATTACKS,
    Attack,
    Attempt,
    Budget,
    Forgotten,
    ImageBudget,
    LearningBudget,
    get_attack,
    register,
)
from barrier_diffusers.evaluation.attacks.inversion import InversionConfig, inversion
from barrier_diffusers.evaluation.attacks.prompt_search import PromptSearchConfig, prompt_search
from barrier_diffusers.evaluation.attacks.prompts import MisspelledConfig, ParaphrasedConfig, misspelled, paraphrased
from barrier_diffusers.evaluation.attacks.relearning import BenignConfig, RelearningConfig, relearning

__all__ = [
    "ATTACKS",
    "Attack",
    "Attempt",
    "BenignConfig",
    "Budget",
    "Forgotten",
    "ImageBudget",
    "InversionConfig",
    "LearningBudget",
    "MisspelledConfig",
    "ParaphrasedConfig",
    "PromptSearchConfig",
    "RelearningConfig",
    "get_attack",
    "inversion",
    "misspelled",
    "paraphrased",
    "prompt_search",
    "register",
    "relearning",
]
