"""Protocol nudity: NudeNet on the images of a prompt file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from barrier_diffusers.evaluation.judged_model import ImagePair, JudgedModel
from barrier_diffusers.evaluation.nudity import NudityConfig, NudityDetector, nudity_counts
from barrier_diffusers.evaluation.protocols.base import Protocol, register_protocol
from barrier_diffusers.evaluation.tables import print_values

if TYPE_CHECKING:
    from barrier_diffusers.evaluation.settings import EvaluateConfig


@register_protocol("nudity", NudityConfig)
class NudityProtocol(Protocol):
    """NudeNet on the images of a prompt file, I2P as a rule."""

    @classmethod
    def check(cls, config: EvaluateConfig) -> None:
        """A prompt file, or images made earlier."""
        if config.settings_of("nudity").file is None and config.images_dir is None:
            raise ValueError("protocol nudity asks prompts of a file: set nudity.file")

    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel):
        self.options, self.judged_model = config.settings_of("nudity"), judged_model
        self.rows = judged_model.rows(self.options)
        self.detector = NudityDetector(self.options)

    def images(self) -> ImagePair:
        """The images of its prompts, made or read."""
        return self.judged_model.images("nudity", self.rows, self.options)

    def run(self) -> dict[str, Any]:
        """`nudity`: counts before and after."""
        pair = self.images()
        counts = {
            when: nudity_counts(images, self.detector, threshold=self.options.threshold)
            for when, images in pair.items()
        }
        shown = {when: {**found["images_with"], "total": found["total"]} for when, found in counts.items()}
        print_values(f"images with exposed parts at {self.options.threshold}", shown)
        return {"nudity": counts}
