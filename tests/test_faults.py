"""What goes wrong in a long run: signals, kills, full disks, damaged files, numbers that overflow. Nothing is lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pipelines
import pytest
import torch
import unlearn_sd
from accelerate import Accelerator
from datasets import load_dataset
from kills import killed_and_resumed
from PIL import Image
from safetensors.torch import load_file
from short_runs import ROOT, flags, main, run

from barrier_diffusers.data.encoding import encode_moments
from barrier_diffusers.data.generated_images import write_image_folder
from barrier_diffusers.data.readers import rows_hash
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.training.checkpoints import Checkpoints, read_checkpoint
from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.workflow.settings import UnlearnConfig

STEPS = {"max_train_steps": 4, "evaluation.classifier": "null", "evaluation.images_per_label": 1}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """An uninterrupted run with a checkpoint after step 2: (its folder, its manifest)."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("whole") / "run"
    os.chdir(ROOT)
    _, manifest = run(folder, cache, checkpointing_steps=2, **STEPS)
    os.chdir(before)
    return folder, manifest


def at_step(monkeypatch, number, action):
    """Let `action` happen in the middle of an optimizer's step."""
    original, calls = torch.optim.AdamW.step, []

    def step(self, *arguments, **settings):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def last_error(monkeypatch, capsys, words):
    """The one line and the exit status that the user gets."""
    monkeypatch.setattr(sys, "argv", ["unlearn_sd.py", *words])
    with pytest.raises(SystemExit) as caught:
        run_script(main, UnlearnConfig)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0], caught.value.code


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_resuming_gives_the_same_bits(
    number, status, tmp_path, cache, whole, monkeypatch, capsys
):
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as caught:
            run(tmp_path / "run", cache, **STEPS)
    assert caught.value.code == status
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]
    _, resumed = run(tmp_path / "run", cache, resume_from_checkpoint="latest", **STEPS)
    assert resumed["hashes"] == whole[1]["hashes"] and resumed["history"] == whole[1]["history"]


def test_other_settings_are_refused_by_name(whole, cache, monkeypatch, capsys):
    folder, _ = whole
    changes = {"learning_rate": 0.5, "barrier.lambda_interval": 3.0, "resume_from_checkpoint": "latest"}
    words = flags(folder, cache_dir=cache, **{**STEPS, **changes})
    line, status = last_error(monkeypatch, capsys, words)
    then = read_checkpoint(folder / "checkpoints" / "step-2")["settings"]
    assert status == 1 and "belongs to a run with other settings" in line
    assert f"learning_rate was {then['learning_rate']} and is 0.5" in line
    assert f"barrier.lambda_interval was {then['barrier.lambda_interval']} and is 3.0" in line
    assert line.count("; ") == 1 and (folder / "model_index.json").is_file()


FREE = {
    "length": ({"max_train_steps": 9}, True),
    "places": ({"cache_dir": "elsewhere", "report_to": "tensorboard", "validation_prompt": "[a bag]"}, True),
    "checkpoints": ({"checkpointing_steps": 7, "checkpoints_total_limit": 1}, True),
    "seed": ({"seed": 1}, False),
    "precision": ({"mixed_precision": "bf16"}, False),
    "concept": ({"concept": "bag"}, False),
}


@pytest.mark.parametrize("name", FREE)
def test_settings_that_decide_about_weights(name, whole):
    changes, free = FREE[name]
    config = parse_config(UnlearnConfig, flags(whole[0], **{**STEPS, **changes}))
    checkpoints = Checkpoints(Accelerator(cpu=True), whole[0], config, 2)
    if free:
        assert checkpoints.find("latest").name == "step-2"
    else:
        with pytest.raises(ValueError, match=f"{next(iter(changes))} was .* and is "):
            checkpoints.find("latest")


NAN = """import torch
from barrier_diffusers.objectives import register

calls = []

@register("nan_at_4")
def loss(step):
    calls.append(None)
    scale = float("nan") if len(calls) == 4 else -1.0
    return scale * step.ordinary_loss()
"""


def test_a_non_finite_loss_names_step_and_term_and_keeps_the_checkpoint(tmp_path, cache, monkeypatch, capsys):
    (tmp_path / "nan.py").write_text(NAN)
    chosen = {"objective.module": tmp_path / "nan.py", "objective.name": "nan_at_4", "objective.anchor": "null"}
    words = flags(tmp_path / "run", cache_dir=cache, checkpointing_steps=2, **{**STEPS, **chosen})
    line, status = last_error(monkeypatch, capsys, words)
    assert status == 1 and "non-finite loss at step 4: objective is nan" in line
    assert f"The last whole checkpoint is '{tmp_path / 'run/checkpoints/step-2'}'" in line
    assert "lower learning_rate" in line
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-2")["step"] == 2
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_a_full_disk_during_a_run_is_one_line(tmp_path, cache, whole, monkeypatch, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)))
    try:
        words = flags(tmp_path / "run", cache_dir=cache, checkpointing_steps=1, **STEPS)
        line, status = last_error(monkeypatch, capsys, words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and "step-2" in line and "--resume_from_checkpoint step-1" in line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    _, resumed = run(tmp_path / "run", cache, resume_from_checkpoint="latest", **STEPS)
    assert resumed["hashes"] == whole[1]["hashes"]


def test_a_damaged_image_is_named_by_row_and_file(tmp_path):
    write_image_folder(tmp_path / "data", torch.zeros(4, 16, 16, 3, dtype=torch.uint8).numpy(), {"text": list("abcd")})
    Image.effect_noise((16, 16), 90).save(tmp_path / "data" / "00002.png")
    content = (tmp_path / "data" / "00002.png").read_bytes()
    rows = load_dataset(str(tmp_path / "data"), split="train").select([0, 2, 3])
    (tmp_path / "data" / "00002.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"image of row 2 \(.*00002.png\) cannot be read"):
        encode_moments(pipelines.vae(), rows, "image", 16)


def test_a_text_encoder_that_does_not_fit_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    pipeline = pipelines.build("sd")
    pipeline.text_encoder = pipelines.clip(width=12)
    pipeline.save_pretrained(tmp_path / "pipeline")
    words = flags(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "pipeline")
    line, status = last_error(monkeypatch, capsys, words)
    assert status == 1 and "gives 12 features per token, but the denoiser reads 8" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", pipelines.BUILDERS)
def test_text_encoders_that_fit_pass(name):
    pipeline = pipelines.build(name)
    PipelineDenoiser(pipeline).check_text_encoder(pipeline)


def child(words):
    """A run in a process of its own."""
    os.chdir(ROOT)
    sys.argv = ["unlearn_sd.py", *words]
    run_script(main, UnlearnConfig)


def history(output):
    return json.loads((output / "manifest.json").read_text())["history"]


def kills(count):
    return int(os.environ.get("BARRIER_KILLS", count))


def trained(output):
    """Whether the last step's checkpoint is there, or the run is over."""
    return (output / "checkpoints" / "step-6").is_dir() or (output / "manifest.json").is_file()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ready", [lambda output: True, trained], ids=["anywhere", "after the last step"])
def test_killed_at_random_moments_and_resumed_a_run_gives_the_same_bits(count, ready, tmp_path):
    settings = {**STEPS, "checkpointing_steps": 1, "resume_from_checkpoint": "latest", "max_forget_images": 32}
    settings |= {"max_train_steps": 6}
    whole, done, killed = killed_and_resumed(
        child,
        lambda output: (flags(output, **settings),),
        tmp_path,
        kills(count),
        ready,
    )
    wanted = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    for output in done:
        found = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), killed
        assert history(whole) == history(output), killed
        assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-4", "step-5"]


MOMENTS = [
    (signal.SIGTERM, "save_weights", "before"),
    (signal.SIGINT, "save_weights", "after"),
    (signal.SIGTERM, "judge", "after"),
    (signal.SIGINT, "save_records", "after"),
]


@pytest.mark.parametrize(("number", "stage", "moment"), MOMENTS)
def test_a_signal_after_the_last_step_loses_nothing(
    number, stage, moment, tmp_path, cache, whole, monkeypatch, capsys
):
    original = getattr(unlearn_sd, stage)

    def stopped(*arguments):
        if moment == "after":
            original(*arguments)
        os.kill(os.getpid(), number)
        pytest.fail("the signal was not heard")

    words = flags(tmp_path / "run", cache_dir=cache, **STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(unlearn_sd, stage, stopped)
        patch.setattr(sys, "argv", ["unlearn_sd.py", *words])
        with pytest.raises(SystemExit) as caught:
            run_script(main, UnlearnConfig)
    assert caught.value.code == 128 + number
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped by" in line]
    assert line.endswith(
        f"stopped by {number.name}: checkpoint {tmp_path}/run/checkpoints/step-4 is whole; the same command with "
        "--resume_from_checkpoint latest goes on from it"
    )
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it trains again"))
    _, resumed = run(tmp_path / "run", cache, resume_from_checkpoint="latest", **STEPS)
    assert resumed["hashes"] == whole[1]["hashes"] and resumed["history"] == whole[1]["history"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_new_weights_never_stand_beside_old_numbers(tmp_path, cache, monkeypatch):
    """Stopped before it is judged, a resumed run leaves the earlier result as it was, and its own last checkpoint."""
    run(tmp_path / "run", cache, **STEPS, checkpointing_steps=2)
    parts = ("unet/*.safetensors", "metrics.json", "manifest.json", "report.html", "certificate.json")

    def contents():
        return {path: path.read_bytes() for part in parts for path in (tmp_path / "run").glob(part)}

    before = contents()
    assert len(before) == len(parts)
    monkeypatch.setattr(unlearn_sd, "judge", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    changes = {**STEPS, "max_train_steps": 5, "resume_from_checkpoint": "latest"}
    monkeypatch.setattr(sys, "argv", ["unlearn_sd.py", *flags(tmp_path / "run", cache_dir=cache, **changes)])
    with pytest.raises(SystemExit):
        run_script(main, UnlearnConfig)
    assert contents() == before
    assert (tmp_path / "run/checkpoints/step-5").is_dir()


SCRIPTS = {"train_scripts/unlearn_sd.py": signal.SIGINT, "-m ddpm_ext.unlearn": signal.SIGTERM}


@pytest.mark.parametrize(("script", "number"), SCRIPTS.items())
def test_a_signal_while_a_script_imports_is_one_line(script, number, tmp_path):
    for delay in (0, 0.7):
        process = subprocess.Popen(
            [sys.executable, *script.split(), "--output_dir", str(tmp_path / "run")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        while not heard(process.pid, number):
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
        assert process.returncode == 128 + number, said
        assert said == f"stopped by {number.name}: start it again\n"


IMPORTING = """
import os, signal, sys
import barrier_diffusers.utils.signals

try:  # as a library does that imports a part of itself
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
except BaseException:
    raise RecursionError
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_library_that_is_being_imported_cannot_change_how_a_signal_ends_a_script(number, tmp_path):
    script = tmp_path / "train_scripts" / "script.py"
    script.parent.mkdir()
    script.write_text(IMPORTING)
    command = [sys.executable, str(script), number.name]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 128 + number and done.stderr == f"stopped by {number.name}: start it again\n"


def heard(pid, number):
    """Whether a process handles the signal by now (Python's own Ctrl-C does not count)."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1) and bool(caught >> (number - 1) & 1)


def test_a_run_on_other_data_or_another_base_is_not_gone_on_with(tmp_path, cache, whole, capsys):
    checkpoint = whole[0] / "checkpoints" / "step-2"
    path = checkpoint / "checkpoint.json"
    content = json.loads(path.read_text())
    assert set(content["inputs"]) == {"base model", "data", "image size"}
    for name in content["inputs"]:
        shutil.copytree(checkpoint, tmp_path / name / "checkpoints" / "step-2")
        other = {**content, "inputs": {**content["inputs"], name: "0"}}
        (tmp_path / name / "checkpoints" / "step-2" / "checkpoint.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"belongs to a run with another {name}: what the settings name is not"):
            run(tmp_path / name, cache, resume_from_checkpoint="latest", **STEPS)
    shutil.copytree(checkpoint, tmp_path / "old" / "checkpoints" / "step-2")
    del content["inputs"], content["after_training"]  # as earlier versions wrote it
    (tmp_path / "old" / "checkpoints" / "step-2" / "checkpoint.json").write_text(json.dumps(content))
    _, resumed = run(tmp_path / "old", cache, resume_from_checkpoint="latest", **STEPS)
    assert resumed["hashes"] == whole[1]["hashes"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: checkpoint")]
    assert "earlier version" in line


def test_the_hash_of_the_data_sees_every_file_and_caption(tmp_path):
    images = torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8).numpy()
    hashes = set()
    for captions, change in ((["a", "b", "c"], 0), (["a", "b", "d"], 0), (["a", "c", "b"], 0), (["a", "b", "c"], 1)):
        folder = tmp_path / str(len(hashes))
        write_image_folder(folder, images + change, {"text": captions})
        rows = load_dataset(str(folder), split="train")
        hashes.add(rows_hash(rows, ["image", "text"]))
        assert rows_hash(rows, ["image", "text"]) in hashes
    assert len(hashes) == 4
