"""How many operators the protection launches: what a GPU pays for, counted on the CPU.

The tiny UNet has the maps and inputs of Stable Diffusion 1.4 (96 and 33), but two widths instead of three, hence fewer
shapes; the slow tests count on the true widths.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import loss as benchmark
from measure import OperatorCount, count_operators
from models import TARGETS, build_unet, forward, make_batches, reduced_dim_of

from barrier_diffusers import Barrier, BarrierConfig


def protected(name, targets, rank=0, **options):
    """A barrier on the attentions of a UNet, away from its snapshot."""
    device = torch.device("cpu")
    unet, attentions = benchmark.attentions_of(name, device)
    if rank:
        names = [path for path, _ in unet.named_modules() if path.endswith(tuple(TARGETS[targets]))]
        benchmark.add_lora(unet, names, rank)
    barrier = Barrier(unet, BarrierConfig(targets=TARGETS[targets], reduced_dim=reduced_dim_of(name), **options))
    inputs = benchmark.make_inputs(attentions, name, 1, device)
    few = benchmark.make_inputs(attentions, name, 1, device)
    few["hidden"] = {path: rows[:, : max(2, rows.shape[1] // 8)] for path, rows in few["hidden"].items()}
    barrier.setup_protection(
        [inputs], benchmark.run_attentions(attentions), [few] if barrier.config.needs_retain_data else None
    )
    benchmark.disturb(barrier, 1e-3)
    return barrier


def loss_and_gradients(barrier):
    for parameter in barrier.trainable_parameters():
        parameter.grad = None
    barrier.compute_protection_loss().backward()


CASES = [("attn2", 0, 120), ("all", 0, 160), ("all", 16, 160), ("attn2", 16, 120)]


@pytest.mark.parametrize(("targets", "rank", "most"), CASES)
@pytest.mark.parametrize("name", ["tiny", pytest.param("sd14", marks=pytest.mark.slow)])
def test_operators_of_the_loss(name, targets, rank, most):
    barrier = protected(name, targets, min(rank, 4) if name == "tiny" else rank)
    first = count_operators(lambda: loss_and_gradients(barrier))
    assert first <= most
    assert len(barrier.maps) == (96 if targets == "all" else 48)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in barrier.trainable_parameters())
    assert count_operators(lambda: loss_and_gradients(barrier)) <= first  # nothing more in later steps


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_operators_do_not_depend_on_the_number_of_maps(rank):
    """Nor is any of them one of ours: each is torch's."""
    barrier = protected("tiny", "all", rank)
    with OperatorCount() as count:
        loss_and_gradients(barrier)
    assert count.total < 2 * len(barrier.maps)
    assert all(name.startswith("aten.") for name in count.counts)


@pytest.mark.parametrize(("rank", "constraint"), [(0, "projection"), (4, "projection"), (0, "both")])
@pytest.mark.parametrize("name", ["tiny", pytest.param("sd14", marks=pytest.mark.slow)])
def test_operators_of_projecting(name, rank, constraint):
    barrier = protected(name, "all", rank, constraint=constraint, projection_energy=0.9)
    barrier.project()  # the first one stacks the bases
    assert 0 < count_operators(barrier.project) <= 40
    ranks = {group.projection.rank for group in barrier.projected}
    assert len(ranks) > 1 and len(barrier.projected) == 33


def test_no_operator_waits_for_the_device():
    """None reads a value on the host."""
    barrier = protected("tiny", "all", constraint="both", projection_energy=0.9)
    with OperatorCount() as count:
        loss_and_gradients(barrier)
        barrier.project()
    waiting = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero", "aten.equal")
    assert not [name for name in count.counts if name.startswith(waiting)]


@pytest.mark.parametrize("side", [8, 32])  # few rows, which wait until there are more; many rows
def test_operators_of_recording_a_batch(side):
    """Per distinct input, beside those of the network's own forward passes."""
    unet = build_unet("tiny")

    def launched(num_batches):
        batches = make_batches("tiny", num_batches, 2, side)
        barrier = Barrier(unet, BarrierConfig(targets=TARGETS["all"], reduced_dim=4))
        total = count_operators(lambda: barrier.setup_protection(batches, forward))
        assert len(barrier.groups) == 33
        return total - count_operators(lambda: [forward(unet, batch) for batch in [*batches, *batches]])

    each = (launched(8) - launched(2)) / (6 * 2 * 33)  # of one batch in one of the two passes
    assert 3 < each <= 10
