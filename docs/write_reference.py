"""Write docs/settings* and docs/api/* from the source: dataclass fields with their comments, docstrings.

    python docs/write_reference.py

Nothing is imported. tests/test_docs.py fails where a page is not what this writes.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {  # page of docs/settings -> script -> (module with its settings, class)
    "unlearn": {"train_scripts/unlearn_sd.py": ("barrier_diffusers/workflow/settings.py", "UnlearnConfig")},
    "evaluate": {"train_scripts/evaluate_sd.py": ("barrier_diffusers/evaluation/settings.py", "EvaluateConfig")},
    "pipelines": {
        "train_scripts/run_pipeline.py": ("barrier_diffusers/workflow/workflow.py", "WorkflowConfig"),
        "train_scripts/sweep.py": ("barrier_diffusers/workflow/sweeps.py", "SweepConfig"),
    },
    "classifiers": {
        "classification_ext/train.py": ("classification_ext/settings.py", "TrainConfig"),
        "classification_ext/unlearn.py": ("classification_ext/settings.py", "UnlearnConfig"),
        "classification_ext/evaluate.py": ("classification_ext/settings.py", "EvaluateConfig"),
    },
    "ddpm": {
        "ddpm_ext/train.py": ("ddpm_ext/settings.py", "TrainConfig"),
        "ddpm_ext/unlearn.py": ("ddpm_ext/settings.py", "UnlearnConfig"),
        "ddpm_ext/evaluate.py": ("ddpm_ext/settings.py", "EvaluateConfig"),
    },
    "training": {
        "train_scripts/train_text_to_image.py": ("train_scripts/train_text_to_image.py", "TrainConfig"),
        "train_scripts/train_classifier.py": ("train_scripts/train_classifier.py", "ClassifierConfig"),
    },
}
EXTENSIONS = ("classification_ext", "ddpm_ext")  # one page for both
MAIN = ("Barrier", "BarrierConfig", "Certificate", "ForgetRegion", "RetainProjection")  # classes shown with methods
EXTENDS = "The adapters for image classifiers and class-conditional DDPMs."
NOTE = "*Written by `python docs/write_reference.py` from the source; change it there.*\n"


USE = """Each is a key of `--config FILE.yaml` and a flag (`--barrier.lambda_interval 1`). A flag wins over the file, a
later file over an earlier one. `null` stands for None, and numbers may be written 1e-5. A list is `'[A, B]'`, or as a
flag also its words one after another (`--attacks inversion benign`); numbers by name are
`'{A: 1, B: 2}'`. `--help` lists the same, and `--print_config` prints what would be used. Contradictions are refused
in one line before any work.
"""


def api_pages() -> dict[str, list[Path]]:
    """Page of docs/api -> its modules: one for every sub-package, and one for the extensions."""
    package = ROOT / "barrier_diffusers"
    folders = sorted(folder for folder in package.iterdir() if (folder / "__init__.py").is_file())
    found = {folder.name: sorted(folder.rglob("*.py")) for folder in folders}
    found["scripts"] += sorted((ROOT / "train_scripts").glob("*.py"))
    return found | {"extensions": [path for name in EXTENSIONS for path in sorted((ROOT / name).rglob("*.py"))]}


@functools.cache
def classes() -> dict[tuple[str, str], tuple[ast.ClassDef, list[str]]]:
    """(module path, class name) -> (class, lines of its module) of all dataclasses that may hold settings."""
    sources = [path for paths in api_pages().values() for path in paths]
    found = {}
    for path in (*sources, *sorted((ROOT / "train_scripts").glob("*.py"))):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                found[path.relative_to(ROOT).as_posix(), node.name] = node, text.splitlines()
    return found


def comment_of(field: ast.AnnAssign, lines: list[str]) -> str:
    """What stands above a field and behind it."""
    above = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    end = lines[(field.end_lineno or field.lineno) - 1][field.end_col_offset or 0 :]
    behind = end.split("#", 1)[1].strip() if "#" in end else ""
    return "; ".join(part for part in (" ".join(above), behind) if part)


def default_of(field: ast.AnnAssign) -> str:
    """The default as it is written, factories opened; empty where the setting is required."""
    value = field.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        factory = next(word.value for word in value.keywords if word.arg in ("default_factory", "default"))
        if isinstance(factory, ast.Lambda):
            return ast.unparse(factory.body)
        return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory), "")
    return "*required*" if value is None else ast.unparse(value)


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|")


class Settings:
    """The fields of a script's dataclass, those of nested ones under dotted names."""

    def __init__(self) -> None:
        self.classes = classes()

    def find(self, module: str, name: str) -> tuple[str, ast.ClassDef, list[str]] | None:
        """A class by name: of the module itself, else of the one place that has it."""
        if (module, name) in self.classes:
            return module, *self.classes[module, name]
        places = [key for key in self.classes if key[1] == name and key[0].split("/")[0] in ("barrier_diffusers",)]
        return (places[0][0], *self.classes[places[0]]) if places else None

    def rows(self, module: str, name: str, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
        """(dotted name, type, default, comment) of every field, bases first."""
        found = self.find(module, name)
        if found is None:
            return
        place, node, lines = found
        for base in reversed(node.bases):
            yield from self.rows(place, ast.unparse(base), prefix)
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            kind, dotted = ast.unparse(field.annotation), f"{prefix}{field.target.id}"
            if self.find(place, kind) is not None:
                yield from self.rows(place, kind, f"{dotted}.")
            else:
                yield dotted, kind, default_of(field), comment_of(field, lines)
        if any(ast.unparse(decorator) == "with_own_sections" for decorator in node.decorator_list):
            for section, (module_of_section, settings) in own_sections().items():
                yield from self.rows(module_of_section, settings, f"{section}.")


def own_sections() -> dict[str, tuple[str, str]]:
    """Section of EvaluateConfig -> (module, settings class), of every attack and protocol registered with settings."""
    found = {}
    for path in api_pages()["evaluation"]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("register_attack", "register_protocol"):
                    name, *settings = (ast.unparse(word) for word in call.args)
                    if settings:
                        found[ast.literal_eval(name)] = path.relative_to(ROOT).as_posix(), settings[0]
    return found


def settings_page(page: str) -> str:
    """docs/settings/<page>.md."""
    parts, settings = [f"# Settings: {page}\n", NOTE], Settings()
    for script, (module, name) in SETTINGS[page].items():
        if not (ROOT / script).is_file():
            continue
        last = {row[0]: row for row in settings.rows(module, name)}  # a subclass's field comes after its base's
        parts.append(f"## {script}\n\n`{name}` in [{module}](../../{module}).\n")
        parts.append("| setting | type | default | |\n|---|---|---|---|")
        for dotted, kind, default, comment in last.values():
            given = default if default == "*required*" or not default else f"`{cell(default)}`"
            parts.append(f"| `{dotted}` | `{cell(kind)}` | {given} | {cell(comment)} |")
        parts.append("")
    return "\n".join(parts)


def settings_index() -> str:
    """docs/settings.md."""
    parts = ["# Settings\n", NOTE, USE, "| scripts | settings |\n|---|---|"]
    for page, scripts in SETTINGS.items():
        names = ", ".join(script for script in scripts if (ROOT / script).is_file())
        parts.append(f"| {names} | [settings/{page}.md](settings/{page}.md) |")
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
    found |= {ROOT / f"docs/settings/{page}.md": settings_page(page) for page in SETTINGS}
    return found | {ROOT / f"docs/api/{page}.md": api_page(page) for page in api_pages()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
