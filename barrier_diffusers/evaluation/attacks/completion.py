"""Completion: real images of the concept are noised in part, or half painted over, and the pipeline makes whole images
of them. No weight changes, and no token is learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import torch

from barrier_diffusers.evaluation.attacks.base import Attempt, Budget, Forgotten, Level, Variant, register_attack
from barrier_diffusers.models.from_images import ImageSampler
from barrier_diffusers.training.learning import encode, frozen
from barrier_diffusers.utils.checks import Range, rules


@dataclass
class CompletionConfig(Budget):
    """Budget of completion. The seed draws nothing: image i gets the noise of the plain prompts' image i."""

    strength: float = 0.5  # share of the sampler's steps that are taken from the noised image on; 1: noise alone
    # half: the left half of the image stays as it is, the right half is painted anew (inpainting)
    kept: Literal["nothing", "half"] = "nothing"
    prompt: Literal["own", "empty"] = "own"  # the images' own captions, or none

    RULES = rules(strength=Range(0, 1, without_low=True))

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """An image of the concept."""
        if not len(forgotten.images):
            raise ValueError(
                f"completion starts from images of {forgotten.concept}, and there is none: leave it out of attacks"
            )

    def variants(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """Three strengths; thorough: with and without prompt, and inpainting."""
        strengths, kinds = (0.3, 0.5, 0.7), [(self.kept, self.prompt)]
        if level == "thorough":
            kinds = [("nothing", "own"), ("nothing", "empty")]
        found = [
            Variant(
                f"noised to {strength:.0%}, prompt {prompt}",
                replace(self, strength=strength, kept=kept, prompt=prompt),
            )
            for strength, (kept, prompt) in product(strengths, kinds)
        ]
        if level == "thorough":
            found += [
                Variant(f"half of it, prompt {prompt}", replace(self, strength=1.0, kept="half", prompt=prompt))
                for prompt in ("own", "empty")
            ]
        return found


@register_attack("completion", CompletionConfig)
def completion(pipeline: Any, forgotten: Forgotten, budget: CompletionConfig) -> Attempt:
    """Noise held-out images of the concept and denoise them, as many as there are prompts."""
    count = len(forgotten.prompts)
    chosen = [index % len(forgotten.images) for index in range(count)]
    images = forgotten.images.select(chosen)
    prompts = [""] * count if budget.prompt == "empty" else list(images["text"])
    sampler, made = ImageSampler(pipeline, forgotten.sampling), []
    batch_size = forgotten.sampling.sized(forgotten.resolution).batch_size
    assert batch_size is not None
    with frozen(pipeline):
        moments = encode(pipeline, images, resolution=forgotten.resolution)
        for start in range(0, count, batch_size):
            latents = sampler.latents(moments[start : start + batch_size])
            seeds = range(forgotten.sampling.seed + start, forgotten.sampling.seed + start + len(latents))
            draws = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            kept = None
            if budget.kept == "half":
                kept = torch.zeros(latents.shape[-2:], dtype=torch.bool)
                kept[:, : latents.shape[-1] // 2] = True
            noise = torch.stack(draws).to(latents)
            asked = prompts[start : start + batch_size]
            guided = budget.prompt == "own"
            denoised = sampler.denoise(latents, noise, asked, strength=budget.strength, kept=kept, guided=guided)
            made.append(sampler.decode(denoised))
    return Attempt(np.concatenate(made), prompts, len(set(chosen)))
