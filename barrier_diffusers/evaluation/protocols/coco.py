"""Protocol coco: FID, KID and CLIP score on captions of photographs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from barrier_diffusers.data.prompt_files import PromptsConfig
from barrier_diffusers.evaluation.judged_model import ImagePair, JudgedModel
from barrier_diffusers.evaluation.protocols.base import Likeness, Protocol, register_protocol
from barrier_diffusers.evaluation.tables import print_values

if TYPE_CHECKING:
    from barrier_diffusers.evaluation.settings import EvaluateConfig


@register_protocol("coco", PromptsConfig)
class CocoProtocol(Protocol):
    """FID, KID and CLIP score on the captions of COCO photographs, or any others."""

    @classmethod
    def check(cls, config: EvaluateConfig) -> None:
        """A prompt file, or images made earlier."""
        if config.settings_of("coco").file is None and config.images_dir is None:
            raise ValueError("protocol coco asks prompts of a file: set coco.file")

    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel):
        self.options, self.judged_model = config.settings_of("coco"), judged_model
        self.rows = judged_model.rows(self.options)
        self.likeness = Likeness(config, judged_model, None)
        if not self.likeness.extractors and self.likeness.clip is None:
            raise ValueError("protocol coco computes nothing: set fidelity.extractors, clip, or both")

    def images(self) -> ImagePair:
        """The images of its prompts, made or read."""
        return self.judged_model.images("coco", self.rows, self.options)

    def run(self) -> dict[str, Any]:
        """`coco`: the metrics before and after."""
        pair = self.images()
        prompts = [row.prompt for row in self.rows for _ in range(self.options.images_per_prompt)]
        results = {}
        for when, images in pair.items():
            found = self.likeness.distances(images) if self.likeness.extractors else {"details": {}}
            if self.likeness.clip is not None:
                score = self.likeness.clip_score(images, prompts)
                found["clip_score"] = score["clip_score"]
                found["details"]["clip"] = score["details"]
            results[when] = found
        print_values("images of captions", results)
        return {"coco": results}
