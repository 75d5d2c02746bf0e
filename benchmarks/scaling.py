"""How the cost of the protection grows: with the data, with K, with the number of maps, with processes.

    python benchmarks/scaling.py --json FILE

Each table changes one thing and leaves the others at their middle value. Setting up passes twice over all batches, so
two bare forward passes over them stand beside it. In the last table processes (gloo, on the CPU) share out the same
batches; the seconds are those of the slowest process.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from cases import backward_of, bare_passes, set_up
from measure import BenchmarkConfig, interleaved, report
from models import TARGETS, Batch, build_unet, forward, make_batches, reduced_dim_of
from torch import nn

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.utils.command_line import run_script


@dataclass(kw_only=True)
class ScalingConfig(BenchmarkConfig):
    """Settings of the benchmark."""

    model: str = "small"
    targets: str = "all"  # or attn2
    batch_size: int = 2
    side: int = 32  # of the latents
    batches: list[int] = field(default_factory=lambda: [1, 4, 16])  # numbers of batches; the middle one elsewhere
    reduced_dims: list[int] = field(default_factory=lambda: [8, 32, 64])  # K
    maps: list[int] = field(default_factory=lambda: [12, 24, 48, 96])  # about so many of the targets
    processes: list[int] = field(default_factory=lambda: [1, 2])  # none: leave that table out

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise ValueError(f"targets is {self.targets!r}, but must be one of {', '.join(TARGETS)}")
        for name in ("batches", "reduced_dims", "maps"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")


def targets_of(unet: nn.Module, config: ScalingConfig, num_maps: int | None = None) -> list[str]:
    """The targets, or the full names of `num_maps` of them, spread over the depth."""
    targets = TARGETS[config.targets]
    if num_maps is None:
        return targets
    names = [name for name, _ in unet.named_modules() if any(name.endswith(f".{target}") for target in targets)]
    count = min(num_maps, len(names))
    return [names[index * len(names) // count] for index in range(count)]


def measure(unet: nn.Module, batches: list[Batch], options: BarrierConfig, config: ScalingConfig) -> dict[str, Any]:
    """Seconds to set up and of two bare passes, milliseconds of the loss with its gradients, bytes of the regions."""
    device, run = torch.device(config.device), config.in_autocast(forward)
    cases = {"bare": bare_passes(unet, batches, run), "setup": set_up(unet, batches, options, run)}
    seconds = interleaved(cases, config.repeats, device, warmup=0)
    barrier = Barrier(unet, options)
    barrier.setup_protection(batches, run)
    parameters = barrier.trainable_parameters()
    start = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.001)

    seconds |= interleaved({"loss": backward_of(barrier.compute_protection_loss, barrier)}, config.repeats, device)
    figures = {
        "two bare passes (s)": seconds["bare"],
        "setup (s)": seconds["setup"],
        "loss (ms)": 1000 * seconds["loss"],
        "regions (MB)": sum(group.region.num_bytes for group in barrier.groups) / 1e6,
    }
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    barrier.remove()
    return figures


def in_process(rank: int, processes: int, port: int, config: ScalingConfig, results: Any) -> None:
    """What every process of the last table does: fit on its share, and say how long that took."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=processes, rank=rank)
    try:
        device, middle = config.start(), config.batches[len(config.batches) // 2]
        unet = build_unet(config.model, device)
        batches = make_batches(config.model, middle, config.batch_size, config.side, device)[rank::processes]
        options = BarrierConfig(targets=TARGETS[config.targets], reduced_dim=reduced_dim_of(config.model))
        run = config.in_autocast(forward)
        cases = {"bare": bare_passes(unet, batches, run), "setup": set_up(unet, batches, options, run)}
        results.put(interleaved(cases, config.repeats, device, warmup=0))
    finally:
        dist.destroy_process_group()


def over_processes(processes: int, config: ScalingConfig) -> dict[str, Any]:
    """A row of the last table."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.spawn(in_process, (processes, port, config, results), processes, join=True)
    found = [results.get() for _ in range(processes)]
    bare, setup = (max(seconds[name] for seconds in found) for name in ("bare", "setup"))
    return {"processes": processes, "two bare passes (s)": bare, "setup (s)": setup, "setup / bare": setup / bare}


def main(config: ScalingConfig) -> None:
    """One table for each thing that grows."""
    device = config.start()
    unet, narrow = build_unet(config.model, device), reduced_dim_of(config.model)
    middle = config.batches[len(config.batches) // 2]
    batches = make_batches(config.model, max(config.batches), config.batch_size, config.side, device)

    def row(count: int = middle, k: int = narrow, num_maps: int | None = None) -> dict[str, Any]:
        options = BarrierConfig(targets=targets_of(unet, config, num_maps), reduced_dim=k)
        return measure(unet, batches[:count], options, config)

    tables = {
        "data": [{"images": count * config.batch_size, **row(count=count)} for count in config.batches],
        "directions": [{"K": k, **row(k=k)} for k in config.reduced_dims],
        "maps": [{"maps": len(targets_of(unet, config, number)), **row(num_maps=number)} for number in config.maps],
    }
    if config.processes:
        tables["processes"] = [over_processes(number, config) for number in config.processes]
    report(config, tables)


if __name__ == "__main__":
    run_script(main, ScalingConfig)
