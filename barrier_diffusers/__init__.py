"""Concept unlearning for diffusers pipelines and torch networks, with a bounded drift everywhere else (BARRIER)."""

from barrier_diffusers.barrier import Barrier
from barrier_diffusers.certificate import Certificate
from barrier_diffusers.config import BarrierConfig
from barrier_diffusers.projection import RetainProjection
from barrier_diffusers.region import ForgetRegion

__version__ = "0.1.0"
__all__ = ["Barrier", "BarrierConfig", "Certificate", "ForgetRegion", "RetainProjection", "__version__"]
