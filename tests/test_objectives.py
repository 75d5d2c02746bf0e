"""Objectives against the formulas of docs/method.md section 5, the registry, and objectives of the user's own."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from barrier_diffusers.objectives import (
    OBJECTIVES,
    DiffusionStep,
    ObjectiveConfig,
    get_objective,
    load_module,
    register,
)
from barrier_diffusers.objectives.base import Objective

ROOT = Path(__file__).resolve().parent.parent


class Recorded:
    """A network linear in the prompt that notes how it was called."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(3, 4)
        self.calls = []

    def __call__(self, noisy, timesteps, condition):
        self.calls.append((noisy, timesteps, torch.is_grad_enabled()))
        return noisy * self.linear(condition["encoder_hidden_states"].mean(1))[:, :, None, None]


@pytest.fixture
def network():
    return Recorded(0)


@pytest.fixture
def step(network):
    torch.manual_seed(1)
    tensors = [torch.randn(2, 4, 5, 5), torch.tensor([3, 9]), torch.randn(2, 4, 5, 5)]
    conditions = [{"encoder_hidden_states": value} for value in torch.randn(3, 2, 6, 3)]
    frozen = Recorded(2)

    @torch.no_grad()
    def reference(*inputs):
        return frozen(*inputs)

    return DiffusionStep(network, *tensors, *conditions, reference=reference)


def test_ga_is_minus_the_ordinary_loss(step):
    expected = -((step.prediction() - step.target) ** 2).mean()
    torch.testing.assert_close(get_objective("ga").loss(step), expected)


@pytest.mark.parametrize("name", ["rl", "concept"])
def test_rl_compares_with_the_anchor_without_its_graph(name, step, network):
    loss = get_objective(name).loss(step)
    (noisy_a, times_a, grad_a), (noisy_b, times_b, grad_b) = network.calls
    assert noisy_a is noisy_b is step.noisy and times_a is times_b
    assert (grad_a, grad_b) == (False, True)
    own = step.predict(step.noisy, step.timesteps, step.condition)
    anchored = step.predict(step.noisy, step.timesteps, step.anchor)
    expected = ((own - anchored.detach()) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, network.linear.weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_kl_against_its_definition(step, network):
    step = replace(step, options=ObjectiveConfig(name="kl", temperature=0.3))
    loss = get_objective("kl").loss(step)
    prediction = step.prediction().double().flatten(1) / 0.3
    frozen = step.reference_prediction(step.condition).double().flatten(1) / 0.3
    p, q = frozen.softmax(1), prediction.softmax(1)
    torch.testing.assert_close(loss.double(), -(p * (p.log() - q.log())).sum(1).mean(), rtol=1e-4, atol=1e-6)
    assert loss.item() < 0 and torch.autograd.grad(loss, network.linear.weight)[0].abs().max() > 0


def test_kl_is_zero_where_both_networks_agree(step, network):
    step = replace(step, reference=network)
    assert get_objective("kl").loss(step).item() == pytest.approx(0, abs=1e-6)


def test_esd_turns_the_frozen_guidance_round(step, network):
    step = replace(step, target=None, options=ObjectiveConfig(name="esd", eta=1.7))
    loss = get_objective("esd").loss(step)
    assert len(network.calls) == 1 and network.calls[0][2]  # the frozen model makes the target
    empty, prompted = (step.reference_prediction(c) for c in (step.unconditional, step.condition))
    torch.testing.assert_close(loss, ((step.prediction() - (empty - 1.7 * (prompted - empty))) ** 2).mean())
    with pytest.raises(ValueError, match="no noise to predict"):
        step.ordinary_loss()


def test_the_frozen_model_has_to_be_asked_for(step):
    with pytest.raises(ValueError, match="register it with needs"):
        replace(step, reference=None).reference_prediction(step.condition)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown objective 'gradient'; known are concept, esd, ga, kl, rl, uce"):
        get_objective("gradient")


def test_registry():
    with pytest.raises(ValueError, match="'ga' is registered already"):
        register("ga")(lambda step: step.target.sum())
    assert OBJECTIVES["rl"].needs_anchor and not OBJECTIVES["ga"].needs_anchor
    assert OBJECTIVES["esd"].own_samples and OBJECTIVES["esd"].needs_unconditional
    for wrong in ({"needs": ("images",)}, {"reads": ("momentum",)}):
        with pytest.raises(ValueError, match="objective 'mine' asks for (images|momentum)"):
            Objective("mine", loss=lambda step: step.target.sum(), **wrong)
    with pytest.raises(ValueError, match="needs a loss or an edit, and not both"):
        Objective("mine")


def test_a_loss_must_be_a_scalar_with_gradient(step):
    for value, found in {"vector": "a tensor of shape", "constant": "without gradient", "number": "float"}.items():
        losses = {"vector": step.prediction().mean(1), "constant": step.target.mean(), "number": 1.0}
        with pytest.raises(ValueError, match=f"'mine' must return a scalar tensor with gradient, not .*{found}"):
            Objective("mine", loss=lambda _, v=losses[value]: v).loss_of(step)
    assert get_objective("ga").loss_of(step).requires_grad


def test_a_prompt_that_was_not_asked_for(step):
    with pytest.raises(ValueError, match="the step has no such prompt"):
        get_objective("rl").loss(replace(step, anchor=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ga", "anchor": "boot"}, "'ga' does not read objective.anchor"),
        ({"name": "rl", "temperature": 0.5}, "'rl' does not read objective.temperature"),
        ({"name": "uce", "alpha": 1.0}, "'uce' does not read objective.alpha"),
        ({"name": "concept"}, "'concept' steers the concept to one anchor"),
    ],
)
def test_a_setting_that_nothing_reads_is_an_error(settings, message):
    options = ObjectiveConfig(**settings)
    with pytest.raises(ValueError, match=message):
        get_objective(options.name).check(options)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"alpha": -1}, {"num_inference_steps": 0}, {"ridge": 0}])
def test_ranges(settings):
    with pytest.raises(ValueError, match=f"objective.{next(iter(settings))} is"):
        ObjectiveConfig(**settings)


@pytest.fixture
def example(tmp_path):
    """The file of docs/add_an_objective.md."""
    (code, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add_an_objective.md").read_text(), re.S)
    assert len(code.splitlines()) <= 30
    path = tmp_path / "stopgrad_repel.py"
    path.write_text(code)
    return path


def test_documented_example(example, step):
    load_module(str(example))
    load_module(str(example))  # a second time changes nothing
    loss = get_objective("repel").loss(step)
    assert loss.item() > 0 and loss.requires_grad


def test_module_that_failed_leaves_no_entry(tmp_path, example):
    example.write_text(example.read_text() + "\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="ZeroDivisionError"):
            load_module(str(example))
    assert "repel" not in OBJECTIVES


def test_module_that_cannot_be_run(tmp_path):
    (tmp_path / "wrong.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    for name, message in {
        str(tmp_path / "none.py"): "does not exist",
        str(tmp_path / "wrong.py"): "no_such_module_anywhere",
        str(tmp_path / "failing.py"): "it failed \\(ZeroDivisionError",
        "no_such_package.objective": "an importable module is needed",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_module(name)
