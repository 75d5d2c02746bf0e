"""train_scripts/unlearn_sd.py on the embedded Stable Diffusion, with a few steps of everything."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from short_runs import BASE, ROOT, flags, main, run

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.workflow.settings import UnlearnConfig

GA = {"objective.name": "ga", "objective.anchor": "null"}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch, tmp_path):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Latents, embeddings and "before" images are the same for all tests of this file."""
    return tmp_path_factory.mktemp("cache")


def sample(pipeline, **settings):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompt = "a photo of a red boot"
    return pipeline(prompt, num_inference_steps=2, output_type="np", generator=generator, **settings).images


def load(folder):
    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def test_launched_as_users_launch_it(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    words = flags(tmp_path / "run", validation_prompt='["a photo of a red sneaker"]', validation_steps=2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words[words.index("--report_to") + 1] = "tensorboard"
    done = subprocess.run(
        [*command, "train_scripts/unlearn_sd.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "run"
    assert "unlearning accuracy" in done.stdout and str(output / "before_after.png") in done.stdout
    wanted = {
        "model_index.json",
        "barrier_config.json",
        "barrier_regions.safetensors",
        "metrics.json",
        "manifest.json",
    }
    wanted |= {
        "before_after.png",
        "loss_curves.png",
        "README.md",
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
    }
    assert wanted <= {path.name for path in output.iterdir()}
    assert list(output.rglob("events.out.tfevents*")) and (output / "validation" / "step-000002.png").is_file()
    metrics = json.loads((output / "metrics.json").read_text())
    for key in ("unlearning_accuracy", "retain_accuracy_before", "retain_accuracy_after", "colour_accuracy_after"):
        assert 0 <= metrics[key] <= 100
    assert metrics["num_images"] == 20 and len(metrics["per_class_after"]) == 10
    assert metrics["details"]["retain_accuracy_after"]["num_images"] == 18
    assert metrics["seeds"] == {"first": 1000, "last": 1019}
    changed = {
        name for name, value in load_file(output / "unet/diffusion_pytorch_model.safetensors").items()
        if not torch.equal(value, load(BASE).unet.state_dict()[name])
    }  # fmt: skip
    assert changed and all(".attn2.to_" in name and "to_out" not in name for name in changed)
    assert np.isfinite(sample(load(output))).all()
    card = (output / "README.md").read_text()
    assert card.startswith("---\n") and "license: mit\n" in card
    results = ModelCard.load(output / "README.md").data.eval_results
    listed = {result.metric_type: result.metric_value for result in results}
    assert listed["unlearning_accuracy"] == metrics["unlearning_accuracy"]
    assert listed["retain_accuracy_after"] == metrics["retain_accuracy_after"]
    assert "without sneaker" in card and "unlearning accuracy" in card
    assert "applies to these weights too: mit." in card


def test_lora_loads_into_the_base_pipeline_and_merges(tmp_path, shared_cache):
    output = tmp_path / "lora"
    run(output, shared_cache, rank=2, merge_adapter="true", learning_rate=0.01, **{"objective.alpha": 0})
    assert (output / "pytorch_lora_weights.safetensors").is_file() and not (output / "unet").exists()
    pipeline = load(BASE)
    before = sample(pipeline)
    pipeline.load_lora_weights(output)
    adapted = sample(pipeline)
    assert np.abs(adapted - before).max() > 1e-3
    np.testing.assert_allclose(sample(load(output / "merged")), adapted, atol=1e-4)
    barrier = Barrier.from_pretrained(output, pipeline.unet)
    assert barrier.uses_adapter and barrier.compute_protection_loss().item() > 0


def test_a_seed_gives_the_same_run_and_a_resumed_one_too(tmp_path, shared_cache):
    settings = {"max_train_steps": 4, "checkpointing_steps": 2}
    _, whole = run(tmp_path / "whole", shared_cache, **settings)
    _, again = run(tmp_path / "again", shared_cache, **settings)
    assert again["hashes"] == whole["hashes"] and again["history"] == whole["history"]
    _, resumed = run(tmp_path / "again", shared_cache, resume_from_checkpoint="step-2", **settings)
    assert resumed["hashes"] == whole["hashes"] and resumed["history"] == whole["history"]
    _, other = run(tmp_path / "other", shared_cache, seed=5, **settings)
    assert other["hashes"]["unet"] != whole["hashes"]["unet"]


def test_without_retain_loss_no_retain_image_is_encoded(tmp_path):
    output = tmp_path / "run"
    _, content = run(output, output / "cache", **{"objective.alpha": 0, "barrier.use_actual_bounds": "false"})
    assert len(list((output / "cache").glob("latents-*"))) == 1
    assert set(content["history"]) == {"objective", "retain", "protection"}
    assert set(content["history"]["retain"]) == {0.0}


def test_without_protection(tmp_path, shared_cache):
    _, content = run(tmp_path / "run", shared_cache, **{**GA, "barrier.lambda_interval": 0})
    assert set(content["history"]["protection"]) == {0.0} and max(content["history"]["objective"]) < 0
    assert (tmp_path / "run" / "barrier_config.json").is_file()
    assert not (tmp_path / "run" / "barrier_regions.safetensors").exists()


def test_images_generated_from_prompts(tmp_path, shared_cache):
    prompts = {
        "forget_prompts": '["a photo of a red bag", "a photo of a blue bag"]',
        "retain_prompts": '["a photo of a red boot"]',
        "train_data_dir": "null",
        "concept": "bag",
        "num_generated_images": 4,
        "generation.num_inference_steps": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": "true",
    }
    metrics, _ = run(tmp_path / "run", shared_cache, **prompts)
    assert set(metrics["per_class_after"]) == {"bag", "boot"} and metrics["num_images"] == 4
    folders = list(shared_cache.glob("generated-*"))
    assert [len(list((folder / "images").glob("*.png"))) for folder in folders] == [4, 4]
    made = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert sorted(entry["sampling"]["seed"] for entry in made) == [0, 1_000_000]
    assert {entry["prompts"][0] for entry in made} == {"a photo of a red bag", "a photo of a red boot"}


@pytest.mark.parametrize("rank", [0, 2])
def test_mixed_precision(tmp_path, shared_cache, rank):
    _, content = run(tmp_path / "run", shared_cache, mixed_precision="bf16", rank=rank)
    assert np.isfinite(content["history"]["protection"]).all()


BAD = {
    "no such target": ({"barrier.targets": "[attn3.to_q]"}, "no module ends with 'attn3.to_q'"),
    "zero forget images": (
        {"concept": "hat", "evaluation.classifier": "null"},
        "zero forget images: no row has class = 'hat'",
    ),
    "percentiles": ({"barrier.lower_percentile": 0.99}, "lower_percentile < upper_percentile"),
    "reduced_dim": ({"barrier.reduced_dim": 500}, "reduced_dim is 500"),
    "no retain data": ({"train_data_dir": "FORGET_ONLY"}, "split 'test' has no other row"),
    "no retain prompts": ({"train_data_dir": "null", "forget_prompts": "[a bag]"}, "set retain_prompts"),
    "missing pipeline": ({"pretrained_model_name_or_path": "/no/such/pipeline"}, "there is no such file or folder"),
    "missing data": ({"train_data_dir": "/no/such/data"}, "does not exist"),
    "no split": ({"evaluation.split": "validation"}, "cannot read split 'validation'"),
    "no column": ({"concept_column": "kind"}, "no column 'kind'"),
    "unknown objective": ({"objective.name": "forget"}, "known are concept, esd, ga, kl, rl, uce"),
    "two anchors": ({"objective.anchor_prompt": "a shoe"}, "not both"),
    "no classifier": ({"evaluation.classifier": "/no/such"}, "but there is no such file or folder"),
    "xformers on a CPU": ({"enable_xformers_memory_efficient_attention": "true"}, "xformers has no CPU kernels"),
    "fp16 on a CPU": ({"mixed_precision": "fp16"}, "mixed_precision fp16 needs a GPU"),
    "backend of a UNet": ({"attention_backend": "native"}, "UNet2DConditionModel has no such switch"),
    "merge without adapter": ({"merge_adapter": "true"}, "merge_adapter needs an adapter: set rank above 0"),
    "unknown checkpoint": ({"resume_from_checkpoint": "step-9"}, "no checkpoint 'step-9'"),
    "zero steps": ({"max_train_steps": 0}, "max_train_steps is 0"),
    "another run": ({"output_dir": "OTHER_RUN"}, "holds another run"),
    "other files": ({"output_dir": "OTHER_FILES"}, "holds other files, which no run wrote (manifest.json)"),
    "not writable": ({"output_dir": "/proc/nothing"}, "cannot be made or written to"),
    "negative alpha": ({"objective.alpha": -1}, "objective.alpha is -1.0, but must be at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_training(name, tmp_path, shared_cache, monkeypatch, capsys):
    changes, message = BAD[name]
    other, foreign, forget_only = tmp_path / "other", tmp_path / "foreign", tmp_path / "data"
    for folder, content in ((other, {"versions": {"barrier-diffusers": "0.1.0"}}), (foreign, {})):
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps(content))
    for split in ("train", "test"):
        source = ROOT / "assets/fashion_images" / split
        rows = [row.split(",") for row in (source / "metadata.csv").read_text().splitlines()]
        (forget_only / split).mkdir(parents=True)
        kept = [rows[0]] + [row for row in rows if row[2] == "sneaker"][:3]
        (forget_only / split / "metadata.csv").write_text("\n".join(",".join(row) for row in kept) + "\n")
        for row in kept[1:]:
            shutil.copy(source / row[0], forget_only / split / row[0])
    replaced = {"OTHER_RUN": other, "OTHER_FILES": foreign, "FORGET_ONLY": forget_only}
    changes = {key: replaced.get(value, value) for key, value in changes.items()}
    words = flags(**{"output": tmp_path / "run", "cache_dir": shared_cache, **changes})
    monkeypatch.setattr(sys, "argv", ["unlearn_sd.py", *words])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("training started"))
    with pytest.raises(SystemExit) as caught:
        run_script(main, UnlearnConfig)
    assert caught.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_a_pipeline_with_nan_weights_is_refused(tmp_path, shared_cache):
    pipeline = load(BASE)
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    pipeline.save_pretrained(tmp_path / "broken")
    with pytest.raises((ValueError, FloatingPointError), match="non-finite"):
        run(tmp_path / "run", shared_cache, pretrained_model_name_or_path=tmp_path / "broken")


def test_public_interface_as_documented(tmp_path):
    """The calls of the README, in its order."""
    unet = load(BASE).unet
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim

    def loader(num):
        return [
            (torch.randn(8, 4, 8, 8, generator=generator), torch.randint(1000, (8,), generator=generator),
             torch.randn(8, 6, width, generator=generator))
            for _ in range(num)
        ]  # fmt: skip

    def forward_fn(model, batch):
        return model(*batch).sample

    forget_loader, held_out_loader = loader(2), loader(64)
    config = BarrierConfig(targets=["attn2.to_q", "attn2.to_k", "attn2.to_v"], lambda_interval=10.0, reduced_dim=32)
    barrier = Barrier(unet, config)
    barrier.setup_protection(forget_loader, forward_fn, retain_loader=None)
    optimizer = torch.optim.AdamW(barrier.trainable_parameters(), lr=1e-5)
    for batch in forget_loader:
        base_loss = -forward_fn(unet, batch).square().mean()
        loss = base_loss + barrier.compute_protection_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    barrier.save_pretrained(tmp_path)
    barrier.remove()
    barrier = Barrier.from_pretrained(tmp_path, unet)
    assert barrier.compute_protection_loss().item() > 0
    certificate = barrier.certify(held_out_loader, forward_fn, quantile=0.99, confidence=0.95)
    assert certificate.holds and certificate.network.certified is not None
    assert set(barrier.regions) == {entry.name for entry in barrier.maps}
    barrier.remove()
