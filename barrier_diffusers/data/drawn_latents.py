"""Latents that the base itself draws for the retain prompts: retain rows without any image.

Shapes: N rows, B batch, c latent channels, h and w latent side.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from barrier_diffusers.data.encoding import EncodedImages, cached_tensors, encode_prompts, tensors_hash
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import fitting_batch
from barrier_diffusers.models.partial_sampler import PartialSampler
from barrier_diffusers.utils.checks import SEED, Checked, at_least, rules
from barrier_diffusers.utils.run_records import fingerprint


@dataclass
class DrawnLatentsConfig(Checked):
    """How the base draws latents of what is retained."""

    num: int = 512  # of all retain prompts together, each as often
    num_inference_steps: int = 20  # of a deterministic sampler
    guidance_scales: list[float] = field(default_factory=lambda: [1.5, 3.0])  # in turn
    seed: int = 0  # of the noise that they start from

    SECTION = "drawn_latents."
    RULES = rules(num=at_least(1), num_inference_steps=at_least(1), guidance_scales=at_least(0), seed=SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.guidance_scales:
            raise ValueError("drawn_latents.guidance_scales is empty, but must hold at least one number")


def with_drawn_latents(
    retain: EncodedImages,
    config: DrawnLatentsConfig,
    *,
    pipeline: Any,
    resolution: int,
    cache: Path,
    base_hash: str,
) -> TorchDataset:
    """The retain rows, if they have images, and those that the pipeline draws for their captions, kept in the cache.

    Their posteriors have no width: every epoch noises the very latents that were drawn.

    Args:
        resolution: side of the images in pixels.
        base_hash: of the pipeline as it is now.
    """
    distinct = retain.caption_ids.unique()
    ids = distinct.repeat(-(-config.num // len(distinct)))[: config.num]
    condition = {key: value[distinct] for key, value in retain.embeddings.items()}
    key = fingerprint(base_hash, resolution, asdict(config), tensors_hash(condition))
    moments = cached_tensors(
        cache / f"drawn-{key}.safetensors",
        lambda: {"moments": draw(retain, ids, config, pipeline=pipeline, resolution=resolution)},
    )["moments"]
    drawn = replace(retain, moments=moments, caption_ids=ids)
    return drawn if retain.moments is None else ConcatDataset([retain, drawn])


def draw(retain: EncodedImages, ids_N: Tensor, config: DrawnLatentsConfig, pipeline: Any, resolution: int) -> Tensor:
    """Posteriors (N, 2 c, h, w) of latents of these rows of the embeddings, on the CPU."""
    denoiser, device = PipelineDenoiser(pipeline), pipeline.device
    shape = denoiser.latent_shape(resolution)
    noise = torch.randn(len(ids_N), *shape, generator=torch.Generator().manual_seed(config.seed))
    empty = {key: value.to(device) for key, value in encode_prompts(pipeline, [""]).items()}
    turn = torch.arange(len(ids_N)) // len(ids_N.unique()) % len(config.guidance_scales)
    done = torch.empty_like(noise)
    for number, scale in enumerate(config.guidance_scales):
        sampler = PartialSampler(denoiser, shape, scale, config.num_inference_steps)
        rows = (turn == number).nonzero().flatten()
        for part in tqdm(rows.split(fitting_batch(resolution, 100)), desc="retain latents", leave=False):
            condition = {key: value.to(device) for key, value in retain.condition(ids_N[part]).items()}
            unconditional = {key: value.expand(len(part), *value.shape[1:]) for key, value in empty.items()}
            done[part] = sampler.whole(condition, unconditional, noise[part].to(device)).cpu()
    return denoiser.exact_moments(done)
