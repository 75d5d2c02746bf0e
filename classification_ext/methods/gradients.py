"""Gradients of single samples, for the Fisher information.

Shapes: B batch, S samples, P parameters, J labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from barrier_diffusers.data.labelled_images import LabelledImages
from classification_ext.data import Batch, in_order


def sample_gradients(
    model: nn.Module, parameters: dict[str, nn.Parameter], pixels: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Gradient of each sample's cross-entropy, (B, *shape) by parameter name; the model must be in eval mode."""
    detached = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (image[None],)).float(), label[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(detached, pixels, labels)


def drawn(images: LabelledImages, count: int, seed: int, batch_size: int, device: torch.device) -> list[Batch]:
    """Batches of `count` of the images, drawn at random without replacement; all of them if there are fewer."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return in_order(images[chosen], batch_size, device)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """Sample gradients as rows (B, P)."""
    return torch.cat([value.flatten(1) for value in gradients.values()], dim=1)


@torch.no_grad()
def add_flat(parameters: dict[str, nn.Parameter], step_P: Tensor) -> None:
    """Add a vector (P,) to the parameters, in the order of `flat`."""
    parts = step_P.split([parameter.numel() for parameter in parameters.values()])
    for parameter, part in zip(parameters.values(), parts, strict=True):
        parameter.add_(part.view(parameter.shape))
