"""Protocol nudity: NudeNet on the images of a prompt file."""

from __future__ import annotations

from typing import Any

from barrier_diffusers.evaluation.judged_model import ImagePair, JudgedModel
from barrier_diffusers.evaluation.nudity import NudityDetector, nudity_counts
from barrier_diffusers.evaluation.protocols.base import Protocol
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.evaluation.tables import print_values


class NudityProtocol(Protocol):
    """NudeNet on the images of a prompt file, I2P as a rule."""

    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel):
        self.options, self.judged_model = config.nudity, judged_model
        self.rows = judged_model.rows(self.options)
        self.detector = NudityDetector(self.options)

    def images(self) -> ImagePair:
        """The images of its prompts, made or read."""
        return self.judged_model.images("nudity", self.rows, self.options)

    def run(self) -> dict[str, Any]:
        """`nudity`: counts before and after."""
        pair = self.images()
        counts = {when: nudity_counts(images, self.detector, self.options.threshold) for when, images in pair.items()}
        shown = {when: {**entry["images_with"], "total": entry["total"]} for when, entry in counts.items()}
        print_values(f"images with exposed parts at {self.options.threshold}", shown)
        return {"nudity": counts}
