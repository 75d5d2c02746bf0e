"""A pipeline of two scripts that take no time: what runs stages is tested with it, apart from what the stages do.

What ran is noted in the file that LIGHT_TRACE names.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from short_runs import ROOT

from barrier_diffusers.utils.checks import FILE_OR_FOLDER, FOLDER, rules
from barrier_diffusers.workflow.definitions import WORKFLOWS
from barrier_diffusers.workflow.stages import Stage

TRAIN = """import json, os, sys, time
config = json.load(open(sys.argv[sys.argv.index("--config") + 1]))
os.makedirs(config["output_dir"], exist_ok=True)
with open(os.environ["LIGHT_TRACE"], "a") as file:
    print("unlearn", config["learning_rate"], config["resume_from_checkpoint"], file=file)
if config["learning_rate"] < 0:
    print("Traceback ...\\nerror: the learning rate is below 0\\nbye")
    sys.exit(1)
if config["sleep"] and config["resume_from_checkpoint"] is None:
    os.makedirs(config["output_dir"] + "/checkpoints/step-1")
    with open(os.environ["LIGHT_TRACE"], "a") as file:
        print("pid", os.getpid(), file=file)
    time.sleep(config["sleep"])
with open(config["output_dir"] + "/weights", "w") as file:
    file.write(str(config["learning_rate"]))
with open(config["output_dir"] + "/metrics.json", "w") as file:
    json.dump({"loss": config["learning_rate"] ** 2}, file)
"""
JUDGE = """import json, os, sys
config = json.load(open(sys.argv[sys.argv.index("--config") + 1]))
os.makedirs(config["output_dir"], exist_ok=True)
with open(os.environ["LIGHT_TRACE"], "a") as file:
    print("evaluate", config["concept"], config["model"], file=file)
rate = float(open(config["model"] + "/weights").read())
erased = {"unlearning_accuracy": rate * 10 + config["bonus"], "retain_accuracy_drop": rate, "settings": {"a": 1}}
with open(config["output_dir"] + "/evaluation.json", "w") as file:
    json.dump({"classes": erased, "attacks": [{"attack": "inversion", "post": {"value": 3}}]}, file)
"""


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of the first script."""

    output_dir: str
    learning_rate: float = 1.0
    targets: list[str] | None = None
    data: str | None = None
    concept: str
    sleep: float = 0.0
    report_to: str = "none"
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False

    RULES = rules(data=FILE_OR_FOLDER)


@dataclass(kw_only=True)
class JudgeConfig:
    """Settings of the second."""

    output_dir: str
    model: str
    concept: str
    bonus: float = 0.0

    RULES = rules(model=FOLDER)


LIGHT = (
    Stage(
        name="unlearn",
        script="train_scripts/train.py",
        settings="light_stages:TrainConfig",
        result="metrics.json",
        metrics=("loss",),
    ),
    Stage(
        name="evaluate",
        script="train_scripts/judge.py",
        settings="light_stages:JudgeConfig",
        result="evaluation.json",
        metrics=("classes.unlearning_accuracy", "classes.retain_accuracy_drop", "attacks.*"),
        filled=frozenset(("output_dir", "model")),
        fill=lambda plan: {"model": str(plan.unlearned)},
        shared={"concept": "unlearn.concept"},
    ),
)


def install(root):
    """Make the two scripts the kind "sd" of pipelines, in a repository of their own."""
    WORKFLOWS["sd"] = LIGHT
    folder = Path(root) / "train_scripts"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.py").is_file():
        (folder / "judge.py").write_text(JUDGE)
        (folder / "train.py").write_text(TRAIN)
    return Path(root)


IMAGENETTE = ["tench", "English springer", "cassette player", "chain saw", "church"]
IMAGENETTE += ["French horn", "garbage truck", "gas pump", "golf ball", "parachute"]
CONFIGS = sorted((ROOT / "train_scripts" / "configs").glob("pipeline_*.yaml"))


def wait_for(condition, seconds=20):
    """Return when condition() holds; it must within these seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stand_ins(text):
    """Empty files and folders in place of the data that a configuration for real models names."""
    for name in sorted(set(re.findall(r"data/[\w.-]+", text))):
        path = Path(name)
        if path.suffix:
            path.parent.mkdir(exist_ok=True)
            path.write_text("case_number,prompt\n0,a dog\n")
        else:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").write_text(json.dumps({"attributes": {"class": IMAGENETTE}}))


def enter_repository(config, folder, monkeypatch):
    """A folder from which the paths of a configuration lead somewhere."""
    monkeypatch.chdir(folder)
    for name in ("assets", "train_scripts"):
        (folder / name).symlink_to(ROOT / name)
    if "ddpm" in config.stem and not (ROOT / "ddpm_ext/unlearn.py").is_file():
        pytest.skip("no DDPM scripts")
    if "fashion" not in config.stem:
        stand_ins(config.read_text())
