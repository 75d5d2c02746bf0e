"""How far the weights of a pipeline are from those of its base: an audit of what somebody else has unlearned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.models.architectures import components


def tensor_drift(name: str, base: Tensor, judged: Tensor) -> dict[str, Any] | None:
    """`name`, `norm` of the difference, `relative` to the base's norm, and the `largest` entry of it; None if the two
    are equal. `rounded` says that they are equal in half precision, as if one was stored in it.
    """
    if torch.equal(base, judged):
        return None
    before, change = base.double(), judged.double() - base.double()
    norm, size = change.norm().item(), before.norm().item()
    return {
        "name": name,
        "norm": norm,
        "relative": norm / size if size > 0 else None,
        "largest": change.abs().max().item(),
        "rounded": any(torch.equal(base.to(half), judged.to(half)) for half in (torch.float16, torch.bfloat16)),
    }


def network_drift(base: nn.Module, judged: nn.Module) -> dict[str, Any]:
    """The drift of a whole network, and in `details` that of each tensor that changed, relatively most first.

    Raises:
        ValueError: networks of different shapes.
    """
    before, after = base.state_dict(), judged.state_dict()
    for name in sorted(before.keys() | after.keys()):
        shapes = [tuple(state[name].shape) if name in state else "none" for state in (before, after)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} has shape {shapes[0]} in the base and {shapes[1]} in what is judged")
    entries = [tensor_drift(name, value.cpu(), after[name].cpu()) for name, value in before.items()]
    changed = [entry for entry in entries if entry is not None]
    changed.sort(key=lambda entry: -(entry["relative"] if entry["relative"] is not None else float("inf")))
    norm = sum(entry["norm"] ** 2 for entry in changed) ** 0.5
    size = sum(value.double().norm().item() ** 2 for value in before.values()) ** 0.5
    return {
        "num_tensors": len(before),
        "num_changed": sum(not entry["rounded"] for entry in changed),
        "num_rounded": sum(entry["rounded"] for entry in changed),
        "norm": norm,
        "relative": norm / size if size > 0 else 0.0,
        "largest": max((entry["largest"] for entry in changed), default=0.0),
        "details": {"tensors": changed},
    }


def weight_drift(base: Any, judged: Any) -> dict[str, Any]:
    """Network -> its drift, see `network_drift`; of one that only one pipeline has, or that is of another shape,
    `incomparable` says so.

    Args:
        base, judged: pipelines.
    """
    before, after = components(base), components(judged)
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            found[name] = {"incomparable": f"only {'the base' if name in before else 'what is judged'} has it"}
            continue
        try:
            found[name] = network_drift(before[name], after[name])
        except ValueError as error:
            found[name] = {"incomparable": str(error)}
    return found


def print_drift(drift: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each network."""
    for name, of_network in drift.items():
        if "incomparable" in of_network:
            print(f"weight drift, {name}: {of_network['incomparable']}")
            continue
        rounded = f", {of_network['num_rounded']} more but for rounding" if of_network["num_rounded"] else ""
        print(
            f"weight drift, {name}: {of_network['num_changed']} of {of_network['num_tensors']} tensors changed"
            f"{rounded}; relative {of_network['relative']:.3g}, largest entry {of_network['largest']:.3g}"
        )
