"""What trackers show a person of a run: read back from tensorboard's event file and from wandb's offline folder."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from short_runs import ROOT, run
from written_runs import share, write_certificate, write_run

from barrier_diffusers.data.prompt_files import PromptRow, write_prompts
from barrier_diffusers.evaluation.report import read_run
from barrier_diffusers.evaluation.tracker_pages import PER_LABEL, Comparison, log_artifact, log_comparison, log_record
from barrier_diffusers.workflow.tracking import TrackConfig, collect, publish


def noise(seed):
    return np.random.default_rng(seed).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)


BEFORE, AFTER = noise(0), noise(1)
LABELS = ["bag"] * 6 + ["boot"] * 6
CASES = list(enumerate(LABELS))
COMPARISON = Comparison([f"a {label} {n}" for n, label in enumerate(LABELS)], LABELS, ["boot"], BEFORE, AFTER)


@pytest.fixture
def record(tmp_path):
    attack = {"attack": "inversion", "concept": "boot", "pre_attack": share(0.0, 0.0, 27.8)}
    attack["post_attack"] = share(40.0, 16.8, 68.7)
    folder = write_run(tmp_path / "run", concept="boot", attacks=[attack])
    write_certificate(folder)
    (folder / "weights.safetensors").write_bytes(b"weights")
    for inside in ("checkpoints", "cache"):
        (folder / inside).mkdir()
        (folder / inside / "large.bin").write_bytes(b"large")
    return read_run(folder)


def tracked(kind, folder, show):
    """What `show(trackers)` gives accelerate's trackers; they are ended afterwards."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with=kind, project_dir=str(folder))
    accelerator.init_trackers("look", init_kwargs={"wandb": {"dir": str(folder)}})
    show(accelerator.trackers)
    accelerator.end_training()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """wandb writes a folder instead of talking to its server; gives that folder once a run has ended."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))

    def folder():
        wandb.teardown()  # its service writes the rest of the log
        (found,) = (tmp_path / "wandb").glob("offline-run-*")
        return found

    return folder


def records(path):
    """Everything in wandb's transaction log: blocks of 32 KiB behind a header of 7 bytes, pieces of records behind 7
    more (checksum, length, and whether it is whole, a first, a middle or a last piece)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, pending = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the rest of a block is empty
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(pending)
            pending = b""


def artifacts(folder, kind):
    """Name of a file -> the file, of every artifact of that type, each with its metadata."""
    (log,) = folder.glob("*.wandb")
    for entry in records(log):
        if entry.WhichOneof("record_type") == "artifact" and entry.artifact.type == kind:
            yield (
                {each.path: Path(each.local_path) for each in entry.artifact.manifest.contents},
                entry.artifact.metadata,
            )


def tables(folder):
    """Name of a table -> (columns, rows), an image as (pixels, caption)."""
    found = {}
    for files, _ in artifacts(folder, "run_table"):

        def cell(value, files=files):
            is_image = isinstance(value, dict)
            return (np.asarray(Image.open(files[value["path"]])), value["caption"]) if is_image else value

        (name,) = [name for name in files if name.endswith(".table.json")]
        content = json.loads(files[name].read_text())
        rows = [[cell(value) for value in row] for row in content["data"]]
        found[name.removesuffix(".table.json")] = content["columns"], rows
    return found


def test_wandb_shows_images_bars_and_the_trade_off(record, tmp_path, offline):
    def show(trackers):
        log_comparison(trackers, COMPARISON, 3, "evaluate: ")
        log_record(trackers, record, 3)
        log_artifact(trackers, Path(record.name), record)

    tracked("wandb", tmp_path, show)
    found = tables(offline())
    columns, rows = found["evaluate: before and after"]
    assert columns == ["prompt", "label", "role", "before", "after"]
    assert [row[0] for row in rows] == [f"a boot {n}" for n in range(6, 6 + PER_LABEL)] + [
        f"a bag {n}" for n in range(PER_LABEL)
    ]
    for row in rows:
        number = int(row[0].split()[-1])
        assert row[1:3] == [LABELS[number], "forgotten" if LABELS[number] == "boot" else "retained"]
        for (pixels, caption), images in zip(row[3:], (BEFORE, AFTER), strict=True):
            assert (pixels == images[number]).all() and caption == row[0]
    assert [row[:4] for row in found["per label_table"][1]] == [
        ["boot", "forgotten", 100.0, 10.0],
        ["bag", "retained", 97.0, 95.0],
    ]
    assert found["attacks_table"][1] == [["inversion", "boot", 0.0, 40.0, 16.8, 68.7]]
    assert found["trade-off_table"][1] == [["run", 2.0, 90.0]]
    pictures = {path.name.rsplit("_", 2)[0] for path in (offline() / "files/media/images").glob("*.png")}
    bars = "Recognised images per label, with 95 % intervals"
    assert {bars, "Images before and after, the same prompts and seeds"} <= pictures
    ((files, metadata),) = artifacts(offline(), "model")
    assert json.loads(metadata)["unlearning_accuracy"] == 90.0
    kept = {"before_after.png", "certificate.json", "manifest.json", "metrics.json", "weights.safetensors"}
    assert set(files) == kept


def events(folder):
    """All that tensorboard reads from the event files below a folder."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (path,) = {path.parent for path in folder.rglob("events.out.tfevents*")}
    found = reader.EventAccumulator(str(path), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def texts(found):
    """Name -> text, of tensorboard."""
    return {
        name.removesuffix("/text_summary"): found.Tensors(name)[0].tensor_proto.string_val[0].decode()
        for name in found.Tags()["tensors"]
    }


def image(found, name):
    """Pixels of the image of that name, in tensorboard."""
    return np.asarray(Image.open(io.BytesIO(found.Images(name)[0].encoded_image_string)).convert("RGB"))


def test_tensorboard_shows_the_same(record, tmp_path):
    def show(trackers):
        log_comparison(trackers, COMPARISON, 3)
        log_record(trackers, record, 3)

    tracked("tensorboard", tmp_path / "logs", show)
    found = events(tmp_path / "logs")
    rows = [np.concatenate([BEFORE[number], AFTER[number]], axis=1) for number in range(6, 6 + PER_LABEL)]
    assert (image(found, "before and after/boot") == np.concatenate(rows)).all()
    said = texts(found)
    assert "| a boot 6 |" in said["before and after/boot"] and "| a bag 5 |" not in said["before and after/bag"]
    assert "| boot | forgotten | 100.0 | 10.0 |" in said["per label"]
    assert "| inversion | boot | 0.0 | 40.0 |" in said["attacks"] and "| run | 2.0 | 90.0 |" in said["trade-off"]
    assert said["verdict"].startswith("9 of 10 images of boot")
    assert image(found, "pictures/Recognised images per label, with 95 % intervals").ndim == 3


def test_a_run_is_shown_by_its_tracker(tmp_path, monkeypatch):
    """A closed-form edit, which has no loop that would have started the trackers."""
    monkeypatch.chdir(ROOT)
    edit = {
        "objective.name": "uce",
        "objective.alpha": 0,
        "barrier.lambda_interval": 0,
        "barrier.targets": "[attn2.to_k, attn2.to_v]",
    }
    run(tmp_path / "run", tmp_path / "cache", report_to="tensorboard", **edit)
    found = events(tmp_path / "run/logs")
    said, prompts = texts(found), json.loads((tmp_path / "run/manifest.json").read_text())
    assert prompts["settings"]["report_to"] == "tensorboard"
    assert "unlearning accuracy" in said["verdict"] and "| sneaker | forgotten |" in said["per label"]
    assert image(found, "before and after/sneaker").shape == (2 * 32, 2 * 32, 3)


def test_an_artifact_is_asked_for_and_needs_wandb():
    with pytest.raises(ValueError, match="only wandb keeps artifacts: set track.report_to to wandb"):
        TrackConfig(artifact=True, report_to="tensorboard")
    assert TrackConfig().artifact is False


def test_a_workflow_shows_what_its_stages_left(record, tmp_path, offline):
    folder = Path(record.name)
    for when, images in (("before", BEFORE), ("after", AFTER)):
        place = folder / "images/classes" / when
        place.mkdir(parents=True)
        write_prompts(place / "prompts.csv", [PromptRow(str(n), f"a {label}", n, label=label) for n, label in CASES])
        (place / "manifest.json").write_text(json.dumps({"num_images": len(LABELS)}))
        for number, image in enumerate(images):
            Image.fromarray(image).save(place / f"{number}_0.png")
    stages = {"evaluate": folder / "metrics.json"}
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrackConfig(report_to="wandb", artifact=True)
    publish(config, tmp_path, {"a": 1}, collect(stages, {}), {**stages, "unlearn": folder / "metrics.json"})
    found = tables(offline())
    rows = found["evaluate: before and after"][1]
    assert [row[1] for row in rows] == ["boot"] * PER_LABEL + ["bag"] * PER_LABEL
    assert (rows[0][3][0] == BEFORE[6]).all() and (rows[0][4][0] == AFTER[6]).all()
    assert found["unlearn: trade-off_table"][1] == [["run", 2.0, 90.0]]
    assert len(list(artifacts(offline(), "model"))) == 1
