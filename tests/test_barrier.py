"""Barrier end to end on tiny models: equal to the oracle, zero at the snapshot, saved, loaded, removed."""

import pytest
import torch
from conftest import ConvNet, image_batches, make_small_unet, make_unet, run_net, run_unet, unet_batches
from oracle import Oracle, net_rows
from peft import LoraConfig
from safetensors.torch import load_file

from barrier_diffusers import Barrier, BarrierConfig, Certificate

ATTN2 = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]
NET_MAPS = ["plain", "strided", "grouped", "point", "fc"]


def perturb(barrier, scale=0.05, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in barrier.trainable_parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def unet_barrier(unet, **options):
    barrier = Barrier(unet, BarrierConfig(**{"reduced_dim": 4, "targets": ATTN2, **options}))
    barrier.setup_protection(unet_batches(), run_unet, unet_batches(seed=1))
    return barrier


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_actual_bounds": True, "region": "slabs"}, {"residual_source": "both", "include_bias_drift": True}],
    ids=str,
)
def test_loss_of_a_network_equals_the_oracle(net, options, normalize):
    forget, retain = image_batches(), image_batches(seed=5)
    options = {"reduced_dim": 4, **options}
    rows, retain_rows = net_rows(net, forget, NET_MAPS), net_rows(net, retain, NET_MAPS)
    config = BarrierConfig(targets=NET_MAPS, lambda_interval=3.0, normalize_protection=normalize, **options)
    barrier = Barrier(net, config)
    barrier.setup_protection(forget, run_net, retain)
    before = {name: (net.get_submodule(name).weight.clone(), net.get_submodule(name).bias) for name in NET_MAPS}
    before = {name: (weight, None if bias is None else bias.clone()) for name, (weight, bias) in before.items()}
    perturb(barrier)
    total = 0.0
    for name in NET_MAPS:
        oracle = Oracle(rows[name], retain_rows[name], **options).use_bounds_of(barrier.regions[name])
        module, (weight0, bias0) = net.get_submodule(name), before[name]
        delta = (module.weight - weight0).detach().flatten(1)
        total += oracle.loss(delta, None if bias0 is None else (module.bias - bias0).detach()).item()
    total *= 3.0 / (len(NET_MAPS) if normalize else 1)
    assert barrier.compute_protection_loss().item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_zero_at_the_snapshot_and_positive_after_a_step(unet, use_lora):
    if use_lora:
        unet.add_adapter(LoraConfig(r=2, target_modules=ATTN2))
    barrier = unet_barrier(unet)
    loss = barrier.compute_protection_loss()
    gradients = torch.autograd.grad(loss, barrier.trainable_parameters())
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    perturb(barrier)
    assert barrier.compute_protection_loss().item() > 0


def test_only_the_targets_train(unet):
    barrier = unet_barrier(unet)
    names = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert names == {f"{entry.name}.weight" for entry in barrier.maps}
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(barrier.trainable_parameters(), lr=1e-2)
    for batch in unet_batches():
        loss = -run_unet(unet, batch).square().mean() + barrier.compute_protection_loss()
        loss.backward()
        assert all((p.grad is not None) == (n in names) for n, p in unet.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names


def test_protection_pulls_the_weights_back(unet):
    barrier = unet_barrier(unet)
    perturb(barrier)
    optimizer = torch.optim.Adam(barrier.trainable_parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = barrier.compute_protection_loss()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_lora_loss_equals_the_merged_weights_loss():
    torch.manual_seed(3)
    adapted, full = make_small_unet(), make_small_unet()
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=ATTN2))
    barriers = [unet_barrier(adapted), unet_barrier(full)]
    perturb(barriers[0], 0.2)
    for entry, other in zip(barriers[0].maps, barriers[1].maps, strict=True):
        factors = entry.lora()
        with torch.no_grad():
            other.layer.weight += factors.scaling * factors.lora_B_OR @ factors.lora_A_RD
    lora, dense = (barrier.compute_protection_loss().item() for barrier in barriers)
    assert lora == pytest.approx(dense, rel=1e-3)
    assert barriers[0]._snapshots == {}


def test_regions_are_shared_and_memory_counted():
    unet = make_unet(sample_size=8)
    barrier = Barrier(unet, BarrierConfig(targets=["to_q", "to_k", "to_v"], reduced_dim=4))
    barrier.setup_protection(unet_batches(num=1, size=2), run_unet)
    assert len(barrier.regions) == 96 and len({id(region) for region in barrier.regions.values()}) == 33
    text = [region for name, region in barrier.regions.items() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert all(region is text[0] for region in text) and text[0].mean.shape == (12,) and text[0].count == 10


def test_both_passes_see_the_same_noise(unet):
    seen = []

    def noisy(model, batch):
        noise = torch.randn_like(batch[0])
        seen.append(noise)
        return model(batch[0] + noise, *batch[1:])

    barrier = Barrier(unet, BarrierConfig(targets=ATTN2, reduced_dim=4))
    barrier.setup_protection(unet_batches(), noisy)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_save_and_load(tmp_path, use_lora):
    models = [make_small_unet(), make_small_unet()]
    if use_lora:
        for model in models:
            torch.manual_seed(1)
            model.add_adapter(LoraConfig(r=2, target_modules=ATTN2))
    barrier = unet_barrier(models[0], residual_weighting="singular_values", use_actual_bounds=True)
    perturb(barrier)
    barrier.save_pretrained(tmp_path)
    loaded = Barrier.from_pretrained(tmp_path, models[1])
    perturb(loaded)
    assert loaded.compute_protection_loss().item() == pytest.approx(barrier.compute_protection_loss().item(), rel=1e-5)
    assert loaded.config == barrier.config
    assert len({id(region) for region in loaded.regions.values()}) == len(barrier.groups)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"barrier_config.json", "barrier_regions.safetensors"} | (
        set() if use_lora else {"barrier_snapshot.safetensors"}
    )
    keys = load_file(tmp_path / "barrier_regions.safetensors")
    assert sum(key.endswith(".residual") for key in keys) == len(barrier.groups)


def test_loading_into_another_model_is_refused(tmp_path, unet):
    unet_barrier(unet).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belong to other maps"):
        Barrier.from_pretrained(tmp_path, make_unet(cross_attention_dim=12))
    with pytest.raises(ValueError, match="has 12 input features, but the map has 20"):
        Barrier.from_pretrained(tmp_path, make_small_unet(cross_attention_dim=20))
    (tmp_path / "barrier_snapshot.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no barrier_snapshot.safetensors"):
        Barrier.from_pretrained(tmp_path, make_small_unet())


def test_remove_is_the_exact_inverse(unet):
    unet.conv_in.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    processors = dict(unet.attn_processors)
    batch = unet_batches(num=1)[0]
    with torch.no_grad():
        before = run_unet(unet, batch)
    barrier = unet_barrier(unet)
    barrier.compute_protection_loss()
    barrier.remove()
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == flags
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    with torch.no_grad():
        assert torch.equal(run_unet(unet, batch), before)
    assert barrier.regions == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 2])
def test_loss_and_gradients_under_autocast_stay_float32(dtype, rank):
    """The whole of it, forward and backward, is what it is without; 1e6 would overflow in float16."""
    unet = make_small_unet()
    if rank:
        unet.add_adapter(LoraConfig(r=rank, target_modules=ATTN2))
    barrier = unet_barrier(unet)
    perturb(barrier)
    parameters = barrier.trainable_parameters()
    expected = barrier.compute_protection_loss()
    gradients = torch.autograd.grad(1e6 * expected, parameters, allow_unused=True)
    with torch.autocast("cpu", dtype):
        inside = barrier.compute_protection_loss()
    found = torch.autograd.grad(1e6 * inside, parameters, allow_unused=True)
    assert inside.dtype == torch.float32 and inside > 0 and torch.equal(inside, expected)
    for ours, theirs in zip(found, gradients, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(rank):
    results = []
    for checkpointing in (False, True):
        unet = make_small_unet()
        if rank:
            torch.manual_seed(0)
            unet.add_adapter(LoraConfig(r=rank, target_modules=ATTN2))
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        barrier = unet_barrier(unet)
        torch.manual_seed(1)
        perturb(barrier)
        protection = barrier.compute_protection_loss()
        loss = run_unet(unet, unet_batches()[0]).square().mean() + protection
        loss.backward()
        results.append([loss.detach(), protection.detach(), *(entry.grad for entry in barrier.trainable_parameters())])
    assert results[0][1] > 0 and all(value is not None for value in results[0])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_accumulated_micro_steps_are_one_step_on_the_whole_batch(unet):
    """Each micro-step adds its share of the protection loss, as unlearn_sd.py's steps do."""
    barrier = unet_barrier(unet)
    perturb(barrier)
    noisy, timesteps, condition = unet_batches()[0]
    half, gradients = len(noisy) // 2, []
    for parts in ([slice(0, 2 * half)], [slice(0, half), slice(half, 2 * half)]):
        for part in parts:
            objective = run_unet(unet, (noisy[part], timesteps[part], condition[part])).square().mean()
            ((objective + barrier.compute_protection_loss()) / len(parts)).backward()
        gradients.append([entry.grad.clone() for entry in barrier.trainable_parameters()])
        unet.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_bfloat16_model():
    unet = make_small_unet().to(torch.bfloat16)
    batches = [(x.bfloat16(), t, c.bfloat16()) for x, t, c in unet_batches()]
    barrier = Barrier(unet, BarrierConfig(targets=ATTN2, reduced_dim=4))
    barrier.setup_protection(batches, run_unet)
    perturb(barrier)
    loss = barrier.compute_protection_loss()
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_certificate(unet, use_lora):
    if use_lora:
        unet.add_adapter(LoraConfig(r=2, target_modules=ATTN2))
    barrier = unet_barrier(unet, use_actual_bounds=True)
    batches = unet_batches(num=8, seed=9)
    fresh = barrier.certify(batches, run_unet, quantile=0.8, confidence=0.9)
    assert isinstance(fresh, Certificate) and fresh.holds
    assert fresh.network.largest == 0.0 and all(entry.sound == 0.0 for entry in fresh.maps)
    perturb(barrier)
    with torch.no_grad():
        after = run_unet(unet, batches[0])
        with barrier.snapshot_weights():
            before = run_unet(unet, batches[0])
        assert torch.equal(run_unet(unet, batches[0]), after)
    assert all(parameter.requires_grad for parameter in barrier.trainable_parameters())
    certificate = barrier.certify(batches, run_unet, quantile=0.8, confidence=0.9)
    assert certificate.holds and len(certificate.maps) == len(barrier.maps)
    expected = ((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).max().item()
    assert certificate.network.largest >= expected * (1 - 1e-5) > 0
    assert certificate.network.num_images == 32 and certificate.network.certified is not None
    assert all(entry.sound >= entry.largest_output_drift > 0 for entry in certificate.maps)


def test_drift_norms(unet):
    barrier = unet_barrier(unet)
    assert set(barrier.drift_norms().values()) == {0.0}
    perturb(barrier)
    assert all(value > 0 for value in barrier.drift_norms().values())


def test_user_errors_come_before_any_pass(unet, net):
    def never(model, batch):
        raise AssertionError("a pass was started")

    with pytest.raises(ValueError, match="no module ends with"):
        Barrier(unet, BarrierConfig(targets=["attn9.to_q"]))
    with pytest.raises(ValueError, match=r"reduced_dim is 9, but .*attn2.to_q has only 8"):
        Barrier(unet, BarrierConfig(targets=ATTN2, reduced_dim=9))
    barrier = Barrier(unet, BarrierConfig(targets=ATTN2, reduced_dim=4, use_actual_bounds=True))
    with pytest.raises(ValueError, match="need a retain_loader"):
        barrier.setup_protection(unet_batches(), never)
    for call in (barrier.compute_protection_loss, lambda: barrier.save_pretrained("x"), lambda: barrier.drift_norms()):
        with pytest.raises(RuntimeError, match="setup_protection"):
            call()
    with pytest.raises(RuntimeError, match="setup_protection"):
        barrier.certify(unet_batches(), never)


def test_adapters_must_cover_all_targets_and_start_at_zero(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_q"]))
    with pytest.raises(ValueError, match="adapt all targets, or none"):
        Barrier(unet, BarrierConfig(targets=ATTN2, reduced_dim=4))
    barrier = Barrier(unet, BarrierConfig(targets=["attn2.to_q"], reduced_dim=4))
    perturb(barrier)
    with pytest.raises(ValueError, match="already changes the model"):
        barrier.setup_protection(unet_batches(), run_unet)


def test_normalisation_statistics_do_not_move_during_setup():
    net = ConvNet().train()
    before = net.norm.running_mean.clone()
    Barrier(net, BarrierConfig(targets=["fc"], reduced_dim=2)).setup_protection(image_batches(), run_net)
    assert torch.equal(net.norm.running_mean, before) and net.norm.training
