"""Maps that read the same input, stacked so that the loss takes few and large products.

Shapes: O output features, D input features, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.drift import Frame, LoraDrift, chunks, stack_lora, stacked_drift
from barrier_diffusers.protection.loss import protection_terms
from barrier_diffusers.protection.projection import RetainProjection
from barrier_diffusers.protection.region import ForgetRegion
from barrier_diffusers.protection.targets import (
    ProtectedMap,
)


class MapGroup:
    """The maps of one region.

    Args:
        share: weight of a map's loss in the total, 1 / number of maps or 1.
    """

    def __init__(self, maps: Sequence[ProtectedMap], region: ForgetRegion, share: float):
        self.maps, self.region, self.share = list(maps), region, share
        self.frame = Frame.of(region)
        sizes = [linear_map.num_outputs * linear_map.num_features for linear_map in maps]
        self._stacks = [[self.maps[place] for place in run] for run in chunks(sizes)]
        self._weights = [
            torch.cat([torch.full((linear_map.num_outputs,), share / linear_map.num_outputs) for linear_map in stack])
            for stack in self._stacks
        ]
        self.to(region.mean.device)

    def to(self, device: torch.device) -> None:
        """Move region, frame and weights."""
        self.region = self.region.to(device)
        self.frame = self.frame.of_moved(self.region)
        self._weights = [weight_O.to(device) for weight_O in self._weights]

    def full_losses(
        self, config: BarrierConfig, snapshots: Mapping[str, tuple[Tensor, Tensor | None]]
    ) -> list[Tensor]:
        """Each stack's part of the protection loss, for maps that train their full weights."""
        losses = []
        for stack, weight_O in zip(self._stacks, self._weights, strict=True):
            now = [linear_map.outputs_first(linear_map.layer.weight) for linear_map in stack]
            then = [linear_map.outputs_first(snapshots[linear_map.name][0]) for linear_map in stack]
            biases = [linear_map.bias for linear_map in stack]
            drift = stacked_drift(now, then, biases, [snapshots[linear_map.name][1] for linear_map in stack])
            losses.append(protection_terms(drift, self.region, config, self.frame) @ weight_O)
        return losses

    def lora_losses(self, config: BarrierConfig) -> list[Tensor]:
        """The same for maps whose adapter trains; those with the same O, R and scaling make a stack."""
        stacks: dict[tuple, list[LoraDrift]] = {}
        for linear_map in self.maps:
            factors = linear_map.lora()
            key = (len(factors.lora_B_OR), len(factors.lora_A_RD), factors.scaling)
            drift = LoraDrift(factors.lora_A_RD, factors.lora_B_OR, factors.scaling)
            stacks.setdefault(key, []).append(drift)
        return [
            protection_terms(stack_lora(drifts), self.region, config, self.frame).sum() * (self.share / key[0])
            for key, drifts in stacks.items()
        ]


@dataclass
class ProjectedGroup:
    """Maps that read the same retain input: one projection, one stacked product."""

    maps: list[ProtectedMap]
    projection: RetainProjection
