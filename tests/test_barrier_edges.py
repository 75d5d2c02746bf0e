"""Barrier in awkward surroundings: late adapters, autocast, shuffled loaders, failures, several processes."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import image_batches, make_small_unet, run_net, run_unet, unet_batches
from forks import in_ranks
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from barrier_diffusers import Barrier, BarrierConfig

CROSS = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]


def config_of(targets=CROSS, **options):
    return BarrierConfig(**{"targets": targets, "reduced_dim": 4, **options})


def protected(unet, **options):
    barrier = Barrier(unet, config_of(**options))
    barrier.setup_protection(unet_batches(), run_unet)
    return barrier


@torch.no_grad()
def disturb(barrier, size=0.05):
    generator = torch.Generator().manual_seed(5)
    for parameter in barrier.trainable_parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def add_lora(unet, targets=CROSS):
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights="gaussian"))


def flags(model):
    return [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("when", ["before", "after"])
def test_only_the_adapter_of_the_maps_trains(unet, when):
    larger = ["attn1.to_q", *CROSS]  # the adapter covers more than the protection
    if when == "before":
        add_lora(unet, larger)
    barrier = Barrier(unet, config_of())
    if when == "after":
        add_lora(unet, larger)
    barrier.setup_protection(unet_batches(), run_unet)
    assert barrier.uses_adapter and barrier.compute_protection_loss() == 0
    trains = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trains == {f"{entry.name}.lora_{x}.default.weight" for entry in barrier.maps for x in "AB"}
    assert barrier.num_trainable == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    disturb(barrier)
    assert barrier.compute_protection_loss() > 0


def test_an_adapter_added_after_the_set_up_is_noticed(unet):
    barrier = protected(unet)
    add_lora(unet)
    with pytest.raises(ValueError, match="an adapter was added to .*attn2.to_q after setup_protection"):
        barrier.compute_protection_loss()
    barrier.setup_protection(unet_batches(), run_unet)
    disturb(barrier)
    assert barrier.compute_protection_loss() > 0


def test_a_peft_model_is_protected_like_the_network_inside(net):
    wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["fc"]))
    barrier = Barrier(wrapped, config_of(["fc"]))
    barrier.setup_protection(image_batches(), run_net)
    assert list(barrier.regions) == ["fc"]
    disturb(barrier)
    assert barrier.compute_protection_loss() > 0


def test_mixed_adapters_leave_the_model_alone(unet):
    add_lora(unet, ["attn2.to_q"])
    before = flags(unet)
    with pytest.raises(ValueError, match="some targets carry an adapter"):
        Barrier(unet, config_of())
    assert flags(unet) == before


def test_autocast_does_not_reach_the_statistics(net):
    """The first convolution reads the data itself, so its region may not depend on autocast at all."""
    regions = []
    for enabled in (False, True):
        barrier = Barrier(net, config_of(["plain"]))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            barrier.setup_protection(image_batches(), run_net)
        regions.append(barrier.regions["plain"].to_tensors())
    assert all(torch.equal(tensor, regions[1][name]) for name, tensor in regions[0].items())


@pytest.mark.parametrize("own_generator", [False, True])
def test_noise_and_order_are_the_same_in_both_passes_and_the_caller_s_state_is_kept(net, own_generator):
    seen = []

    def noisy(model, batch):
        seen.append(batch + torch.randn_like(batch) + random.random() + float(np.random.rand()))
        return model(seen[-1])

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = DataLoader(torch.cat(image_batches()), batch_size=4, shuffle=True, generator=generator)
    Barrier(net, config_of(["fc"])).setup_protection(loader, noisy)
    assert len(seen) == 6 and all(torch.equal(*pair) for pair in zip(seen[:3], seen[3:], strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_non_finite_retain_data_is_named(unet):
    retain = unet_batches(seed=1)
    retain[1][2][0, 0, 0] = float("nan")
    barrier = Barrier(unet, config_of(use_actual_bounds=True))
    with pytest.raises(ValueError, match="non-finite activations reached .*attn2.to_k in batch 1"):
        barrier.setup_protection(unet_batches(), run_unet, retain)


def test_a_failed_load_leaves_the_model_alone(unet, tmp_path):
    protected(unet).save_pretrained(tmp_path)
    adapted = make_small_unet()
    add_lora(adapted)
    for model, words in (
        (adapted, "saved for full weights; this model trains adapter ones"),
        (make_small_unet(cross_attention_dim=14), "has 12 input features, but the map has 14"),
    ):
        before = flags(model)
        with pytest.raises(ValueError, match=words):
            Barrier.from_pretrained(tmp_path, model)
        assert flags(model) == before


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_certificate_counts_every_image_once_and_changes_nothing(unet, adapter, inference):
    if adapter:
        add_lora(unet, ["attn1.to_q", *CROSS])
    barrier = protected(unet)
    disturb(barrier, 0.01)
    before, values = flags(unet), {name: value.clone() for name, value in unet.state_dict().items()}

    def forward(model, batch):
        with torch.inference_mode(inference):
            return run_unet(model, batch)

    certificate = barrier.certify(unet_batches(5, seed=2), forward, quantile=0.5, confidence=0.9)
    assert {entry.relative.num_images for entry in certificate.maps} == {20} == {certificate.network.num_images}
    assert certificate.holds and 0 < certificate.network.certified <= certificate.network.largest
    assert flags(unet) == before
    assert all(torch.equal(value, values[name]) for name, value in unet.state_dict().items())


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = unet_batches(4)[rank::2]
    barrier = Barrier(make_small_unet(), config_of())
    barrier.setup_protection(share, run_unet)
    disturb(barrier)
    result = {"loss": barrier.compute_protection_loss().detach(), "count": barrier.groups[0].region.count}
    if rank == 1:
        share[0][2][0, 0, 0] = float("nan")
    try:
        barrier.setup_protection(share, run_unet)
    except (ValueError, RuntimeError) as error:
        result["error"] = str(error)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_fit_one_region_and_fail_together(tmp_path):
    in_ranks(_worker, str(tmp_path))
    single = Barrier(make_small_unet(), config_of())
    single.setup_protection(unet_batches(4), run_unet)
    disturb(single)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for result in results:
        assert result["count"] == single.groups[0].region.count
        torch.testing.assert_close(result["loss"], single.compute_protection_loss().detach(), rtol=1e-4, atol=0)
    assert "recording failed in another process" in results[0]["error"]
    assert "non-finite" in results[1]["error"]
