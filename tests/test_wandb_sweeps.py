"""barrier-sweep --wandb true: a sweep on wandb's server, and an agent of it, from one command."""

import os
import subprocess
import sys

import pytest
from short_runs import ROOT
from sweep_files import write
from wandb_server import sweep_server

from barrier_diffusers.workflow.sweep_file import read_sweep
from barrier_diffusers.workflow.sweeps import SweepConfig
from barrier_diffusers.workflow.wandb_sweeps import check_wandb, wandb_content

pytest.importorskip("wandb")
WORKFLOW = ROOT / "train_scripts/configs/pipeline_fashion_class.yaml"


def sweep_file(tmp_path, *more, **changes):
    command = ["${env}", "${interpreter}", "${program}", "--config", str(WORKFLOW)]
    command += [f"--output_dir={tmp_path}/trials/{{hash}}", *more, "${args}"]
    parameters = {
        "unlearn.learning_rate": {"values": [1.0e-4, 3.0e-4]},
        "unlearn.barrier.targets": {"value": ["attn2.to_k"]},
    }
    return write(tmp_path / "sweep.yaml", parameters=parameters, command=command, **changes)


def test_what_wandb_is_given_runs_anywhere_and_logs_to_it(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    content = wandb_content(sweep, ROOT)
    assert (
        content["program"] == str(ROOT / "train_scripts/run_pipeline.py") and content["project"] == "barrier_diffusers"
    )
    assert content["command"][:3] == ["${env}", sys.executable, "${program}"]
    assert content["command"][-3:] == ["--track.report_to=wandb", "--track.project=barrier_diffusers", "${args}"]
    assert {name: content[name] for name in ("method", "metric", "parameters")} == {
        name: sweep.content[name] for name in ("method", "metric", "parameters")
    }
    own = read_sweep(sweep_file(tmp_path, "--track.report_to", "all", "--track.project=mine", project="mine"))
    words = wandb_content(own, ROOT)["command"]
    assert words[-4:] == ["--track.report_to", "all", "--track.project=mine", "${args}"]
    assert "${interpreter}" in sweep.content["command"]  # what was read stays as it is


def test_trials_that_tell_wandb_nothing_are_refused():
    check_wandb(["--track.report_to", "wandb"])
    for words in (["--track.report_to", "tensorboard"], ["--track.report_to=none"]):
        with pytest.raises(ValueError, match="so wandb would see no metric"):
            check_wandb(words)


def test_settings_that_contradict_one_another():
    with pytest.raises(ValueError, match="wandb_sweep is a sweep on wandb's server: set wandb"):
        SweepConfig(sweep="s", output_dir="o", wandb_sweep="abc")
    with pytest.raises(ValueError, match="trade_off is drawn of trials in output_dir"):
        SweepConfig(sweep="s", output_dir="o", wandb=True, trade_off=["a", "b"])


def run_script(tmp_path, variables, *more):
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        environment[name] = str(tmp_path)
    file = sweep_file(tmp_path, "--dry_run=true")
    words = ["--sweep", file, "--output_dir", str(tmp_path / "out"), "--wandb", "true", *more]
    command = [sys.executable, "train_scripts/sweep.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_one_command_creates_a_sweep_and_runs_a_trial_of_it(tmp_path):
    with sweep_server() as (server, variables):
        done = run_script(tmp_path, variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"UpsertSweep", "CreateAgent", "Heartbeat"} <= set(server.seen)
    assert server.config["parameters"]["unlearn.learning_rate"]["values"] == [1.0e-4, 3.0e-4]
    assert "add --wandb_sweep barrier_diffusers/a-sweep" in done.stdout
    assert "unlearn: " in done.stdout and "train_scripts/unlearn_sd.py" in done.stdout  # what the trial would run


@pytest.mark.slow
def test_a_machine_joins_a_sweep_and_without_an_account_nothing_starts(tmp_path):
    with sweep_server() as (server, variables):
        server.config = wandb_content(read_sweep(sweep_file(tmp_path, "--dry_run=true")), ROOT)
        done = run_script(tmp_path, variables, "--wandb_sweep", "a-sweep")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UpsertSweep" not in server.seen and "train_scripts/unlearn_sd.py" in done.stdout
    nobody = run_script(tmp_path, {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"), "WANDB_MODE": "online"})
    assert nobody.returncode == 1 and "error: " in nobody.stderr and "Traceback" not in nobody.stderr
