"""Two processes (gloo, CPU) do what one does on the same global batch: regions, losses; one of them writes."""

import json

import pytest
import torch
from ddpm_models import Place
from launching import launch
from safetensors.torch import load_file
from short_runs import ROOT, flags, run

COMMON = {"evaluation.classifier": "null", "evaluation.images_per_label": 1, "barrier.lambda_interval": 1.0}
COMMON |= {"evaluation.sampling.num_inference_steps": 1, "learning_rate": 1e-3}
BARE = {"objective.anchor": "null", "objective.alpha": 0}
ESD = {**BARE, "objective.name": "esd", "objective.num_inference_steps": 3, "max_forget_images": 30}
VARIANTS = {
    "full weights, retain loss": {},
    "LoRA, alpha 0": {"rank": 2, "objective.alpha": 0},
    "LoRA, accumulation and checkpointing": {
        "rank": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": "true",
    },
    "full weights, projection": {
        "barrier.constraint": "both",
        "barrier.use_actual_bounds": "true",
        "objective.alpha": 0,
    },
    "full weights, bf16": {"mixed_precision": "bf16"},
    "esd, mask of an adapter": {**ESD, "rank": 2, "saliency_mask": 0.3},
    "esd": ESD,
    "mask": {"saliency_mask": 0.3},
    "ga, mask of an adapter": {**BARE, "objective.name": "ga", "rank": 2, "saliency_mask": 0.3},
    "kl, mask": {**BARE, "objective.name": "kl", "saliency_mask": 0.3},
    "concept": {"objective.name": "concept", "objective.anchor": "null", "objective.anchor_prompt": "a boot"},
}
FAST = ("full weights, retain loss", "esd, mask of an adapter")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in VARIANTS]
)
def test_two_processes_equal_one(name, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {**COMMON, **VARIANTS[name]}
    run(tmp_path / "one", cache, train_batch_size=8, **settings)
    words = flags(tmp_path / "two", cache_dir=cache, train_batch_size=4, **settings)
    done = launch(["train_scripts/unlearn_sd.py"], words)
    folders = [tmp_path / "one", tmp_path / "two"]
    if "bf16" in name:  # batches of another size round otherwise
        require_equal(done, folders, tolerance=0.05, rel=0.1, abs=1e-3)
    else:
        require_equal(done, folders)


def test_two_processes_of_the_label_model_equal_one(tmp_path):
    place = Place(tmp_path)
    settings = {"gradient_accumulation_steps": 2, "objective.alpha": 0.5, "barrier.use_actual_bounds": "true"}
    settings |= {"evaluation.judge": "null", "barrier.lambda_interval": 1.0}
    settings |= {"trained_weights": "all", "objective.retain_target": "base", "robust.meta_steps": "[1,3]"}
    settings |= {"robust.token_rounds": 2, "robust.token_interval": 1, "robust.token_num_steps": 3}
    settings |= {"robust.project_conflicts": "true"}
    place.unlearn(tmp_path / "one", train_batch_size=4, **settings)
    words = place.unlearn_words(tmp_path / "two", train_batch_size=2, **settings)
    require_equal(launch(["-m", "ddpm_ext.unlearn"], words), [tmp_path / "one", tmp_path / "two"])


def require_equal(done, folders, tolerance=1e-5, **precise):
    """A run of one process and a run of two (`done`) have fitted the same regions and had the same losses."""
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("picture: ") == 1
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for fitted in ("barrier_regions.safetensors", "barrier_projections.safetensors"):
        if (folders[0] / fitted).is_file():
            ours, theirs = (load_file(folder / fitted) for folder in folders)
            for key, value in ours.items():
                scale = value.abs().max().item() or 1.0
                torch.testing.assert_close(theirs[key], value, rtol=0, atol=tolerance * scale, msg=key)
    one, two = (read_history(folder) for folder in folders)
    assert one["protection"][-1] > 0
    for part, values in one.items():
        assert two[part] == pytest.approx(values, **(precise or {"rel": 2e-4, "abs": 1e-7})), part


def read_history(folder):
    return json.loads((folder / "manifest.json").read_text())["history"]
