"""The linear maps a model has, which of them are protected, and the patches a convolution multiplies.

An nn.Embedding is a linear map too, W x on one-hot rows x: row j of its table is W's column j, so the drift of row j
is dW e_j. A class-conditional UNet's class_embedding is one, with as many input features D as it has labels.

Shapes: B batch, C channels, H and W image side, O output features, D input features, L positions, R LoRA rank.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from barrier_diffusers.protection.sharding import reshard, whole

PEFT_PREFIX = "base_model.model."  # of the module paths inside a PeftModel


PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")  # what fusing replaces


TYPES = ("Linear", "Conv2d", "Conv2d1x1")


Snapshots = dict[str, tuple[Tensor, Tensor | None]]  # map name -> its weight and bias


def _is_of(module: nn.Module, library: str, name: str) -> bool:
    """Whether a module is of a class of a library, which is not imported: without it there is no such module."""
    found = sys.modules.get(library)
    return found is not None and isinstance(module, getattr(found, name))


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a peft layer around another one."""
    return _is_of(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def _prefix_of(model: nn.Module) -> str:
    """What the paths of a model's modules have in front of their names."""
    return PEFT_PREFIX if _is_of(model, "peft.peft_model", "PeftModel") else ""


@dataclass(frozen=True)
class LoraFactors:
    """The active adapter of a map: dW = scaling * B A."""

    lora_A_RD: Tensor
    lora_B_OR: Tensor
    scaling: float
    parameters: tuple[nn.Parameter, ...]


class ProtectedMap:
    """One y = W x + b inside a model; its module is looked up at every use, so an adapter may be added later."""

    def __init__(self, model: nn.Module, path: str, name: str):
        self.model, self.path, self.name = model, path, name
        parent, _, self._child = path.rpartition(".")
        self._parent = model.get_submodule(parent)

    def __repr__(self) -> str:
        return f"ProtectedMap({self.name!r})"

    @property
    def module(self) -> nn.Module:
        """The module that is called: the layer itself, or the peft layer around it."""
        return getattr(self._parent, self._child) if self._child else self.model

    @property
    def layer(self) -> nn.Linear | nn.Conv2d | nn.Embedding:
        """The Linear, Conv2d or Embedding that holds the base weight."""
        module = self.module
        return module.get_base_layer() if is_adapter(module) else module  # type: ignore[return-value, operator]

    @property
    def num_outputs(self) -> int:
        """Number of output features, O."""
        return self.outputs_first(self.layer.weight).shape[0]

    @property
    def num_features(self) -> int:
        """Input features, D: C_in / groups * kh * kw for a convolution, rows of the table for an embedding."""
        return self.outputs_first(self.layer.weight).shape[1:].numel()

    @property
    def is_table(self) -> bool:
        """Whether the map is an embedding, whose inputs are one-hot rows."""
        return isinstance(self.layer, nn.Embedding)

    @property
    def bias(self) -> Tensor | None:
        """The bias, (O,); None for a map without."""
        return bias_of(self.layer)

    def outputs_first(self, weight: Tensor) -> Tensor:
        """The map's weight as a view (O, ...): an embedding's table (D, O) is transposed."""
        return weight.T if self.is_table else weight

    @property
    def has_adapter(self) -> bool:
        """Whether a peft layer wraps the map."""
        return is_adapter(self.module)

    def lora(self) -> LoraFactors:
        """The factors of the one active LoRA adapter; convolution factors are flattened.

        Raises:
            ValueError: another kind of adapter, DoRA, a LoRA bias, a merged adapter, or not exactly one active.
        """
        from peft.tuners.lora.layer import LoraLayer  # here, as only a model with an adapter needs peft

        module = self.module
        if not isinstance(module, LoraLayer):
            raise ValueError(
                f"{self.name} carries a {type(module).__name__}; of the peft adapters only LoRA is supported"
            )
        layer, factors_A, factors_B = module.get_base_layer(), module.lora_A, module.lora_B
        if isinstance(layer, nn.Embedding):
            raise ValueError(f"{self.name} is an embedding; LoRA on these is not supported: train it in full")
        active = [name for name in module.active_adapters if name in factors_A]
        if len(active) != 1:
            raise ValueError(
                f"{self.name} has {len(active)} active LoRA adapters, but exactly one is supported: {active}"
            )
        if isinstance(layer, nn.Conv2d):
            if layer.groups > 1:
                raise ValueError(
                    f"{self.name} is a grouped convolution; LoRA on these is not supported: train it in full"
                )
            if layer.dilation != (1, 1) or layer.padding_mode != "zeros":
                raise ValueError(
                    f"{self.name} has dilation or a padding mode, which peft's LoRA drops: train it in full"
                )
        if module.merged:
            raise ValueError(f"the LoRA adapter of {self.name} is merged into the weight: unmerge it first")
        (name,) = active
        down, up = factors_A[name], factors_B[name]
        if name in module.lora_variant or up.bias is not None or not isinstance(down, nn.Linear | nn.Conv2d):
            raise ValueError(f"{self.name} uses a LoRA variant (DoRA, lora_bias, ...); only plain LoRA is supported")
        both = (down.weight, up.weight)
        factors = both if isinstance(down, nn.Linear) else (both[0].flatten(1), both[1].flatten(1))
        return LoraFactors(*factors, float(module.scaling[name]), both)

    def trainable(self, bias: bool = True) -> list[nn.Parameter]:
        """The parameters that train: the adapter's if there is one, else weight and (unless it is frozen) bias."""
        if self.has_adapter:
            return list(self.lora().parameters)
        both = (self.layer.weight, self.bias if bias else None)
        return [parameter for parameter in both if isinstance(parameter, nn.Parameter)]


def _is_map(module: nn.Module) -> bool:
    layer: Any = module.get_base_layer() if is_adapter(module) else module  # type: ignore[operator]
    return isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)


def bias_of(layer: nn.Module) -> Tensor | None:
    """A layer's bias; None for one without, such as an embedding."""
    return getattr(layer, "bias", None)


def linear_maps(model: nn.Module) -> list[ProtectedMap]:
    """Every Linear, Conv2d and Embedding of the model (adapter factors excluded), in module order."""
    maps: list[ProtectedMap] = []
    inside_adapter: tuple[str, ...] = ()
    prefix = _prefix_of(model)
    for path, module in model.named_modules():
        if inside_adapter and path.startswith(inside_adapter):
            continue
        if is_adapter(module):
            inside_adapter = (*inside_adapter, path + ".")
        if _is_map(module):
            maps.append(ProtectedMap(model, path, path.removeprefix(prefix)))
    return maps


def matches(linear_map: ProtectedMap, target: str) -> bool:
    """Whether a target names the map: a type, its full name, or a whole dotted suffix of it."""
    if target in TYPES:
        layer = linear_map.layer
        if target == "Conv2d1x1":
            return isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) == (1, 1)
        return type(layer).__name__ == target
    return linear_map.name == target or linear_map.name.endswith("." + target)


def resolve_targets(
    model: nn.Module, targets: Sequence[str], blocks: Sequence[int | str] | None = None
) -> list[ProtectedMap]:
    """The maps that `targets` name, in module order; with `blocks` only those inside one of them (`named_blocks`).

    A target is a whole dotted suffix ("attn2.to_q", "fc"), a full name, or a type: "Linear", "Conv2d", "Conv2d1x1".

    Raises:
        ValueError: a target that matches nothing or only a container; a block that does not exist or holds none of
            the targets; a quantised or tied weight; fused q/k/v.
    """
    maps = linear_maps(model)
    found = {target: [linear_map for linear_map in maps if matches(linear_map, target)] for target in targets}
    for target, matched in found.items():
        if not matched:
            raise ValueError(_no_match(model, maps, target))
    wanted = {linear_map.path for matched in found.values() for linear_map in matched}
    resolved = [linear_map for linear_map in maps if linear_map.path in wanted]
    if blocks is not None:
        resolved = maps_in_blocks(model, resolved, targets, blocks)
    _refuse_unsupported(model, resolved)
    return resolved


def maps_in_blocks(
    model: nn.Module, maps: list[ProtectedMap], targets: Sequence[str], blocks: Sequence[int | str]
) -> list[ProtectedMap]:
    """Those of the targets' maps that lie inside one of the blocks.

    Raises:
        ValueError: a block that does not exist or holds none of the targets; a target that none of the blocks holds.
    """
    names = named_blocks(model, blocks, _prefix_of(model))
    for block in names:
        if not any(is_inside(linear_map.name, block) for linear_map in maps):
            inside = [
                linear_map.name.rpartition(f"{block}.")[2]
                for linear_map in linear_maps(model)
                if is_inside(linear_map.name, block)
            ]
            listed = ", ".join(list(dict.fromkeys(inside))[:12]) or "no linear map"
            raise ValueError(f"block {block!r} holds none of the targets {', '.join(targets)}; it has {listed}")
    kept = [linear_map for linear_map in maps if any(is_inside(linear_map.name, block) for block in names)]
    for target in targets:
        if not any(matches(linear_map, target) for linear_map in kept):
            raise ValueError(f"target {target!r} lies in none of the blocks {', '.join(names)}")
    return kept


def _no_match(model: nn.Module, maps: list[ProtectedMap], target: str) -> str:
    inside = [
        f".{linear_map.name}".partition(f".{target}.")[2]
        for linear_map in maps
        if f".{target}." in f".{linear_map.name}"
    ]
    if inside:
        children = ", ".join(f"{target}.{child}" for child in list(dict.fromkeys(inside))[:8])
        return f"{target!r} is a container, not a linear map; name its layers, e.g. {children}"
    for path, module in model.named_modules():
        if f".{path}".endswith(f".{target}"):
            return f"{target!r} is a {type(module).__name__}; only Linear, Conv2d and Embedding maps can be protected"
    suffixes = list(dict.fromkeys(".".join(linear_map.name.split(".")[-2:]) for linear_map in maps))
    near = difflib.get_close_matches(target, suffixes, n=6, cutoff=0.0)
    others = [suffix for suffix in suffixes if suffix not in near]
    listed = ", ".join((near + others)[:12]) + (", ..." if len(suffixes) > 12 else "")
    return f"no module ends with {target!r}; the {type(model).__name__} has {listed or 'no Linear or Conv2d'}"


def _is_fused(module: nn.Module) -> bool:
    """Whether an attention runs to_qkv / to_kv instead of its projections.

    `unfuse_qkv_projections` gives an Attention its processor back but leaves the flag set: the processor decides.
    """
    if not getattr(module, "fused_projections", False):
        return False
    is_attention = _is_of(module, "diffusers.models.attention_processor", "Attention")
    return not is_attention or type(module.processor).__name__.startswith("Fused")


def require_zero_adapters(maps: Sequence[ProtectedMap]) -> None:
    """ValueError if a map carries a LoRA adapter that is not zero, or one that is not supported."""
    for linear_map in maps:
        if linear_map.has_adapter:
            factors = linear_map.lora()
            if whole(factors.lora_B_OR).abs().max() * whole(factors.lora_A_RD).abs().max() != 0:
                raise ValueError(
                    f"the LoRA adapter of {linear_map.name} already changes the model; the protection is measured "
                    "from the base weights: merge the adapter first, or add a fresh one"
                )


def _refuse_unsupported(model: nn.Module, maps: list[ProtectedMap]) -> None:
    seen: dict[int, str] = {}
    fused = {path for path, module in model.named_modules() if _is_fused(module)}
    for linear_map in maps:
        weight = linear_map.layer.weight
        if not weight.is_floating_point() or weight.element_size() < 2:  # float8 is storage, not arithmetic
            raise ValueError(f"{linear_map.name} has a quantised weight ({weight.dtype}): load the model unquantised")
        if getattr(linear_map.layer, "max_norm", None) is not None:
            raise ValueError(
                f"{linear_map.name} renormalises its rows when it is read (max_norm), which is no linear map"
            )
        if id(weight) in seen:
            raise ValueError(
                f"{linear_map.name} and {seen[id(weight)]} share one weight: tied maps cannot be protected apart"
            )
        seen[id(weight)] = linear_map.name
        parent = linear_map.path.rpartition(".")[0]
        if parent in fused and linear_map.path.rpartition(".")[2] in PROJECTIONS:
            raise ValueError(
                f"{linear_map.name} never runs because the attention's projections are fused: "
                "call unfuse_qkv_projections() before setting up the protection"
            )


def patches(x_BCHW: Tensor, layer: nn.Conv2d) -> Tensor:
    """The inputs of a convolution seen as a linear map, (B, L * groups, D) with D = C_in / groups * kh * kw.

    The layer's own stride, padding (mode and "same" included) and dilation; border patches included; the patches of
    all groups are pooled, as they go through kernels of the same shape.
    """
    if layer.padding_mode == "zeros":
        padded = F.pad(x_BCHW, layer._reversed_padding_repeated_twice)
    else:
        padded = F.pad(x_BCHW, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    columns = F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)  # type: ignore[arg-type]
    batch, _, positions = columns.shape
    features = layer.weight.shape[1:].numel()
    grouped = columns.view(batch, layer.groups, features, positions)
    return grouped.permute(0, 3, 1, 2).reshape(batch, positions * layer.groups, features)


def input_rows(value: Tensor, layer: nn.Module) -> Tensor:
    """What reached a map, as rows (B, L, D) with the batch first; an embedding's numbers (B, ...) become one-hot."""
    if isinstance(layer, nn.Embedding):
        numbers = value.reshape(len(value), -1) if value.dim() else value.view(1, 1)
        return F.one_hot(numbers, layer.num_embeddings).float()
    if isinstance(layer, nn.Conv2d):
        return patches(value, layer)
    if value.dim() == 1:
        value = value[None]
    return value.reshape(len(value), -1, value.shape[-1]) if value.dim() > 2 else value[:, None]


def input_geometry(layer: nn.Module) -> tuple[Any, ...]:
    """Two maps on the same tensor read the same rows if their geometry is equal."""
    if isinstance(layer, nn.Conv2d):
        padding = (tuple(layer._reversed_padding_repeated_twice), layer.padding_mode)
        return ("conv", layer.kernel_size, layer.stride, layer.dilation, layer.groups, *padding)
    return ("table", layer.num_embeddings) if isinstance(layer, nn.Embedding) else ("linear",)


@torch.no_grad()
def snapshot_of(layer: nn.Linear | nn.Conv2d | nn.Embedding) -> tuple[Tensor, Tensor | None]:
    """Copies of the weight and bias as they are now."""
    bias = bias_of(layer)
    return layer.weight.detach().clone(), None if bias is None else bias.detach().clone()


@torch.no_grad()
def restore(layer: nn.Linear | nn.Conv2d | nn.Embedding, values: tuple[Tensor, Tensor | None]) -> None:
    """Write copies taken by `snapshot_of` back into the layer."""
    layer.weight.copy_(values[0])
    bias = bias_of(layer)
    if bias is not None and values[1] is not None:
        bias.copy_(values[1])


@torch.no_grad()
def write_values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Give the parameters the values of the same names."""
    if parameters:
        torch._foreach_copy_(list(parameters.values()), [values[name] for name in parameters])


def moved(snapshots: Snapshots, device: torch.device) -> Snapshots:
    """The snapshots on another device."""
    return {
        name: (weight.to(device), None if bias is None else bias.to(device))
        for name, (weight, bias) in snapshots.items()
    }


@contextmanager
def switched_off(adapters: Sequence[Any]) -> Iterator[None]:
    """peft layers without their adapters, for the duration of a block.

    Their own `enable_adapters` would change which parameters train, too: `fully_shard` looks at that once only.
    """
    before = [layer._disable_adapters for layer in adapters]
    try:
        for layer in adapters:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(adapters, before, strict=True):
            layer._disable_adapters = disabled


@contextmanager
def at_snapshot(maps: Sequence[ProtectedMap], snapshots: Snapshots) -> Iterator[None]:
    """Give the maps their snapshots' values and switch their adapters off, for the duration of the block."""
    model = maps[0].model
    reshard(model)  # whole weights that are left over from a forward pass are written by no one
    layers = {linear_map.name: linear_map.layer for linear_map in maps if linear_map.name in snapshots}
    trained = {name: snapshot_of(layer) for name, layer in layers.items()}
    adapted = [linear_map.module for linear_map in maps if linear_map.has_adapter]
    try:
        for name, layer in layers.items():
            restore(layer, snapshots[name])
        with switched_off(adapted):
            yield
    finally:
        reshard(model)
        for name, values in trained.items():
            restore(layers[name], values)


STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}  # forward order; UNets register the middle last


TRANSFORMER_BLOCK = re.compile(r"(^|\.)(single_|joint_)?transformer_blocks\.\d+$")


# of a transformer that calls them otherwise: HiDream; Z-Image and Lumina 2; Hunyuan-DiT
OTHER_BLOCK = re.compile(r"^((double|single)_stream_blocks|layers|blocks)\.\d+$")


ATTENTION = re.compile(r"(^|\.)attentions\.\d+$")  # of a UNet without transformer blocks, such as a DDPM's


def numbered_blocks(model: nn.Module, prefix: str = "") -> list[str]:
    """Names of the blocks that a number counts, in forward order.

    In a UNet these are its transformer blocks from the first down block over the middle to the last up block
    (Stable Diffusion 1.x has 16), or its attentions where it has no transformer blocks. In a transformer they are
    `transformer_blocks`, so that a number is the index there; `single_transformer_blocks` continue the count. Those
    that call them otherwise have `layers`, `blocks` or `double_stream_blocks` and `single_stream_blocks`.

    Args:
        prefix: start of every module path, left out of the names.
    """
    names = [path.removeprefix(prefix) for path, _ in model.named_modules()]
    found = [name for name in names if TRANSFORMER_BLOCK.search(name)]
    for pattern in (ATTENTION, OTHER_BLOCK):
        found = found or [name for name in names if pattern.search(name)]
    return sorted(found, key=lambda name: STAGES.get(name.partition(".")[0], 0))


def is_inside(name: str, block: str) -> bool:
    """Whether the whole dotted parts of `block` occur in `name`, one after the other, before its last part.

    >>> is_inside("single_transformer_blocks.12.attn.to_q", "transformer_blocks.12")
    False
    """
    return f".{block}." in f".{name}"


def named_blocks(model: nn.Module, blocks: Sequence[int | str], prefix: str = "") -> list[str]:
    """The dotted name of every one of `blocks`, numbers (also written as strings) looked up by `numbered_blocks`.

    Raises:
        ValueError: a number or name that the model does not have; the message lists what it has.
    """
    numbered = numbered_blocks(model, prefix)
    paths = [path.removeprefix(prefix) for path, module in model.named_modules() if next(module.children(), None)]
    chosen = []
    for block in blocks:
        if str(block).isdecimal() and int(block) < len(numbered):
            chosen.append(numbered[int(block)])
        elif any(f".{path}".endswith(f".{block}") for path in paths):
            chosen.append(str(block))
        else:
            raise ValueError(f"no block {block!r}; the {type(model).__name__} has {_listed(numbered, paths)}")
    return chosen


def _listed(numbered: Sequence[str], paths: Iterable[str]) -> str:
    counted = [f"{index} = {name}" for index, name in enumerate(numbered)]
    if len(counted) > 20:
        counted = [*counted[:10], "...", *counted[-9:]]
    stages = [path for path in paths if re.fullmatch(r"[a-z_]*blocks?(\.\d+)?", path)]
    others = [path for path in stages if path not in numbered]
    return ", ".join(counted or ["no numbered block"]) + (f"; and by name {', '.join(others)}" if others else "")
