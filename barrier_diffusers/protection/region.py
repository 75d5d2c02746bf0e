"""ForgetRegion: where the forget inputs of a layer live (docs/method.md section 1), fitted from streamed statistics.

Shapes: D input features, K kept directions, L directions of a wide input's residual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.frequent_directions import FrequentDirections, shrunk
from barrier_diffusers.protection.statistics import Moments, ProjectionSketch
from barrier_diffusers.utils.files import reading_tensors, written_whole

THIN = 4  # a factor of C_res is used where it has at most D / THIN columns: then it halves the work at least


SMALLEST_KRYLOV = 700  # input features; of fewer, the whole decomposition is as quick


OVERSAMPLED = 16  # directions beyond those asked for


KRYLOV_BLOCKS = 8  # powers of C between restarts


KRYLOV_RESTARTS = 3


KRYLOV_ERROR = 1e-10  # of the largest eigenvalue; float32, in which the basis is kept, rounds at 6e-8


KRYLOV_TOO_FLAT = 1e-3  # likewise: with a larger error after a round, more rounds would cost more than they save


LEFT_OUT = 1e-6  # share of the trace of C_res that its factor may miss: the size of float32's rounding


@dataclass(frozen=True)
class Directions:
    """Leading directions of the forget inputs, known after the first pass."""

    mean_D: Tensor  # float64
    basis_DK: Tensor  # orthonormal columns, float64
    eigenvalues_K: Tensor  # variance of the forget inputs along each column


@dataclass(frozen=True)
class ForgetRegion:
    """What the protection loss knows of one input tensor; all tensors float32, shared by every map that reads it."""

    mean: Tensor  # (D,) of the forget rows
    basis: Tensor  # (D, K) leading eigenvectors of the forget covariance; the identity for decomposition "none"
    z_lower: Tensor  # (K,) lower percentile of z = basis^T (x - mean)
    z_upper: Tensor  # (K,) upper percentile
    outer_lower: Tensor  # (K,) lower end of the outer envelope
    outer_upper: Tensor  # (K,) upper end
    residual: Tensor | None  # (D, D) C_res, covariance outside the basis; None where there is none, or a bound on it
    count: int  # forget rows
    residual_multiplier: float = 1.0  # 1 per sample, N / rows with residual_weighting "singular_values"
    residual_factor: Tensor | None = None  # (D, L) F of a wide input: C_res <= F F^T + delta (I - basis basis^T)
    residual_diagonal: float = 0.0  # delta

    def to(self, device: torch.device | str) -> ForgetRegion:
        """The same region on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def num_features(self) -> int:
        """Number of input features, D."""
        return len(self.mean)

    def thin_factor(self) -> Tensor | None:
        """F with F F^T = C_res, where the whole C_res is known and so few columns are enough that it saves work."""
        return None if self.residual is None else thin_factor(self.residual, self.num_features // THIN)

    @property
    def num_bytes(self) -> int:
        """Memory the tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.to_tensors().values())

    def to_tensors(self) -> dict[str, Tensor]:
        """All fields as tensors, for safetensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        numbers = {"count": self.count, "residual_multiplier": self.residual_multiplier}
        if self.residual_factor is not None:
            numbers["residual_diagonal"] = self.residual_diagonal
        return {**tensors, **{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ForgetRegion:
        """The inverse of `to_tensors`."""
        values = dict(tensors)
        count, multiplier = int(values.pop("count").item()), float(values.pop("residual_multiplier").item())
        residual, factor = values.pop("residual", None), values.pop("residual_factor", None)
        diagonal = 0.0 if factor is None else float(values.pop("residual_diagonal").item())
        return cls(
            residual=residual,
            count=count,
            residual_multiplier=multiplier,
            residual_factor=factor,
            residual_diagonal=diagonal,
            **values,
        )


def thin_factor(covariance_DD: Tensor, most: int) -> Tensor | None:
    """F (D, L) with L <= `most` and F F^T = C up to LEFT_OUT of the trace; None if C has a higher rank.

    Cholesky with the largest diagonal entry left as pivot (Higham 1990); what is left over is positive semi-definite,
    so its trace, which is known at every step, bounds what a loss can miss: trace * ||dW||^2 / O. In float64, on the
    host, with work O(D L^2).
    """
    trace = covariance_DD.diagonal().sum()
    if most and math.sqrt(most) * covariance_DD.norm() < (1 - 2 * LEFT_OUT) * trace:
        return None  # the largest `most` eigenvalues sum to no more, by Cauchy and Schwarz
    left_DD = covariance_DD.detach().double().cpu()
    diagonal_D = left_DD.diagonal().clone()
    enough = LEFT_OUT * diagonal_D.sum()
    columns = torch.zeros(most, len(left_DD), dtype=torch.float64)  # one row per column of F
    for step in range(most + 1):
        if diagonal_D.clamp_min(0).sum() <= enough:
            return columns[:step].T.to(covariance_DD).contiguous()
        if step == most:
            break
        pivot = int(diagonal_D.argmax())
        column_D = left_DD[pivot] - columns[:step, pivot] @ columns[:step]
        columns[step] = column_D / diagonal_D[pivot].sqrt()
        diagonal_D -= columns[step].square()
    return None


def _fix_signs(basis_DK: Tensor) -> Tensor:
    """Turn each column so that its entry of largest magnitude is positive: a run is reproducible."""
    largest_1K = basis_DK.abs().argmax(0, keepdim=True)
    signs_1K = basis_DK.gather(0, largest_1K).sign()
    return basis_DK * torch.where(signs_1K == 0, 1.0, signs_1K)


def fit_directions(moments: Moments | FrequentDirections, config: BarrierConfig, name: str = "") -> Directions:
    """Mean and leading directions after the first pass over the forget data.

    "svd" and "pca" come from the same routine: the right singular vectors of the centred rows are the eigenvectors of
    their covariance, rows are not kept, and the SVD of a covariance takes seven times as long. Those of a wide input
    are its sketch's.

    Raises:
        ValueError: reduced_dim exceeds the number of input features; no rows.
    """
    if isinstance(moments, FrequentDirections):
        values_K, leading_DK = moments.leading(config.reduced_dim)
        return Directions(moments.mean, _fix_signs(leading_DK), values_K)
    covariance_DD = moments.covariance
    num_features = len(covariance_DD)
    if config.decomposition == "none":
        identity_DD = torch.eye(num_features, dtype=torch.float64, device=covariance_DD.device)
        return Directions(moments.mean, identity_DD, covariance_DD.diagonal().clone())
    check_reduced_dim(config, num_features, name)
    values_K, leading_DK = leading_eigenvectors(covariance_DD, config.reduced_dim)
    return Directions(moments.mean, _fix_signs(leading_DK.contiguous()), values_K.clamp_min(0))


def leading_eigenvectors(covariance_DD: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest eigenvalues, descending, and their eigenvectors (D, num), float64.

    Where these are few of many, by a block Krylov method (Golub and Underwood 1977; Musco and Musco 2015), which is
    mostly matrix products: restarted until C v - lambda v is rounding, and given up for the whole decomposition where
    the spectrum is too flat for that.
    """
    num_features = len(covariance_DD)
    width = num + OVERSAMPLED
    if num_features >= SMALLEST_KRYLOV and width * KRYLOV_BLOCKS <= num_features // 2:
        generator = torch.Generator().manual_seed(0)  # no number is drawn from the global one
        start = torch.randn(num_features, width, generator=generator, dtype=torch.float64)
        block_DW = torch.linalg.qr(start.to(covariance_DD.device))[0]
        for _ in range(KRYLOV_RESTARTS):
            blocks = [block_DW]
            for _ in range(KRYLOV_BLOCKS - 1):
                blocks.append(torch.linalg.qr(covariance_DD @ blocks[-1])[0])
            space_DS = torch.linalg.qr(torch.cat(blocks, dim=1))[0]
            image_DS = covariance_DD @ space_DS
            values_S, rotation_SS = torch.linalg.eigh(space_DS.T @ image_DS)
            values_W, rotation_SW = values_S.flip(0)[:width], rotation_SS.flip(1)[:, :width]
            block_DW = space_DS @ rotation_SW
            error_DK = (image_DS @ rotation_SW - block_DW * values_W)[:, :num]
            error = float(error_DK.norm(dim=0).max() / values_W[0].clamp_min(1e-300))
            if error <= KRYLOV_ERROR:
                return values_W[:num], block_DW[:, :num]
            if error > KRYLOV_TOO_FLAT:
                break
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    return values_D.flip(0)[:num], vectors_DD.flip(1)[:, :num]


def check_reduced_dim(config: BarrierConfig, num_features: int, name: str) -> None:
    """ValueError if the map `name` has fewer than reduced_dim input features."""
    if config.decomposition != "none" and config.reduced_dim > num_features:
        raise ValueError(
            f"reduced_dim is {config.reduced_dim}, but {name or 'the map'} has only {num_features} input features: "
            f"set reduced_dim to at most {num_features}"
        )


def residual_covariance(covariance_DD: Tensor, basis_DK: Tensor) -> Tensor:
    """C_res = (I - B B^T) C (I - B B^T), (D, D), in O(D^2 K): no second decomposition.

    For the forget rows B holds eigenvectors of C, so this is C - B diag(eig) B^T. It is positive semi-definite by
    construction: eigenvalues below 0 are float64 rounding, a billionth of what the float32 of the result rounds off.
    """
    image_DK = covariance_DD @ basis_DK
    half_DK = image_DK - basis_DK @ ((basis_DK.T @ image_DK) / 2)
    return torch.addmm(
        covariance_DD, torch.cat([basis_DK, half_DK], dim=1), torch.cat([half_DK, basis_DK], dim=1).T, alpha=-1
    )


def bounded_residual(rows: FrequentDirections, basis_DK: Tensor, most: int) -> tuple[Tensor, float]:
    """F (D, L) with L <= `most`, orthogonal to the basis, and delta: with P = I - basis basis^T it is, up to float32's
    rounding of F, F F^T <= P C P <= F F^T + delta P."""
    rows_LD, delta = rows.bound
    outside_LD = rows_LD - (rows_LD @ basis_DK) @ basis_DK.T
    kept_LD, more = shrunk(outside_LD, most)
    return kept_LD.T.float().contiguous(), float(delta + more)


def fit_region(
    forget_moments: Moments | FrequentDirections,
    directions: Directions,
    forget_sketch: ProjectionSketch,
    config: BarrierConfig,
    retain_moments: Moments | FrequentDirections | None = None,
    retain_sketch: ProjectionSketch | None = None,
) -> ForgetRegion:
    """The region after the second pass (docs/method.md section 1).

    With `use_actual_bounds` the envelope is the min / max of z over forget and retain rows, in the mean and basis of
    the forget rows. `residual_source` "retain" takes the retain rows' covariance about their own mean, "both" that of
    all rows pooled; in either case its part outside the forget basis.

    Raises:
        ValueError: an option that needs retain rows, and none were recorded.
    """
    missing = config.use_actual_bounds and retain_sketch is None
    if missing or (config.residual_source != "forget" and retain_moments is None):
        raise ValueError("use_actual_bounds and residual_source='retain' / 'both' need a retain_loader")
    z_lower, z_upper = forget_sketch.quantile(config.lower_percentile), forget_sketch.quantile(config.upper_percentile)
    if config.use_actual_bounds:
        assert retain_sketch is not None
        outer_lower = torch.minimum(forget_sketch.minimum, retain_sketch.minimum)
        outer_upper = torch.maximum(forget_sketch.maximum, retain_sketch.maximum)
    else:
        outer_lower, outer_upper = z_lower - config.infinity_scale, z_upper + config.infinity_scale
    residual, factor, diagonal, multiplier = None, None, 0.0, 1.0
    if config.decomposition != "none":
        source = _residual_moments(forget_moments, retain_moments, config)
        if isinstance(source, FrequentDirections):
            factor, diagonal = bounded_residual(source, directions.basis_DK, config.residual_rank)
        else:
            residual = residual_covariance(source.covariance, directions.basis_DK)
        if config.residual_weighting == "singular_values":
            multiplier = _singular_value_weight(forget_moments.count, *directions.basis_DK.shape)
    return ForgetRegion(
        mean=directions.mean_D.float(),
        basis=directions.basis_DK.float(),
        z_lower=z_lower,
        z_upper=z_upper,
        outer_lower=outer_lower,
        outer_upper=outer_upper,
        residual=None if residual is None else residual.float(),
        count=forget_moments.count,
        residual_multiplier=multiplier,
        residual_factor=factor,
        residual_diagonal=diagonal,
    )


def _residual_moments(
    forget: Moments | FrequentDirections, retain: Moments | FrequentDirections | None, config: BarrierConfig
) -> Moments | FrequentDirections:
    if config.residual_source == "forget":
        return forget
    assert retain is not None
    if config.residual_source == "retain":
        return retain
    pooled: Any = forget.fresh()  # of the kind that both are
    pooled.merge(forget)
    pooled.merge(retain)
    return pooled


def _singular_value_weight(count: int, num_features: int, reduced_dim: int) -> float:
    """N / (min(N, D) - K): the paper's code divides the squared singular values by the number of residual rows."""
    rows = min(count, num_features) - reduced_dim
    return count / rows if rows > 0 else 0.0


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    with written_whole(path) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, metadata)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; ValueError if there is none, or a damaged one."""
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} holds no {path.name}")
    with reading_tensors(path), safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
