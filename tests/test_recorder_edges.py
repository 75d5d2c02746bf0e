"""Recording under in-place operations, autocast, inference mode, copies and shuffled loaders."""

import copy

import pytest
import torch
from conftest import image_batches, run_net, run_unet, unet_batches
from torch import nn
from torch.utils.data import DataLoader

from barrier_diffusers.protection.recorder import (
    BarrierAttnProcessor,
    InputRecorder,
    record_inputs,
    wrapped_processors,
)
from barrier_diffusers.protection.targets import resolve_targets

QKV = ["to_q", "to_k", "to_v"]


def record(model, targets, batches, forward, **options):
    rows = {}
    maps = resolve_targets(model, targets)

    def keep(name, x):
        rows.setdefault(name, []).append(x.clone())

    leaders = record_inputs(model, maps, batches, forward, keep, **options)
    return leaders, {name: torch.cat(parts) for name, parts in rows.items()}


class InPlace(nn.Module):
    """One tensor object that holds something else when the second map reads it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = x.clone()
        return self.one(x) + self.two(x.relu_()) + self.three(x)


def test_a_tensor_changed_in_place_is_not_shared():
    leaders, rows = record(InPlace(), ["Linear"], [torch.randn(8, 4)], run_net)
    assert leaders == {"one": "one", "two": "two", "three": "two"}
    assert rows["one"].min() < 0 and rows["two"].min() >= 0


def test_inference_mode_records_the_same(unet):
    def inference(model, batch):
        with torch.inference_mode():
            return run_unet(model, batch)

    leaders, rows = record(unet, QKV, unet_batches(), run_unet)
    alone, others = record(unet, QKV, unet_batches(), inference)  # no versions to tell changes by: shared less
    assert len(others) > len(rows)
    assert all(torch.equal(others[leader], rows[leaders[name]]) for name, leader in alone.items())
    again, shared = record(unet, QKV, unet_batches(), inference, leader_of=leaders)
    assert again == leaders and all(torch.equal(shared[name], rows[name]) for name in rows)
    assert record(unet, QKV, unet_batches(), run_unet, leader_of=alone)[0] == alone


def test_what_accumulates_is_out_of_autocast_and_inference_mode(unet):
    squares = []

    def accumulate(name, rows):
        assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        squares.append(rows.float().flatten(0, 1).T @ rows.float().flatten(0, 1))
        assert squares[-1].dtype == torch.float32 and not squares[-1].is_inference()

    def inference(model, batch):
        with torch.inference_mode():
            run_unet(model, batch)

    maps = resolve_targets(unet, ["attn1.to_q"])
    with torch.autocast("cpu", torch.bfloat16):
        for forward in (run_unet, inference):
            record_inputs(unet, maps, unet_batches(1), forward, accumulate)
    assert len(squares) == 2 * len(maps)


def test_a_copy_made_while_recording_is_an_ordinary_model(unet):
    unet.eval()
    copies = []

    def forward(model, batch):
        copies.append(copy.deepcopy(model))  # as an EMA does
        return run_unet(model, batch)

    batch = unet_batches(1)[0]
    with torch.no_grad():
        expected = run_unet(unet, batch)
        record(unet, QKV, [batch], forward)
        assert not [p for p in copies[0].attn_processors.values() if isinstance(p, BarrierAttnProcessor)]
        assert torch.equal(run_unet(copies[0], batch), expected)


def test_shallow_copy_of_a_wrapper(unet):
    with wrapped_processors(unet, resolve_targets(unet, QKV), InputRecorder(lambda name, rows: None)):
        wrapper = unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
        assert copy.copy(wrapper).processor is wrapper.processor


def test_checking_a_loader_neither_reads_it_nor_draws():
    class Counting(DataLoader):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    loader = Counting(torch.cat(image_batches()), batch_size=4, shuffle=True)
    record(nn.Sequential(nn.Flatten(), nn.Linear(243, 2)), ["1"], loader, run_net)
    assert loader.passes == 1


def test_the_way_through_the_model_must_not_change_between_passes():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, shared):
            return self.one(x) + self.two(x if shared else x + 1)

    model, x = Switch(), torch.randn(3, 4)
    leaders, _ = record(model, ["Linear"], [(x, True)], lambda m, b: m(*b))
    with pytest.raises(ValueError, match="two read the input of one in an earlier batch and that of two now"):
        record(model, ["Linear"], [(x, False)], lambda m, b: m(*b), leader_of=leaders)


def test_an_attribute_called_processor_is_no_attention():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.processor, self.fc = torch.tanh, nn.Linear(4, 4)

        def forward(self, x):
            return self.processor(self.fc(x))

    assert record(Odd(), ["fc"], [torch.randn(2, 4)], run_net)[0] == {"fc": "fc"}
