"""The protocols: each asks for its prompts, has the images judged, and gives a part of metrics.json.

A protocol is built (which refuses, before any long work, whatever it cannot do) and then run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from barrier_diffusers.data.images import ImageFiles, ImageSet
from barrier_diffusers.evaluation.clip_score import clip_score, load_clip
from barrier_diffusers.evaluation.extractors import get_extractor
from barrier_diffusers.evaluation.fidelity import fidelity_by
from barrier_diffusers.evaluation.judged_model import ImagePair, JudgedModel
from barrier_diffusers.evaluation.settings import EvaluateConfig


class Protocol(ABC):
    """One way to judge."""

    @abstractmethod
    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel): ...

    @abstractmethod
    def images(self) -> ImagePair:
        """The images of its prompts, made or read."""

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Make or read the images, judge them, print a table; the part of metrics.json."""


class Likeness:
    """FID and KID against a reference set, and CLIP score, as far as the settings ask for them."""

    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel, reference: ImageSet | None):
        options = config.fidelity
        self.options, self.device = options, judged_model.device
        self.extractors = [get_extractor(spec, self.device) for spec in options.extractors]
        self.reference = ImageFiles(options.reference_dir) if options.reference_dir else reference
        if self.extractors and self.reference is None:
            raise ValueError("FID and KID compare with real images: set fidelity.reference_dir")
        self.clip = load_clip(config.clip) if config.clip else None
        self.cache = Path(options.cache_dir) if options.cache_dir else judged_model.output / "cache"

    def distances(self, images: ImageSet) -> dict[str, Any]:
        """FID and KID by every extractor."""
        assert self.reference is not None
        return fidelity_by(self.extractors, self.reference, images, self.options, self.cache)

    def clip_score(self, images: ImageSet, prompts: Sequence[str]) -> dict[str, Any]:
        """CLIP score of images and their prompts."""
        assert self.clip is not None
        return clip_score(images, prompts, self.clip, device=self.device)
