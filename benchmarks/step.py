"""A whole training step (rl, alpha 0): protection on, off and the baseline's, for full weights and LoRA.

    python benchmarks/step.py --rank 16 --json FILE

Time comes from interleaved runs in one process, peak memory from a fresh process for every case. The baseline's step
is measured twice: as docs/method.md section 5 says it, and with the retain side run although alpha is 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from measure import BenchmarkConfig, in_fresh_process, interleaved, peak_bytes, report
from models import TARGETS, add_lora, build_unet, forward, make_batches, predict, reduced_dim_of
from naive import NaiveBarrier, random_label_step
from torch import nn

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.objectives import DiffusionStep, get_objective
from barrier_diffusers.utils.command_line import run_script

CASES = ("off", "on", "baseline", "baseline with retain side")


@dataclass(kw_only=True)
class StepConfig(BenchmarkConfig):
    """Settings of the benchmark."""

    targets: Literal["all", "attn2"] = "attn2"
    rank: int = 0  # of the LoRA adapter; 0: full weights
    batch_size: int | None = None  # None: 1 on a CPU, 8 on a GPU
    side: int | None = None  # of the latents; None: 32 on a CPU, 64 on a GPU
    num_prompts: int = 1  # of the forget images
    gradient_checkpointing: bool = False
    memory: bool = True  # also measure the peak memory of every case, each in a fresh process
    cases: list[str] | None = None  # of the four; None: all
    peak_of: str | None = None  # for the benchmark itself: run this one case and print its peak memory

    def __post_init__(self) -> None:
        self.batch_size = self.batch_size or (8 if self.on_gpu else 1)
        self.side = self.side or (64 if self.on_gpu else 32)


def make_case(name: str, unet: nn.Module, config: StepConfig) -> Callable[[], Any]:
    """One training step, its data, protection and optimizer prepared."""
    assert config.batch_size is not None and config.side is not None
    batch, retain, fitted = make_batches(
        config.model, 3, config.batch_size, config.side, config.device, config.num_prompts
    )
    options = BarrierConfig(targets=TARGETS[config.targets], reduced_dim=reduced_dim_of(config.model))
    barrier = Barrier(unet, options)
    parameters = barrier.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    if name.startswith("baseline"):
        names = [entry.name for entry in barrier.maps]
        naive = NaiveBarrier(unet, names, reduced_dim=options.reduced_dim)
        naive.setup([fitted], config.in_autocast(forward))
        unet.requires_grad_(True)
        run = config.in_autocast(predict)
        side = retain if name.endswith("retain side") else None
        return lambda: random_label_step(unet, naive, optimizer, batch, run, alpha=0.0, retain=side)
    if name == "on":
        barrier.setup_protection([fitted], config.in_autocast(forward))
    objective = get_objective("rl")

    def run_unet(*inputs: Any) -> torch.Tensor:
        return config.in_autocast(predict)(unet, *inputs)

    def step() -> None:
        parts = (batch["noisy"], batch["timesteps"], batch["target"], batch["condition"], batch["anchor"])
        loss = objective.loss_of(DiffusionStep(run_unet, *parts))
        if name == "on":
            loss = loss + barrier.compute_protection_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_flags(unet: nn.Module, step: Callable[[], Any]) -> Callable[[], Any]:
    """The step with the parameters training that train now; they are the cases' own, on one network."""
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]

    def run() -> None:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        step()

    return run


def prepared_unet(config: StepConfig) -> nn.Module:
    unet = build_unet(config.model, config.device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    if config.rank:
        add_lora(unet, TARGETS[config.targets], config.rank)
    return unet


def main(config: StepConfig) -> None:
    """Time the cases in turns, then each one's peak memory in a process of its own."""
    device = config.start()
    unet = prepared_unet(config)
    if config.peak_of is not None:
        step = make_case(config.peak_of, unet, config)
        for _ in range(2):  # the optimizer's moments are there from the first step on
            step()
        print(json.dumps({"peak_bytes": peak_bytes(device)}))
        return
    chosen = config.cases or list(CASES)
    cases = {name: with_flags(unet, make_case(name, unet, config)) for name in chosen}
    seconds = interleaved(cases, config.repeats, device)
    del cases, unet
    peaks = {}
    if config.memory:
        peaks = {
            name: in_fresh_process(__file__, config, peak_of=name, cases=None)["peak_bytes"] / 1e9 for name in chosen
        }
    rows = []
    for name in chosen:
        row: dict[str, Any] = {"step": name, "seconds": seconds[name]}
        row["time / off"] = seconds[name] / seconds["off"] if "off" in seconds else "-"
        row["on / this"] = seconds["on"] / seconds[name] if "on" in seconds else "-"
        if peaks:
            row["peak (GB)"] = peaks[name]
            row["peak / off"] = peaks[name] / peaks["off"] if "off" in peaks else "-"
        rows.append(row)
    trained = f"LoRA rank {config.rank}" if config.rank else "full weights"
    checkpointing = ", gradient checkpointing" if config.gradient_checkpointing else ""
    size = f"batch {config.batch_size}, latents {config.side} x {config.side}, precision {config.precision}"
    report(config, {f"{config.model}, {trained}, targets {config.targets}, {size}{checkpointing}": rows})


if __name__ == "__main__":
    run_script(main, StepConfig)
