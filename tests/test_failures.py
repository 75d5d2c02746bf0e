"""How a failed run ends: one line and a log file for errors of input and machine, a traceback for bugs."""

import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import make_small_unet, run_unet, unet_batches
from PIL import Image
from pipelines import build
from short_runs import ROOT

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.models.loading import add_adapter, load_adapter, load_pipeline
from barrier_diffusers.models.publishing import save_adapter as publish_adapter
from barrier_diffusers.utils import failures
from barrier_diffusers.utils.command_line import run_script
from classification_ext.models import load_classifier


@dataclass
class Config:
    """Settings of a script."""

    output_dir: str = "out"


def bomb():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    Image.open(file)


def long_field():
    list(csv.reader(io.StringIO("a" * (csv.field_size_limit() + 1))))


def out_of_memory():
    torch.empty(2**60)


def lost_key():
    torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 3)})


EXTERNAL = {
    "decompression bomb": (bomb, "DecompressionBombError: "),
    "csv": (long_field, "Error: field larger than field limit"),
    "memory": (out_of_memory, "RuntimeError: "),
    "loading": (lost_key, "RuntimeError: Error(s) in loading state_dict"),
}


def ended(raising, monkeypatch, capsys):
    """What run_script raises, and what it prints."""

    def main(config):
        raising()

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(BaseException) as caught:
        run_script(main, Config)
    return caught.value, capsys.readouterr().err


@pytest.mark.parametrize("name", EXTERNAL)
def test_input_and_machine_end_in_one_line_that_names_the_log(name, tmp_path, monkeypatch, capsys):
    raising, message = EXTERNAL[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/logs").mkdir(parents=True)
    error, said = ended(raising, monkeypatch, capsys)
    assert isinstance(error, SystemExit) and error.code == 1
    (line,) = said.splitlines()
    assert line.startswith("error: ") and message in line
    (log,) = re.findall(r"\(traceback: (.*)\)$", line)
    text = Path(log).read_text()
    assert Path(log).parent == Path("out/logs") and f"in {raising.__name__}" in text and "Traceback" in text


def test_without_logs_of_a_run_the_traceback_is_kept_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    _, said = ended(lost_key, monkeypatch, capsys)
    assert len(list((tmp_path / "temporary").iterdir())) == 1 and str(tmp_path / "temporary") in said
    assert not (tmp_path / "out").exists()


def ours(error):
    """A function of a file that counts as ours and that raises the error."""
    path = Path(failures.OURS[0]) / "made_up.py"
    scope = {"error": error}
    exec(compile("def work():\n    raise error\n", str(path), "exec"), scope)
    return scope["work"]


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("b"), AttributeError("c"), RuntimeError("shape"), IndexError()]
)
def test_bugs_keep_their_traceback(error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raised, said = ended(ours(error), monkeypatch, capsys)
    assert raised is error and said == ""


def test_what_we_raise_on_purpose_needs_no_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error, said = ended(ours(ValueError("resolution is 3:\n  choose 8")), monkeypatch, capsys)
    assert error.code == 1 and said == "error: resolution is 3: choose 8\n"


def test_a_type_error_of_a_library_that_reads_data_is_the_datas(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def reading():
        Image.open(3.5)

    error, said = ended(reading, monkeypatch, capsys)
    assert error.code == 1 and "AttributeError" in said and said.count("\n") == 1


def test_the_traceback_can_be_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BARRIER_TRACEBACK", "1")
    error, _ = ended(lost_key, monkeypatch, capsys)
    assert isinstance(error, RuntimeError)


@pytest.mark.parametrize("error", [RecursionError("half imported"), OSError("half read"), KeyError("half there")])
@pytest.mark.parametrize("reading", [False, True], ids=["main", "settings"])
def test_an_error_that_a_signal_caused_is_the_signals(error, reading, monkeypatch, capsys):
    """A library that the signal found in the middle of something ends in an error of its own."""

    def stopped(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise error from None

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as caught:
        run_script(stopped, stopped if reading else Config)
    assert caught.value.code == 143 and capsys.readouterr().err == "stopped by SIGTERM: start it again\n"


WORKER = """
import signal, sys, time
from barrier_diffusers.utils.group_exit import end_with_launcher
from barrier_diffusers.utils.signals import heed_signals

if sys.argv[1] == "waits":  # in a library, where no handler of Python runs
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    heed_signals()
end_with_launcher(look=0.05, grace=0.5)
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
assert worker.stdout.readline() == b"ready\\n"
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("doing", ["works", "waits"])
def test_a_process_whose_launcher_was_killed_does_not_wait_for_it(doing):
    """With it went the store that processes meet at, which another would ask for as long as the group may wait."""
    place = {**os.environ, "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LAUNCHER, WORKER, doing]
    done = subprocess.run(command, env=place, stderr=subprocess.PIPE, text=True, timeout=50)  # until the worker ends
    assert done.returncode == -9 and done.stderr.startswith("the launcher is gone\n")
    assert ("stopped by SIGTERM" in done.stderr) == (doing == "works")


LEFT_IN_ORDER = """
import atexit, os
from dataclasses import dataclass
from barrier_diffusers.utils.command_line import run_script

@dataclass
class Config:
    \"\"\"Settings of a script.\"\"\"

    fail: bool = False

class Group:
    def __del__(self, write=os.write):
        write(2, b"taken apart by the interpreter")

group = Group()
atexit.register(print, "what was registered ran")

def main(config):
    print("worked")
    if config.fail:
        raise ValueError("no such thing")

run_script(main, Config)
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fail", [False, True])
def test_a_process_that_was_started_with_others_is_not_taken_apart(processes, fail, tmp_path):
    """Leaving a group does not delete it: that is left to the interpreter, which threads of gloo may wait for."""
    (tmp_path / "script.py").write_text(LEFT_IN_ORDER)
    command = [sys.executable, "script.py", *(["--fail=true"] if fail else [])]
    place = {**os.environ, "WORLD_SIZE": str(processes), "RANK": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=place, capture_output=True, text=True)
    assert done.returncode == int(fail) and done.stdout == "worked\nwhat was registered ran\n"
    assert ("taken apart" in done.stderr) == (processes == 1)
    assert ("error: no such thing" in done.stderr) == fail


def save_regions(folder):
    unet = make_small_unet()
    barrier = Barrier(unet, BarrierConfig(targets=["attn2.to_k"], reduced_dim=2))
    barrier.setup_protection(unet_batches(), run_unet)
    barrier.save_pretrained(folder)


def save_adapter(folder):
    pipeline = build("sd")
    add_adapter(pipeline.unet, BarrierConfig(targets=["attn2.to_k"]), 2)
    for name, value in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(value)  # else it changes nothing, which is refused
    publish_adapter(pipeline, folder)


READ = {  # what is read -> (file, how its folder is made, how it is read)
    "denoiser": ("unet/diffusion_pytorch_model", lambda to: build("sd").save_pretrained(to), load_pipeline),
    "text encoder": ("text_encoder/model", lambda to: build("sd").save_pretrained(to), load_pipeline),
    "adapter": ("pytorch_lora_weights", save_adapter, lambda folder: load_adapter(build("sd"), folder)),
    "judge": (
        "model",
        lambda to: shutil.copytree(ROOT / "assets/fashion_classifier", to),
        lambda folder: ClassifierSource(folder).load(["sneaker"]),
    ),
    "classifier": ("model", lambda to: shutil.copytree(ROOT / "assets/fashion_resnet", to), load_classifier),
    "snapshot": ("barrier_snapshot", save_regions, lambda folder: Barrier.from_pretrained(folder, make_small_unet())),
}


@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_of_weights_is_named(name, tmp_path):
    file, make, read = READ[name]
    make(tmp_path / "made")
    read(str(tmp_path / "made"))
    path = tmp_path / "made" / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])  # a copy that was broken off
    with pytest.raises(ValueError, match=f"'{re.escape(str(path))}' is no whole .safetensors file"):
        read(str(tmp_path / "made"))
