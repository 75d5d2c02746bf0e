"""A compiled network trains to the same weights, is saved under the same names, and is as it was afterwards."""

import importlib.util

import pytest
import torch
from accelerate.state import AcceleratorState
from pipelines import build
from safetensors.torch import load_file
from short_runs import ROOT, flags, run, run_tiny

from barrier_diffusers.training.steps import compiled
from barrier_diffusers.training.unlearn import adamw
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig

QUICK = {"evaluation.classifier": "null", "evaluation.images_per_label": 1, "learning_rate": 1e-3}
KL = {"objective.name": "kl", "objective.anchor": "null"}


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        (
            "eager",
            {"rank": 2, "objective.name": "kl", "objective.anchor": "null"},
        ),  # a reference without a copy: two graphs
        pytest.param(
            "eager",
            {**KL, "gradient_checkpointing": "true"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_compiled_network_trains_to_the_same_weights(backend, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    weights = []
    for changes in ({}, {"compile": "true", "compile_backend": backend}):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / str(len(weights))
        run(folder, tmp_path / "cache", **QUICK, **settings, **changes)
        found = [*folder.glob("unet/*.safetensors"), *folder.glob("pytorch_lora_weights.safetensors")]
        weights.append(load_file(found[0]))
    assert list(weights[0]) == list(weights[1])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # inductor compiles C++, a network of any size for minutes
def test_inductor_trains_to_the_same_weights(tmp_path):
    build("sd").save_pretrained(tmp_path / "base")
    weights = []
    for changes in ({}, {"compile": "true", "compile_backend": "inductor"}):
        run_tiny(tmp_path / "base", tmp_path / str(len(weights)), **changes)
        weights.append(load_file(tmp_path / str(len(weights)) / "unet" / "diffusion_pytorch_model.safetensors"))
    assert list(weights[0]) == list(weights[1])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_compiled_is_as_before_afterwards():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    network, calls = Doubled(3, 2), []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    before, names = network(torch.ones(1, 3)), list(network.state_dict())
    with compiled(network, backend):
        assert torch.equal(network(torch.ones(1, 3)), before)
        assert list(network.state_dict()) == names
    assert len(calls) == 1
    network(torch.ones(7, 3))  # would be compiled anew
    assert len(calls) == 1


def test_an_unknown_backend_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="compile_backend is 'nothing', but must be one of aot_eager"):
        parse_config(UnlearnConfig, flags(tmp_path / "run", compile="true", compile_backend="nothing"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8bit_adam_without_its_package_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bitsandbytes is not installed: pip install bitsandbytes"):
        parse_config(UnlearnConfig, flags(tmp_path / "run", use_8bit_adam="true"))


def test_8bit_adam_keeps_a_byte_for_each_number():
    pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = adamw(True)([{"params": [parameter], "lr": 1e-3}], weight_decay=0.0)
    parameter.square().sum().backward()
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


def test_adamw_is_torchs_otherwise():
    assert adamw(False) is torch.optim.AdamW
