"""Concept unlearning for diffusers pipelines and torch networks, with a bounded drift everywhere else (BARRIER).

Importing the package imports nothing else: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barrier_diffusers.data.encoding import EncodedImages, NoisedBatches, encode_images
    from barrier_diffusers.models.architectures import Architecture, get_architecture, register_architecture
    from barrier_diffusers.models.denoiser import PipelineDenoiser
    from barrier_diffusers.objectives import DiffusionStep, get_objective, register_objective
    from barrier_diffusers.protection.barrier import Barrier
    from barrier_diffusers.protection.certificate import Certificate
    from barrier_diffusers.protection.config import BarrierConfig
    from barrier_diffusers.protection.projection import RetainProjection
    from barrier_diffusers.protection.region import ForgetRegion
    from barrier_diffusers.training.steps import StepMaker
    from barrier_diffusers.workflow.notebook import UnlearnResult, unlearn

__version__ = "0.1.0"

_HOMES = {
    "Architecture": "models.architectures",
    "Barrier": "protection.barrier",
    "BarrierConfig": "protection.config",
    "Certificate": "protection.certificate",
    "DiffusionStep": "objectives",
    "EncodedImages": "data.encoding",
    "ForgetRegion": "protection.region",
    "NoisedBatches": "data.encoding",
    "PipelineDenoiser": "models.denoiser",
    "RetainProjection": "protection.projection",
    "StepMaker": "training.steps",
    "UnlearnResult": "workflow.notebook",
    "unlearn": "workflow.notebook",
    "encode_images": "data.encoding",
    "get_architecture": "models.architectures",
    "get_objective": "objectives",
    "register_architecture": "models.architectures",
    "register_objective": "objectives",
}

__all__ = [
    "Architecture",
    "Barrier",
    "BarrierConfig",
    "Certificate",
    "DiffusionStep",
    "EncodedImages",
    "ForgetRegion",
    "NoisedBatches",
    "PipelineDenoiser",
    "RetainProjection",
    "StepMaker",
    "UnlearnResult",
    "__version__",
    "encode_images",
    "get_architecture",
    "get_objective",
    "register_architecture",
    "register_objective",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
