"""Objectives against the formulas of METHOD.md section 5."""

import pytest
import torch

from barrier_diffusers.objectives import OBJECTIVES, DiffusionStep, get_objective, register


@pytest.fixture
def step():
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 4)
    calls = []

    def predict(noisy, timesteps, condition):
        calls.append((noisy, timesteps, torch.is_grad_enabled()))
        return noisy * linear(condition["encoder_hidden_states"].mean(1))[:, :, None, None]

    tensors = [torch.randn(2, 4, 5, 5), torch.tensor([3, 9]), torch.randn(2, 4, 5, 5)]
    conditions = [{"encoder_hidden_states": value} for value in torch.randn(2, 2, 6, 3)]
    return DiffusionStep(predict, *tensors, *conditions), linear, calls


def test_ga_is_minus_the_ordinary_loss(step):
    step, _, _ = step
    expected = -((step.prediction() - step.target) ** 2).mean()
    torch.testing.assert_close(get_objective("ga").loss(step), expected)


def test_rl_compares_with_the_anchor_without_its_graph(step):
    step, linear, calls = step
    loss = get_objective("rl").loss(step)
    (noisy_a, times_a, grad_a), (noisy_b, times_b, grad_b) = calls
    assert noisy_a is noisy_b is step.noisy and times_a is times_b
    assert (grad_a, grad_b) == (False, True)
    own = step.predict(step.noisy, step.timesteps, step.condition)
    anchored = step.predict(step.noisy, step.timesteps, step.anchor)
    torch.testing.assert_close(loss, ((own - anchored.detach()) ** 2).mean())
    expected = torch.autograd.grad(((own - anchored.detach()) ** 2).mean(), linear.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, linear.weight)[0], expected)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown objective 'gradient'; known are concept, esd, ga, kl, rl, uce"):
        get_objective("gradient")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'ga' is registered already"):
        register("ga")(lambda step: step.target.sum())
    assert OBJECTIVES["rl"].needs_anchor and not OBJECTIVES["ga"].needs_anchor
