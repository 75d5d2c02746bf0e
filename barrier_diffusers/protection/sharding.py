"""Weights that torch's `fully_shard` (FSDP 2) has shared out over processes, seen as rows of outputs.

The protection loss is a sum over output rows, so each process computes the terms of its own rows against statistics
that all of them hold; of full weights nothing is gathered. Two things are not rows of outputs and are gathered, in one
collective operation: LoRA's factors A, and an embedding's table, whose rows are input features.

FSDP averages over the processes what its own backward pass finds. The protection's gradient goes past it, straight to
the shards, and is whole: no process adds anything to another one's rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _loaded(module: str, name: str) -> Any:
    """A class of a part of torch, which is not imported for this: without it there is no such object."""
    return getattr(sys.modules.get(module), name, ())


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether processes share a tensor (a DTensor)."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


@dataclass(frozen=True)
class Share:
    """Which rows of every weight a process holds."""

    group: Any  # the processes that hold the other rows
    index: int  # of this process among them
    size: int

    def rows(self, number: int) -> slice:
        """Its rows of so many, as torch cuts them: the last processes may hold fewer, or none."""
        each = -(-number // self.size)
        return slice(min(self.index * each, number), min((self.index + 1) * each, number))


def share_of(tensor: Tensor) -> Share | None:
    """How a weight is shared out; None for one that is whole.

    Raises:
        ValueError: it is cut in another way than by its first dimension.
    """
    if not is_sharded(tensor):
        return None
    placements, mesh = tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or not placements[cut[0]].is_shard(0):
        raise ValueError(
            f"a weight of shape {tuple(tensor.shape)} is shared out as {placements}; only fully_shard's own cut, "
            "by the first dimension over one dimension of the mesh, is supported"
        )
    return Share(mesh.get_group(cut[0]), mesh.get_local_rank(cut[0]), mesh.size(cut[0]))


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds, with gradient and in the same memory; a whole tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without gradient; all processes have to ask for a shared one."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal in all processes, shared out as `like` is, or a shared one made whole if `like` is."""
    if is_sharded(tensor) and not is_sharded(like):
        return whole(tensor)
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # own memory: the local part would else be a view that keeps the whole alive
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).clone()


class _Sum(torch.autograd.Function):
    """The sum of all processes' numbers; each one's gradient is that of its own number alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Share) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=share.group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def summed(value: Tensor, share: Share | None) -> Tensor:
    """A sum over rows, over all processes' rows."""
    return value if share is None else _Sum.apply(value, share)


class _Gather(torch.autograd.Function):
    """Whole tensors from parts, in one collective operation; gradients are summed over the processes, in another.

    The parts are added up in a buffer of zeros, as they may differ in size from process to process.
    """

    @staticmethod
    def forward(ctx: Any, share: Share, shapes: Sequence[torch.Size], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.share, ctx.shapes = share, shapes
        ctx.dtypes = [part.dtype for part in parts]
        flat = parts[0].new_zeros(sum(shape.numel() for shape in shapes), dtype=torch.float32)
        gathered = _Gather.split(flat, shapes)
        for full, part in zip(gathered, parts, strict=True):
            full[share.rows(len(full))] = part
        dist.all_reduce(flat, group=share.group)
        return tuple(full.to(dtype) for full, dtype in zip(gathered, ctx.dtypes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        dist.all_reduce(flat, group=ctx.share.group)
        parts = _Gather.split(flat, ctx.shapes)
        own = [part[ctx.share.rows(len(part))].to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)]
        return None, None, *own

    @staticmethod
    def split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Shared tensors made whole, where each process goes on with rows of its own: the gradients are summed."""
    share = share_of(tensors[0]) if tensors else None
    if share is None:
        return list(tensors)
    return list(_Gather.apply(share, [tensor.shape for tensor in tensors], *map(own_part, tensors)))


def are_gathered(modules: Iterable[nn.Module]) -> bool:
    """Whether `fully_shard` has taken one of the modules: they gather their weights when they run."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    return bool(kind) and any(isinstance(module, kind) for module in modules)


def reshard(model: nn.Module) -> None:
    """Give every module its shards back where `fully_shard` still holds whole weights, as its root does between a
    forward pass and its backward pass; that gathers them again."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    if kind and dist.is_initialized():
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()
