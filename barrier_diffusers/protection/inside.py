"""The protection loss computed while the network runs: each attention evaluates the terms of its own maps.

Where an engine shares out weights and makes them whole only while the module that owns them runs, this is the place
where the loss can read them. Value and gradient are those of the loss computed outside, whose maps are stacked across
the whole network: fewer operators, hence the default.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.recorder import BarrierAttnProcessor, attentions_of
from barrier_diffusers.protection.region import ForgetRegion
from barrier_diffusers.protection.sharding import Share, are_gathered
from barrier_diffusers.protection.stacks import MapGroup, StackedLoss
from barrier_diffusers.protection.targets import ProtectedMap, Snapshots


@contextmanager
def saved_as_they_are() -> Iterator[None]:
    """What autograd saves meanwhile is out of reach of hooks around it: gradient checkpointing would drop it and, as
    the loss is not computed again in the backward pass, miss it."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


class Part:
    """The terms of the maps of one attention, or of one other map.

    Attributes:
        value: of this step, with gradient; None until they run.
    """

    def __init__(self, maps: Sequence[ProtectedMap]):
        self.maps = list(maps)
        steps = maps[0].path.split(".")  # weights may be shared out module by module: all that lie around the maps
        self.around = [maps[0].model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps))]
        self.loss: StackedLoss
        self.value: Tensor | None = None
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []

    @property
    def _parameters(self) -> list[Tensor]:
        found: list[Tensor | None] = []
        for linear_map in self.maps:
            found += linear_map.lora().parameters if self.loss.adapter else (linear_map.layer.weight, linear_map.bias)
        return [parameter for parameter in found if parameter is not None]

    def evaluate(self, snapshots: Snapshots) -> None:
        """Compute the value from the weights as they are now."""
        device = self.maps[0].layer.weight.device.type
        with saved_as_they_are(), torch.autocast(device, enabled=False):
            self.value = self.loss.value(snapshots)
        self._seen = [(weakref.ref(parameter), parameter._version) for parameter in self._parameters]

    @property
    def is_due(self) -> bool:
        """Whether there is no value, or the weights have changed since: an optimizer's step with the value unread."""
        if self.value is None:
            return True
        pairs = zip(self._parameters, self._seen, strict=True)
        return any(now is reference() and now._version != version for now, (reference, version) in pairs)

    def require_whole(self) -> None:
        """A RuntimeError if an engine has shared out the weights or holds them back."""
        for linear_map in self.maps:
            layer = linear_map.layer
            factors = linear_map.lora() if self.loss.adapter else None
            shapes = [factor.dim() for factor in factors.parameters] if factors else [layer.weight.dim()]
            if min(shapes) < 2 or not all(parameter.numel() for parameter in self._parameters):
                raise RuntimeError(
                    f"the weights of {linear_map.name} are shared out over processes, and it did not run in this "
                    "step: compute the protection loss after the step's forward pass, which has to run every "
                    "protected map with gradients"
                )


class LossInside:
    """The protection loss in parts, each computed where its maps run; `value` adds them up.

    A part is computed in the first forward pass with gradients since the last call of `value`; later ones of the same
    step use it again, and so does the second run of a checkpointed block, in the backward pass. What did not run is
    computed by `value`. The processors of the attentions are wrapped until `remove`; a processor that is exchanged
    meanwhile only moves its part's work to `value`.

    Args:
        regions: of each distinct input, with the maps that read it.
        adapter: whether LoRA adapters train instead of the maps' weights.
        prepare: moves what was fitted to the model's device; the snapshots.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Sequence[tuple[Sequence[ProtectedMap], ForgetRegion]],
        config: BarrierConfig,
        adapter: bool,
        prepare: Callable[[], Snapshots],
    ):
        self.model, self.config, self.adapter, self._prepare = model, config, adapter, prepare
        self.share: Share | None = None
        self.groups = [MapGroup(list(maps), region, region.thin_factor()) for maps, region in regions]
        by_attention, others = attentions_of(model, [one for group in self.groups for one in group.maps])
        self.parts = [Part(maps) for maps in [*by_attention.values(), *([one] for one in others)]]
        self._build()
        self._undo: list[Callable[[], None]] = []
        for parent, part in zip(by_attention, self.parts, strict=False):
            self._undo.append(self._wrap(model.get_submodule(parent), part))
        for linear_map, part in zip(others, self.parts[len(by_attention) :], strict=True):
            self._undo.append(self._listen(linear_map.module, part))

    def _build(self) -> None:
        num_maps = sum(len(group.maps) for group in self.groups)
        for part in self.parts:
            names = {linear_map.name for linear_map in part.maps}
            shared = [(group, [one for one in group.maps if one.name in names]) for group in self.groups]
            groups = [  # one that lies in this part alone is the same object: what is stacked is held once
                group if len(maps) == len(group.maps) else MapGroup(maps, group.region, group.factor_DL)
                for group, maps in shared
                if maps
            ]
            part.loss = StackedLoss.of_groups(groups, self.config, self.adapter, num_maps)
            part.loss.cut(self.share)

    def _wrap(self, attention: Any, part: Part) -> Callable[[], None]:
        """Let an attention's processor compute a part first; what takes that back."""
        processor, compute = attention.processor, self._computing(part)

        def call(wrapped: Any, *args: Any, **kwargs: Any) -> Any:
            compute()
            return wrapped(*args, **kwargs)

        wrapper = attention.processor = BarrierAttnProcessor(processor, call)

        def undo() -> None:
            if attention.processor is wrapper:
                attention.processor = processor

        return undo

    def _listen(self, module: nn.Module, part: Part) -> Callable[[], None]:
        """Let a module compute a part before it runs; what takes that back."""
        compute, listened = self._computing(part), weakref.ref(module)

        def hook(called: nn.Module, args: Any) -> None:
            if called is listened():  # not a copy of the model
                compute()

        return module.register_forward_pre_hook(hook).remove

    def _computing(self, part: Part) -> Callable[[], None]:
        """A function that computes a part where it is due; torch.compile leaves it as it is."""
        itself = weakref.ref(self)  # a model holds no barrier alive

        def compute() -> None:
            loss = itself()
            if loss is not None and loss._may_compute(part):
                part.evaluate(loss._prepare())

        return torch.compiler.disable(compute)

    def _may_compute(self, part: Part) -> bool:
        in_backward = torch._C._current_graph_task_id() != -1  # a checkpointed block runs again
        if in_backward or not torch.is_grad_enabled() or are_gathered(part.around):
            return False
        return all(one.has_adapter == self.adapter for one in part.maps) and part.is_due

    def to(self, device: torch.device) -> None:
        """Move everything."""
        for group in self.groups:
            group.to(device)
        self._build()

    def cut(self, share: Share | None) -> None:
        """Compute the terms of these rows from now on."""
        self.share = share
        for part in self.parts:
            part.loss.cut(share)

    def value(self, snapshots: Snapshots) -> Tensor:
        """The loss of this step; the next forward pass computes the next one's. lambda_interval is not in it.

        Raises:
            RuntimeError: a map did not run in this step, and its weights are not whole now.
        """
        values: list[Tensor] = []
        for part in self.parts:
            if part.is_due:
                part.require_whole()
                part.evaluate(snapshots)
            assert part.value is not None
            values.append(part.value)
            part.value = None
        return torch.stack(values).sum()

    def remove(self) -> None:
        """Take processors and hooks away."""
        for undo in self._undo:
            undo()
        self._undo = []
