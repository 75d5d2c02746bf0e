"""Train a few parameters of a frozen pipeline on some images, with the loss that it was trained with: what an attack
does, and what the adversary in robust training does.

Shapes: N images, B batch, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import trange

from barrier_diffusers.data.encoding import encode_moments
from barrier_diffusers.models.architectures import components
from barrier_diffusers.models.denoiser import Denoiser
from barrier_diffusers.objectives.base import Condition, DiffusionStep


class LearningSettings(Protocol):
    """What `learn` reads of its settings."""

    seed: int  # of everything it draws
    num_steps: int  # of AdamW, without weight decay
    batch_size: int  # images per step, drawn with replacement
    learning_rate: float  # constant


@contextmanager
def frozen(pipeline: Any) -> Iterator[None]:
    """No network of the pipeline trains; which parameters did, and every module's mode, come back at the end."""
    parts = components(pipeline).values()
    gradients = [(value, value.requires_grad) for part in parts for value in part.parameters()]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.requires_grad_(False).eval()
        yield
    finally:
        for value, required in gradients:
            value.requires_grad_(required)
        for module, training in modes:
            module.training = training


@contextmanager
def every_weight(network: nn.Module) -> Iterator[list[nn.Parameter]]:
    """All parameters of a network, which train; their values come back at the end."""
    weights = list(network.parameters())
    before = [weight.detach().clone() for weight in weights]
    try:
        network.requires_grad_(True)
        yield weights
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def encode(pipeline: Any, images: Dataset, resolution: int) -> Tensor:
    """VAE posteriors (N, 2 c, h, w) of the images."""
    return encode_moments(pipeline.vae, images, image_column="image", resolution=resolution)


def learn(
    denoiser: Denoiser,
    moments: Tensor,
    condition: Callable[[Tensor], Condition],
    parameters: Sequence[nn.Parameter],
    budget: LearningSettings,
    desc: str,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train `parameters`, and nothing else, on the denoising loss that the model itself was trained with.

    Args:
        moments: VAE posteriors (N, 2 c, h, w) of the images, or what else `denoiser.noised` takes.
        condition: numbers of the images in a batch (B,) -> what their captions or labels tell the denoiser.
        after_step: called after each step with the number of steps done, 1 and on; it draws from no generator of
            the training.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    generator = torch.Generator().manual_seed(budget.seed)
    optimizer = torch.optim.AdamW(parameters, lr=budget.learning_rate, weight_decay=0.0)
    predict, device = partial(denoiser.predict, denoiser.network), next(denoiser.network.parameters()).device
    for step in trange(budget.num_steps, desc=desc, leave=False):
        rows = torch.randint(len(moments), (budget.batch_size,), generator=generator)
        drawn = denoiser.noised(moments[rows], generator)
        noisy, timesteps, target = (value.to(device) for value in (drawn.noisy, drawn.timesteps, drawn.target))
        prompts = {key: value.to(device) for key, value in condition(rows).items()}
        loss = DiffusionStep(predict, noisy, timesteps, target, prompts).ordinary_loss()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{desc}: non-finite loss at step {step + 1}: lower its learning_rate")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step + 1)
