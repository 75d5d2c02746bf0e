"""How far the bound on the covariance of wide inputs lies above it, on the embedded model's own activations.

    python benchmarks/residual_bound.py

Its convolutions of 1,152 features and more stand for wide ones, which it does not have: exact covariances are at hand.
Drifts are random, or those of twelve steps that fit noise, with SGD and with AdamW. Processor time of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.protection.recorder import record_inputs
from barrier_diffusers.protection.region import residual_covariance
from barrier_diffusers.protection.statistics import Moments

BASE = Path(__file__).resolve().parent.parent / "assets" / "fashion_sd"
SMALLEST = 1152  # features of a map that is looked at
RANKS = (128, 256)


def run(unet: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """forward_fn."""
    return unet(*batch).sample


def make_batches(num: int, size: int) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """The UNet, and noised latents of its own sneakers with timesteps and prompt."""
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompts = ["a photo of a red sneaker"] * size
    latents = pipeline(prompts, num_inference_steps=10, generator=generator, output_type="latent").images
    with torch.no_grad():
        embedded, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    batches = []
    for _ in range(num):
        steps = torch.randint(1000, (size,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        batches.append((noising.add_noise(latents, noise, steps), steps, embedded))
    return pipeline.unet, batches


def drifts(barrier: Barrier, batches: list[tuple[Tensor, ...]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What the drift is, and dW (O, D) of each map in float64."""
    parameters = [linear_map.layer.weight for linear_map in barrier.maps]
    before = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(batch[0].shape, generator=generator) for batch in batches[:4]]
    names = [linear_map.name for linear_map in barrier.maps]
    makers: dict[str, Any] = {
        "random": None,
        "SGD": lambda: torch.optim.SGD(parameters, lr=0.1),
        "AdamW": lambda: torch.optim.AdamW(parameters, lr=1e-4),
    }
    for kind, make in makers.items():
        if make is None:
            found = [torch.randn(value.shape, generator=generator) for value in before]
        else:
            optimizer = make()
            for step in range(12):
                optimizer.zero_grad()
                (run(barrier.model, batches[step % 4]) - targets[step % 4]).square().mean().backward()
                optimizer.step()
            found = [(now - then).detach() for now, then in zip(parameters, before, strict=True)]
        yield kind, {name: drift.double().flatten(1) for name, drift in zip(names, found, strict=True)}
        with torch.no_grad():
            for now, then in zip(parameters, before, strict=True):
                now.copy_(then)


def main() -> None:
    torch.set_num_threads(1)
    unet, batches = make_batches(12, 8)
    convolutions = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Conv2d)}
    names = [name for name, module in convolutions.items() if module.weight[0].numel() >= SMALLEST]
    moments: dict[str, Moments] = {}

    def gather(name: str, rows_BLD: Tensor) -> None:
        moments.setdefault(name, Moments(rows_BLD.shape[-1])).update(rows_BLD.flatten(0, 1))

    for rank in (None, *RANKS):
        width = None if rank is None else SMALLEST - 1
        config = BarrierConfig(targets=names, wide_features=width, residual_rank=rank or RANKS[0], interval=False)
        barrier = Barrier(unet, config)
        start = time.process_time()
        barrier.setup_protection(batches, run)
        print(f"residual_rank {rank}: set up in {time.process_time() - start:.1f} s", flush=True)
        if rank is None:
            record_inputs(unet, barrier.maps, batches, run, gather)
            values = {name: torch.linalg.eigvalsh(seen.covariance).flip(0) for name, seen in moments.items()}
            barrier.remove()
            continue
        regions = barrier.regions
        least = {name: values[name][config.num_sketched] for name in names}
        slack = [regions[name].residual_diagonal / float(least[name]) for name in names]
        print(f"  delta / eigenvalue {config.num_sketched + 1}: {min(slack):.2f} to {max(slack):.2f}")
        exact = {name: residual_covariance(moments[name].covariance, regions[name].basis.double()) for name in names}
        for kind, found in drifts(barrier, batches):
            sums = torch.zeros(2, dtype=torch.float64)
            for name, drift_OD in found.items():
                region = regions[name]
                assert region.residual_factor is not None
                along = drift_OD @ region.residual_factor.double()
                outside = drift_OD.square().sum() - (drift_OD @ region.basis.double()).square().sum()
                bound = along.square().sum() + region.residual_diagonal * outside
                sums += torch.stack([bound, ((drift_OD @ exact[name]) * drift_OD).sum()]) / len(drift_OD)
            print(f"  {kind} drift: residual term / exact one {sums[0] / sums[1]:.2f}", flush=True)
        barrier.remove()


if __name__ == "__main__":
    main()
