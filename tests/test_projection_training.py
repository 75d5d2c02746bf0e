"""Projection (docs/method.md section 7) in training: no update enters the span; what the certificate says is left."""

import pytest
import torch
from conftest import image_batches, make_small_unet, run_net, run_unet, unet_batches
from peft import LoraConfig, get_peft_model
from projected import CONVS, TEXT, add_lora, config_of, drift_inside, protected, text_batches, train

from barrier_diffusers import Barrier, RetainProjection


@pytest.mark.parametrize("constraint", ["projection", "both"])
@pytest.mark.parametrize("kind", ["linear", "conv", "linear lora", "conv lora"])
def test_no_drift_on_spanned_directions_after_training(unet, net, kind, constraint):
    options = {"constraint": constraint, "lambda_interval": 1e-3}
    if kind.startswith("linear"):
        model, forward_fn, retain, forget = unet, run_unet, text_batches(), unet_batches(num=8)
        config = config_of(["attn2.to_q", *TEXT], projection_energy=0.8, **options)
        if kind.endswith("lora"):
            add_lora(model, config.targets)
    else:
        model, forward_fn, retain, forget = net, run_net, image_batches(seed=5), image_batches(num=8)
        targets = ["plain", "point"] if kind.endswith("lora") else CONVS
        config = config_of(targets, projection_energy=0.8, **options)
        if kind.endswith("lora"):
            torch.manual_seed(3)
            model = get_peft_model(net, LoraConfig(r=3, target_modules=targets))
    barrier = Barrier(model, config)
    barrier.setup_protection(forget, forward_fn, retain)
    train(barrier, forward_fn, forget)
    for entry in barrier.maps:
        inside, drift = drift_inside(barrier, entry)
        assert inside.shape[1] == barrier.projections[entry.name].rank > 0
        assert drift.abs().max() > 1e-3
        assert inside.abs().max() < 1e-6  # float32 rounding of weights of size 1
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in barrier.trainable_parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    assert max(drift_inside(barrier, entry)[0].abs().max() for entry in barrier.maps) > 1e-3  # the check can fail


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_predictions_for_spanned_prompts_stay(unet, use_lora):
    """Keys and values read nothing but the text, so a network with these trained does not move on retain prompts."""
    if use_lora:
        add_lora(unet)
    forget, held_out = unet_batches(num=6), text_batches(seed=8)
    with torch.no_grad():
        before = [run_unet(unet, batch) for batch in (forget[0], held_out[0])]
    barrier = protected(unet)
    train(barrier, run_unet, forget)
    with torch.no_grad():
        after = [run_unet(unet, batch) for batch in (forget[0], held_out[0])]
    assert (after[0] - before[0]).abs().max() > 1e-2
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 30])
def test_half_precision_weights_keep_their_rounding_and_no_more(steps):
    """bfloat16 rounds an entry by at most 2^-8 of its size; 30 steps leave no more than 3."""
    unet = make_small_unet().to(torch.bfloat16)
    halve = [(noisy.bfloat16(), time, text.bfloat16()) for noisy, time, text in text_batches()]
    barrier = Barrier(unet, config_of(projection_energy=0.99))
    barrier.setup_protection(None, run_unet, halve)
    forget = [(noisy.bfloat16(), time, text.bfloat16()) for noisy, time, text in unet_batches(num=3)]
    train(barrier, run_unet, forget * (steps // 3))
    for entry in barrier.maps:
        assert entry.layer.weight.dtype == torch.bfloat16
        inside, drift = drift_inside(barrier, entry)
        basis, weight = barrier.projections[entry.name].basis.double(), entry.layer.weight.double().flatten(1)
        assert (inside.abs() <= 2**-8 * weight.abs() @ basis.abs() + 1e-6).all()
        assert drift.abs().max() > 1e-2


def test_maps_on_one_input_share_one_projection(unet):
    barrier = protected(unet, targets=["attn2.to_q", *TEXT])
    assert list(barrier.projections) == [entry.name for entry in barrier.maps]
    text = [fit for name, fit in barrier.projections.items() if name.endswith(tuple(TEXT))]
    queries = [fit for name, fit in barrier.projections.items() if name.endswith("to_q")]
    assert all(fit is text[0] for fit in text) and text[0].rank == 3 and text[0].count == 60
    assert len({id(fit) for fit in [*queries, text[0]]}) == len(queries) + 1
    assert isinstance(text[0], RetainProjection)


def test_biases_are_frozen(net):
    penalty = Barrier(net, config_of(CONVS, constraint="penalty", projection_energy=0.999))
    trained = {id(parameter) for parameter in penalty.trainable_parameters()}
    penalty.remove()
    barrier = Barrier(net, config_of(CONVS))
    layers = [entry.layer for entry in barrier.maps]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) == 3 and all(id(bias) in trained and not bias.requires_grad for bias in biases)
    assert {id(p) for p in barrier.trainable_parameters()} == {id(layer.weight) for layer in layers}
    assert barrier.num_trainable == sum(layer.weight.numel() for layer in layers)
    barrier.remove()
    assert all(bias.requires_grad for bias in biases)


def test_a_projection_alone_has_no_regions_and_no_loss(unet):
    barrier = protected(unet)
    train(barrier, run_unet, unet_batches())
    loss = barrier.compute_protection_loss()
    assert loss.item() == 0.0 and loss.dtype == torch.float32 and not loss.requires_grad
    assert barrier.regions == {} and all(value > 0 for value in barrier.drift_norms().values())


def test_both_has_the_penalty_s_loss_and_the_projection(unet):
    barrier = protected(unet, constraint="both")
    alone = Barrier(make_small_unet(), config_of(constraint="penalty", projection_energy=0.999))
    alone.setup_protection(unet_batches(), run_unet)
    assert list(barrier.regions) == list(alone.regions) == list(barrier.projections)
    train(barrier, run_unet, unet_batches())
    alone.model.load_state_dict(barrier.model.state_dict())
    expected = alone.compute_protection_loss()
    torch.testing.assert_close(barrier.compute_protection_loss(), expected)
    assert expected > 0 and alone.projections == {}
    gradients = torch.autograd.grad(barrier.compute_protection_loss(), barrier.trainable_parameters())
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_set_up_moves_a_fresh_adapter_out_of_the_span_and_nothing_else(unet):
    add_lora(unet)
    batch = unet_batches(num=1)[0]
    with torch.no_grad():
        before = run_unet(unet, batch)
    barrier = protected(unet)
    for entry in barrier.maps:
        factor = entry.lora().lora_A_RD.detach()
        assert (factor @ barrier.projections[entry.name].basis).abs().max() < 1e-6 and factor.abs().max() > 1e-2
    with torch.no_grad():
        assert torch.equal(run_unet(unet, batch), before)


def test_projection_under_autocast_is_the_same(unet):
    barrier = protected(unet)
    with torch.no_grad():
        for entry in barrier.maps:
            entry.layer.weight += 0.1
        with torch.autocast("cpu", torch.bfloat16):
            barrier.project()
    assert max(drift_inside(barrier, entry)[0].abs().max() for entry in barrier.maps) < 1e-6


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("constraint", ["projection", "both"])
def test_certificate_is_sound_and_speaks_of_the_energy_left_out(unet, use_lora, constraint):
    if use_lora:
        add_lora(unet)
    barrier = protected(unet, constraint=constraint, lambda_interval=1e-3)
    train(barrier, run_unet, unet_batches(num=6))
    certificates = {}
    for spread in (0.0, 0.01, 0.1):  # how far held-out text leaves the span
        held_out = text_batches(num=8, seed=9, spread=spread)
        certificate = barrier.certify(held_out, run_unet, quantile=0.8, confidence=0.9)
        assert certificate.holds and len(certificate.maps) == len(barrier.maps)
        assert certificate.network.num_images == 32
        assert all(entry.rows_outside_envelope < 0.1 * entry.rows for entry in certificate.maps)
        assert all(entry.sound > entry.largest_output_drift - 1e-6 for entry in certificate.maps)
        certificates[spread] = certificate
    assert max(entry.sound for entry in certificates[0.0].maps) < 1e-3
    assert max(entry.relative.largest for entry in certificates[0.0].maps) < 1e-4
    assert certificates[0.0].network.certified < 1e-4 < certificates[0.1].network.certified
    for near, far in zip(certificates[0.01].maps, certificates[0.1].maps, strict=True):
        assert near.largest_output_drift < 0.2 * far.largest_output_drift and near.sound < far.sound


def test_moment_bound_of_a_projection_counts_violations_as_promised(unet):
    barrier = Barrier(unet, config_of(projection_energy=0.9))
    barrier.setup_protection(None, run_unet, text_batches(num=10, rank=6, spread=0.3))
    train(barrier, run_unet, unet_batches(num=6))
    certificate = barrier.certify(text_batches(num=10, rank=6, seed=9, spread=0.3), run_unet, quantile=0.9)
    assert certificate.holds
    assert all(entry.moment > 0 and entry.moment_violations <= 0.1 for entry in certificate.maps)


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_remove_undoes_everything(net, use_lora):
    targets = ["plain", "point"]
    model = net
    if use_lora:
        torch.manual_seed(3)
        model = get_peft_model(net, LoraConfig(r=2, target_modules=targets))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    batch = image_batches(num=1)[0]
    model.eval()
    with torch.no_grad():
        before = model(batch)
    barrier = Barrier(model, config_of(targets, projection_energy=0.8))
    barrier.setup_protection(None, run_net, image_batches(seed=5))
    barrier.remove()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert barrier.projections == {} and not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(batch), before)
    with pytest.raises(RuntimeError, match="call setup_protection"):
        barrier.project()
