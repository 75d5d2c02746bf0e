"""Registries that a test may add to: a user's file is registered once a process, and tests bring theirs again."""

from contextlib import contextmanager

from barrier_diffusers.evaluation.attacks import ATTACKS
from barrier_diffusers.evaluation.extractors import EXTRACTORS
from barrier_diffusers.evaluation.protocols import PROTOCOLS
from barrier_diffusers.objectives import OBJECTIVES


@contextmanager
def registries_kept():
    """What is registered inside is taken out again at the end."""
    registries = (ATTACKS, EXTRACTORS, OBJECTIVES, PROTOCOLS)
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, items in zip(registries, before, strict=True):
            registry.clear()
            registry.update(items)
