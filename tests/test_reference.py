"""The frozen reference answers as a copy made before training would."""

import copy

import pytest
import torch
from conftest import make_small_unet, run_unet, unet_batches
from peft import LoraConfig

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.training.steps import FrozenReference

TARGETS = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_as_a_copy(rank, checkpointing):
    unet = make_small_unet()
    if rank:
        unet.add_adapter(LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights="gaussian"))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    before = copy.deepcopy(unet)
    barrier = Barrier(unet, BarrierConfig(targets=TARGETS, reduced_dim=4))
    reference = FrozenReference(unet, barrier.trainable_parameters())
    optimizer = torch.optim.Adam(barrier.trainable_parameters(), lr=0.05)
    unet.train()
    for batch in unet_batches(2):
        prediction = run_unet(unet, batch)
        frozen = reference(run_unet, unet, batch)  # between forward and backward, as an objective calls it
        (prediction - frozen).square().mean().add(prediction.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = unet_batches(1, seed=5)[0]
    with torch.no_grad():
        expected, trained = run_unet(before, batch), run_unet(unet, batch)
    frozen = reference(run_unet, unet, batch)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, expected, rtol=0, atol=0)
    assert (trained - expected).abs().max() > 1e-3
    torch.testing.assert_close(run_unet(unet, batch).detach(), trained, rtol=0, atol=0)  # nothing was left behind


@pytest.mark.parametrize("fresh", [True, False])
def test_a_fresh_adapter_is_switched_off_and_any_other_copied(fresh):
    unet = make_small_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="gaussian" if fresh else False))
    barrier = Barrier(unet, BarrierConfig(targets=TARGETS, reduced_dim=4))
    batch = unet_batches(1)[0]
    with torch.no_grad():
        expected = run_unet(unet, batch)
    reference = FrozenReference(unet, barrier.trainable_parameters())
    assert reference.num_copied == (0 if fresh else barrier.num_trainable)
    with torch.no_grad():
        for parameter in barrier.trainable_parameters():
            parameter.add_(1)
    torch.testing.assert_close(reference(run_unet, unet, batch), expected, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in barrier.trainable_parameters())
