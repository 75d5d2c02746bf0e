"""The loss computed while the network runs equals the one computed outside, in value and in gradient."""

import copy
import inspect

import pytest
import torch
from conftest import ConvNet, image_batches, make_small_unet, run_net, run_unet, unet_batches
from diffusers.models.attention_processor import AttnProcessor2_0
from pipelines import build
from safetensors.torch import load_file
from sharded import class_batches, class_unet, lora_unet, run_class_unet
from short_runs import run_tiny
from torch import nn

from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.recorder import BarrierAttnProcessor

ATTENTION = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]
CASES = {  # model, forward function, batches, options
    "full weights": (make_small_unet, run_unet, unet_batches, {"targets": [*ATTENTION, "attn1.to_q"]}),
    "attention and feed-forward": (
        make_small_unet,
        run_unet,
        unet_batches,
        {"targets": ["attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "conv1"], "include_bias_drift": True},
    ),
    "LoRA": (lora_unet, run_unet, unet_batches, {"targets": ATTENTION, "region": "slabs"}),
    "convolutions": (ConvNet, run_net, image_batches, {"targets": ["Conv2d", "fc"], "normalize_protection": False}),
    "a table": (class_unet, run_class_unet, class_batches, {"targets": ["to_q", "class_embedding"]}),
}


def protected(name, inside=True, model=None, **options):
    """(barrier, forward function, batches) of a case, away from its snapshot."""
    make, forward, batches, settings = CASES[name]
    if model is None:
        torch.manual_seed(0)
        model = make().eval()
    barrier = Barrier(model, BarrierConfig(reduced_dim=3, loss_inside=inside, **settings, **options))
    barrier.setup_protection(batches(), forward)
    disturb(barrier)
    return barrier, forward, batches()


@torch.no_grad()
def disturb(barrier):
    torch.manual_seed(2)
    for parameter in barrier.trainable_parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def values_of(barrier):
    return [part.value for part in barrier._loss.parts]


def loss_and_gradients(barrier):
    for parameter in barrier.trainable_parameters():
        parameter.grad = None
    loss = barrier.compute_protection_loss()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in barrier.trainable_parameters())]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_loss_outside(name):
    outside = loss_and_gradients(protected(name, inside=False)[0])
    barrier, forward, batches = protected(name)
    assert values_of(barrier) == [None] * len(barrier._loss.parts)
    forward(barrier.model, batches[0])
    before = values_of(barrier)
    assert None not in before and outside[0] > 0
    forward(barrier.model, batches[1])  # every pass of a step uses the first one's
    assert all(one is other for one, other in zip(before, values_of(barrier), strict=True))
    assert_equal(loss_and_gradients(barrier), outside)
    assert_equal(loss_and_gradients(barrier), outside)  # what did not run is computed now


def test_attentions_compute_in_their_processors_and_other_maps_in_hooks():
    barrier, _, _ = protected("attention and feed-forward")
    found = [type(module.processor) for module in barrier.model.modules() if hasattr(module, "set_processor")]
    parts = [[linear_map.name for linear_map in part.maps] for part in barrier._loss.parts]
    assert found.count(BarrierAttnProcessor) == 0  # to_out.0 lies in a list of the attention, not in itself
    assert all(len(names) == 1 for names in parts)
    barrier, _, _ = protected("full weights")
    parts = [sorted(linear_map.name.rpartition(".")[2] for linear_map in part.maps) for part in barrier._loss.parts]
    assert sorted(parts) == [["to_k", "to_q", "to_v"]] * 4 + [["to_q"]] * 4
    found = [type(module.processor) for module in barrier.model.modules() if hasattr(module, "set_processor")]
    assert found.count(BarrierAttnProcessor) == 8


@pytest.mark.parametrize("name", ["full weights", "LoRA", "attention and feed-forward"])
def test_a_checkpointed_block_counts_once(name):
    barrier, forward, batches = protected(name)
    forward(barrier.model, batches[0]).square().mean().backward()
    plain = [parameter.grad.clone() for parameter in barrier.trainable_parameters()]
    plain = [one + other for one, other in zip(plain, loss_and_gradients(barrier)[1:], strict=True)]
    barrier, forward, batches = protected(name)
    barrier.model.enable_gradient_checkpointing()
    barrier.model.train()
    objective = forward(barrier.model, batches[0]).square().mean()
    assert None not in values_of(barrier)
    loss = objective + barrier.compute_protection_loss()
    loss.backward()
    assert values_of(barrier) == [None] * len(barrier._loss.parts)  # the second run computed nothing
    assert_equal([parameter.grad for parameter in barrier.trainable_parameters()], plain)


def test_nothing_is_computed_without_gradients():
    barrier, forward, batches = protected("full weights")
    with torch.no_grad():
        forward(barrier.model, batches[0])
    barrier.certify(batches, forward, quantile=0.5, confidence=0.5)
    assert values_of(barrier) == [None] * len(barrier._loss.parts)


@pytest.mark.parametrize("name", ["full weights", "LoRA", "convolutions"])
def test_a_value_of_earlier_weights_is_not_used(name):
    barrier, forward, batches = protected(name)
    forward(barrier.model, batches[0])
    disturb(barrier)  # as an optimizer's step of somebody who did not ask for the loss
    outside = protected(name, inside=False)[0]
    disturb(outside)
    expected = loss_and_gradients(outside)
    forward(barrier.model, batches[0])
    assert_equal(loss_and_gradients(barrier), expected)
    forward(barrier.model, batches[0])
    disturb(barrier)
    disturb(outside)
    assert_equal(loss_and_gradients(barrier), loss_and_gradients(outside))


def test_it_trains_to_the_same_weights():
    weights = []
    for inside in (True, False):
        barrier, forward, batches = protected("full weights", inside)
        optimizer = torch.optim.SGD(barrier.trainable_parameters(), lr=0.1)
        for step in range(4):
            objective = forward(barrier.model, batches[step % 3]).square().mean()
            (objective + barrier.compute_protection_loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([parameter.detach() for parameter in barrier.trainable_parameters()])
    assert_equal(*weights)


@pytest.mark.parametrize("name", ["full weights", "LoRA"])
def test_precision_does_not_depend_on_autocast(name):
    barrier, forward, batches = protected(name)
    forward(barrier.model, batches[0])
    plain = loss_and_gradients(barrier)
    with torch.autocast("cpu", torch.bfloat16):
        forward(barrier.model, batches[0])
    assert None not in values_of(barrier)
    assert all(map(torch.equal, loss_and_gradients(barrier), plain))


@pytest.mark.parametrize("name", ["full weights", "LoRA", "convolutions"])
def test_a_compiled_network_computes_it_too(name):
    barrier, forward, batches = protected(name)
    forward(barrier.model, batches[0]).square().mean().backward()
    plain = [parameter.grad.clone() for parameter in barrier.trainable_parameters()]
    expected = loss_and_gradients(barrier)
    barrier.model.compile(backend="eager")
    for _ in range(2):
        objective = forward(barrier.model, batches[0]).square().mean()
        assert None not in values_of(barrier)
        assert_equal(loss_and_gradients(barrier), expected)
        assert_equal(torch.autograd.grad(objective, barrier.trainable_parameters()), plain)


def test_the_model_stays_a_model():
    """Names, copies, signatures and processors."""
    model = make_small_unet()
    names, processors = list(model.state_dict()), dict(model.attn_processors)
    barrier, forward, batches = protected("full weights", model=model)
    attention = next(module for module in model.modules() if isinstance(getattr(module, "processor", None),
                     BarrierAttnProcessor))  # fmt: skip
    assert list(model.state_dict()) == names
    assert inspect.signature(attention.processor.__call__) == inspect.signature(AttnProcessor2_0().__call__)
    copied = copy.deepcopy(model)
    assert not any(isinstance(one, BarrierAttnProcessor) for one in copied.attn_processors.values())
    forward(copied, batches[0])
    assert values_of(barrier) == [None] * len(barrier._loss.parts)
    barrier.remove()
    assert model.attn_processors == processors
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_copy_of_a_hooked_model_computes_nothing():
    barrier, forward, batches = protected("convolutions")
    forward(copy.deepcopy(barrier.model), batches[0])
    assert values_of(barrier) == [None] * len(barrier._loss.parts)


def test_an_exchanged_processor_moves_the_work_outside():
    barrier, forward, batches = protected("full weights")
    expected = loss_and_gradients(barrier)
    barrier.model.set_attn_processor(AttnProcessor2_0())
    forward(barrier.model, batches[0])
    assert values_of(barrier) == [None] * len(barrier._loss.parts)
    assert_equal(loss_and_gradients(barrier), expected)
    barrier.remove()
    assert all(type(one) is AttnProcessor2_0 for one in barrier.model.attn_processors.values())


def test_a_region_is_held_once():
    barrier, _, _ = protected("full weights")
    held = {group.region.residual.data_ptr() for group in barrier.groups}
    stacked = [inputs.covariance_GDD for part in barrier._loss.parts for inputs, _ in part.loss._inputs]
    assert {covariance_GDD.data_ptr() for covariance_GDD in stacked if covariance_GDD is not None} <= held


def test_it_is_kept_with_the_barrier(tmp_path):
    barrier, forward, batches = protected("full weights")
    barrier.save_pretrained(tmp_path)
    expected = loss_and_gradients(barrier)
    barrier.remove()
    again = Barrier.from_pretrained(tmp_path, barrier.model)
    forward(again.model, batches[0])
    assert None not in values_of(again)
    assert_equal(loss_and_gradients(again), expected)


def test_weights_that_are_not_whole_are_refused():
    barrier, _, _ = protected("convolutions")
    barrier.model.plain.weight = nn.Parameter(barrier.model.plain.weight.detach().flatten())  # as FSDP 1 leaves it
    with pytest.raises(RuntimeError, match="the weights of plain are shared out .* after the step's forward pass"):
        barrier.compute_protection_loss()


def test_it_is_an_option_of_the_penalty():
    with pytest.raises(ValueError, match="loss_inside"):
        BarrierConfig(targets=["fc"], constraint="projection", loss_inside=True)


def test_a_run_ends_with_the_same_weights(tmp_path):
    """With accumulation and gradient checkpointing."""
    build("sd").save_pretrained(tmp_path / "base")
    weights = []
    for inside in ("false", "true"):
        folder = tmp_path / inside
        options = {"barrier.loss_inside": inside, "gradient_accumulation_steps": 2, "gradient_checkpointing": "true"}
        run_tiny(tmp_path / "base", folder, max_train_steps=3, **options)
        weights.append(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    assert list(weights[0]) == list(weights[1])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
