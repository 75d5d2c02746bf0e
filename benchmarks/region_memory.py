"""Memory that the statistics of all linear maps take, counted and not measured, for docs/performance.md.

    python benchmarks/region_memory.py

The UNet runs once on the meta device, without weights or arithmetic, which shows the maps that read the same tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from models import forward, make_batches, settings_of
from torch import Tensor

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.recorder import InputRecorder, wrapped_processors
from barrier_diffusers.protection.targets import ProtectedMap, input_geometry, resolve_targets

TARGETS = ["Linear", "Conv2d"]
WIDE = (None, 8192, 4096, 2048)


class Widths(InputRecorder):
    """Notes the number of features of every distinct input, and reads no value."""

    def __init__(self) -> None:
        super().__init__(lambda leader, rows: None)
        self.found: list[int] = []

    def observe(self, linear_map: ProtectedMap, value: Tensor) -> None:
        readers = self._readers_of(value, input_geometry(linear_map.layer))
        if not readers:
            self.found.append(linear_map.num_features)
        readers.append(linear_map.name)


def on_meta(value: Any) -> Any:
    """A batch without its values."""
    return {key: on_meta(part) for key, part in value.items()} if isinstance(value, dict) else value.to("meta")


def input_widths(name: str) -> list[int]:
    """Number of features of every distinct input of the linear maps of a network of models.py."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings_of(name))
    widths = Widths()
    (batch,) = make_batches(name, 1, 1, settings_of(name)["sample_size"])
    with torch.no_grad(), wrapped_processors(unet, resolve_targets(unet, TARGETS), widths):
        forward(unet, on_meta(batch))
    return widths.found


def region_bytes(num_features: int, config: BarrierConfig) -> int:
    """Of a region: mean, basis, four ends of intervals, and the residual or its factor; float32, and two or three
    float64 numbers."""
    wide = config.is_wide(num_features)
    columns = config.residual_rank if wide else num_features
    return 4 * (num_features * (1 + config.reduced_dim + columns) + 4 * config.reduced_dim) + 8 * (3 if wide else 2)


def recording_bytes(num_features: int, config: BarrierConfig) -> int:
    """While forget rows are recorded: what is summed in float64, and as many rows as may wait in float32."""
    wide = config.is_wide(num_features)
    summed, waiting = (config.num_sketched,) * 2 if wide else (num_features, num_features // 4)
    return num_features * (8 * (summed + 1) + 4 * waiting)


def counted(widths: list[int], config: BarrierConfig) -> str:
    """One line of the table."""
    wide = sum(map(config.is_wide, widths))
    sums = (sum(count(width, config) for width in widths) / 1e9 for count in (recording_bytes, region_bytes))
    return f"| {config.wide_features or 'none'} | {wide} | {' | '.join(f'{total:.1f}' for total in sums)} |"


if __name__ == "__main__":
    inputs = input_widths("sd14")
    print(f"{len(inputs)} distinct inputs, the widest of {max(inputs)} features")
    for width in WIDE:
        print(counted(inputs, BarrierConfig(wide_features=width)))
