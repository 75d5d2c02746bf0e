"""The protection loss, one pure function per term of docs/method.md section 2, each returning one value per output.

A caller weighs each output with 1 / O of its map, so that maps of different size can be stacked. No function looks at
a value on the host. Shapes: O outputs, D input features, K kept directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.drift import Drift, Frame, LoraStack
from barrier_diffusers.protection.region import ForgetRegion


def mean_term(mean_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """L_mean: (dW mean + db)^2, (O,)."""
    return _plus_bias(mean_O, bias_O).square()


def residual_term(energy_O: Tensor, multiplier: float = 1.0) -> Tensor:
    """L_residual: diag(dW C_res dW^T), (O,), times N / rows with residual_weighting "singular_values"."""
    return energy_O if multiplier == 1.0 else energy_O * multiplier


def interval_ends(
    drift_OK: Tensor, lower_K: Tensor, upper_K: Tensor, bias_O: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ends (O,) of {d z + db : lower <= z <= upper}: d+ l - d- u and d+ u - d- l, computed as d c -+ |d| w / 2.

    With several boxes, bounds (K, T) and bias (O, 1), the ends are (O, T).
    """
    centre_O = _plus_bias(drift_OK @ ((lower_K + upper_K) / 2), bias_O)
    half_width_O = drift_OK.abs() @ ((upper_K - lower_K) / 2)
    return centre_O - half_width_O, centre_O + half_width_O


def box_term(drift_OK: Tensor, lower_K: Tensor, upper_K: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """T(lower, upper): the squares of both interval ends, (O,)."""
    low_O, high_O = interval_ends(drift_OK, lower_K, upper_K, bias_O)
    return low_O.square() + high_O.square()


def two_corner_term(drift_OK: Tensor, region: ForgetRegion, bias_O: Tensor | None = None) -> Tensor:
    """T(outer_lower, z_lower) + T(z_upper, outer_upper), (O,): the paper's two boxes."""
    lower_K2 = torch.stack([region.outer_lower, region.z_upper], dim=1)
    upper_K2 = torch.stack([region.z_lower, region.outer_upper], dim=1)
    return box_term(drift_OK, lower_K2, upper_K2, None if bias_O is None else bias_O[:, None]).sum(1)


def envelope_term(drift_OK: Tensor, region: ForgetRegion, bias_O: Tensor | None = None) -> Tensor:
    """T(outer_lower, outer_upper), (O,): the worst case over the complement of the safe box."""
    return box_term(drift_OK, region.outer_lower, region.outer_upper, bias_O)


def slabs_term(drift_OK: Tensor, region: ForgetRegion, bias_O: Tensor | None = None) -> Tensor:
    """Mean of T over the 2K slabs whose union is the exact complement of the safe box, (O,).

    A slab is the envelope with one coordinate clipped to its low or high side, so its centre and width differ from the
    envelope's in that coordinate only: one rank-one correction each, O(O K) in all.
    """
    centre_K = (region.outer_lower + region.outer_upper) / 2
    half_K = (region.outer_upper - region.outer_lower) / 2
    size_OK = drift_OK.abs()
    centre_O1 = _plus_bias(drift_OK @ centre_K, bias_O)[:, None]
    half_O1 = (size_OK @ half_K)[:, None]
    total = drift_OK.new_zeros(len(drift_OK))
    for lower_K, upper_K in ((region.outer_lower, region.z_lower), (region.z_upper, region.outer_upper)):
        slab_centre_OK = centre_O1 + drift_OK * ((lower_K + upper_K) / 2 - centre_K)
        slab_half_OK = half_O1 + size_OK * ((upper_K - lower_K) / 2 - half_K)
        total = total + 2 * (slab_centre_OK.square() + slab_half_OK.square()).sum(1)
    return total / (2 * drift_OK.shape[1])


INTERVAL_TERMS = {"two_corner": two_corner_term, "envelope": envelope_term, "slabs": slabs_term}


def protection_terms(
    drift: Drift | LoraStack, region: ForgetRegion, config: BarrierConfig, frame: Frame | None = None
) -> Tensor:
    """L_mean + L_residual + L_interval of every output, (O,) float32; its mean over a map's outputs is L_map.

    Args:
        frame: of the region, if it is at hand.
    """
    products, bias_O = drift.products(frame or Frame.of(region)), drift.delta_bias_O
    total_O = mean_term(products.mean_O, bias_O)
    if products.energy_O is not None:
        total_O = total_O + residual_term(products.energy_O, region.residual_multiplier)
    if config.has_interval_term:
        shift_O = bias_O if config.include_bias_drift else None
        total_O = total_O + INTERVAL_TERMS[config.region](products.drift_OK, region, shift_O)
    return total_O


def _plus_bias(values_O: Tensor, bias_O: Tensor | None) -> Tensor:
    return values_O if bias_O is None else values_O + bias_O
