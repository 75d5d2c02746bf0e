"""Generate images from prompts, each from its own seed, so that before and after differ in nothing but the weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from barrier_diffusers.models.architectures import (
    ARCHITECTURES,
    default_side,
    get_architecture,
    sampling_arguments,
)
from barrier_diffusers.utils.checks import SEED, Checked, at_least, rules

PIXELS_AT_ONCE = 2**21  # of a batch: with them Stable Diffusion and SDXL stay below 24 GB at 512 and 1024 pixels
SLICED_FROM = 256  # side of images that the VAE encodes and decodes one by one


def fitting_batch(side: int, most: int) -> int:
    """How many images of this side are worked on at once, at least one and not more than `most`."""
    return max(1, min(most, PIXELS_AT_ONCE // side**2))


@contextmanager
def sliced_vae(vae: Any, side: int) -> Iterator[None]:
    """A VAE that takes large images one by one: each of 1024 pixels needs 4.4 GB while it is decoded."""
    switch = vae is not None and side >= SLICED_FROM and hasattr(vae, "use_slicing") and not vae.use_slicing
    if switch:
        vae.use_slicing = True
    try:
        yield
    finally:
        if switch:
            vae.use_slicing = False


def side_of(pipeline: Any, sampling: SamplingConfig) -> int:
    """Side in pixels of the images that a pipeline samples."""
    if sampling.resolution is not None:
        return sampling.resolution
    if getattr(pipeline, "vae", None) is None:
        return pipeline.resolution
    return default_side(pipeline) or 1024


@dataclass
class SamplingConfig(Checked):
    """How images are sampled; part of every number computed from them."""

    num_inference_steps: int = 20  # of the pipeline's own scheduler
    guidance_scale: float = 3.0  # classifier-free guidance
    batch_size: int | None = None  # images sampled at once; None: 100, fewer of large images (8 of 512, 2 of 1024)
    seed: int = 1000  # image i of a prompt list starts from seed + i
    resolution: int | None = None  # side in pixels; None: the pipeline's own

    RULES = rules(
        num_inference_steps=at_least(1),
        guidance_scale=at_least(0),
        batch_size=at_least(1),
        seed=SEED,
        resolution=at_least(1),
    )

    def sized(self, side: int) -> SamplingConfig:
        """With a batch size for images of this side, where none is set."""
        return replace(self, batch_size=self.batch_size or fitting_batch(side, 100))


def postprocessors(pipeline: Any) -> list[str]:
    """Parts of a pipeline that change decoded pixels: a safety checker blackens them, a watermark writes on them."""
    return [name for name in ("safety_checker", "watermark") if vars(pipeline).get(name) is not None]


def filters_off(pipeline: Any) -> dict[str, list[str]]:
    """What a record of generated images says beside model, prompts and sampling: which filters were off.

    Nothing for a pipeline without any, whose images of earlier versions are the same.
    """
    return {"off": postprocessors(pipeline)} if postprocessors(pipeline) else {}


@contextmanager
def without_postprocessing(pipeline: Any) -> Iterator[None]:
    """The pipeline gives the pixels that it decoded: what it draws is to be seen, not what a filter hides."""
    off = {name: vars(pipeline)[name] for name in postprocessors(pipeline)}
    vars(pipeline).update(dict.fromkeys(off))  # not setattr, which would write it into the pipeline's configuration
    try:
        yield
    finally:
        vars(pipeline).update(off)


@contextmanager
def autocast_denoiser(pipeline: Any) -> Iterator[None]:
    """The denoiser, and nothing else, under autocast to the VAE's precision if that is half: a pipeline may decode in
    float32 on its own account (SDXL does), which an autocast around it would undo. A pipeline without VAE runs as it
    is."""
    vae = getattr(pipeline, "vae", None)
    precision = None if vae is None else vae.dtype
    if precision not in (torch.float16, torch.bfloat16):
        yield
        return
    network = getattr(pipeline, get_architecture(type(pipeline).__name__).denoiser)
    original = network.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(pipeline.device.type, precision):
            return original(*args, **kwargs)

    own = "forward" in vars(network)  # accelerate puts its wrapper there
    network.forward = forward
    try:
        yield
    finally:
        if own:
            network.forward = original
        else:
            del network.forward


@torch.no_grad()
def sample(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig, guidance_scale: float
) -> np.ndarray:
    """One batch of images as bytes (N, H, W, 3), each from noise of its own seed; `sampling` says how many steps.

    An image depends, in its last bits, on the batch it is sampled in: a batch is repeated whole or not at all. A
    safety checker and a watermark are off.

    Raises:
        FloatingPointError: non-finite pixels, or nothing but black ones.
    """
    pipeline.set_progress_bar_config(disable=True)
    size = {} if sampling.resolution is None else {"height": sampling.resolution, "width": sampling.resolution}
    if type(pipeline).__name__ in ARCHITECTURES:
        asked = sampling_arguments(pipeline, prompts, guidance_scale)
    else:  # one of our own, which is asked for labels
        asked = {"labels": list(prompts), "guidance_scale": guidance_scale}
    vae, side = getattr(pipeline, "vae", None), side_of(pipeline, sampling)
    with autocast_denoiser(pipeline), without_postprocessing(pipeline), sliced_vae(vae, side):
        result = pipeline(
            **asked,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=sampling.num_inference_steps,
            output_type="np",
            **size,
        ).images
    if not np.isfinite(result).all():
        raise FloatingPointError(f"the pipeline generated non-finite pixels for prompts from {prompts[0]!r} on")
    images = (result * 255).round().clip(0, 255).astype(np.uint8)
    if not images.any():
        raise FloatingPointError(
            f"the pipeline generated {len(images)} images and every pixel is black, for prompts from {prompts[0]!r} "
            "on: its weights or its precision are damaged (or it filters its images in a way of its own)"
        )
    return images


@dataclass(frozen=True)
class ImageOrder:
    """Images that are asked for, in batches that do not depend on who samples them."""

    prompts: list[str]
    sampling: SamplingConfig  # with a batch size

    @property
    def starts(self) -> range:
        """The first prompt of every batch."""
        assert self.sampling.batch_size is not None
        return range(0, len(self.prompts), self.sampling.batch_size)

    def batch(self, pipeline: Any, start: int) -> np.ndarray:
        """The images of the batch that starts at this prompt."""
        chunk = self.prompts[start : start + self.starts.step]
        seeds = [self.sampling.seed + start + index for index in range(len(chunk))]
        return sample(pipeline, chunk, seeds, self.sampling, self.sampling.guidance_scale)


def generate(pipeline: Any, prompts: Sequence[str], sampling: SamplingConfig, desc: str = "generating") -> np.ndarray:
    """Images of the prompts as bytes (N, H, W, 3); image i starts from noise of seed `sampling.seed + i`.

    In a pipeline of half precision the denoiser runs under autocast, as it may be in float32 for training.

    Raises:
        FloatingPointError: non-finite pixels, or a batch of nothing but black ones.
    """
    order = ImageOrder(list(prompts), sampling.sized(side_of(pipeline, sampling)))
    return np.concatenate([order.batch(pipeline, start) for start in tqdm(order.starts, desc=desc, leave=False)])
