"""The SLURM files: bash reads them, shellcheck finds nothing, and a job that is stopped goes back in the queue."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from short_runs import ROOT

FOLDER = ROOT / "train_scripts" / "slurm"
FILES = sorted(FOLDER.glob("*.sbatch"))
JOB = """import signal, sys, time
if "--fail" in sys.argv:
    sys.exit(3)
def stop(*_):
    print("checkpoint", flush=True)
    time.sleep(0.3)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(30 if "--long" in sys.argv else 0)
print("done")
"""


@pytest.fixture
def submit(tmp_path):
    """A function that starts a file as SLURM would, in a repository of its own, with a scontrol that only notes."""
    for folder in ("train_scripts/slurm", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    for path in FILES:
        shutil.copy(path, tmp_path / "train_scripts" / "slurm")
    for name in ("job.py", "sweep.py"):
        (tmp_path / "train_scripts" / name).write_text(JOB)
    (tmp_path / "bin/scontrol").write_text('#!/bin/sh\necho "$@" >> "$SLURM_SUBMIT_DIR/requeued"\n')
    (tmp_path / "bin/scontrol").chmod(0o755)

    def start(name, *arguments, **variables):
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "PYTHON": sys.executable,
            **variables,
        }
        command = ["bash", str(FOLDER / name), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd="/", **pipes)

    start.requeued = tmp_path / "requeued"
    return start


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_jobs_are_resumable_and_name_nobodys_machine(path):
    text = path.read_text()
    options = re.findall("^#SBATCH --(.*)$", text, re.M)
    assert "requeue" in options and "open-mode=append" in options and "signal=B:TERM@180" in options
    assert not re.search(r"(?<![\w.\]/}])/(home|scratch|users|mnt|data|work|root)\b", text)
    assert not [option for option in options if option.startswith(("partition", "account", "mail"))]


def test_dry_run(submit):
    job = submit("sweep.sbatch", "--sweep", "a b.yaml", DRY_RUN="1")
    out, _ = job.communicate(timeout=20)
    assert shlex.split(out) == [sys.executable, "train_scripts/sweep.py", "--sweep", "a b.yaml"]
    assert job.returncode == 0


def test_a_job_that_ends_is_not_requeued(submit):
    job = submit("run.sbatch", "train_scripts/job.py", SLURM_JOB_ID="7")
    assert job.communicate(timeout=20)[0] == "ready\ndone\n" and job.returncode == 0
    assert not submit.requeued.exists()


def test_a_job_that_fails_is_not_requeued(submit):
    job = submit("run.sbatch", "train_scripts/job.py", "--fail", SLURM_JOB_ID="7")
    job.communicate(timeout=20)
    assert job.returncode == 3 and not submit.requeued.exists()


ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.mark.parametrize(
    ("name", "variables", "wanted"), [("run.sbatch", {}, "requeue 9"), ("sweep.sbatch", ARRAY, "requeue 7_2")]
)
def test_a_job_whose_time_is_over_writes_its_checkpoint_and_is_requeued(name, variables, wanted, submit):
    script = ["train_scripts/job.py"] if name == "run.sbatch" else []
    job = submit(name, *script, "--long", SLURM_JOB_ID="9", **variables)
    assert job.stdout.readline() == "ready\n"
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=20)
    assert out == "checkpoint\n" and job.returncode == 0, err
    assert submit.requeued.read_text() == wanted + "\n"


@pytest.mark.parametrize("words", [[], ["no/such/script.py"]])
def test_what_is_missing_is_said(words, submit):
    job = submit("run.sbatch", *words)
    _, err = job.communicate(timeout=20)
    assert job.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1
