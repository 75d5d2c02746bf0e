"""Files of others run no code, names from data are no paths, tokens are written nowhere."""

import ast
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from short_runs import ROOT, run
from small_training import Small

from barrier_diffusers.data.generated_images import write_image_folder
from barrier_diffusers.evaluation.classifier import AttributeClassifier
from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.training.checkpoints import CHECKPOINT_NAME
from barrier_diffusers.utils.files import file_hash
from classification_ext.models import build_classifier, load_classifier

SHORT = {"max_train_steps": 1, "evaluation.classifier": "null", "evaluation.images_per_label": 1}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


class Bomb:
    """A pickle of it creates a folder when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_the_bomb_works(tmp_path):
    torch.save(Bomb(tmp_path / "trace"), tmp_path / "bomb")
    torch.load(tmp_path / "bomb", weights_only=False)
    assert (tmp_path / "trace").is_dir()


STATES = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "history.bin", "custom_checkpoint_0.pkl", "model")


@pytest.mark.parametrize("how", ["torch.save", "pickle.dump"])
@pytest.mark.parametrize("name", STATES)
def test_no_file_of_a_checkpoint_runs_code(name, how, tmp_path):
    """The list of files agrees, as with a checkpoint that somebody made for this."""
    small = Small(tmp_path).train(1)
    folder, trace = tmp_path / "checkpoints" / "step-1", tmp_path / "trace"
    if name == "model":  # accelerate would take a pickle where there are no safetensors
        (folder / "model.safetensors").unlink()
        name = "pytorch_model.bin"
    if how == "torch.save":
        torch.save(Bomb(trace), folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    content = json.loads((folder / CHECKPOINT_NAME).read_text())
    there = [path.name for path in folder.iterdir() if path.name != CHECKPOINT_NAME]
    content["files"] = {file: file_hash(folder / file) for file in there}
    (folder / CHECKPOINT_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is refused|does not fit this run|model.safetensors is missing"):
        small.checkpoints.load(small.checkpoints.find("step-1"), 1)
    assert not trace.exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_with_pickled_weights_is_refused(part, tmp_path):
    pipelines.build("sd").save_pretrained(tmp_path / "pipeline")
    weights = next((tmp_path / "pipeline" / part).glob("*.safetensors"))
    pickled = {"unet": "diffusion_pytorch_model.bin", "vae": "diffusion_pytorch_model.bin"}
    weights.unlink()
    torch.save(Bomb(tmp_path / "trace"), weights.with_name(pickled.get(part, "pytorch_model.bin")))
    with pytest.raises(OSError, match=r"Pickled weights \(.bin\) are never read"):
        load_pipeline(str(tmp_path / "pipeline"))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_single_pickled_file_is_refused(suffix, tmp_path):
    torch.save(Bomb(tmp_path / "trace"), tmp_path / f"model{suffix}")
    with pytest.raises(ValueError, match="may hold a pickle"):
        load_pipeline(str(tmp_path / f"model{suffix}"))
    assert not (tmp_path / "trace").exists()


def test_a_pickled_judge_is_refused(tmp_path):
    source = ROOT / "assets" / "fashion_classifier"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(Bomb(tmp_path / "trace"), tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="No such file.*model.safetensors"):
        AttributeClassifier.from_pretrained(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_the_code_asks_for_no_code():
    """No pickle is read by hand, and no repository's code is trusted."""
    for folder in ("barrier_diffusers", "classification_ext", "ddpm_ext", "train_scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text()
            for word in ("trust_remote_code=True", "pickle.load", "allow_pickle", "weights_only=False)"):
                assert word not in source, (path, word)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert given.get("weights_only") == "True", (path, node.lineno)


def entries(folder):
    return {path.relative_to(folder) for path in Path(folder).rglob("*")}


def test_names_from_data_are_no_paths_and_tokens_are_written_nowhere(tmp_path, monkeypatch, capfd):
    token = "hf_" + "SecretSecretSecretSecretSecret1234"
    monkeypatch.setenv("HF_TOKEN", token)
    home, name = tmp_path / "a" / "b", "../../x"
    rows = {"text": [f"a photo of a {name}", "a photo of a red bag"] * 8, "class": [name, "/tmp/../bag"] * 8}
    images = np.random.default_rng(0).integers(256, size=(16, 32, 32, 3), dtype=np.uint8)
    write_image_folder(home / "data" / "train", images, rows)
    before = entries(tmp_path)
    changes = {
        "train_data_dir": home / "data",
        "concept": name,
        "objective.anchor": "boot",
        "report_to": "tensorboard",
    }
    changes |= {"evaluation.split": "train", "checkpointing_steps": 1, "max_train_steps": 2}
    run(home / "run", home / "cache", **{**SHORT, **changes})
    outside = {
        path for path in entries(tmp_path) - before if path.parts[:3] not in (("a", "b", "run"), ("a", "b", "cache"))
    }
    assert not outside
    printed = capfd.readouterr()
    assert token not in printed.out + printed.err
    written = [path for path in home.rglob("*") if path.is_file()]
    assert {"manifest.json", "metrics.json", "checkpoint.json"} <= {path.name for path in written}
    assert list(home.rglob("events.out.tfevents*"))
    for path in written:
        assert token.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("load", [load_classifier, lambda folder: build_classifier(folder, ["a", "b"], 8, 3, seed=0)])
def test_code_in_a_classifiers_folder_is_neither_run_nor_asked_about(load, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    with pytest.raises(ValueError):
        load(str(tmp_path))
    assert not asked and not (tmp_path / "ran").exists()
