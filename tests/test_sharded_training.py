"""Whole runs of unlearn_sd.py whose weights two processes share (FSDP 2, gloo, CPU) end as those of one process."""

import json

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from short_runs import ROOT, flags, run

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # what the launcher sets unless told otherwise
}
COMMON = {"evaluation.classifier": "null", "evaluation.images_per_label": 1, "barrier.lambda_interval": 1.0}
COMMON |= {"evaluation.sampling.num_inference_steps": 1, "learning_rate": 1e-4, "max_train_steps": 5}
VARIANTS = {
    "full weights": {},
    "LoRA, projection, accumulation, checkpointing": {
        "rank": 3,
        "barrier.constraint": "both",
        "barrier.use_actual_bounds": "true",
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": "true",
        "objective.alpha": 0,
    },
    "full weights, frozen reference": {
        "objective.name": "esd",
        "objective.num_inference_steps": 2,
        "objective.anchor": "null",
    },
    "LoRA, frozen reference": {"objective.name": "kl", "rank": 2, "objective.anchor": "null"},
    "full weights, bf16": {"mixed_precision": "bf16"},
}
FAST = "full weights"


def weights_of(folder):
    found = [*folder.glob("unet/*.safetensors"), *folder.glob("pytorch_lora_weights.safetensors")]
    return load_file(found[0])


def distance(found, expected):
    """Norm of the difference relative to the norm."""
    change = sum((found[name].double() - value.double()).square().sum() for name, value in expected.items())
    return float((change / sum(value.double().square().sum() for value in expected.values())).sqrt())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == FAST else [pytest.mark.slow]) for name in VARIANTS]
)
def test_two_processes_that_share_the_weights_equal_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings, cache = {**COMMON, **VARIANTS[name]}, tmp_path / "cache"
    run(tmp_path / "one", cache, train_batch_size=8, **settings)
    settings |= {"cache_dir": cache, "train_batch_size": 4, "checkpointing_steps": 3}
    words = flags(tmp_path / "two", **settings)
    done = launch(["train_scripts/unlearn_sd.py"], words, **SHARDED)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "manifest.json").read_text())["history"] for name in ("one", "two"))
    rounding = 0.1 if "bf16" in name else 1e-5
    for part, values in one.items():
        assert two[part] == pytest.approx(values, rel=rounding * 10, abs=1e-7), part
    assert one["protection"][-1] > 0
    alike = tmp_path / "one"
    if "projection" in name:  # two processes fit another one, by 4e-5, whether or not they share weights
        alike = tmp_path / "group"
        assert launch(["train_scripts/unlearn_sd.py"], flags(alike, **settings)).returncode == 0
    first, second = weights_of(alike), weights_of(tmp_path / "two")
    assert list(first) == list(second)
    assert distance(second, first) < rounding
    checkpoint = tmp_path / "two" / "checkpoints" / "step-3"
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file()  # it was shared out
    if name == FAST:
        snapshot = [
            load_file(folder / "barrier_snapshot.safetensors") for folder in (tmp_path / "two", checkpoint / "barrier")
        ]
        assert all(map(torch.equal, snapshot[0].values(), snapshot[1].values()))
        again = launch(["train_scripts/unlearn_sd.py"], [*words, "--resume_from_checkpoint", "step-3"], **SHARDED)
        assert again.returncode == 0, again.stderr[-3000:]
        resumed = weights_of(tmp_path / "two")
        assert all(torch.equal(resumed[key], value) for key, value in second.items())
