"""Retain inputs that are given instead of recorded: the text embeddings of prompts are all that keys and values read.

Shapes: B batch, L rows of a sample, D input features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from barrier_diffusers.protection.recorder import NonFiniteActivationError, OnRows
from barrier_diffusers.protection.targets import ProtectedMap, input_geometry, input_rows, matches


class RetainInputs:
    """Which protected maps have their retain inputs given, and which of these read the same.

    Args:
        given: target (a dotted suffix or full name, as in `BarrierConfig.targets`) -> the tensors that reach its maps:
            (B, L, D) or (N, D) for a Linear, (B, C, H, W) for a Conv2d. Targets with the same object as value share
            one set of statistics. An iterable is read once; any number of tensors in it, none kept.
        maps: the protected maps.

    Raises:
        ValueError: a target that names no protected map, or a map that two targets name.
    """

    def __init__(self, given: Mapping[str, Iterable[Tensor]], maps: Sequence[ProtectedMap]):
        self.target_of: dict[str, str] = {}
        self._sources: list[tuple[Iterable[Tensor], list[ProtectedMap]]] = []
        for target, tensors in given.items():
            named = [linear_map for linear_map in maps if matches(linear_map, target)]
            if not named:
                known = ", ".join(linear_map.name for linear_map in maps[:6]) + (", ..." if len(maps) > 6 else "")
                raise ValueError(
                    f"retain_inputs names {target!r}, but no protected map is called so; they are {known}"
                )
            for linear_map in named:
                if linear_map.name in self.target_of:
                    first = self.target_of[linear_map.name]
                    raise ValueError(f"retain_inputs gives {linear_map.name} twice, by {first!r} and by {target!r}")
                self.target_of[linear_map.name] = target
            shared = next((readers for source, readers in self._sources if source is tensors), None)
            if shared is None:
                self._sources.append((tensors, named))
            else:
                shared.extend(named)

    def covers(self, maps: Iterable[ProtectedMap]) -> bool:
        """Whether all of the maps have their inputs given."""
        return all(linear_map.name in self.target_of for linear_map in maps)

    def read(self, on_rows: OnRows, leader_of: Mapping[str, str] | None = None) -> dict[str, str]:
        """Pass the rows (B, L, D) of each distinct input to `on_rows(leader, rows)`.

        Args:
            leader_of: who leads whom as recorded on other data; without it, maps with the same source and geometry
                share.

        Returns:
            map name -> leader, for the maps given.

        Raises:
            ValueError: tensors that do not fit the map, non-finite, empty or no tensors, and (with `leader_of`) a map
                that is given while another one that reads the same input is not, or by another source.
        """
        leaders: dict[str, str] = {}
        for tensors, readers in self._sources:
            device = readers[0].layer.weight.device
            # as for recorded rows: no half precision, nothing read-only
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                leaders |= self._read_source(tensors, readers, on_rows, leader_of)
        return leaders

    def _read_source(
        self,
        tensors: Iterable[Tensor],
        readers: list[ProtectedMap],
        on_rows: OnRows,
        leader_of: Mapping[str, str] | None,
    ) -> dict[str, str]:
        leading: dict[tuple, ProtectedMap] = {}
        leaders: dict[str, str] = {}
        for linear_map in readers:
            first = leading.setdefault((*input_geometry(linear_map.layer), linear_map.num_features), linear_map)
            leaders[linear_map.name] = first.name
        if leader_of is not None:
            self._require_whole_groups({linear_map.name for linear_map in readers}, leader_of)
            leaders = {name: leader_of[name] for name in leaders}
            leading = {
                (linear_map.name,): linear_map for linear_map in readers if leaders[linear_map.name] == linear_map.name
            }
        count = 0
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            count += 1
            for linear_map in leading.values():
                on_rows(linear_map.name, self._rows(tensor, linear_map))
        if count == 0:
            raise ValueError(f"retain_inputs[{self.target_of[readers[0].name]!r}] is empty")
        return leaders

    def _require_whole_groups(self, names: set[str], leader_of: Mapping[str, str]) -> None:
        led = {leader_of[name] for name in names}
        for name, leader in leader_of.items():
            if leader in led and name not in names:
                raise ValueError(
                    f"{name} reads the same input as {next(n for n in names if leader_of[n] == leader)}, whose retain "
                    "inputs are given: give the same object for both in retain_inputs, or for neither"
                )

    def _rows(self, tensor: Tensor, linear_map: ProtectedMap) -> Tensor:
        what, layer = f"retain_inputs[{self.target_of[linear_map.name]!r}]", linear_map.layer
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what} has a {type(tensor).__name__} in it, but must be tensors")
        if isinstance(layer, torch.nn.Embedding):
            count, whole = len(layer.weight), not (tensor.is_floating_point() or tensor.is_complex())
            if not whole or tensor.numel() == 0 or not 0 <= int(tensor.min()) <= int(tensor.max()) < count:
                raise ValueError(f"{what} must hold whole numbers from 0 to {count - 1}, rows of {linear_map.name}")
            return input_rows(tensor.detach().to(layer.weight.device, torch.long), layer)
        is_image = isinstance(layer, torch.nn.Conv2d)
        width = tensor.shape[1] if is_image and tensor.dim() == 4 else tensor.shape[-1] if tensor.dim() else 0
        expected = layer.weight.shape[1] * getattr(layer, "groups", 1)
        if width != expected or (is_image and tensor.dim() != 4) or tensor.numel() == 0:
            raise ValueError(
                f"{what} has a tensor of shape {tuple(tensor.shape)}, but {linear_map.name} reads "
                f"{f'(B, {expected}, H, W)' if is_image else f'(..., {expected})'}"
            )
        rows = input_rows(tensor.detach().to(layer.weight.device, torch.float32), layer)
        if not torch.isfinite(rows).all():
            raise NonFiniteActivationError(f"{what} holds NaN or infinity")
        return rows
