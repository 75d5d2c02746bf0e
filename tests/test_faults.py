"""What goes wrong in a long run: signals, kills, full disks, damaged files, numbers that overflow. Nothing is lost."""

import json
import os
import resource
import signal
import sys

import pipelines
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import load_dataset
from kills import killed_and_resumed
from PIL import Image
from safetensors.torch import load_file
from short_runs import ROOT, flags, main, run

from barrier_diffusers.data.concepts import write_image_folder
from barrier_diffusers.data.encoding import encode_moments
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.training.checkpoints import Checkpoints, read_checkpoint
from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.workflow.settings import UnlearnConfig

STEPS = {"max_train_steps": 4, "evaluation.classifier": "null", "evaluation.images_per_label": 1}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)


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
    assert not list((tmp_path / "run").iterdir())


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


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_a_run_gives_the_same_bits(count, tmp_path):
    settings = {**STEPS, "checkpointing_steps": 1, "resume_from_checkpoint": "latest", "max_forget_images": 32}
    settings |= {"max_train_steps": 6}
    whole, done, killed = killed_and_resumed(
        child,
        lambda output: (flags(output, **settings),),
        tmp_path,
        kills(count),
    )
    wanted = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    for output in done:
        found = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), killed
        assert history(whole) == history(output), killed
        assert not [path for path in (output / "checkpoints").iterdir() if path.name.startswith(".")]
