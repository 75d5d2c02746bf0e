"""Readers, captions, concepts, and everything frozen computed once: latents and text embeddings.

Importing it imports nothing else: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barrier_diffusers.data.encoding import EncodedImages, NoisedBatches, encode_images

__all__ = ["EncodedImages", "NoisedBatches", "encode_images"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.encoding"), name)


def __dir__() -> list[str]:
    return __all__
