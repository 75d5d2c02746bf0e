"""The map of the package: rooms, and imports that run downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "barrier_diffusers"
ROOMS = "utils protection objectives models data training evaluation workflow scripts".split()  # bottom to top
ALONE = {"protection": {"utils"}}  # sub-packages that may import fewer than all below them


def imported_modules(source, package):
    """Absolute names of all modules that a source may import, in whichever form."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            )


def upward_imports(source, path):
    """Modules above the sub-package that `path` (relative to the package) lies in."""
    room = path.parts[0]
    allowed = ALONE.get(room, set(ROOMS[: ROOMS.index(room)])) | {room}
    package = ".".join(["barrier_diffusers", *path.parent.parts])
    for name in imported_modules(source, package):
        parts = name.split(".")
        if parts[0] == "barrier_diffusers":
            if len(parts) > 1 and parts[1] in ROOMS and parts[1] not in allowed:
                yield name
            elif len(parts) == 1 or parts[1] not in (*ROOMS, "__version__"):
                yield name  # the root knows all sub-packages
        elif parts[0] in ("classification_ext", "ddpm_ext", "train_scripts"):
            yield name


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_imports_run_downwards(path):
    assert not list(upward_imports(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE)))


@pytest.mark.parametrize(
    "source",
    [
        "from barrier_diffusers.training.steps import StepMaker",
        "import barrier_diffusers.training.steps",
        "from barrier_diffusers import training",
        "from barrier_diffusers.training import steps",
        "from ..training import steps",
        "from .. import training",
        "def late():\n    import barrier_diffusers.training.steps as steps",
        "import importlib\nimportlib.import_module('barrier_diffusers.training.steps')",
        "from barrier_diffusers import Barrier",
    ],
)
def test_every_form_of_an_upward_import_is_seen(source):
    assert list(upward_imports(source, Path("protection/loss.py")))
    assert not list(upward_imports("from barrier_diffusers.utils.files import remove", Path("protection/loss.py")))


def test_helpers_of_tests_are_no_tests():
    for path in Path(__file__).parent.glob("*.py"):
        found = [name for name in imported_modules(path.read_text(encoding="utf-8"), "") if name.startswith("test_")]
        assert not found, f"{path.name} imports {found[0]}: what two tests need is in a module of its own"


def test_the_top_level_is_small():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__pycache__"}
    assert set(ROOMS) <= entries and len(entries) <= 10


def test_protection_needs_torch_alone():
    code = (
        "import sys, barrier_diffusers.protection.barrier, barrier_diffusers.protection.certificate\n"
        "heavy = {'datasets', 'jsonargparse', 'matplotlib', 'sklearn', 'torchmetrics'}\n"
        "print(*(heavy & set(sys.modules)))\n"
        "print(*(name for name in sys.modules if name.startswith('barrier_diffusers.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, ours = (line.split() for line in done.stdout.split("\n")[:2])
    assert not heavy
    assert all(name.split(".")[1] in ("protection", "utils") for name in ours)


BLOCKED = ("peft", "transformers", "accelerate", "datasets", "diffusers", "jsonargparse", "matplotlib")


def test_protection_works_with_torch_alone():
    """Protects a bare module where no other library can be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        "import torch\n"
        "from barrier_diffusers import Barrier, BarrierConfig\n"
        "net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))\n"
        "barrier = Barrier(net, BarrierConfig(targets=['Linear'], reduced_dim=2))\n"
        "barrier.setup_protection([torch.randn(9, 6)], lambda model, batch: model(batch))\n"
        "torch.nn.init.normal_(net[2].weight)\n"
        "loss = barrier.compute_protection_loss()\n"
        "loss.backward()\n"
        "assert loss > 0 and net[2].weight.grad.any()\n"
        "assert barrier.certify([torch.randn(9, 6)] * 40, lambda model, batch: model(batch)).holds\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
