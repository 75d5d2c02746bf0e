"""Robust training against its definitions (docs/method.md section 8), each computed in the plainest way."""

import json
import shutil
from dataclasses import replace

import pipelines
import pytest
import torch
import torch.nn.functional as F
from ddpm_models import Place
from peft import LoraConfig
from robust_models import Toy
from short_runs import run_tiny
from torch.utils.data import default_collate

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.objectives import ObjectiveConfig, get_objective
from barrier_diffusers.training.relearner import Adam, AddedAdapter, Relearner, adapted_maps, one_of, seeded
from barrier_diffusers.training.robust import RobustTerms
from barrier_diffusers.training.robust_config import RobustConfig
from barrier_diffusers.utils.command_line import config_from
from barrier_diffusers.workflow.settings import UnlearnConfig, chosen_objective

META = {"robust.meta_steps": "[1,3]", "robust.meta_learning_rates": "[1e-3,1e-2]", "robust.meta_num_images": 3}
ROBUST = {**META, "objective.retain_target": "base", "objective.anchor_target": "base", "trained_weights": "all"}


def test_adam_is_torchs():
    torch.manual_seed(0)
    ours = [torch.randn(3, 2), torch.randn(4)]
    theirs = [value.clone().requires_grad_() for value in ours]
    optimizer, adam = torch.optim.Adam(theirs, lr=0.03), Adam(ours, 0.03)
    for _ in range(4):
        gradients = [torch.randn_like(value) for value in ours]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        adam.step(gradients)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-6, atol=1e-7)


def plainly_relearned(toy, config, number):
    """A copy of the network after the number-th relearning of all weights, by torch's own Adam."""
    generator, network = seeded(7, "relearner", number), toy.copy()
    num_steps = one_of(config.meta_steps, generator)
    one_of(["trained"], generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=one_of(config.meta_learning_rates, generator))
    rows = torch.randperm(len(toy.rows), generator=generator)[: config.meta_num_images]
    batch = default_collate([toy.rows[int(row)] for row in rows])
    for _ in range(num_steps):
        drawn = toy.denoiser.noised(batch["moments"], generator)
        loss = F.mse_loss(network(drawn.noisy, drawn.timesteps, **batch["condition"]).sample, drawn.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def relearner(toy, config):
    return Relearner(config, toy.denoiser, toy.network, parameters=toy.parameters, images=toy.rows, seed=7)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_gradient_after_relearning_is_added_to_the_one_before(number):
    toy = Toy(anchor_target="base")
    config = RobustConfig(meta_steps=[1, 2, 4], meta_learning_rates=[1e-3, 1e-2], meta_num_images=3, meta_weight=0.5)
    before = [value.detach().clone() for value in toy.parameters]
    terms = RobustTerms(config, get_objective("rl"), relearner(toy, config))
    made = toy.step()
    parts = terms(made, step=0, number=number)
    assert all(torch.equal(now, then) for now, then in zip(toy.parameters, before, strict=True))
    sum(parts.values()).backward()

    with torch.no_grad():
        target = toy.network(
            made.noisy, made.timesteps, **made.anchor
        ).sample  # the frozen network is the same one yet
    moved, plain = plainly_relearned(toy, config, number), toy.copy()
    losses = [F.mse_loss(one(made.noisy, made.timesteps, **made.condition).sample, target) for one in (plain, moved)]
    torch.testing.assert_close(parts["objective"], losses[0])
    torch.testing.assert_close(parts["meta"], 0.5 * losses[1], rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(loss, one.parameters()) for loss, one in zip(losses, (plain, moved), strict=True)]
    largest = max(value.abs().max() for value in gradients[1])
    for parameter, first, second in zip(toy.parameters, *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, first + 0.5 * second, rtol=1e-3, atol=1e-4 * float(largest))


def test_no_relearner_in_the_steps_between():
    toy = Toy(anchor_target="base")
    config = RobustConfig(meta_steps=[1], meta_every=2)
    terms = RobustTerms(config, get_objective("rl"), relearner(toy, config))
    assert [list(terms(toy.step(), step, step)) for step in range(3)] == [
        ["objective", "meta"],
        ["objective"],
        ["objective", "meta"],
    ]


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["Conv2d", "Linear"]])
def test_an_added_adapter_is_pefts(targets):
    toy = Toy()
    added = AddedAdapter(adapted_maps(toy.network, targets), 2, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        for factor in added.up:
            factor.normal_(std=0.1)
    other = toy.copy()
    names = [linear_map.name for linear_map in added.maps]
    other.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names))
    for name, down, up in zip(names, added.down, added.up, strict=True):
        layer = other.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down.detach(), up.detach()
    made = toy.step()
    plain = made.prediction()
    with added.on():
        adapted = made.prediction()
        with added.off():
            torch.testing.assert_close(made.prediction(), plain, rtol=0, atol=0)
    torch.testing.assert_close(adapted, other(made.noisy, made.timesteps, **made.condition).sample)
    torch.testing.assert_close(made.prediction(), plain, rtol=0, atol=0)
    assert (adapted - plain).abs().max() > 1e-3


def test_an_adapters_relearning_moves_no_weight_and_the_frozen_network_goes_without_it():
    toy = Toy(anchor_target="base")
    config = RobustConfig(meta_steps=[3], meta_weights="adapter", meta_adapter_learning_rates=[0.05])
    them = relearner(toy, config)
    made = toy.step()
    target = made.reference_prediction(made.anchor)
    merged = toy.copy()
    with them.relearned(0):
        there = made.prediction()
        loss = F.mse_loss(there, target)
        for linear_map, down, up in zip(them.maps, them._adapter.down, them._adapter.up, strict=True):
            merged.get_submodule(linear_map.name).weight.data += up @ down
        expected = torch.autograd.grad(loss, toy.parameters)
    assert not any(module._forward_hooks for module in toy.network.modules())
    torch.testing.assert_close(there, merged(made.noisy, made.timesteps, **made.condition).sample)
    parts = RobustTerms(config, get_objective("rl"), them)(made, step=0, number=0)
    torch.testing.assert_close(parts["meta"], loss)
    assert parts["meta"] != parts["objective"]
    found = torch.autograd.grad(parts["meta"], toy.parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_distilled_retention_and_the_frozen_anchor():
    toy = Toy(anchor_target="base")
    base = toy.copy()
    with torch.no_grad():
        for parameter in toy.parameters:
            parameter.add_(0.01 * torch.randn_like(parameter))
    made = toy.step()
    own, anchor = (
        base(made.noisy, made.timesteps, **condition).sample.detach() for condition in (made.condition, made.anchor)
    )
    now = toy.network(made.noisy, made.timesteps, **made.condition).sample
    torch.testing.assert_close(made.distilled_loss(), F.mse_loss(now, own))
    objective = get_objective("rl")
    torch.testing.assert_close(objective.loss_of(made), F.mse_loss(now, anchor))
    drifting = replace(made, options=ObjectiveConfig())
    torch.testing.assert_close(
        objective.loss_of(drifting), F.mse_loss(now, toy.network(made.noisy, made.timesteps, **made.anchor).sample)
    )


def batches(toy):
    made = [toy.step(range(6)), toy.step(range(6, 12))]
    return [(one.noisy, one.timesteps, one.condition) for one in made]


def forward(network, batch):
    return network(batch[0], batch[1], **batch[2]).sample


def test_all_weights_train_while_the_targets_are_protected(tmp_path):
    toy = Toy()
    before = toy.copy()
    config = BarrierConfig(targets=["attn2.to_k"], reduced_dim=2)
    barrier = Barrier(toy.network, config, trained_weights="all")
    assert set(barrier.trainable_parameters()) == set(toy.parameters)
    barrier.setup_protection(batches(toy), forward)
    assert all(parameter.requires_grad for parameter in toy.parameters)
    with torch.no_grad():
        for parameter in toy.parameters:
            parameter.add_(0.05)
    batch = batches(toy)[0]
    trained = forward(toy.network, batch)
    barrier.save_pretrained(tmp_path)
    for one in (barrier, Barrier.from_pretrained(tmp_path, toy.network, "all")):
        with one.snapshot_weights():
            torch.testing.assert_close(forward(toy.network, batch), forward(before, batch), rtol=0, atol=0)
        torch.testing.assert_close(forward(toy.network, batch), trained, rtol=0, atol=0)
    barrier.remove()
    targets_alone = Barrier(pipelines.build("sd").unet, config)
    targets_alone.setup_protection(batches(toy), forward)
    targets_alone.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="it was made while the targets trained"):
        Barrier.from_pretrained(tmp_path / "other", toy.network, "all")


def test_a_projection_holds_the_biases_of_its_maps():
    toy = Toy()
    barrier = Barrier(toy.network, BarrierConfig(targets=["Linear"], constraint="projection"), trained_weights="all")
    held = {id(one.bias) for one in barrier.maps if one.bias is not None}
    assert {id(one) for one in barrier.trainable_parameters()} == {id(one) for one in toy.parameters} - held


CONTRADICTIONS = {
    "a distillation of nothing": ({"objective": {"retain_target": "base"}}, "objective.alpha is 0"),
    "all weights and an adapter": ({"trained_weights": "all", "rank": 2}, "set rank to 0"),
    "a mask": ({"saliency_mask": 0.5, "robust": {"meta_steps": [1]}}, "would hold the attackers of robust.meta_steps"),
    "a compiled network": (
        {"compile": True, "robust": {"meta_steps": [1], "meta_weights": "adapter"}},
        "set robust.meta_weights to trained",
    ),
    "no rate": ({"robust": {"meta_learning_rates": []}}, "robust.meta_learning_rates is empty"),
    "no step": ({"robust": {"meta_steps": [0]}}, "robust.meta_steps is 0, but must be at least 1"),
    "no training": (
        {
            "objective": {"name": "uce", "anchor_prompt": "a sneaker"},
            "barrier": {"lambda_interval": 0},
            "robust": {"meta_steps": [1]},
        },
        "leave robust.meta_steps at its default",
    ),
    "a setting of another objective": (
        {"objective": {"name": "ga", "anchor_target": "base"}},
        "does not read objective.anchor_target",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_in_one_message(name, tmp_path):
    changes, message = CONTRADICTIONS[name]
    values = {"pretrained_model_name_or_path": "assets/fashion_sd", "concept": "boot", "retain_prompts": ["a sneaker"]}
    with pytest.raises(ValueError) as caught:
        chosen_objective(config_from(UnlearnConfig, {**values, "output_dir": str(tmp_path / "run"), **changes}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    pipelines.build("sd").save_pretrained(folder)
    return folder


def test_a_resumed_run_ends_with_the_same_bits(source, tmp_path):
    settings = {**ROBUST, "barrier.targets": "[Linear]", "max_train_steps": 4, "checkpointing_steps": 2}
    settings |= {"cache_dir": tmp_path / "cache", "gradient_accumulation_steps": 2}
    whole = run_tiny(source, tmp_path / "whole", **settings)
    assert set(whole["history"]) == {"objective", "retain", "protection", "meta"} and min(whole["history"]["meta"]) > 0
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "half" / "checkpoints")
    half = run_tiny(source, tmp_path / "half", resume_from_checkpoint="step-2", **settings)
    assert half["hashes"] == whole["hashes"] and half["history"] == whole["history"]


@pytest.mark.parametrize("name", ["ga", "kl", "esd", "concept"])
@pytest.mark.parametrize("rank", [0, 2])
def test_every_objective_with_weights_and_with_an_adapter(name, rank, source, tmp_path):
    settings = {**META, "objective.name": name, "rank": rank, "objective.anchor": "null", "objective.alpha": 1.0}
    settings |= {"objective.retain_target": "base", "robust.meta_weights": "either", "cache_dir": tmp_path / "cache"}
    if name == "concept":
        settings |= {"objective.anchor": "sneaker", "objective.anchor_target": "base"}
    if name == "esd":
        settings |= {"objective.num_inference_steps": 2}
    history = run_tiny(source, tmp_path / "run", max_train_steps=3, **settings)["history"]
    assert all(abs(value) > 0 for value in history["meta"]) and history["retain"][0] < history["retain"][-1]


def test_the_label_model_trains_so_too(tmp_path):
    place = Place(tmp_path)
    settings = {**ROBUST, "objective.alpha": 1.0, "barrier.targets": "[Linear,Conv2d]", "learning_rate": 1e-2}
    metrics, _ = place.unlearn(tmp_path / "run", **settings)
    assert metrics["num_trainable"] == metrics["num_parameters"]
    assert min(json.loads((tmp_path / "run" / "manifest.json").read_text())["history"]["meta"]) > 0
