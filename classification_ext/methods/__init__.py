"""Unlearning methods, one file each; importing a file registers it. See base.py for what they get."""

from classification_ext.methods import (
    boundary_expand,
    boundary_shrink,
    fisher,
    ft,
    ga,
    l1_sparse,
    retrain,
    rl,
    wfisher,
)
from classification_ext.methods.base import METHODS, Edit, Method, Step

__all__ = [
    "METHODS",
    "Edit",
    "Method",
    "Step",
    "boundary_expand",
    "boundary_shrink",
    "fisher",
    "ft",
    "ga",
    "l1_sparse",
    "retrain",
    "rl",
    "wfisher",
]
