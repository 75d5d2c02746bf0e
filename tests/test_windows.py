"""What only some systems have is not needed to import anything of ours."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORT_ALL = """
import importlib, pkgutil, sys

OURS = ("barrier_diffusers", "classification_ext", "ddpm_ext")

def import_all():
    for package in OURS:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            importlib.import_module(module.name)

import_all()  # the libraries are for this system
for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios"):  # which Windows does not have
    sys.modules[name] = None
import_all()
"""


def test_everything_imports_without_the_modules_that_windows_lacks():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
