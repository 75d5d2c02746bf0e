"""Checkpoints and other files: whole or not at all, found again, refused when damaged or of another run."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pipelines
import pytest
import torch
from accelerate import Accelerator
from short_runs import ROOT, flags
from small_training import Small

from barrier_diffusers.data.encoding import cached_tensors
from barrier_diffusers.data.generated_images import write_image_folder
from barrier_diffusers.models.publishing import save_pipeline
from barrier_diffusers.training.checkpoints import Checkpoints, Interruption
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.utils.files import WriteError, write_json
from barrier_diffusers.workflow.settings import UnlearnConfig


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


@contextmanager
def largest_file(num_bytes):
    """No file of this process may grow beyond this size: what a full disk is to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_checkpoints_rotate_and_are_found(tmp_path):
    small = Small(tmp_path, limit=2).train(1, 2, 10)
    assert [path.name for path in small.checkpoints.folders] == ["step-2", "step-10"]
    latest = small.checkpoints.find("latest")
    assert latest == tmp_path / "checkpoints" / "step-10" == small.checkpoints.find("step-10")
    weight, noise = small.model.weight.detach().clone(), torch.rand(3)
    fresh = Small(tmp_path)
    assert fresh.checkpoints.load(latest, 10) == 10 and torch.equal(torch.rand(3), noise)
    assert fresh.history.values == {"objective": [1.0, 2.0, 10.0]} and torch.equal(fresh.model.weight, weight)
    with pytest.raises(ValueError, match="no checkpoint 'step-7'"):
        small.checkpoints.find("step-7")
    with pytest.raises(ValueError, match="has 10 steps, the run only 9"):
        fresh.checkpoints.load(latest, 9)
    assert Small(tmp_path / "new").checkpoints.find("latest") is None and fresh.checkpoints.find(None) is None


def test_rotation_keeps_what_was_written_last(tmp_path):
    Small(tmp_path).train(2, 4)
    small = Small(tmp_path, limit=1)
    small.checkpoints.load(tmp_path / "checkpoints" / "step-2", 9)
    small.train(3)
    assert [path.name for path in small.checkpoints.folders] == ["step-3"]


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": ("model.safetensors", Path.unlink, "incomplete: model.safetensors is missing"),
    "cut off": ("optimizer.bin", cut, "damaged: optimizer.bin"),
    "changed": ("random_states_0.pkl", flip, "damaged: random_states_0.pkl"),
    "no list": ("checkpoint.json", Path.unlink, "no readable checkpoint.json"),
    "half a list": ("checkpoint.json", cut, "no readable checkpoint.json"),
    "foreign": ("custom_checkpoint_0.pkl", Path.touch, "no part of it: custom_checkpoint_0.pkl"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_latest_takes_the_one_before(name, tmp_path, capsys):
    file, damage, message = DAMAGE[name]
    small = Small(tmp_path).train(1, 2)
    damage(tmp_path / "checkpoints" / "step-2" / file)
    with pytest.raises(ValueError, match=message):
        small.checkpoints.find("step-2")
    assert small.checkpoints.find("latest").name == "step-1"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and message in warnings[0] and warnings[0].endswith("going on from step-1")
    damage(tmp_path / "checkpoints" / "step-1" / file)
    with pytest.raises(ValueError, match="has no whole one: delete that folder"):
        small.checkpoints.find("latest")


def test_the_length_counts_where_the_learning_rate_follows_it(tmp_path):
    def checkpoints(length):
        words = flags(tmp_path, lr_scheduler="cosine", max_train_steps=length)
        return Checkpoints(Accelerator(cpu=True), tmp_path, parse_config(UnlearnConfig, words), 2).settings

    assert checkpoints(4) != checkpoints(5)


def test_a_setting_that_an_earlier_version_did_not_have_is_at_its_default(tmp_path):
    small = Small(tmp_path).train(1)
    path = tmp_path / "checkpoints" / "step-1" / "checkpoint.json"
    content = json.loads(path.read_text())
    for name in ("gradient_accumulation_steps", "objective.alpha", "barrier.bound_mode"):
        content["settings"].pop(name, None)
    path.write_text(json.dumps(content))
    small.checkpoints.settings["objective.alpha"] = 0.0  # the default; the configuration file sets it
    assert small.checkpoints.find("latest").name == "step-1"
    small.checkpoints.settings["gradient_accumulation_steps"] = 4
    with pytest.raises(ValueError, match="gradient_accumulation_steps was 1 and is 4"):
        small.checkpoints.find("latest")


def test_a_default_that_was_a_number_and_is_left_to_the_model(tmp_path):
    small = Small(tmp_path).train(1)
    path = tmp_path / "checkpoints" / "step-1" / "checkpoint.json"
    content = json.loads(path.read_text())
    content["settings"] |= {"generation.batch_size": 100, "resolution": 512}  # as earlier versions wrote them
    path.write_text(json.dumps(content))
    small.checkpoints.settings |= {"generation.batch_size": None, "resolution": None}
    checkpoint = small.checkpoints.find("latest")
    small.checkpoints.inputs = {"image size": "1024"}
    with pytest.raises(ValueError, match="is of images of 512 pixels, not 1024: set resolution"):
        small.checkpoints.load(checkpoint, 9)
    small.checkpoints.inputs = {"image size": "512"}
    assert small.checkpoints.load(checkpoint, 9) == 1
    small.checkpoints.settings["resolution"] = 256
    with pytest.raises(ValueError, match="resolution was 512 and is 256"):
        small.checkpoints.find("latest")


def test_weights_that_are_not_finite_become_no_checkpoint(tmp_path):
    small = Small(tmp_path).train(1)
    with torch.no_grad():
        small.model.weight[3, 3] = float("inf")
    with pytest.raises(FloatingPointError, match="non-finite weights after step 2.*step-1"):
        small.checkpoints.save(2, small.model.parameters(), None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("num_bytes", [100, 10_000, 60_000])  # nothing, the model, the optimizer do not fit
def test_a_full_disk_leaves_the_checkpoint_before(num_bytes, tmp_path):
    small = Small(tmp_path).train(1)
    with largest_file(num_bytes), pytest.raises(WriteError, match="cannot write .*step-2.*free disk space.*step-1"):
        small.train(2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert small.checkpoints.find("latest").name == "step-1"
    small.train(2)
    assert small.checkpoints.find("latest").name == "step-2"


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(WriteError, match="cannot write .*checkpoints/step-1' .*No checkpoint was written before"):
        Small(tmp_path).train(1)


def test_other_files_are_whole_too(tmp_path):
    pipeline = pipelines.build("sd")
    save_pipeline(pipeline, tmp_path / "pipeline")
    write_json(tmp_path / "a.json", 1)
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8).numpy()
    writers = {
        "pipeline": lambda: save_pipeline(pipeline, tmp_path / "pipeline"),
        "a.json": lambda: write_json(tmp_path / "a.json", "x" * 3000),
        "t.safetensors": lambda: cached_tensors(tmp_path / "t.safetensors", lambda: {"a": torch.zeros(1000)}),
        "images": lambda: write_image_folder(tmp_path / "images", images, {"text": ["a", "b"]}),
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, write in writers.items():
        with largest_file(1000), pytest.raises(WriteError, match=f"cannot write .*{name}.*free disk space"):
            write()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, name


def test_a_damaged_cache_file_is_named(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="t.safetensors' is damaged .*: delete it"):
        cached_tensors(tmp_path / "t.safetensors", dict)


def test_a_signal_after_the_last_look_is_not_lost():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("outer"))
    try:
        with Interruption(Accelerator(cpu=True)) as interruption:
            assert not interruption.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested and heard == []
        assert heard == ["outer"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(Accelerator(cpu=True)) as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interruption.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
