"""What protection costs an image classifier: trainable share, seconds a step and of setting up, for an architecture.

    python benchmarks/classifier_step.py --architecture resnet18 --batch_size 32 --json FILE

A step is rl on a forget batch and cross-entropy on a retain batch, as classification_ext/unlearn.py runs it; the cases
run in turns, each on a network of its own with random weights and images. Setting up reads `num_batches` forget
batches (the penalty: twice) or retain batches (the projection: once).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from measure import BenchmarkConfig, interleaved, report, synchronise

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.training.steps import freeze_normalisation
from barrier_diffusers.utils.command_line import run_script
from classification_ext.methods.rl import other_labels
from classification_ext.models import build_classifier
from classification_ext.unlearn import run_batch

CASES: dict[str, dict[str, Any]] = {
    "none": {"lambda_interval": 0.0},
    "penalty": {},
    "projection": {"constraint": "projection", "projection_energy": 0.8},
}


@dataclass(kw_only=True)
class ClassifierStepConfig(BenchmarkConfig):
    """Settings of the benchmark; `model` is not read."""

    architecture: str = "resnet8-tiny"
    targets: list[str] = field(default_factory=lambda: ["Conv2d1x1", "fc"])
    batch_size: int = 128
    side: int = 28
    num_channels: int = 1
    num_labels: int = 10
    reduced_dim: int = 8
    num_batches: int = 8  # for setting up


def batches(config: ClassifierStepConfig, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Random images and labels on the device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.batch_size, config.num_channels, config.side, config.side)
    return [
        {
            "images": torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(config.device),
            "labels": torch.randint(config.num_labels, shape[:1], generator=generator).to(config.device),
        }
        for _ in range(count)
    ]


def make_case(name: str, config: ClassifierStepConfig) -> tuple[Callable[[], None], dict[str, Any]]:
    """One training step with everything it needs, and the facts of its setup."""
    names = [str(label) for label in range(config.num_labels)]
    model = build_classifier(config.architecture, names, config.side, config.num_channels, seed=0).to(config.device)
    total = sum(parameter.numel() for parameter in model.parameters())
    options = BarrierConfig(targets=config.targets, reduced_dim=config.reduced_dim, **CASES[name])
    model.eval()
    barrier = Barrier(model, options)
    forget, retain = batches(config, config.num_batches, 0), batches(config, config.num_batches, 1)
    clock = time.perf_counter if torch.device(config.device).type == "cuda" else time.process_time
    synchronise(torch.device(config.device))
    start = clock()
    if options.protects:
        barrier.setup_protection(forget, run_batch, retain if options.has_projection else None)
    synchronise(torch.device(config.device))
    facts = {"set-up": clock() - start, "trained %": 100 * barrier.num_trainable / total}
    optimizer = torch.optim.AdamW(barrier.trainable_parameters(), lr=1e-4, weight_decay=0.0)
    freeze_normalisation(model)

    def step() -> None:
        batch, kept = forget[0], retain[0]
        loss = F.cross_entropy(run_batch(model, batch), other_labels(batch["labels"], config.num_labels))
        loss = loss + F.cross_entropy(run_batch(model, kept), kept["labels"])
        if options.protects:
            loss = loss + barrier.compute_protection_loss()
        loss.backward()
        optimizer.step()
        if options.protects:
            barrier.project()
        optimizer.zero_grad()

    return step, facts


def main(config: ClassifierStepConfig) -> None:
    """Time the cases in turns."""
    device = config.start()
    made = {name: make_case(name, config) for name in CASES}
    seconds = interleaved({name: step for name, (step, _) in made.items()}, config.repeats, device, warmup=2)
    rows = []
    for name, (_, facts) in made.items():
        row = {"protection": name, "trained %": round(facts["trained %"], 4), "step (s)": seconds[name]}
        row |= {"step / none": seconds[name] / seconds["none"]}
        rows.append(row | {f"set-up, {config.num_batches} batches (s)": facts["set-up"]})
    size = f"{config.side} x {config.side}, batch {config.batch_size} + {config.batch_size}"
    report(config, {f"{config.architecture}, targets {', '.join(config.targets)}, {size}": rows})


if __name__ == "__main__":
    run_script(main, ClassifierStepConfig)
