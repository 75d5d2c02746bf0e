"""BarrierConfig: every option of the protection, as a dataclass that saves to and loads from barrier_config.json.

Beside it what all settings share: their checks, and what every unlearning run says about the protection.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from barrier_diffusers.utils.checks import SHARE, Range, at_least, check_settings, rules

CONFIG_NAME = "barrier_config.json"


PENALTY_CHOICES = (  # of the protection loss; its numbers have a value anyway, and are not read without it
    *("region", "decomposition", "interval", "remove_top_directions", "include_bias_drift"),
    *("use_actual_bounds", "normalize_protection", "residual_weighting", "residual_source", "loss_inside"),
    *("wide_features", "residual_rank"),
)


RESIDUAL_CHOICES = ("residual_source", "residual_weighting", "wide_features", "residual_rank")


@dataclass
class BarrierConfig:
    """Options of BARRIER (arXiv 2605.15737); contradictory ones are an error, not a precedence rule.

    Raises:
        ValueError: a value out of range, an unknown choice, or two options that contradict each other.
    """

    # protected and trained: dotted suffixes or full names of Linear / Conv2d modules, or Linear, Conv2d, Conv2d1x1
    # None: those of the pipeline's row in architectures.py (a Barrier on a bare model must be given names)
    targets: list[str] | None = None
    # only inside these blocks: numbers of transformer blocks in forward order, or dotted names such as down_blocks.1
    blocks: list[int | str] | None = None  # None: everywhere
    lambda_interval: float = 10.0  # >= 0; weight of the protection loss in the total
    lower_percentile: float = 0.05  # [0, 1]; lower end of the safe interval of each direction
    upper_percentile: float = 0.95  # [0, 1]; upper end
    reduced_dim: int = 32  # >= 1; K, the directions that get an interval of their own
    infinity_scale: float = 20.0  # >= 0, in units of z; distance of the outer envelope from the safe interval
    use_actual_bounds: bool = False  # outer envelope from the real min / max of forget and retain data
    normalize_protection: bool = True  # mean over maps, so that lambda does not depend on how many there are
    # two_corner: the paper's two boxes; envelope: worst case over the complement; slabs: the exact complement
    region: Literal["two_corner", "envelope", "slabs"] = "two_corner"
    # svd, pca: leading directions of the centred inputs (equal up to rounding); none: one interval per feature
    decomposition: Literal["svd", "pca", "none"] = "svd"
    interval: bool = True  # False: mean and residual terms only
    remove_top_directions: bool = False  # the K directions are dropped: mean and residual terms only
    include_bias_drift: bool = False  # the bias drift also enters both ends of each interval
    # per_sample: mean over rows; singular_values: the paper's code, grows with the number of rows
    residual_weighting: Literal["per_sample", "singular_values"] = "per_sample"
    residual_source: Literal["forget", "retain", "both"] = "forget"  # whose covariance fills the residual term
    # >= 0; of inputs with more features an upper bound on the covariance is kept, in memory linear in the features:
    # residual_rank directions beside the basis, and one number for all others; null: whole covariances everywhere
    wide_features: int | None = 8192
    # >= 1; more make the bound tighter; inputs of fewer than 2 (reduced_dim + residual_rank) features have none
    residual_rank: int = 256
    # penalty: the protection loss; projection: updates are kept out of the directions of the retain inputs, and
    # lambda_interval, reduced_dim, the percentiles and infinity_scale play no part; both: projection and loss
    constraint: Literal["penalty", "projection", "both"] = "penalty"
    projection_energy: float = 0.999  # (0, 1]; share of the retain inputs' energy E|x|^2 that updates may not touch
    # 0: not at all. Above, the projection is soft: of the drift along a direction whose retain energy is e times the
    # mean over all directions, softness / (softness + e) is left after each step
    projection_softness: float = 0.0
    # each attention computes the loss of its own maps while it runs in training: for engines that make weights whole
    # only there; value and gradient are the same, and it takes more operators
    loss_inside: bool = False

    RULES = rules(
        blocks=at_least(0),
        lambda_interval=at_least(0),
        lower_percentile=SHARE,
        upper_percentile=SHARE,
        reduced_dim=at_least(1),
        wide_features=at_least(0),
        residual_rank=at_least(1),
        infinity_scale=at_least(0),
        projection_energy=Range(0, 1, without_low=True),
        projection_softness=at_least(0),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_lists()
        self._check_choices()
        self._check_contradictions()

    def _check_lists(self) -> None:
        if self.targets is not None and (isinstance(self.targets, str) or not self.targets or not all(self.targets)):
            raise ValueError(f"targets is {self.targets!r}, but must be a non-empty list of module names")
        if self.blocks is not None and (isinstance(self.blocks, str) or not self.blocks or "" in self.blocks):
            raise ValueError(f"blocks is {self.blocks!r}, but must be a non-empty list of numbers or module names")
        if not self.lower_percentile < self.upper_percentile:
            raise ValueError(
                "percentiles must satisfy 0 <= lower_percentile < upper_percentile <= 1, but are "
                f"{self.lower_percentile} and {self.upper_percentile}"
            )

    def _check_choices(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("region", "decomposition", "residual_weighting", "residual_source", "constraint"):
            choices = get_args(hints[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}")

    def _check_contradictions(self) -> None:
        none = self.decomposition == "none"
        defaults = {field.name: field.default for field in fields(self)}
        mean_and_residual_only = not self.interval or self.remove_top_directions
        contradictions = {
            "decomposition='none' has no leading directions, so remove_top_directions has nothing to remove": none
            and self.remove_top_directions,
            f"decomposition='none' has no residual: {', '.join(RESIDUAL_CHOICES)} must keep their defaults": (
                none and any(getattr(self, name) != defaults[name] for name in RESIDUAL_CHOICES)
            ),
            "interval=False and remove_top_directions=True both drop the interval term: choose one": not self.interval
            and self.remove_top_directions,
            "without the interval term, region, include_bias_drift and use_actual_bounds must keep their defaults": (
                mean_and_residual_only
                and (self.region != "two_corner" or self.include_bias_drift or self.use_actual_bounds)
            ),
        }
        contradictions |= {
            f"constraint='projection' has no protection loss: {', '.join(PENALTY_CHOICES)} must keep their defaults": (
                not self.has_penalty and any(getattr(self, name) != defaults[name] for name in PENALTY_CHOICES)
            ),
            "constraint='both' with lambda_interval=0 has no protection loss: set constraint='projection'": (
                self.constraint == "both" and self.lambda_interval == 0
            ),
            "projection_energy needs constraint='projection' or 'both'": not self.has_projection
            and self.projection_energy != defaults["projection_energy"],
            "projection_softness needs constraint='projection' or 'both'": not self.has_projection
            and self.projection_softness > 0,
        }
        for message, holds in contradictions.items():
            if holds:
                raise ValueError(message)

    @property
    def has_interval_term(self) -> bool:
        """Whether L_interval is part of the loss."""
        return self.interval and not self.remove_top_directions

    @property
    def has_penalty(self) -> bool:
        """Whether there is a protection loss, hence regions of the forget inputs."""
        return self.constraint != "projection"

    @property
    def has_projection(self) -> bool:
        """Whether updates are kept out of the retain inputs' directions."""
        return self.constraint != "penalty"

    @property
    def num_sketched(self) -> int:
        """Directions of a wide map's inputs that are kept: reduced_dim for the basis, residual_rank beside it."""
        return self.reduced_dim + self.residual_rank

    def is_wide(self, num_features: int) -> bool:
        """Whether the covariance of so many input features is bounded rather than kept."""
        if self.wide_features is None or self.decomposition == "none":
            return False
        return num_features > max(self.wide_features, 2 * self.num_sketched)

    @property
    def protects(self) -> bool:
        """Whether anything is protected at all: lambda_interval = 0 switches the penalty off."""
        return self.has_projection or self.lambda_interval > 0

    @property
    def region_needs_retain_data(self) -> bool:
        """Whether the regions of the protection loss take a pass over retain data."""
        return self.use_actual_bounds or self.residual_source != "forget"

    @property
    def needs_retain_data(self) -> bool:
        """Whether setting up the protection takes a pass over retain data."""
        return self.region_needs_retain_data or self.has_projection

    @property
    def summary(self) -> str:
        """The protection in a few words, for tables and model cards."""
        penalty = f"protection weight {self.lambda_interval:g}" if self.protects else "no protection"
        soft = f", softness {self.projection_softness:g}" if self.projection_softness else ""
        projection = f"projection at energy {self.projection_energy:g}{soft}"
        return {"penalty": penalty, "projection": projection, "both": f"{penalty}, {projection}"}[self.constraint]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BarrierConfig:
        """The inverse of `to_dict`; an unknown key is a ValueError."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(unknown)} in the BARRIER config; known are {', '.join(known)}"
            )
        return cls(**values)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write barrier_config.json into `folder`, whole or not at all."""
        # here, as the package imports torch and this module does not
        from barrier_diffusers.utils.files import write_json

        path = Path(folder) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> BarrierConfig:
        """Read barrier_config.json from `folder`."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} holds no {CONFIG_NAME}")
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
