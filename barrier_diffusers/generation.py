"""Generate images from prompts, each from its own seed, so that before and after differ in nothing but the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm


@dataclass
class SamplingConfig:
    """How images are sampled; part of every number computed from them."""

    num_inference_steps: int = 20  # of the pipeline's own scheduler
    guidance_scale: float = 3.0  # classifier-free guidance
    batch_size: int = 100  # images sampled at once
    seed: int = 1000  # image i of a prompt list starts from seed + i


@torch.no_grad()
def generate(pipeline: Any, prompts: Sequence[str], sampling: SamplingConfig, desc: str = "generating") -> np.ndarray:
    """Images of the prompts as bytes (N, H, W, 3); image i starts from noise of seed `sampling.seed + i`.

    A pipeline whose text encoder is in half precision runs under autocast, as its UNet may be in float32 for training.

    Raises:
        FloatingPointError: non-finite pixels.
    """
    pipeline.set_progress_bar_config(disable=True)
    precision = pipeline.text_encoder.dtype
    half = precision in (torch.float16, torch.bfloat16)
    images = []
    for start in tqdm(range(0, len(prompts), sampling.batch_size), desc=desc, leave=False):
        chunk = list(prompts[start : start + sampling.batch_size])
        generators = [torch.Generator().manual_seed(sampling.seed + start + index) for index in range(len(chunk))]
        with torch.autocast(pipeline.device.type, precision if half else None, enabled=half):
            result = pipeline(
                chunk,
                generator=generators,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                output_type="np",
            ).images
        if not np.isfinite(result).all():
            raise FloatingPointError(
                f"the pipeline generated non-finite pixels for prompts {start} to {start + len(chunk)}"
            )
        images.append((result * 255).round().clip(0, 255).astype(np.uint8))
    return np.concatenate(images)
