"""What the projection's tests share: retain texts of low rank, a protected UNet, training steps."""

import torch
from conftest import run_unet, unet_batches
from peft import LoraConfig

from barrier_diffusers import Barrier, BarrierConfig

TEXT = ["attn2.to_k", "attn2.to_v"]
CONVS = ["plain", "strided", "grouped", "point"]


def text_batches(rank=3, num=3, size=4, seed=1, spread=0.0):
    """UNet batches whose text embeddings lie in `rank` of the 12 dimensions, up to `spread`."""
    directions = torch.randn(rank, 12, generator=torch.Generator().manual_seed(11))
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for noisy, timesteps, text in unet_batches(num, size, seed=seed):
        inside = torch.randn(*text.shape[:2], rank, generator=generator) @ directions
        batches.append((noisy, timesteps, inside + spread * text))
    return batches


def config_of(targets=TEXT, **options):
    return BarrierConfig(
        **{"targets": targets, "constraint": "projection", "projection_energy": 1.0, "reduced_dim": 4, **options}
    )


def protected(unet, **options):
    config = config_of(**options)
    barrier = Barrier(unet, config)
    barrier.setup_protection(unet_batches() if config.has_penalty else None, run_unet, text_batches())
    return barrier


def add_lora(model, targets=TEXT):
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))


def train(barrier, forward_fn, batches, optimizer=None, lr=1e-2):
    """Real steps that change the output on the batches as much as they can; the optimizer, to go on with."""
    optimizer = optimizer or torch.optim.AdamW(barrier.trainable_parameters(), lr=lr)
    for batch in batches:
        loss = -forward_fn(barrier.model, batch).float().square().mean() + barrier.compute_protection_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        barrier.project()
    return optimizer


def drift_inside(barrier, entry):
    """(dW P, dW) in float64."""
    delta_OD = barrier.drift(entry).dense().detach().double()
    return delta_OD @ barrier.projections[entry.name].basis.double(), delta_OD
