"""Write docs/settings* and docs/api/* from the source: dataclass fields with their comments, docstrings.

    python docs/write_reference.py

Sub-packages, scripts and their settings are found in the folders. tests/test_docs.py fails where a page is not what
this writes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

from barrier_diffusers.utils.help_page import groups_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # page of docs/settings -> its scripts; a script that no page names is on the last one of its folder
    "unlearn": ("train_scripts/unlearn_sd.py",),
    "evaluate": ("train_scripts/evaluate_sd.py", "train_scripts/generate_sd.py", "train_scripts/report.py"),
    "restore": ("train_scripts/restore.py", "train_scripts/export.py"),
    "demo": ("train_scripts/demo.py",),
    "pipelines": ("train_scripts/run_pipeline.py", "train_scripts/sweep.py"),
    "training": ("train_scripts/*.py",),
    "classifiers": ("classification_ext/*.py",),
    "ddpm": ("ddpm_ext/*.py",),
}
EXTENSIONS = ("classification_ext", "ddpm_ext")  # one page for both
MAIN = ("Barrier", "BarrierConfig", "Certificate", "ForgetRegion", "RetainProjection")  # classes shown with methods
EXTENDS = "The adapters for image classifiers and class-conditional DDPMs."
NOTE = "*Written by `python docs/write_reference.py` from the source; change it there.*\n"


USE = """Each is a key of `--config FILE.yaml` and a flag (`--barrier.lambda_interval 1`). A flag wins over the file, a
later file over an earlier one. `null` stands for None, and numbers may be written 1e-5. A list is `'[A, B]'`, or as a
flag also its words one after another (`--attacks inversion benign`); numbers by name are
`'{A: 1, B: 2}'`. `--help` lists them, `--help-all` with every
section in full, and `--print_config` prints what would be used. Numbers out of range and contradictions are refused
in one line before any work.
"""


def api_pages() -> dict[str, list[Path]]:
    """Page of docs/api -> its modules: one for every sub-package, and one for the extensions."""
    package = ROOT / "barrier_diffusers"
    folders = sorted(folder for folder in package.iterdir() if (folder / "__init__.py").is_file())
    found = {folder.name: sorted(folder.rglob("*.py")) for folder in folders}
    found["scripts"] += sorted((ROOT / "train_scripts").glob("*.py"))
    return found | {"extensions": [path for name in EXTENSIONS for path in sorted((ROOT / name).rglob("*.py"))]}


def settings_of(script: Path) -> type | None:
    """The dataclass that a script reads its command line into; None for a module that is no script."""
    calls = [node for node in ast.walk(parsed(script)) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.args[1]) for call in calls if ast.unparse(call.func) == "run_script"]
    if not names:
        return None
    name = script.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    module = importlib.import_module(name.replace("train_scripts", "barrier_diffusers.scripts"))
    found = getattr(module, names[0])
    if not isinstance(found, type):  # a function; what it returns has the settings as `config`
        found = get_type_hints(get_type_hints(found)["return"])["config"]
    return found


@functools.cache
def settings_pages() -> dict[str, dict[str, type]]:
    """Page of docs/settings -> its scripts -> their settings."""
    found: dict[str, dict[str, type]] = {}
    taken = set[Path]()
    for page, patterns in PAGES.items():
        paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if path not in taken]
        taken |= set(paths)
        kinds = {path.relative_to(ROOT).as_posix(): settings_of(path) for path in paths}
        found[page] = {script: kind for script, kind in kinds.items() if kind is not None}
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|")


def settings_page(page: str) -> str:
    """docs/settings/<page>.md."""
    parts, shown = [f"# Settings: {page}\n", NOTE], dict[type, str]()
    for script, config_class in settings_pages()[page].items():
        module = Path(inspect.getsourcefile(config_class) or "").relative_to(ROOT).as_posix()
        parts.append(f"## {script}\n")
        if config_class in shown:
            parts.append(f"The settings of {shown[config_class]}.\n")
            continue
        shown[config_class] = script
        parts.append(f"`{config_class.__name__}` in [{module}](../../{module}).\n")
        for group in groups_of(config_class):
            parts.append(f"**{group.title}**\n\n| setting | type | default | |\n|---|---|---|---|")
            for flag in group.flags:
                default = "*needed*" if flag.default is None else f"`{cell(flag.default)}`" if flag.default else ""
                parts.append(f"| `{flag.name}` | {cell(flag.kind)} | {default} | {cell(flag.comment)} |")
            parts.append("")
    return "\n".join(parts)


def settings_index() -> str:
    """docs/settings.md."""
    parts = ["# Settings\n", NOTE, USE, "| scripts | settings |\n|---|---|"]
    for page, scripts in settings_pages().items():
        parts.append(f"| {', '.join(scripts)} | [settings/{page}.md](settings/{page}.md) |")
    return "\n".join(parts) + "\n"


def api_index() -> str:
    """docs/api.md."""
    parts = ["# Functions and classes\n", NOTE, "| page | what is there |\n|---|---|"]
    for page, modules in api_pages().items():
        init = modules[0].with_name("__init__.py") if page != "extensions" else None
        text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) if init else EXTENDS
        parts.append(f"| [api/{page}.md](api/{page}.md) | {cell(first_sentence(text))} |")
    return "\n".join(parts) + "\n"


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    """A call with the names and defaults of its parameters."""
    arguments = node.args
    arguments.posonlyargs = [arg for arg in arguments.posonlyargs if arg.arg not in ("self", "cls")]
    arguments.args = [arg for arg in arguments.args if arg.arg not in ("self", "cls")]
    for arg in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if arg is not None:
            arg.annotation = None
    return f"{name}({ast.unparse(arguments)})"


def first_sentence(docstring: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def public(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Classes and functions whose names do not begin with an underscore."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def entries(path: Path) -> Iterator[tuple[str, str]]:
    """(name or call, first sentence) of everything public in a module."""
    for node in public(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.FunctionDef):
            yield signature(node, node.name), first_sentence(ast.get_docstring(node))
            continue
        start = next((entry for entry in node.body if getattr(entry, "name", "") == "__init__"), None)
        call = signature(start, node.name) if isinstance(start, ast.FunctionDef) else node.name
        yield call, first_sentence(ast.get_docstring(node))
        if node.name in MAIN:
            for method in public(node.body):
                if isinstance(method, ast.FunctionDef):
                    attribute = any(ast.unparse(word) == "property" for word in method.decorator_list)
                    name = f"{node.name}.{method.name}"
                    yield name if attribute else signature(method, name), first_sentence(ast.get_docstring(method))


def api_page(page: str) -> str:
    """docs/api/<page>.md."""
    parts = [f"# API: {page}\n", NOTE]
    for path in api_pages()[page]:
        rows = list(entries(path))
        if rows:
            place = path.relative_to(ROOT).as_posix()
            what = first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
            parts.append(f"## [{place.removesuffix('.py').replace('/', '.')}](../../{place})\n\n{what}\n")
            parts.append("| name | |\n|---|---|")
            parts.extend(f"| `{cell(name)}` | {cell(text)} |" for name, text in rows)
            parts.append("")
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """Every page and what it should be."""
    found = {ROOT / "docs/settings.md": settings_index(), ROOT / "docs/api.md": api_index()}
    found |= {ROOT / f"docs/settings/{page}.md": settings_page(page) for page in PAGES}
    return found | {ROOT / f"docs/api/{page}.md": api_page(page) for page in api_pages()}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
