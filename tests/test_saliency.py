"""SalUn's mask: what it ranks, and that held entries never move."""

import pytest
import torch
from conftest import make_small_unet, unet_batches
from peft import LoraConfig

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.objectives import DiffusionStep
from barrier_diffusers.training.saliency import LOSS_SCALE, SaliencyMask, keep_top, saliency_scores, summed_gradients

TARGETS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]


def make(rank=0):
    unet = make_small_unet()
    if rank:
        unet.add_adapter(LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights="gaussian"))
    barrier = Barrier(unet, BarrierConfig(targets=TARGETS, reduced_dim=4))
    targets = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def steps():
        for (noisy, timesteps, condition), target in zip(unet_batches(3), targets, strict=True):
            yield DiffusionStep(lambda x, t, c: unet(x, t, c).sample, noisy, timesteps, target, condition)

    return barrier, steps


def test_keep_top_ranks_all_scores_together():
    scores = [torch.tensor([[5.0, 1.0], [0.0, 9.0]]), torch.tensor([2.0, 8.0, 7.0, 3.0])]
    first, second = keep_top(scores, 0.5)
    assert first.tolist() == [[True, False], [False, True]] and second.tolist() == [False, True, True, False]
    assert sum(int(mask.sum()) for mask in keep_top(scores, 1e-9)) == 1


def test_full_weights_are_scored_by_the_summed_gradient():
    barrier, steps = make()
    (group,) = saliency_scores(barrier.maps, barrier.trainable_parameters(), steps)
    assert [parameter for parameter, _ in group] == barrier.trainable_parameters()
    barrier.model.zero_grad()
    for step in steps():
        (step.ordinary_loss() * len(step.noisy)).backward()
    for parameter, scores in group:
        torch.testing.assert_close(scores / LOSS_SCALE, parameter.grad.abs(), rtol=1e-4, atol=1e-7)
    other_order = saliency_scores(barrier.maps, barrier.trainable_parameters(), lambda: reversed(list(steps())))
    for (_, a), (_, b) in zip(group, other_order[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_both_factors_of_an_adapter_get_scores_and_are_left_alone(half):
    barrier, steps = make(rank=2)
    before = [parameter.detach().clone() for parameter in barrier.trainable_parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):  # whose cache keeps copies of the factors
        up, down = saliency_scores(barrier.maps, barrier.trainable_parameters(), steps)
    assert {p for p, _ in up} | {p for p, _ in down} == set(barrier.trainable_parameters())
    assert all(scores.abs().max() > 0 for _, scores in (*up, *down))
    for parameter, value in zip(barrier.trainable_parameters(), before, strict=True):
        assert torch.equal(parameter, value) and parameter.grad is None


@pytest.mark.parametrize("rank", [0, 2])
def test_held_entries_never_move(rank):
    barrier, steps = make(rank)
    parameters = barrier.trainable_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    mask = SaliencyMask(parameters)
    mask.choose(saliency_scores(barrier.maps, barrier.trainable_parameters(), steps), 0.3)
    assert mask.kept_fraction == pytest.approx(0.3, abs=0.01)
    mask.attach(optimizer)

    def train(count):
        for step in list(steps()) * count:
            step.ordinary_loss().backward()
            for parameter, allowed in zip(parameters, mask.masks, strict=True):
                assert (parameter.grad[~allowed] == 0).all()
            optimizer.step()
            optimizer.zero_grad()

    train(2)
    for parameter, value, allowed in zip(parameters, before, mask.masks, strict=True):
        assert torch.equal(parameter[~allowed], value[~allowed])
        assert (parameter[allowed] == value[allowed]).sum() <= 0.1 * allowed.sum()
    state = mask.state_dict()
    resumed = SaliencyMask(parameters)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(resumed.masks, mask.masks, strict=True))


def test_a_gradient_that_is_not_finite_stops_the_run():
    barrier, steps = make()
    with torch.no_grad():
        barrier.model.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="saliency_mask"):
        summed_gradients(barrier.trainable_parameters(), steps())
