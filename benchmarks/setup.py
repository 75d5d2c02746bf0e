"""Setting up the protection: time against bare forward passes over the same data, and peak memory as the data grows.

    python benchmarks/setup.py --targets all --json FILE

The protection reads the data twice, so two bare passes are the yardstick. Every size is measured in a fresh process,
where the bare passes and the setup take turns; peak memory in another one that runs one of them only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from cases import bare_passes, set_up
from measure import BenchmarkConfig, in_fresh_process, interleaved, peak_bytes, report
from models import TARGETS, build_unet, forward, make_batches, reduced_dim_of
from naive import NaiveBarrier
from torch import nn

from barrier_diffusers import BarrierConfig
from barrier_diffusers.protection.targets import resolve_targets
from barrier_diffusers.utils.command_line import run_script

CASES = ("bare", "barrier", "baseline")


@dataclass(kw_only=True)
class SetupConfig(BenchmarkConfig):
    """Settings of the benchmark."""

    targets: Literal["all", "attn2"] = "attn2"
    batch_size: int | None = None  # None: 2 on a CPU, 8 on a GPU
    side: int | None = None  # of the latents; None: 32 on a CPU, 64 on a GPU
    sizes: list[int] | None = None  # numbers of batches; None: 1, 4 and 16
    baseline: bool = True  # measure the baseline too
    num_batches: int | None = None  # for the benchmark itself: measure this size
    peak_of: str | None = None  # for the benchmark itself: only the peak memory of this case

    def __post_init__(self) -> None:
        self.batch_size = self.batch_size or (8 if self.on_gpu else 2)
        self.side = self.side or (64 if self.on_gpu else 32)


def make_cases(config: SetupConfig, unet: nn.Module, num_batches: int) -> dict[str, Any]:
    """Bare passes, the setup, the baseline's setup."""
    assert config.batch_size is not None and config.side is not None
    batches = make_batches(config.model, num_batches, config.batch_size, config.side, config.device)
    forward_fn = config.in_autocast(forward)
    targets = TARGETS[config.targets]
    options = BarrierConfig(targets=targets, reduced_dim=reduced_dim_of(config.model))

    def baseline() -> None:
        names = [linear_map.name for linear_map in resolve_targets(unet, targets)]
        NaiveBarrier(unet, names, reduced_dim=options.reduced_dim).setup(batches, forward_fn)

    barrier = set_up(unet, batches, options, forward_fn)
    return dict(zip(CASES, (bare_passes(unet, batches, forward_fn), barrier, baseline), strict=True))


def measure_size(config: SetupConfig) -> dict[str, Any]:
    """What the process for one size prints."""
    device = config.start()
    assert config.num_batches is not None
    cases = make_cases(config, build_unet(config.model, device), config.num_batches)
    if config.peak_of is not None:
        cases[config.peak_of]()
        return {"peak_bytes": peak_bytes(device)}
    if not config.baseline:
        cases.pop("baseline")
    return interleaved(cases, config.repeats, device, warmup=0)


def main(config: SetupConfig) -> None:
    """One process per size and question; a table of all."""
    if config.num_batches is not None:
        print(json.dumps(measure_size(config)))
        return
    rows = []
    cases = CASES if config.baseline else CASES[:2]
    for size in config.sizes or [1, 4, 16]:
        shared = {"sizes": None, "num_batches": size}
        seconds = in_fresh_process(__file__, config, **shared)
        row = {"images": size * config.batch_size, "two bare passes (s)": seconds["bare"]}
        for name in cases[1:]:
            row |= {f"{name} (s)": seconds[name], f"{name} / bare": seconds[name] / seconds["bare"]}
        for name in cases:
            peak = in_fresh_process(__file__, config, **shared, peak_of=name)
            row[f"{name} peak (GB)"] = peak["peak_bytes"] / 1e9
        rows.append(row)
    for row in rows:
        for name in cases:
            row[f"{name} peak / {rows[0]['images']} images"] = row[f"{name} peak (GB)"] / rows[0][f"{name} peak (GB)"]
    size = f"batches of {config.batch_size}, latents {config.side}, precision {config.precision}"
    tables = {f"{config.model}, targets {config.targets}, {size}": rows}
    if len(rows) > 1:
        tables["fixed and per batch"] = [apart(name, rows, config) for name in cases[1:]]
    report(config, tables)


def apart(name: str, rows: list[dict[str, Any]], config: SetupConfig) -> dict[str, Any]:
    """What setting up takes beside two bare passes: whatever the data, and for each batch, from the two end rows."""
    assert config.batch_size is not None
    first, last = (
        (
            row["images"] / config.batch_size,
            row[f"{name} (s)"] - row["two bare passes (s)"],
            row["two bare passes (s)"],
        )
        for row in (rows[0], rows[-1])
    )
    batches = last[0] - first[0]
    per_batch, bare = (last[1] - first[1]) / batches, (last[2] - first[2]) / batches
    fixed = first[1] - first[0] * per_batch
    return {
        "set-up": name,
        "fixed (s)": fixed,
        "per batch (s)": per_batch,
        "per batch / two bare passes": per_batch / bare,
    }


if __name__ == "__main__":
    run_script(main, SetupConfig)
