"""Precision and recall of generated images (Kynkäänniemi et al., arXiv 1904.06991), and the inception score's formula.

All work on what any network says of the images; whose features or probabilities they are belongs in the metric's
name.

Shapes: N real images, M generated images, D features, J labels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def radii(features_ND: Tensor, neighbours: int) -> Tensor:
    """Distance (N,) of each row to its `neighbours`-th nearest other row."""
    distances_NN = torch.cdist(features_ND, features_ND)
    distances_NN.fill_diagonal_(-1)  # itself comes first, whatever rounding makes of its distance
    return distances_NN.kthvalue(neighbours + 1, dim=1).values


def share_inside(queries_MD: Tensor, features_ND: Tensor, radii_N: Tensor) -> float:
    """Share of the queries that lie in the ball of at least one feature row."""
    return float((torch.cdist(queries_MD, features_ND) <= radii_N).any(1).double().mean())


def precision_recall(real_ND: Tensor, generated_MD: Tensor, neighbours: int = 3) -> dict[str, float]:
    """Percentages: precision = generated images inside the real images' manifold, recall = the reverse.

    A set's manifold is the union of the balls around its rows that reach to each row's `neighbours`-th nearest
    neighbour in the set. Recall depends on both counts: compare at equal counts only.

    Raises:
        ValueError: a set with no more rows than `neighbours`, or neighbours below 1.
    """
    smaller = min(len(real_ND), len(generated_MD))
    if neighbours < 1 or smaller <= neighbours:
        raise ValueError(f"precision and recall with {neighbours} neighbours need more images in each set than these")
    real_ND, generated_MD = real_ND.double(), generated_MD.double()
    return {
        "precision": round(100 * share_inside(generated_MD, real_ND, radii_N=radii(real_ND, neighbours)), 3),
        "recall": round(100 * share_inside(real_ND, generated_MD, radii_N=radii(generated_MD, neighbours)), 3),
    }


def inception_score(probabilities_MJ: Tensor) -> float:
    """exp(mean KL(p(y | x) || p(y))) (Salimans et al., arXiv 1606.03498), over all images at once: 1 ... J.

    Raises:
        ValueError: no image.
    """
    if not len(probabilities_MJ):
        raise ValueError("the inception score needs at least one image")
    p_MJ = probabilities_MJ.double()
    marginal_J = p_MJ.mean(0)
    divergence_M = (torch.xlogy(p_MJ, p_MJ) - torch.xlogy(p_MJ, marginal_J)).sum(1)
    return float(divergence_M.mean().exp())


def entropy(probabilities_MJ: Tensor) -> Tensor:
    """Entropy (M,) of each image's distribution over labels, in nats."""
    p_MJ = probabilities_MJ.double()
    return -torch.xlogy(p_MJ, p_MJ).sum(1)
