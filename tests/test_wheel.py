"""The wheel holds all that a user needs, and what it holds works without a clone."""

import importlib
import json
import tomllib

import pytest
import wheels
from wheels import ROOT, light_flags

from barrier_diffusers.utils.installation import named_file, resolve_named_files, shipped

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return wheels.build_wheel(tmp_path_factory.mktemp("wheel"))


def in_wheel(name):
    """Where a tracked file lies in the wheel; None for what stays in the clone."""
    folder = name.partition("/")[0]
    if folder not in ("barrier_diffusers", "classification_ext", "ddpm_ext", "train_scripts") or name.endswith(".md"):
        return None
    return name.replace("train_scripts/", "barrier_diffusers/scripts/")


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    expected = {in_wheel(name) for name in wheels.tracked()} - {None}
    assert "barrier_diffusers/scripts/configs/fashion_class.yaml" in expected
    assert "barrier_diffusers/py.typed" in expected and "ddpm_ext/configs/unlearn_fashion.yaml" in expected
    assert {name for name in wheels.names_in(wheel) if ".dist-info/" not in name} == expected


def test_every_console_command_leads_to_a_function():
    scripts = sorted((ROOT / "train_scripts").glob("*.py"))
    commands = [path.stem for path in scripts if "def command(" in path.read_text(encoding="utf-8")]
    assert sorted(PROJECT["scripts"].values()) == [f"barrier_diffusers.scripts.{name}:command" for name in commands]
    for where in PROJECT["scripts"].values():
        module, _, function = where.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_configurations_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, path = ROOT / "classification_ext", "train_scripts/configs/fashion_class.yaml"
    found = resolve_named_files(["--config", "fashion_class", "--seed", "1"], folder)
    assert found == ["--config", str(folder / "configs/fashion_class.yaml"), "--seed", "1"]
    assert resolve_named_files([f"--config={path}"], folder) == [f"--config={ROOT / path}"]
    sweep = ROOT / "train_scripts/sweeps/fashion_class.yaml"
    assert resolve_named_files(["--sweep", "fashion_class"], ROOT / "train_scripts") == ["--sweep", str(sweep)]
    (tmp_path / "fashion_class").write_text("seed: 1\n")  # a file of the user's own comes first
    assert named_file("fashion_class", folder / "configs") == "fashion_class"
    with pytest.raises(ValueError, match="there is no file 'fashion_clas'; by their names .*fashion_class"):
        named_file("fashion_clas", folder / "configs")


def test_scripts_are_found_in_a_clone_and_in_an_installation(tmp_path):
    assert shipped("train_scripts/unlearn_sd.py") == ROOT / "train_scripts/unlearn_sd.py"
    assert shipped("ddpm_ext/unlearn.py", tmp_path) == tmp_path / "ddpm_ext/unlearn.py"
    assert shipped("train_scripts/unlearn_sd.py", tmp_path) == tmp_path / "barrier_diffusers/scripts/unlearn_sd.py"


def test_one_version_of_python_is_named():
    wanted = PROJECT["requires-python"].removeprefix(">=")
    for page in ("README.md", "docs/quickstart.md"):
        assert f"Python {wanted}" in (ROOT / page).read_text(encoding="utf-8"), page


@pytest.mark.slow
def test_without_a_clone(wheel, tmp_path):
    installed = wheels.Installed(tmp_path / "environment", wheel)
    here = tmp_path / "elsewhere"
    here.mkdir()
    unlearn = ("barrier-unlearn", "--config", "fashion_class", "--output_dir", "out", *light_flags())
    refused = installed.run(*unlearn, cwd=here)
    assert refused.returncode and "copy its assets folder here" in refused.stderr and not (here / "out").exists()

    (here / "assets").symlink_to(ROOT / "assets")
    done = installed.run(*unlearn, cwd=here)
    assert done.returncode == 0 and "unlearning accuracy" in done.stdout, done.stderr
    where = installed.run("python", "-c", "import barrier_diffusers; print(barrier_diffusers.__file__)", cwd=here)
    assert where.stdout.startswith(str(tmp_path))

    launched = installed.run(
        *("python", "-m", "accelerate.commands.launch", "-m", "barrier_diffusers.scripts.unlearn_sd"),
        *("--config", "fashion_class", "--output_dir", "again", *light_flags()),
        cwd=here,
    )
    assert launched.returncode == 0, launched.stderr
    losses = [json.loads((here / name / "manifest.json").read_text())["history"] for name in ("out", "again")]
    assert losses[0] == losses[1] and losses[0]

    for command in PROJECT["scripts"]:
        shown = installed.run(command, "--help", cwd=here)
        assert shown.returncode == 0 and "usage" in shown.stdout.casefold(), (command, shown.stderr)
    report = installed.run("barrier-report", "--compare", "out", "again", "--output", "both.html", cwd=here)
    assert report.returncode == 0 and (here / "both.html").is_file()

    workflow = installed.run(
        *("barrier-workflow", "--config", "pipeline_fashion_class", "--output_dir", "whole", "--stages", "[unlearn]"),
        *light_flags("unlearn."),
        cwd=here,
    )
    assert workflow.returncode == 0 and (here / "whole/unlearn/metrics.json").is_file(), workflow.stderr
    trials = ("--output_dir", "trials", "--dry_run", "true")
    sweep = installed.run("barrier-sweep", "--sweep", "fashion_class", *trials, cwd=here)
    assert sweep.returncode == 0 and "4 trials" in sweep.stdout, sweep.stderr
