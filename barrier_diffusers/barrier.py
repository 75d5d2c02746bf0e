"""Barrier: a config, the fitted regions and the snapshot of one model.

Shapes: B batch, L positions, D input features, K kept directions, O output features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.certificate import Certificate, MapObserver, RelativeDrift, distribution_free, order_statistic
from barrier_diffusers.config import BarrierConfig
from barrier_diffusers.drift import Drift, FullDrift, LoraDrift, full_drift, stack_drifts
from barrier_diffusers.fitting import ForwardFn, first_tensor, fit_regions, kept_random_state
from barrier_diffusers.loss import protection_terms
from barrier_diffusers.recorder import evaluation_mode, record_inputs
from barrier_diffusers.region import ForgetRegion, check_reduced_dim, load_tensors, save_tensors
from barrier_diffusers.targets import ProtectedMap, resolve_targets, restore, snapshot_of

REGIONS_NAME = "barrier_regions.safetensors"
SNAPSHOT_NAME = "barrier_snapshot.safetensors"


@dataclass
class MapGroup:
    """Maps that read the same input: one region, one stacked product."""

    maps: list[ProtectedMap]
    region: ForgetRegion
    weight_O: Tensor  # 1 / O of its map for every stacked output, over the number of maps if normalised


class Barrier:
    """Protects some linear maps of a model while a base objective trains them.

    Everything else is frozen at once. If the maps carry a peft LoRA adapter, only the adapter trains and the base
    weights are the snapshot.

    Args:
        model: a network whose targets are Linear or Conv2d modules.
        config: what is protected, and how.

    Raises:
        ValueError: no targets, or targets and blocks that match nothing, or that mix maps with and without adapter.
    """

    def __init__(self, model: nn.Module, config: BarrierConfig):
        self.model, self.config = model, config
        if config.targets is None:
            raise ValueError("the config names no targets: set targets=[...], e.g. ['attn2.to_q', 'attn2.to_k']")
        self.maps = resolve_targets(model, config.targets, config.blocks)
        for entry in self.maps:
            check_reduced_dim(config, entry.num_features, entry.name)
        self.groups: list[MapGroup] = []
        self._snapshots: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._requires_grad: dict[nn.Parameter, bool] = {}
        self._freeze_the_rest()

    def _freeze_the_rest(self) -> None:
        """Only the maps train, or their adapters if they carry any; also called when one may have been added since."""
        adapted = [entry.has_adapter for entry in self.maps]
        if any(adapted) and not all(adapted):
            without = next(entry.name for entry in self.maps if not entry.has_adapter)
            raise ValueError(f"some targets carry an adapter, but {without} does not: adapt all targets, or none")
        trainable = set(self.trainable_parameters())
        self.uses_adapter = all(adapted)
        for parameter in self.model.parameters():
            self._requires_grad.setdefault(parameter, parameter.requires_grad)
            parameter.requires_grad_(parameter in trainable)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters the optimizer may change."""
        return [parameter for entry in self.maps for parameter in entry.trainable()]

    @property
    def num_trainable(self) -> int:
        """How many numbers train."""
        return sum(parameter.numel() for parameter in self.trainable_parameters())

    @property
    def regions(self) -> dict[str, ForgetRegion]:
        """Map name -> region; maps that read the same input share one object."""
        found = {entry.name: group.region for group in self.groups for entry in group.maps}
        return {entry.name: found[entry.name] for entry in self.maps if entry.name in found}

    def setup_protection(self, forget_loader: Any, forward_fn: ForwardFn, retain_loader: Any = None) -> None:
        """Fit the regions and take the snapshot: two passes over the forget data, one over the retain data if needed.

        All passes start from the random state of the caller, who gets it back unchanged, so that a forward function
        that draws noise draws the same in each. In a distributed run each process passes its own share of the data.

        Args:
            forget_loader, retain_loader: re-iterable batches, e.g. DataLoaders.
            forward_fn: `forward_fn(model, batch)` runs the model once.

        Raises:
            ValueError: no retain data although an option needs it; empty or one-shot loaders; non-finite activations;
                a LoRA adapter that is not zero at the start.
        """
        if self.config.needs_retain_data and retain_loader is None:
            raise ValueError("use_actual_bounds and residual_source='retain' / 'both' need a retain_loader")
        self._freeze_the_rest()
        self._require_zero_drift()
        fitted = fit_regions(self.model, self.maps, self.config, forget_loader, forward_fn, retain_loader)
        self._install(fitted)
        self._snapshots = {} if self.uses_adapter else {entry.name: snapshot_of(entry.layer) for entry in self.maps}

    def _require_zero_drift(self) -> None:
        if self.uses_adapter:
            for entry in self.maps:
                factors = entry.lora()
                if factors.lora_B_OR.abs().max() * factors.lora_A_RD.abs().max() != 0:
                    raise ValueError(
                        f"the LoRA adapter of {entry.name} already changes the model; the protection is measured from "
                        "the base weights: merge the adapter first, or add a fresh one"
                    )

    def _install(self, groups: list[tuple[list[ProtectedMap], ForgetRegion]]) -> None:
        self.groups = []
        share = 1 / len(self.maps) if self.config.normalize_protection else 1.0
        for maps, region in groups:
            rows = [torch.full((entry.num_outputs,), share / entry.num_outputs) for entry in maps]
            device = maps[0].layer.weight.device
            self.groups.append(MapGroup(maps, region.to(device), torch.cat(rows).to(device)))

    def _require_setup(self) -> None:
        if not self.groups:
            raise RuntimeError("there are no regions yet: call setup_protection, or load a saved barrier")

    def drift(self, entry: ProtectedMap) -> Drift:
        """How far a map has drifted from its snapshot, with gradient.

        Raises:
            RuntimeError: setup_protection was not called.
            ValueError: an adapter was added or removed since then.
        """
        self._require_setup()
        if entry.has_adapter != self.uses_adapter:
            change = "removed from" if self.uses_adapter else "added to"
            raise ValueError(f"an adapter was {change} {entry.name} after setup_protection: call it again")
        if self.uses_adapter:
            factors = entry.lora()
            return LoraDrift(factors.lora_A_RD, factors.lora_B_OR, factors.scaling)
        layer = entry.layer
        weight0, bias0 = self._snapshots[entry.name]
        return full_drift(layer.weight, weight0, layer.bias, bias0)

    def compute_protection_loss(self) -> Tensor:
        """lambda_interval * protection loss (METHOD section 2): a float32 scalar, 0 before any step.

        Raises:
            RuntimeError: setup_protection was not called.
        """
        self._require_setup()
        device = self.groups[0].maps[0].layer.weight.device
        if self.groups[0].region.mean.device != device:
            self._move(device)
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            for group in self.groups:
                drifts = [self.drift(entry) for entry in group.maps]
                full = [drift for drift in drifts if isinstance(drift, FullDrift)]
                if full:
                    terms_O = protection_terms(stack_drifts(full), group.region, self.config)
                else:
                    terms_O = torch.cat([protection_terms(drift, group.region, self.config) for drift in drifts])
                total = total + terms_O @ group.weight_O
        return self.config.lambda_interval * total

    def _move(self, device: torch.device) -> None:
        for group in self.groups:
            group.region, group.weight_O = group.region.to(device), group.weight_O.to(device)
        self._snapshots = {
            name: (weight.to(device), None if bias is None else bias.to(device))
            for name, (weight, bias) in self._snapshots.items()
        }

    @torch.no_grad()
    def drift_norms(self) -> dict[str, float]:
        """Frobenius norm of each map's drift relative to its snapshot's, for logs."""
        self._require_setup()
        relative = []
        for entry in self.maps:
            base = self._snapshots[entry.name][0] if not self.uses_adapter else entry.layer.weight
            relative.append(self.drift(entry).dense().norm() / base.float().norm().clamp_min(1e-30))
        return dict(zip((entry.name for entry in self.maps), torch.stack(relative).tolist(), strict=True))

    def certify(
        self, held_out_loader: Any, forward_fn: ForwardFn, quantile: float = 0.99, confidence: float = 0.95
    ) -> Certificate:
        """What is guaranteed on retain inputs like the held-out ones (METHOD section 6); these must not have been used
        for fitting or training.

        Raises:
            RuntimeError: setup_protection was not called.
            ValueError: quantile or confidence outside (0, 1), or unusable data.
        """
        self._require_setup()
        order_statistic(1, quantile, confidence)
        observers = {
            entry.name: MapObserver(
                entry.name,
                self.drift(entry),
                group.region,
                entry.layer.weight,
                entry.layer.bias,
                self.uses_adapter,
                quantile,
            )
            for group in self.groups
            for entry in group.maps
        }
        members = {group.maps[0].name: group.maps for group in self.groups}
        leader_of = {entry.name: leader for leader, maps in members.items() for entry in maps}

        def observe(leader: str, rows_BLD: Tensor) -> None:
            for entry in members[leader]:
                observers[entry.name].update(rows_BLD)

        with kept_random_state(self.model, held_out_loader):
            record_inputs(
                self.model, self.maps, held_out_loader, forward_fn, observe, what="held-out", leader_of=leader_of
            )
        network = self._network_drift(held_out_loader, forward_fn, quantile, confidence)
        return Certificate([o.result(quantile, confidence) for o in observers.values()], network, quantile, confidence)

    @torch.no_grad()
    def _network_drift(
        self, loader: Any, forward_fn: ForwardFn, quantile: float, confidence: float
    ) -> RelativeDrift | None:
        """Relative change ||f(x) - f0(x)|| / ||f0(x)|| of the network's output per sample; None without a tensor."""
        changes = []
        with evaluation_mode(self.model):
            for batch in loader:
                with kept_random_state(self.model):
                    now = first_tensor(forward_fn(self.model, batch))
                if now is None:
                    return None
                with self.snapshot_weights():
                    before = first_tensor(forward_fn(self.model, batch))
                assert before is not None
                change, size = ((now - before).float().flatten(1), before.float().flatten(1))
                changes.append((change.norm(dim=1) / size.norm(dim=1).clamp_min(1e-30)).cpu())
        return distribution_free(torch.cat(changes), quantile, confidence)

    @contextmanager
    def snapshot_weights(self) -> Iterator[None]:
        """The model as it was at the snapshot, for the duration of the block."""
        layers = {entry.name: entry.layer for entry in self.maps}
        trained = {name: snapshot_of(layer) for name, layer in layers.items()} if not self.uses_adapter else {}
        adapted: list[Any] = [entry.module for entry in self.maps] if self.uses_adapter else []
        flags = {parameter: parameter.requires_grad for module in adapted for parameter in module.parameters()}
        try:
            for name in trained:
                restore(layers[name], self._snapshots[name])
            for module in adapted:
                module.enable_adapters(False)
            yield
        finally:
            for name, values in trained.items():
                restore(layers[name], values)
            for module in adapted:
                module.enable_adapters(True)
            for parameter, requires_grad in flags.items():  # enable_adapters changes them
                parameter.requires_grad_(requires_grad)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write barrier_config.json, the regions (each once) and, for full weights, the snapshot; no pickle.

        Raises:
            RuntimeError: there is nothing fitted to save.
        """
        self._require_setup()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{k}": v for i, group in enumerate(self.groups) for k, v in group.region.to_tensors().items()}
        names = json.dumps([[entry.name for entry in group.maps] for group in self.groups])
        save_tensors(folder / REGIONS_NAME, tensors, {"maps": names, "weights": self._weights})
        if self._snapshots:
            parts = {f"{name}.weight": weight for name, (weight, _) in self._snapshots.items()}
            biases = {f"{name}.bias": bias for name, (_, bias) in self._snapshots.items() if bias is not None}
            save_tensors(folder / SNAPSHOT_NAME, {**parts, **biases}, {})
        self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, model: nn.Module) -> Barrier:
        """Load what `save_pretrained` wrote, for a model with the same targets.

        Raises:
            ValueError: missing files, or regions and snapshot that do not fit the model.
        """
        barrier = cls(model, BarrierConfig.from_pretrained(folder))
        try:
            barrier._load(Path(folder))
        except BaseException:
            barrier.remove()
            raise
        return barrier

    @property
    def _weights(self) -> str:
        return "adapter" if self.uses_adapter else "full"

    def _load(self, folder: Path) -> None:
        tensors, metadata = load_tensors(folder / REGIONS_NAME)
        if metadata["weights"] != self._weights:
            raise ValueError(
                f"{str(folder)!r} was saved for {metadata['weights']} weights; this model trains {self._weights} ones"
            )
        by_name = {entry.name: entry for entry in self.maps}
        groups = []
        names: list[list[str]] = json.loads(metadata["maps"])
        if sorted(name for group in names for name in group) != sorted(by_name):
            raise ValueError(f"the regions in {str(folder)!r} belong to other maps than the targets of this model")
        for index, group_names in enumerate(names):
            prefix = f"{index}."
            fields = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            region = ForgetRegion.from_tensors(fields)
            for name in group_names:
                if by_name[name].num_features != len(region.mean):
                    raise ValueError(
                        f"the region of {name} has {len(region.mean)} input features, "
                        f"but the map has {by_name[name].num_features}"
                    )
            groups.append(([by_name[name] for name in group_names], region))
        if not self.uses_adapter:
            saved, _ = load_tensors(folder / SNAPSHOT_NAME)
            for name, entry in by_name.items():
                weight0, bias0 = saved.get(f"{name}.weight"), saved.get(f"{name}.bias")
                shapes = [None if value is None else value.shape for value in (weight0, bias0)]
                expected = [None if value is None else value.shape for value in (entry.layer.weight, entry.layer.bias)]
                if weight0 is None or shapes != expected:
                    raise ValueError(f"the snapshot in {str(folder)!r} does not fit {name}")
                self._snapshots[name] = (weight0, bias0)
        self._install(groups)
        self._move(self.maps[0].layer.weight.device)

    def remove(self) -> None:
        """Undo what was done to the model: every parameter's requires_grad is as it was. Trained weights stay."""
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        self.groups, self._snapshots, self._requires_grad = [], {}, {}
