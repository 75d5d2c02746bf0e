"""BARRIER as a technique of eval-unlearn (PyPI), found by its entry point: `eval-unlearn plugins` lists `barrier`.

eval-unlearn is no dependency: it makes the technique with keyword arguments and asks it for images.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL import Image

from barrier_diffusers.data.erased_concepts import read_erased
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.models.loading import load_merged
from barrier_diffusers.utils.checks import FOLDER, MODEL, at_least, check_settings, rules


@dataclass(frozen=True)
class TechniqueConfig:
    """What eval-unlearn passes on from its configuration; names are those of its own techniques."""

    model_id: str  # pipeline that unlearn_sd.py saved, folder or hub id; with lora_weights the base pipeline
    lora_weights: str | None = None  # or the folder with the adapter that it saved
    device: str | None = None  # None: the GPU, if there is one
    use_fp16: bool = True  # on a GPU
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 4  # images sampled at once

    RULES = rules(
        model_id=MODEL,
        lora_weights=FOLDER,
        num_inference_steps=at_least(1),
        guidance_scale=at_least(0),
        batch_size=at_least(1),
    )

    def __post_init__(self) -> None:
        check_settings(self)


class BarrierTechnique:
    """A pipeline that was unlearned with barrier_diffusers.

    Raises:
        ValueError: a setting that there is not, or a pipeline or adapter that nothing was erased from, which would be
            judged in its place.
    """

    def __init__(self, **settings: Any):
        known = [item.name for item in fields(TechniqueConfig)]
        unknown = sorted(set(settings) - set(known))
        if unknown or "model_id" not in settings:
            problem = f"does not know {', '.join(unknown)}" if unknown else "needs model_id"
            raise ValueError(f"technique barrier {problem}; its settings are {', '.join(known)}")
        self.config = TechniqueConfig(**settings)
        path = self.config.lora_weights or self.config.model_id
        if not read_erased(path):
            raise ValueError(f"{path!r} does not say that anything was erased: name what unlearn_sd.py saved")
        self.device = self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        half = self.config.use_fp16 and self.device.startswith("cuda")
        dtype = torch.float16 if half else torch.float32
        self.pipeline = load_merged(self.config.model_id, self.config.lora_weights, dtype=dtype).to(self.device)

    def generate(self, prompts: Sequence[str], seed: int | None = None, **changes: Any) -> list[Image.Image]:
        """An image of each prompt; image i starts from seed + i, or without a seed from one that is drawn.

        Args:
            changes: num_inference_steps, guidance_scale, for these images.

        Raises:
            ValueError: any other change.
        """
        sampling = {name: getattr(self.config, name) for name in ("num_inference_steps", "guidance_scale")}
        unknown = sorted(set(changes) - set(sampling))
        if unknown:
            raise ValueError(f"technique barrier cannot change {', '.join(unknown)} of an image")
        first = secrets.randbelow(2**31) if seed is None else seed
        settings = SamplingConfig(**{**sampling, **changes}, batch_size=self.config.batch_size, seed=first)
        return [Image.fromarray(image) for image in generate(self.pipeline, list(prompts), sampling=settings)]
