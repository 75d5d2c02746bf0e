"""Objectives against the formulas of docs/method.md section 5, the registry, and objectives of the user's own."""

import re
from argparse import ArgumentError
from dataclasses import asdict, make_dataclass, replace
from pathlib import Path

import pytest
import torch

from barrier_diffusers.objectives import (
    OBJECTIVES,
    DiffusionStep,
    ObjectiveConfig,
    get_objective,
    load_module,
    load_objective,
    register_objective,
)
from barrier_diffusers.objectives.base import Objective
from barrier_diffusers.utils.command_line import config_from, parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig

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
    assert get_objective("kl").loss_of(step).item() == pytest.approx(0, abs=1e-6)


def test_esd_turns_the_frozen_guidance_round(step, network):
    step = replace(step, target=None, options=ObjectiveConfig(name="esd", eta=1.7))
    loss = get_objective("esd").loss(step)
    assert len(network.calls) == 1 and network.calls[0][2]  # the frozen model makes the target
    empty, prompted = (step.reference_prediction(c) for c in (step.unconditional, step.condition))
    torch.testing.assert_close(loss, ((step.prediction() - (empty - 1.7 * (prompted - empty))) ** 2).mean())
    with pytest.raises(ValueError, match="no noise to predict"):
        step.ordinary_loss()


@pytest.mark.parametrize(
    "options", [{"name": "rl", "anchor_target": "base", "anchor_eta": 0.5}, {"name": "esd"}, {"name": "kl"}]
)
def test_what_is_forgotten_is_what_the_frozen_model_knows_by_the_concepts_own_name(options, step):
    def told(condition):  # which prompts the frozen model reads
        asked = []
        watched = replace(step, reference=lambda *given: asked.append(given[2]) or step.reference(*given))
        get_objective(options["name"]).loss_of(replace(watched, options=ObjectiveConfig(**options), **condition))
        return asked

    learned = {"encoder_hidden_states": torch.randn(2, 6, 3)}
    plainly = told({})
    assert any(one is step.condition for one in plainly)
    asked = told({"condition": learned, "named": step.condition})
    assert len(asked) == len(plainly) and all(one is other for one, other in zip(asked, plainly, strict=True))


def test_the_frozen_model_has_to_be_asked_for(step):
    with pytest.raises(ValueError, match="register it with needs"):
        replace(step, reference=None).reference_prediction(step.condition)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown objective 'gradient'; known are concept, esd, ga, kl, rl, uce"):
        get_objective("gradient")


def test_registry():
    with pytest.raises(ValueError, match="'ga' is registered already"):
        register_objective("ga")(lambda step: step.target.sum())
    assert OBJECTIVES["rl"].needs_anchor and not OBJECTIVES["ga"].needs_anchor
    assert OBJECTIVES["esd"].samples_from_model and OBJECTIVES["esd"].needs_unconditional
    with pytest.raises(ValueError, match="objective 'mine' asks for images; needs are anchor, "):
        Objective("mine", loss=lambda step: step.target.sum(), needs=("images",))
    for settings in (dict, make_dataclass("Settings", [("momentum", float)])):
        with pytest.raises(ValueError, match="settings of objective 'mine' must be a dataclass whose fields have def"):
            Objective("mine", loss=lambda step: step.target.sum(), settings=settings)
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
    path = tmp_path / "repel.py"
    path.write_text(code)
    return path


def test_documented_example(example, step):
    load_module(str(example))
    load_module(str(example))  # a second time changes nothing
    loss = get_objective("repel").loss_of(step)
    assert loss.item() > 0 and loss.requires_grad


UNLEARN = {"concept": "sneaker", "pretrained_model_name_or_path": "base", "output_dir": "run"}


def test_an_objective_brings_settings_of_its_own(example, tmp_path, step):
    flags = [f"--{name}={value}" for name, value in UNLEARN.items()]
    (tmp_path / "repel.yaml").write_text(f"objective: {{module: {example}, name: repel, margin: 50, anchor: boot}}\n")
    told = {
        "flags": [f"--objective.module={example}", "--objective.name", "repel", "--objective.margin", "50"],
        "a file": [f"--config={tmp_path / 'repel.yaml'}"],
        "a file and a flag": ["--config", str(tmp_path / "repel.yaml"), "--objective.margin=50"],
        "one mapping": ["--objective", f"{{module: {example}, name: repel, margin: 50}}"],
    }
    for how, words in told.items():
        config = parse_config(UnlearnConfig, [*flags, *words])
        assert config.objective.margin == 50 and isinstance(config, UnlearnConfig), how
        assert asdict(config)["objective"]["margin"] == 50
    section = {"module": str(example), "name": "repel", "margin": 50}
    options = config_from(UnlearnConfig, {**UNLEARN, "objective": section}).objective
    objective = load_objective(options)
    wide, narrow = (objective.loss_of(replace(step, options=value)).item() for value in (options, None))
    distance = (step.prediction() - step.reference_prediction(step.condition)).square().flatten(1).mean(1)
    expected = (50 - distance).relu().mean() - (0.05 - distance).relu().mean()  # without options the default, 0.05
    assert wide - narrow == pytest.approx(expected.item(), rel=1e-5)
    assert load_objective(ObjectiveConfig(name="repel", module=str(example))) is objective  # without the own fields


OWN = """from __future__ import annotations
from dataclasses import dataclass, field
from typing import Literal
from barrier_diffusers import register_objective

@dataclass
class Own:
    kind: Literal["soft", "hard"] = "soft"
    words: list[str] = field(default_factory=list)
    eta: float = 3.0  # as esd has one, with another default

    def __post_init__(self):
        if self.eta < 0:
            raise ValueError("objective.eta is below 0")

@dataclass
class Greedy:
    alpha: float = 1.0

register_objective("own", settings=Own)(lambda step: step.ordinary_loss())
register_objective("greedy", settings=Greedy)(lambda step: step.ordinary_loss())
"""


def test_what_an_own_setting_may_be(tmp_path):
    words = [f"--{name}={value}" for name, value in UNLEARN.items()]
    (tmp_path / "own.py").write_text(OWN)
    words += [f"--objective.module={tmp_path / 'own.py'}"]
    options = parse_config(UnlearnConfig, [*words, "--objective.name=own", "--objective.words", "a", "b"]).objective
    assert (options.kind, options.words, options.eta, options.temperature) == ("soft", ["a", "b"], 3.0, 0.1)
    for flags, message in {
        ("--objective.name=own", "--objective.kind=loud"): "kind",
        ("--objective.name=own", "--objective.eta=-1"): "objective.eta is below 0",
        ("--objective.name=rl", "--objective.kind=hard"): "kind",  # not the chosen one's
        ("--objective.name=greedy",): "declares alpha, which all objectives share",
    }.items():
        with pytest.raises((ValueError, ArgumentError), match=message):
            parse_config(UnlearnConfig, [*words, *flags])
    unread = parse_config(UnlearnConfig, [*words, "--objective.name=own", "--objective.temperature=1"]).objective
    with pytest.raises(ValueError, match="'own' does not read objective.temperature"):
        load_objective(unread)


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
