"""Latent inversion: whether there is a noise from which the pipeline draws a real image of the concept, with no prompt
at all. No weight changes, and no token is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from barrier_diffusers.evaluation.attacks.base import Attempt, Budget, Forgotten, register_attack
from barrier_diffusers.models.from_images import ImageSampler
from barrier_diffusers.training.learning import encode, frozen


@dataclass
class LatentInversionConfig(Budget):
    """Budget of latent inversion, which takes the evaluation's sampling steps up and down. The seed draws nothing."""

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """An image of the concept."""
        if not len(forgotten.images):
            raise ValueError(
                f"latent_inversion starts from images of {forgotten.concept}, and there is none: leave it out of "
                "attacks"
            )


@register_attack("latent_inversion", LatentInversionConfig)
def latent_inversion(pipeline: Any, forgotten: Forgotten, budget: LatentInversionConfig) -> Attempt:
    """Invert held-out images of the concept to noise with the empty prompt, and sample from that noise."""
    count = len(forgotten.prompts)
    chosen = [index % len(forgotten.images) for index in range(count)]
    sampler, made = ImageSampler(pipeline, forgotten.sampling), []
    batch_size = forgotten.sampling.sized(forgotten.resolution).batch_size
    assert batch_size is not None
    with frozen(pipeline):
        moments = encode(pipeline, forgotten.images.select(chosen), resolution=forgotten.resolution)
        for start in range(0, count, batch_size):
            latents = sampler.latents(moments[start : start + batch_size])
            empty = [""] * len(latents)
            made.append(sampler.decode(sampler.from_noise(sampler.invert(latents, empty), empty)))
    return Attempt(np.concatenate(made), [""] * count, len(set(chosen)))
