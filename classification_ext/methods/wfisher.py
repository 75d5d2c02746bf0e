"""Influence unlearning: a Newton step to the retained images' optimum (Koh and Liang, arXiv 1703.04730).

Shapes: S samples, P parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from classification_ext.data import in_order, pixels_of
from classification_ext.methods.base import METHODS, Edit, Method
from classification_ext.methods.gradients import add_flat, drawn, flat, sample_gradients


def inverse_fisher_product(gradients_SP: Tensor, vector_P: Tensor, damping: float) -> Tensor:
    """(damping I + G^T G / S)^-1 v, exactly, by Woodbury's identity: only an S x S system is solved.

    WoodFisher (Singh and Alistarh, arXiv 2004.14340) applies the same identity to one sample after another.
    """
    num = len(gradients_SP)
    gram_SS = gradients_SP @ gradients_SP.T + damping * num * torch.eye(num).to(gradients_SP)
    weights_S = torch.linalg.solve(gram_SS, gradients_SP @ vector_P)
    return (vector_P - gradients_SP.T @ weights_S) / damping


def influence(edit: Edit) -> None:
    """w + scale (N_f / N_r) H^-1 grad L_f, with the retained images' damped empirical Fisher matrix for H.

    At an optimum of all images the retained images' gradient is - (N_f / N_r) grad L_f, so this is Newton's step on
    their loss. Memory: num_samples gradients of the whole network.
    """
    options, model, parameters = edit.options, edit.model, edit.parameters
    size = min(edit.batch_size, 32)
    rows = drawn(edit.retain, options.num_samples, edit.seed, size, edit.device)
    gradients = [flat(sample_gradients(model, parameters, pixels_of(batch), batch["labels"])) for batch in rows]
    forget_P = torch.zeros_like(gradients[0][0])
    for batch in in_order(edit.forget, size, edit.device):
        forget_P += flat(sample_gradients(model, parameters, pixels_of(batch), batch["labels"])).sum(0)
    forget_P /= len(edit.forget)
    step_P = inverse_fisher_product(torch.cat(gradients), forget_P, options.damping)
    add_flat(parameters, options.scale * len(edit.forget) / len(edit.retain) * step_P)


METHODS.register(Method("wfisher", edit=influence, reads=("damping", "scale", "num_samples")))
