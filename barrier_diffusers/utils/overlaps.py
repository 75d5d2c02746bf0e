"""Nothing is written where something is read: outputs and inputs of a run may not contain one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from barrier_diffusers.utils.checks import PathRule, paths_of, rules_of

OUTPUTS = ("output", "written")  # kinds of paths that a run writes
MAY_LIE_IN = {  # output -> the folders of other settings that it may lie in, but not be
    "cache_dir": ("output_dir",),
    "fidelity.cache_dir": ("output_dir",),
    "output": ("compare",),  # a report beside the run that it is about
}


def _resolved(path: Path) -> Path:
    absolute = Path(os.path.abspath(path.expanduser()))
    try:
        return absolute.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return absolute


def contains(folder: Path, path: Path) -> bool:
    """Whether a path lies in a folder or is it, by whatever links, mounts and spellings they are named. Names that
    differ in case alone count as one, as they are one on some file systems."""
    own, other = _resolved(folder), _resolved(path)
    names, others = ([part.casefold() for part in place.parts] for place in (own, other))
    if others[: len(names)] == names:
        return True
    return own.exists() and any(place.exists() and own.samefile(place) for place in (other, *other.parents))


def check_overlaps(config: Any, made: Sequence[Path] = ()) -> None:
    """Refuse settings of which an output equals, contains or lies in an input or another output.

    Args:
        config: a settings dataclass.
        made: folders that the run makes itself; what is read there is an input of a later stage.

    Raises:
        ValueError: names both settings.
    """
    found = [(name, value, rule, local_path(rule, value)) for name, value, rule in paths_of(config)]
    named = [(name, value, rule, path) for name, value, rule, path in found if path is not None]
    outputs = [(name, value, path) for name, value, rule, path in named if rule.kind in OUTPUTS]
    inputs = [
        (name, value, path)
        for name, value, rule, path in named
        if rule.kind not in OUTPUTS and not any(contains(folder, path) for folder in made)
    ]
    for index, (name, value, path) in enumerate(outputs):
        for other, its_value, its_path in [*outputs[:index], *inputs]:
            how = _overlap(name, path, other=other, its_path=its_path)
            if how:
                raise ValueError(
                    f"{name} {value!r} {how} {other} {its_value!r}: nothing is written where something else is "
                    f"written or read; name another {name}"
                )


def refuse_inside(config: Any, folder: Path, made: Sequence[Path]) -> None:
    """Refuse inputs that lie in the folder of a whole workflow and that no stage makes.

    Raises:
        ValueError: names the setting.
    """
    for name, value, rule in paths_of(config):
        path = local_path(rule, value)
        if path is None or rule.kind in OUTPUTS or any(contains(own, path) for own in made):
            continue
        if contains(folder, path):
            raise ValueError(f"{name} {value!r} lies in output_dir {str(folder)!r}: name another output_dir")


def _overlap(name: str, path: Path, other: str, its_path: Path) -> str | None:
    inside, around = contains(its_path, path), contains(path, its_path)
    if inside and around:
        return "is the same as"
    if inside:
        return None if other in MAY_LIE_IN.get(name, ()) else "lies in"
    if around:
        return None if name in MAY_LIE_IN.get(other, ()) else "contains"
    return None


def local_path(rule: PathRule, value: str) -> Path | None:
    """The path that a value names, or would name if there were such a file: a hub id means a folder once there is
    one. None for a value that never means a path."""
    named = value.partition(rule.after)[2] if rule.after else value
    return Path(named).expanduser() if named else None


def expand_outputs(config: Any) -> None:
    """Replace `~` in the paths that a run writes."""
    kind: Any = type(config)
    rules = rules_of(kind)
    for field in fields(config):
        value, rule = getattr(config, field.name), rules.get(field.name)
        if is_dataclass(value) and not isinstance(value, type):
            expand_outputs(value)
        elif isinstance(rule, PathRule) and rule.kind in OUTPUTS and isinstance(value, str):
            setattr(config, field.name, os.path.expanduser(value))
