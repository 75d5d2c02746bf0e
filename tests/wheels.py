"""The package as a wheel, and a virtual environment outside the clone that has nothing of ours but the wheel."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
LIGHT = {  # flags of a run of seconds, for barrier-unlearn and for the stage `unlearn` of a workflow
    "max_train_steps": "2",
    "max_retain_images": "64",
    "evaluation.images_per_label": "2",
    "evaluation.sampling.num_inference_steps": "2",
}


def tracked():
    """Files of the repository, by their paths in it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def build_wheel(folder):
    """Path of the wheel that a copy of the tracked sources gives; nothing is written into the clone."""
    source, out = folder / "source", folder / "wheel"
    for name in tracked():
        if not name.startswith(("assets/", "tests/", "benchmarks/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, env=without_clone(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def names_in(wheel):
    """What a wheel holds."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def without_clone():
    """The environment variables of a process that finds nothing of the clone."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class Installed:
    """A virtual environment with the wheel; libraries come from this interpreter's own, which stay as they are."""

    def __init__(self, folder, wheel):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([self.program("pip"), "install", "-q", "--no-deps", "--no-index", wheel], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        # a path in a .pth file adds the folder, not that folder's own .pth files: no editable install
        (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def program(self, name):
        """Path of a command."""
        return str(self.folder / "bin" / name)

    def run(self, *words, cwd):
        """A finished process; it ran in `cwd`."""
        words = [self.program(words[0]), *map(str, words[1:])]
        return subprocess.run(words, cwd=cwd, env=without_clone(), capture_output=True, text=True)


def light_flags(prefix=""):
    """Command-line words of a run of seconds."""
    return [word for name, value in LIGHT.items() for word in (f"--{prefix}{name}", value)]
