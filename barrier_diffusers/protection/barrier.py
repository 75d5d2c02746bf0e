"""Barrier: a config, the fitted regions and projections, and the snapshot of one model.

Shapes: B batch, L positions, D input features, K kept directions, O output features.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from barrier_diffusers.protection.certificate import Certificate, Guarantee, TrainedMaps, certify
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.drift import Drift, LoraDrift, full_drift
from barrier_diffusers.protection.fitting import ForwardFn, fit_protection, own_config
from barrier_diffusers.protection.inside import LossInside
from barrier_diffusers.protection.order_statistics import Split
from barrier_diffusers.protection.projection import ProjectedGroup, RetainProjection, StackedProjections
from barrier_diffusers.protection.region import ForgetRegion, check_reduced_dim
from barrier_diffusers.protection.retain_inputs import RetainInputs
from barrier_diffusers.protection.sharding import cut_like, is_sharded, own_part, reshard, share_of, whole
from barrier_diffusers.protection.stacks import MapGroup, StackedLoss
from barrier_diffusers.protection.storage import BarrierState, load_rest, load_state, save_state
from barrier_diffusers.protection.targets import (
    ProtectedMap,
    Snapshots,
    at_snapshot,
    moved,
    require_zero_adapters,
    resolve_targets,
    snapshot_of,
    write_values,
)


class Barrier:
    """Protects some linear maps of a model while a base objective trains them.

    Everything else is frozen at once, unless `trained_weights` is "all". If the maps carry a peft LoRA adapter, only
    the adapter trains and the base weights are the snapshot. With a projection the maps' biases are frozen too: a bias
    acts on every input alike, so any drift of it would reach the retain inputs whatever directions they span.

    Args:
        model: a network whose targets are Linear, Conv2d or Embedding modules.
        config: what is protected, and how.
        trained_weights: what trains: the targets alone, or all parameters, of which the targets' are protected.

    Raises:
        ValueError: no targets, or targets and blocks that match nothing, or that mix maps with and without adapter;
            all weights are to train beside an adapter.
    """

    def __init__(
        self, model: nn.Module, config: BarrierConfig, trained_weights: Literal["targets", "all"] = "targets"
    ):
        self.model, self.config, self.trained_weights = model, config, trained_weights
        if config.targets is None:
            raise ValueError("the config names no targets: set targets=[...], e.g. ['attn2.to_q', 'attn2.to_k']")
        self.maps = resolve_targets(model, config.targets, config.blocks)
        if config.has_penalty:
            for linear_map in self.maps:
                check_reduced_dim(own_config(config, linear_map), linear_map.num_features, linear_map.name)
        self._loss: StackedLoss | LossInside | None = None
        self._projections: StackedProjections | None = None
        self._snapshots: Snapshots = {}
        self._rest: dict[str, Tensor] = {}  # parameters that train beside the maps' -> their values at the snapshot
        # each parameter, its name and flag as they were; fully_shard exchanges the objects, and the old ones must go
        self._requires_grad: list[tuple[weakref.ref[nn.Parameter], str, bool]] = []
        self._freeze_the_rest()

    def _freeze_the_rest(self) -> None:
        """Only the maps train, or their adapters if they carry any; also called when one may have been added since."""
        adapted = [linear_map.has_adapter for linear_map in self.maps]
        if any(adapted) and not all(adapted):
            without = next(linear_map.name for linear_map in self.maps if not linear_map.has_adapter)
            raise ValueError(f"some targets carry an adapter, but {without} does not: adapt all targets, or none")
        self.uses_adapter = all(adapted)
        if self.uses_adapter and self.trained_weights == "all":
            raise ValueError("trained_weights='all' trains no adapter: merge the adapter, or train the targets alone")
        trainable = set(self.trainable_parameters())
        known = {key for reference, name, _ in self._requires_grad for key in (id(reference()), name)}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in known and name not in known:
                self._requires_grad.append((weakref.ref(parameter), name, parameter.requires_grad))
            parameter.requires_grad_(parameter in trainable)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters the optimizer may change."""
        of_maps = [parameter for linear_map in self.maps for parameter in self.trainable_of(linear_map)]
        return [*of_maps, *self.rest().values()]

    def rest(self) -> dict[str, nn.Parameter]:
        """The parameters that train although they are no target's, by name; none unless all weights train."""
        if self.trained_weights == "targets":
            return {}
        of_maps = {id(parameter) for linear_map in self.maps for parameter in linear_map.trainable()}
        return {name: value for name, value in self.model.named_parameters() if id(value) not in of_maps}

    def trainable_of(self, linear_map: ProtectedMap) -> list[nn.Parameter]:
        """Trainable parameters of one map; a projection freezes its bias."""
        return linear_map.trainable(bias=not self.config.has_projection)

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.trainable_parameters())

    @property
    def regions(self) -> dict[str, ForgetRegion]:
        """Map name -> region; maps that read the same input share one object. Empty with constraint "projection"."""
        found = {linear_map.name: group.region for group in self.groups for linear_map in group.maps}
        return {linear_map.name: found[linear_map.name] for linear_map in self.maps if linear_map.name in found}

    @property
    def projections(self) -> dict[str, RetainProjection]:
        """Map name -> projection; maps that read the same retain input share one object. Empty without projection."""
        found = {linear_map.name: group.projection for group in self.projected for linear_map in group.maps}
        return {linear_map.name: found[linear_map.name] for linear_map in self.maps if linear_map.name in found}

    def setup_protection(
        self,
        forget_loader: Any,
        forward_fn: ForwardFn,
        retain_loader: Any = None,
        retain_inputs: Mapping[str, Iterable[Tensor]] | None = None,
    ) -> None:
        """Fit what the constraint needs and take the snapshot: two passes over the forget data for the protection
        loss, one over the retain data if needed.

        All passes start from the random state of the caller, who gets it back unchanged, so that a forward function
        that draws noise draws the same in each. In a distributed run each process passes its own share of the data.
        With a projection, a LoRA adapter's factor A is moved out of the span; the adapter stays zero, as B is.

        Args:
            forget_loader, retain_loader: re-iterable batches, e.g. DataLoaders. The forget data is not read with
                constraint "projection" (pass None), the retain data not where `retain_inputs` covers all maps.
            forward_fn: `forward_fn(model, batch)` runs the model once.
            retain_inputs: target -> the tensors that reach its maps on retain data, taken instead of recording; see
                `RetainInputs`. E.g. `{"attn2.to_k": embeddings, "attn2.to_v": embeddings}` with the text embeddings of
                retain prompts (padding tokens included, as the maps read them) needs no retain image.

        Raises:
            ValueError: no forget or retain data although an option needs it; empty or one-shot loaders; non-finite
                activations; a LoRA adapter that is not zero at the start; retain inputs that leave no map a direction
                to move in.
        """
        config = self.config
        given = RetainInputs(retain_inputs or {}, self.maps)
        if retain_inputs and not config.needs_retain_data:
            raise ValueError("retain_inputs is given, but no option needs retain data")
        if config.has_penalty and forget_loader is None:
            raise ValueError("the protection loss needs a forget_loader; only constraint='projection' goes without")
        if config.needs_retain_data and retain_loader is None and not given.covers(self.maps):
            raise ValueError(
                "use_actual_bounds, residual_source='retain' / 'both' and a projection need a retain_loader, or "
                "retain_inputs for all maps"
            )
        reshard(self.model)
        self._freeze_the_rest()
        require_zero_adapters(self.maps)
        fitted = fit_protection(self.model, self.maps, config, forget_loader, forward_fn, retain_loader, given)
        reshard(self.model)
        snapshots = (
            {} if self.uses_adapter else {linear_map.name: snapshot_of(linear_map.layer) for linear_map in self.maps}
        )
        rest = {name: parameter.detach().clone() for name, parameter in self.rest().items()}
        self._install(BarrierState(self._weights, fitted.regions, fitted.projections, snapshots, rest))
        if self.uses_adapter:
            self.project()

    @property
    def groups(self) -> list[MapGroup]:
        """The maps of each distinct forget input, and its region. Empty with constraint "projection"."""
        return self._loss.groups if self._loss else []

    @property
    def projected(self) -> list[ProjectedGroup]:
        """The maps of each distinct retain input, and its projection. Empty without projection."""
        return self._projections.groups if self._projections else []

    def _install(self, state: BarrierState) -> None:
        self._take_loss_away()
        regions = [(maps, region.to(self._device)) for maps, region in state.regions]
        if regions and self.config.loss_inside:
            self._loss = LossInside(self.model, regions, self.config, self.uses_adapter, prepare=self._on_device)
        elif regions:
            self._loss = StackedLoss(regions, self.config, adapter=self.uses_adapter)
        projections = [(maps, projection.to(self._device)) for maps, projection in state.projections]
        softness = self.config.projection_softness
        self._projections = StackedProjections(projections, softness) if projections else None
        self._snapshots = moved(state.snapshots, self._device)
        self._rest = {name: value.to(self._device) for name, value in state.rest.items()}

    def _take_loss_away(self) -> None:
        if isinstance(self._loss, LossInside):
            self._loss.remove()
        self._loss = None

    def _require_setup(self) -> None:
        if not self.groups and not self.projected:
            raise RuntimeError("nothing is fitted yet: call setup_protection, or load a saved barrier")

    @property
    def _device(self) -> torch.device:
        return self.maps[0].layer.weight.device

    def drift(self, linear_map: ProtectedMap) -> Drift:
        """How far a map has drifted from its snapshot, with gradient; that of a weight shared out over processes is
        made whole, for which all of them have to ask, and has none.

        Raises:
            RuntimeError: setup_protection was not called.
            ValueError: an adapter was added or removed since then.
        """
        self._require_setup()
        self._require_same_adapter(linear_map)
        self.follow_model()
        if self.uses_adapter:
            factors = linear_map.lora()
            down, up = (
                whole(factor) if is_sharded(factor) else factor for factor in (factors.lora_A_RD, factors.lora_B_OR)
            )
            return LoraDrift(down, up, factors.scaling)
        pair = (linear_map.layer.weight, linear_map.bias)
        now, then = (
            [whole(value) if is_sharded(value) else value for value in values if value is not None]
            for values in (pair, self._snapshots[linear_map.name])
        )
        weight, weight0 = (linear_map.outputs_first(values[0]) for values in (now, then))
        return full_drift(weight, weight0, *(values[1] for values in (now, then) if len(values) == 2))

    def _require_same_adapter(self, linear_map: ProtectedMap) -> None:
        if linear_map.has_adapter != self.uses_adapter:
            change = "removed from" if self.uses_adapter else "added to"
            raise ValueError(f"an adapter was {change} {linear_map.name} after setup_protection: call it again")

    def compute_protection_loss(self) -> Tensor:
        """lambda_interval * protection loss (docs/method.md section 2): a float32 scalar, 0 before any step.

        With constraint "projection" it is an exact 0 without graph, whatever lambda_interval is. With weights shared
        out by `fully_shard` all processes have to call it: each computes the terms of its own rows and gets the sum.
        With `loss_inside` it adds up what was computed in this step's first forward pass: call it after that.

        Raises:
            RuntimeError: setup_protection was not called; or with `loss_inside`, a map did not run in this step, and
                its weights are whole only then.
        """
        self._require_setup()
        device = self.follow_model()
        for linear_map in self.maps:
            self._require_same_adapter(linear_map)
        if self._loss is None:
            return torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            return self.config.lambda_interval * self._loss.value(self._snapshots)

    def project(self) -> None:
        """Take the drift out of the retain inputs' span (docs/method.md section 7); call it after each optimizer step.

        dW <- dW (I - P P^T), or A <- A (I - P P^T) with LoRA, in place and in float32; see `project_out` for what
        half-precision weights leave. A soft projection takes a share of each direction's drift out at every call. Does
        nothing with constraint "penalty".

        Raises:
            RuntimeError: setup_protection was not called.
            ValueError: an adapter was added or removed since then.
        """
        if not self.config.has_projection:
            return
        self._require_setup()
        device = self.follow_model()
        weights: dict[str, Tensor] = {}
        origins: dict[str, Tensor] = {}
        gathered: list[tuple[Tensor, Tensor]] = []  # a shared embedding's table and the whole that is projected
        for linear_map in self.maps:
            self._require_same_adapter(linear_map)
            if self.uses_adapter:
                weights[linear_map.name] = own_part(linear_map.lora().parameters[0])
                continue
            now, then = linear_map.layer.weight, self._snapshots[linear_map.name][0]
            if linear_map.is_table and is_sharded(now):
                gathered.append((now, whole(now)))
                now, then = gathered[-1][1], whole(then)
            weights[linear_map.name] = linear_map.outputs_first(own_part(now))
            origins[linear_map.name] = linear_map.outputs_first(own_part(then))
        assert self._projections is not None
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            self._projections.project(weights, origins)
            for shared, full in gathered:
                shared.copy_(cut_like(full, shared))

    def follow_model(self) -> torch.device:
        """Move what was fitted to the model's device, and share it out as the model's weights are, or make it whole.

        Everything here does so where it has to. With weights that were made whole again all processes have to call it
        before one of them goes on alone.
        """
        reshard(self.model)
        self._on_device()
        self._cut_like_model()
        return self._device

    def _on_device(self) -> Snapshots:
        """Move what was fitted to the model's device; the snapshots."""
        device = self._device
        held = self.projected[0].projection.basis if self.projected else self.groups[0].region.mean
        if held.device != device:
            for stacked in (self._loss, self._projections):
                if stacked is not None:
                    stacked.to(device)
            self._snapshots = moved(self._snapshots, device)
            self._rest = {name: value.to(device) for name, value in self._rest.items()}
        return self._snapshots

    def _cut_like_model(self) -> None:
        """Snapshots are shared out as the weights are; the loss reads this process's rows."""
        share = share_of(self.maps[0].layer.weight)
        if self._loss is not None and self._loss.share != share:
            self._loss.cut(share)
        for linear_map in self.maps if self._snapshots else []:
            layer, (weight0, bias0) = linear_map.layer, self._snapshots[linear_map.name]
            if is_sharded(layer.weight) != is_sharded(weight0):
                if share_of(layer.weight) != share:
                    raise ValueError(f"{linear_map.name} is shared out in another way than {self.maps[0].name}")
                bias0 = None if bias0 is None or linear_map.bias is None else cut_like(bias0, linear_map.bias)
                self._snapshots[linear_map.name] = cut_like(weight0, layer.weight), bias0

    @torch.no_grad()
    def drift_norms(self) -> dict[str, float]:
        """Frobenius norm of each map's drift relative to its snapshot's, for logs."""
        self._require_setup()
        relative = []
        for linear_map in self.maps:
            drift = self.drift(linear_map)
            base = self._snapshots[linear_map.name][0] if not self.uses_adapter else linear_map.layer.weight
            relative.append(drift.dense().norm() / whole(base).float().norm().clamp_min(1e-30))
        return dict(zip((linear_map.name for linear_map in self.maps), torch.stack(relative).tolist(), strict=True))

    def certify(
        self,
        held_out_loader: Any,
        forward_fn: ForwardFn,
        quantile: float = 0.99,
        confidence: float = 0.95,
        split: Split | None = None,
        shared: bool = False,
    ) -> Certificate:
        """What is guaranteed on retain inputs like the held-out ones (docs/method.md section 6).

        The held-out inputs must not have been used for fitting or training. With a projection its span stands in for
        the forget region: the drift inside is 0, and the bounds speak of the part outside.

        Args:
            split: which of the images choose the distribution-free bounds, and which check them.
            shared: all processes of a group call this with the same loader, which has a length, and each looks at
                batch k of its rank modulo their number; all get the certificate of one process, to the digit unless
                `forward_fn` draws random numbers.

        Raises:
            RuntimeError: setup_protection was not called, or another process failed.
            ValueError: quantile or confidence outside (0, 1), or unusable data.
        """
        self._require_setup()
        self.follow_model()
        regions = [(group.maps, group.projection.as_region()) for group in self.projected]
        regions = regions or [(group.maps, group.region) for group in self.groups]
        trained = TrainedMaps(
            model=self.model,
            regions=[(linear_map, region) for maps, region in regions for linear_map in maps],
            drift=self.drift,
            base_is_current=self.uses_adapter,
            snapshot_weights=self.snapshot_weights,
        )
        guarantee = Guarantee(quantile, confidence, split or Split())
        return certify(trained, held_out_loader, forward_fn, guarantee, shared)

    @contextmanager
    def snapshot_weights(self) -> Iterator[None]:
        """The model as it was at the snapshot, for the duration of a block."""
        rest = self.rest() if self._rest else {}
        now = {name: parameter.detach().clone() for name, parameter in rest.items()}
        try:
            write_values(rest, self._rest)
            with at_snapshot(self.maps, self._snapshots):
                yield
        finally:
            write_values(rest, now)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write barrier_config.json, regions and projections (each once) and, for full weights, the snapshot.

        With weights shared out over processes all of them have to call it, and the first one writes.

        Raises:
            RuntimeError: there is nothing fitted to save.
        """
        self._require_setup()
        regions = [(group.maps, group.region) for group in self.groups]
        projections = [(group.maps, group.projection) for group in self.projected]
        self.follow_model()
        snapshots = self._snapshots
        if any(is_sharded(weight) for weight, _ in snapshots.values()):
            snapshots = {
                name: (whole(weight).cpu(), None if bias is None else whole(bias).cpu())
                for name, (weight, bias) in snapshots.items()
            }
        if share_of(self.maps[0].layer.weight) is None or dist.get_rank() == 0:
            state = BarrierState(self._weights, regions, projections, snapshots, self._rest)
            save_state(Path(folder), self.config, state)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, model: nn.Module, trained_weights: Literal["targets", "all"] = "targets"
    ) -> Barrier:
        """Load what `save_pretrained` wrote, for a model with the same targets, whose weights are left as they are.

        Raises:
            ValueError: missing files, or files that do not fit the model.
        """
        barrier = cls(model, BarrierConfig.from_pretrained(folder), trained_weights)
        try:
            state = load_state(Path(folder), barrier.config, barrier.maps, barrier._weights)
            state.rest = load_rest(Path(folder), barrier.rest())
            barrier._install(state)
        except BaseException:
            barrier.remove()
            raise
        return barrier

    @property
    def _weights(self) -> str:
        return "adapter" if self.uses_adapter else "full"

    def remove(self) -> None:
        """Undo what was done to the model: every parameter's requires_grad is as it was. Trained weights stay, and so
        does a LoRA factor A that a projection moved."""
        reshard(self.model)
        by_id = {id(reference()): flag for reference, _, flag in self._requires_grad if reference() is not None}
        by_name = {name: flag for _, name, flag in self._requires_grad}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(by_id.get(id(parameter), by_name.get(name, parameter.requires_grad)))
        self._take_loss_away()
        self._projections = None
        self._snapshots, self._rest, self._requires_grad = {}, {}, []
