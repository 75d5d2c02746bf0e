"""Fisher forgetting: noise on the weights that the retained images do not need (Golatkar et al., arXiv 1911.04933)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from classification_ext.data import Batch, pixels_of
from classification_ext.methods.base import METHODS, Edit, Method
from classification_ext.methods.gradients import drawn, sample_gradients


def fisher_diagonal(model: nn.Module, parameters: dict[str, nn.Parameter], batches: list[Batch]) -> dict[str, Tensor]:
    """Mean over images x of sum_j p_j(x) (d log p_j(x) / d w)^2, the expectation over labels taken exactly."""
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    for batch in batches:
        pixels = pixels_of(batch)
        with torch.no_grad():
            shares_BJ = model(pixels).float().softmax(1)
        count += len(pixels)
        for label in range(shares_BJ.shape[1]):
            same = torch.full_like(batch["labels"], label)
            for name, value in sample_gradients(model, parameters, pixels, same).items():
                totals[name] += torch.einsum("b,b...->...", shares_BJ[:, label], value.square())
    return {name: total / count for name, total in totals.items()}


def scrub(edit: Edit) -> None:
    """w + n, with n drawn from N(0, noise / sqrt(F)); F below a millionth of its largest entry counts as that."""
    options = edit.options
    batches = drawn(edit.retain, options.num_samples, edit.seed, min(edit.batch_size, 32), edit.device)
    diagonal = fisher_diagonal(edit.model, edit.parameters, batches)
    least = 1e-6 * max(float(value.max()) for value in diagonal.values())
    generator = torch.Generator().manual_seed(edit.seed)
    with torch.no_grad():
        for name, parameter in edit.parameters.items():
            unit = torch.randn(parameter.shape, generator=generator).to(edit.device)
            parameter.add_(unit * (options.noise / diagonal[name].clamp_min(least).sqrt()).sqrt())


METHODS.register(Method("fisher", edit=scrub, reads=("noise", "num_samples")))
