"""Where the files that come with the package lie, in a clone or installed: scripts, configurations, sweeps.

A wheel holds train_scripts/ as barrier_diffusers/scripts/. The embedded models and images of assets/ are too large
for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the clone, or the folder that holds the installed packages
SCRIPTS = "train_scripts"
FOLDERS = {"--config": "configs", "--sweep": "sweeps"}  # flag -> folder beside a script with files of that kind


def shipped(path: str, root: Path = ROOT) -> Path:
    """A file or folder by its path in the repository ("train_scripts/unlearn_sd.py"), wherever the package lies.

    Args:
        root: of the clone, or the folder that holds the installed packages.
    """
    first, _, rest = path.partition("/")
    if first == SCRIPTS and not (root / SCRIPTS).is_dir():
        return root / "barrier_diffusers" / "scripts" / rest
    return root / path


def named_file(value: str, folder: Path) -> str:
    """The file that `value` means: a file that there is, one in `folder` by its name alone ("fashion_class"), or one
    of the package by its path in the repository.

    Raises:
        ValueError: there is no such file; the message lists those of the folder.
    """
    if Path(value).expanduser().is_file():
        return value
    for path in (folder / value, folder / f"{value}.yaml", shipped(value)):
        if path.is_file():
            return str(path)
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"there is no file {value!r}" + (f"; by their names alone there are {names}" if names else ""))


def resolve_named_files(arguments: list[str], folder: Path) -> list[str]:
    """Command-line words in which every `--config` and `--sweep` names a file that there is.

    Args:
        folder: of the script that the words are for.

    Raises:
        ValueError: a file that is neither there nor comes with the package.
    """
    resolved = list[str]()
    for word in arguments:
        flag, equals, value = word.partition("=")
        if equals and flag in FOLDERS:
            word = f"{flag}={named_file(value, folder / FOLDERS[flag])}"
        elif resolved and resolved[-1] in FOLDERS:
            word = named_file(word, folder / FOLDERS[resolved[-1]])
        resolved.append(word)
    return resolved


NO_ASSETS = (
    "; there is no folder 'assets' here: the embedded models and images belong to the repository and are too large "
    "for the package, so run this in a clone, or copy its assets folder here"
)


def where_assets_are(message: str) -> str:
    """What to add to an error message about one of the embedded models or images, where there are none."""
    return NO_ASSETS if "'assets/" in message and not Path("assets").exists() else ""


def require_assets(config: Any) -> None:
    """Refuse settings that name the embedded models or images where there are none.

    Raises:
        ValueError: says which setting.
    """
    if Path("assets").exists():
        return
    for name, value in _strings(config):
        if value.startswith("assets/") and not name.rpartition(".")[2].startswith("output"):
            raise ValueError(f"{name} is {value!r}")


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of all strings in nested dataclasses, mappings and lists."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _strings(element, name)
    elif isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type)):
        parts = (
            value if isinstance(value, Mapping) else {each.name: getattr(value, each.name) for each in fields(value)}
        )
        for key, part in parts.items():
            yield from _strings(part, f"{name}.{key}" if name else str(key))
