"""Record the rows that reach the protected maps, and find out which maps read the same tensor.

Inside an attention module a BarrierAttnProcessor listens while the wrapped processor runs; any other map gets a plain
forward pre-hook. Both are gone when the recording ends, also after an exception. Shapes: B batch, L positions, D input
features.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from barrier_diffusers.protection.targets import ProtectedMap, input_geometry, input_rows

OnRows = Callable[[str, Tensor], None]


class NonFiniteActivationError(ValueError):
    """An input of a protected map holds NaN or infinity."""


class InputRecorder:
    """Sorts out what arrives at the maps: one stream of rows per distinct input, passed to `on_rows(leader, rows)`.

    A map's *leader* is the first map that read the same tensor in the same forward pass. Tensors are told apart by
    identity (and by version, as an in-place operation changes what they hold); only weak references are held, so no
    activation outlives the forward pass.

    Args:
        on_rows: gets the leader's name and its rows (B, L, D), in float32 arithmetic whatever the forward pass uses.
        leader_of: who led whom in an earlier pass; this one must agree.
    """

    def __init__(self, on_rows: OnRows, leader_of: Mapping[str, str] | None = None):
        self.on_rows = on_rows
        self.leader_of: dict[str, str] = {}
        self._expected = dict(leader_of or {})
        self._readers: dict[tuple[Any, ...], tuple[weakref.ref, list[str]]] = {}
        self._sums: list[tuple[str, Tensor]] = []  # of the rows of this batch

    def observe(self, linear_map: ProtectedMap, value: Tensor) -> None:
        """Note that `value` reached the map `linear_map`.

        Raises:
            ValueError: the map used to share another map's input, and does not now.
        """
        name, layer = linear_map.name, linear_map.layer
        readers = self._readers_of(value, input_geometry(layer))
        leader = self._expected.setdefault(name, readers[0] if readers else name)
        self.leader_of[name] = leader
        if leader != name and leader not in readers and not value.is_inference():
            raise ValueError(
                f"{name} read the input of {leader} in an earlier batch and that of {[*readers, name][0]} now: "
                "the forward function must take the same way through the model for every batch"
            )
        readers.append(name)
        if leader == name:
            # autocast would take the statistics in half precision, inference mode would make them read-only
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(value.device.type, enabled=False):
                rows = input_rows(value.detach(), layer)
                self._sums.append((name, rows.sum(dtype=torch.float32)))  # NaN and infinity survive a sum
                self.on_rows(name, rows)

    def _readers_of(self, value: Tensor, geometry: tuple[Any, ...]) -> list[str]:
        """The maps that read this very tensor, unchanged since, as the same rows."""
        if value.is_inference():  # it has no version to tell changes by: nothing new is found to be shared
            return []
        key = (id(value), value._version, geometry)
        reference, readers = self._readers.get(key, (None, []))
        if reference is None or reference() is not value:
            readers = []
            self._readers[key] = (weakref.ref(value), readers)
        return readers

    def end_batch(self, index: int) -> None:
        """Forget the tensors of this forward pass and check, in one synchronisation, that all were finite.

        Raises:
            NonFiniteActivationError: names the first map that got NaN or infinity, and the batch.
        """
        self._readers.clear()
        sums, self._sums = self._sums, []
        if not sums:
            return
        device = sums[0][1].device
        finite = torch.stack([each.to(device) for _, each in sums]).isfinite()
        if not finite.all():
            name = next(name for (name, _), each in zip(sums, finite.tolist(), strict=True) if not each)
            raise NonFiniteActivationError(f"non-finite activations reached {name} in batch {index}")


class BarrierAttnProcessor:
    """Runs the wrapped attention processor through `call(processor, *args, **kwargs)`, which adds something of ours:
    recording the inputs of the attention's maps, or the loss of these.

    A plain object (an nn.Module would appear in the model's state_dict). It shows the wrapped processor's signature,
    because diffusers drops keyword arguments that a signature does not name, and passes attribute reads and writes on.
    """

    def __init__(self, processor: Any, call: Callable[..., Any]):
        @functools.wraps(processor.__call__)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return call(processor, *args, **kwargs)

        # an instance attribute: inspect.signature(attention.processor.__call__) follows it to the wrapped signature
        self.__dict__.update({"processor": processor, "__call__": wrapped})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["__call__"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "processor" not in self.__dict__:  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.__dict__["processor"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["processor"], name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model gets the wrapped processor alone: nobody records or protects it."""
        return copy.deepcopy(self.__dict__["processor"], memo)


@contextmanager
def hooked(maps: Sequence[ProtectedMap], recorder: InputRecorder) -> Iterator[None]:
    """Forward pre-hooks on the maps' current modules, removed at the end whatever happens."""
    handles: list[RemovableHandle] = []
    try:
        for linear_map in maps:

            def hook(module: nn.Module, args: tuple, kwargs: dict, linear_map: ProtectedMap = linear_map) -> None:
                recorder.observe(linear_map, args[0] if args else next(iter(kwargs.values())))

            handles.append(linear_map.module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def attentions_of(
    model: nn.Module, maps: Sequence[ProtectedMap]
) -> tuple[dict[str, list[ProtectedMap]], list[ProtectedMap]]:
    """Path of every attention whose processor can be wrapped -> its own maps; and all other maps."""
    by_parent: dict[str, list[ProtectedMap]] = {}
    others: list[ProtectedMap] = []
    for linear_map in maps:
        parent = linear_map.path.rpartition(".")[0]
        attention = model.get_submodule(parent)
        processor = getattr(attention, "processor", None)
        if hasattr(attention, "set_processor") and callable(processor) and not isinstance(processor, nn.Module):
            by_parent.setdefault(parent, []).append(linear_map)
        else:
            others.append(linear_map)
    return by_parent, others


@contextmanager
def wrapped_processors(model: nn.Module, maps: Sequence[ProtectedMap], recorder: InputRecorder) -> Iterator[None]:
    """Put a BarrierAttnProcessor around the processor of every attention that owns a map; hooks for all other maps."""
    by_parent, others = attentions_of(model, maps)

    def listening(children: Sequence[ProtectedMap]) -> Callable[..., Any]:
        def call(processor: Any, *args: Any, **kwargs: Any) -> Any:
            with hooked(children, recorder):
                return processor(*args, **kwargs)

        return call

    originals: list[tuple[Any, Any]] = []
    try:
        for parent, children in by_parent.items():
            owner: Any = model.get_submodule(parent)
            originals.append((owner, owner.processor))
            owner.processor = BarrierAttnProcessor(owner.processor, listening(children))
        with hooked(others, recorder):
            yield
    finally:
        for owner, processor in originals:
            owner.processor = processor


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; each one's own mode comes back at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def record_inputs(
    model: nn.Module,
    maps: Sequence[ProtectedMap],
    loader: Any,
    forward_fn: Callable[[nn.Module, Any], Any],
    on_rows: OnRows,
    what: str = "forget",
    leader_of: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run `forward_fn(model, batch)` over the loader and pass each distinct input's rows (B, L, D) to `on_rows`.

    Returns:
        map name -> name of its leader, the first map that reads the same input.

    Raises:
        ValueError: a loader that can be read only once or is empty, a map that no input reached, non-finite inputs.
    """
    if isinstance(loader, Iterator):  # calling iter() to find out would start workers and draw a shuffling seed
        raise ValueError(
            f"the {what} loader can be read only once, but is read several times: pass a list or a DataLoader"
        )
    recorder = InputRecorder(on_rows, leader_of)
    index = -1
    with torch.no_grad(), evaluation_mode(model), wrapped_processors(model, maps, recorder):
        for index, batch in enumerate(loader):
            forward_fn(model, batch)
            recorder.end_batch(index)
    if index < 0:
        raise ValueError(f"zero {what} batches: the {what} loader is empty")
    silent = [linear_map.name for linear_map in maps if linear_map.name not in recorder.leader_of]
    if silent:
        raise ValueError(f"no input reached {', '.join(silent[:4])}: forward_fn must run the whole model")
    return recorder.leader_of
