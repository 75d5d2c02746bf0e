"""What each setting may be, declared beside the fields of its dataclass and checked before any work.

A settings dataclass names a rule for each number, name and path among its fields:

    @dataclass
    class SamplingConfig(Checked):
        num_inference_steps: int = 20
        batch_size: int = 100

        RULES = rules(num_inference_steps=at_least(1), batch_size=at_least(1))

Rules of base classes count as well. They are checked when the dataclass is made, and on a command line before that,
where the message has the setting's dotted name. Paths are looked at by `check_paths`, once the settings are complete.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from barrier_diffusers.utils.files import can_write_in


class Rule:
    """What a value must satisfy, here nothing; a list or a mapping satisfies it if each of its values does."""

    def refusal(self, value: Any) -> str | None:
        """What is wrong with the value, to follow "NAME is VALUE, but"; None if nothing is."""
        return None


@dataclass(frozen=True)
class Range(Rule):
    """A finite number between two ends."""

    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def refusal(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None  # a word or a flag; the type is checked elsewhere
        inside = self.low <= value <= self.high and math.isfinite(value)
        ends = self.without_low and value == self.low or self.without_high and value == self.high
        return None if inside and not ends else f"must be {self}"

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        if math.isinf(self.high):
            return f"> {self.low:g}" if self.without_low else f"at least {self.low:g}"
        if math.isinf(self.low):
            return f"< {self.high:g}" if self.without_high else f"at most {self.high:g}"
        return f"in {'(' if self.without_low else '['}{self.low:g}, {self.high:g}{')' if self.without_high else ']'}"


def at_least(low: float) -> Range:
    """A number from `low` on."""
    return Range(low)


ABOVE_0 = Range(0, without_low=True)  # > 0
SHARE = Range(0, 1)  # both ends included
INNER_SHARE = Range(0, 1, without_low=True, without_high=True)
SEED = Range(0, 2**32 - 1)  # what numpy takes
ANY_NUMBER = Range()


@dataclass(frozen=True)
class OneOf(Rule):
    """A name from a list.

    Args:
        names: or a function that gives them, where they may be registered later.
    """

    names: Sequence[str] | Callable[[], Sequence[str]]

    def refusal(self, value: Any) -> str | None:
        names = self.names() if callable(self.names) else self.names
        return None if value in names else f"must be one of {', '.join(names)}"


@dataclass(frozen=True)
class Tracker(Rule):
    """A tracker of accelerate that can log here; `all` stands for those that are installed."""

    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}

    def refusal(self, value: Any) -> str | None:
        wanted = list(self.packages) if value == "all" else [value] if value in self.packages else []
        installed = [
            name for name in wanted if any(importlib.util.find_spec(package) for package in self.packages[name])
        ]
        if not wanted or installed:
            return None
        return f"{' and '.join(wanted)} cannot log here: pip install {' or '.join(wanted)}, or set it to none"


def require_wandb(artifact: bool, report_to: str, setting: str) -> None:
    """A ValueError where a result is to be an artifact, but no tracker that keeps such is asked for.

    Args:
        setting: that names the tracker.
    """
    if artifact and (report_to not in ("wandb", "all") or not importlib.util.find_spec("wandb")):
        raise ValueError(f"only wandb keeps artifacts: set {setting} to wandb (pip install wandb), or leave it out")


@dataclass(frozen=True)
class Needs(Rule):
    """A switch that needs a package, where it is on."""

    package: str

    def refusal(self, value: Any) -> str | None:
        if not value or importlib.util.find_spec(self.package):
            return None
        return f"{self.package} is not installed: pip install {self.package}, or leave it out"


@dataclass(frozen=True)
class PathRule(Rule):
    """Something on this machine.

    Args:
        kind: file or folder, what is read; either; model, data or module, which may also be the name of something
            that is no file here; output, a folder that is made; written, a file that is made.
        after: the path is what stands behind this letter in the value, if it is there at all.
    """

    kind: str
    after: str = ""

    def path_in(self, value: str) -> Path | None:
        """The path that a setting names, `~` resolved; None if it names something of the hub."""
        if self.after:
            value = value.partition(self.after)[2]
            if not value:
                return None
        path = Path(value).expanduser()
        is_name = self.kind in ("model", "data", "module") and not path.exists() and not looks_local(value)
        return None if is_name else path

    def problem(self, value: str) -> str | None:
        """What is wrong with the path, to follow "NAME is VALUE, but"; None if nothing is."""
        path = self.path_in(value)
        if path is None:
            return None
        if self.kind == "output":
            reason = can_write_in(path)
            return f"it cannot be made or written to ({reason}): name another folder" if reason else None
        if self.kind == "written":
            reason = "it is a folder" if path.is_dir() else can_write_in(path.parent)
            return f"it cannot be written ({reason}): name another file" if reason else None
        wanted = {"file": path.is_file, "folder": path.is_dir}.get(self.kind, path.exists)
        if wanted():
            return None
        if path.exists():
            return f"that is no {self.kind}"
        above = path.parent
        names = sorted(other.name for other in above.iterdir()) if above.is_dir() else []
        near = [name for name in names if not name.startswith(".")][:8]
        return f"there is no such {self.kind if self.kind in ('file', 'folder') else 'file or folder'}" + (
            f"; {str(above)!r} holds {', '.join(near)}" if near else ""
        )


FILE, FOLDER, FILE_OR_FOLDER = PathRule("file"), PathRule("folder"), PathRule("either")
MODEL, DATA, MODULE, OUTPUT = PathRule("model"), PathRule("data"), PathRule("module"), PathRule("output")
WRITTEN = PathRule("written")
EXTRACTOR = PathRule("either", after="=")


def looks_local(name: str) -> bool:
    """Whether a name that is not there can only be meant as a path: the hub's are `NAME` or `OWNER/NAME`.

    `OWNER/NAME` counts as a path, too, where there is a folder OWNER here.
    """
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or name.endswith((".safetensors", ".ckpt", ".py")):
        return True
    owner, slash, _ = name.partition("/")
    return bool(slash) and Path(owner).is_dir()


_deferred: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred_checks() -> Iterator[None]:
    """In the block `check_settings` does nothing: a parser makes parts of settings, which do not know their names."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


@dataclass
class Checked:
    """Base of a settings dataclass: its values are checked against its `RULES` when it is made."""

    SECTION = ""  # what stands before the names in messages

    def __post_init__(self) -> None:
        check_settings(self)


def rules(**fields: Rule) -> Mapping[str, Rule]:
    """The `RULES` of a settings dataclass, by the names of its fields."""
    return fields


hints_of = functools.cache(typing.get_type_hints)  # field -> its type, of a settings dataclass


@functools.cache
def rules_of(config_class: type) -> dict[str, Rule]:
    """The rules of a settings dataclass and its bases; the nearest class wins."""
    found: dict[str, Rule] = {}
    for part in reversed(config_class.__mro__):
        found |= part.__dict__.get("RULES", {})
    return found


def section_class(hint: Any) -> type | None:
    """The settings dataclass that a field's type names, alone or beside others; None without one."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)


def settings_of(config_class: type, values: Any, prefix: str = "") -> Iterator[tuple[str, Any, Rule | None]]:
    """(dotted name, value, rule) of all settings in nested dataclasses, of an instance or as mappings."""
    rules, hints = rules_of(config_class), hints_of(config_class)
    for field in fields(config_class):
        name, missing = f"{prefix}{field.name}", object()
        if isinstance(values, Mapping):
            value = values.get(field.name, missing)
        else:
            value = getattr(values, field.name, missing)
        section = section_class(hints[field.name])
        if value is missing:
            continue
        if section is not None and (isinstance(value, Mapping) or is_dataclass(value)):
            yield from settings_of(section if isinstance(value, Mapping) else type(value), value, f"{name}.")
        else:
            yield name, value, rules.get(field.name)


def parts_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each value of a list or a mapping, or of the value itself; None is left out."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from parts_of(f"{name}.{key}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from parts_of(name, part)
    elif value is not None:
        yield name, value


def check_settings(values: Any, config_class: type | None = None, prefix: str | None = None) -> None:
    """Refuse values that break a rule.

    Args:
        values: a settings dataclass, or nested mappings of the values of `config_class`.
        prefix: of the names in messages; None: the dataclass's SECTION, if it has one.

    Raises:
        ValueError: the first such value, by its dotted name.
    """
    if _deferred.get():
        return
    config_class = config_class or type(values)
    prefix = getattr(config_class, "SECTION", "") if prefix is None else prefix
    for name, value, rule in settings_of(config_class, values, prefix):
        for part_name, part in parts_of(name, value) if rule else ():
            refusal = rule.refusal(part) if rule else None
            if refusal:
                raise ValueError(f"{part_name} is {part!r}, but {refusal}")


def paths_of(values: Any, config_class: type | None = None) -> Iterator[tuple[str, str, PathRule]]:
    """(dotted name, path, rule) of every setting that names something on this machine or on the hub."""
    for name, value, rule in settings_of(config_class or type(values), values):
        if isinstance(rule, PathRule):
            for part_name, part in parts_of(name, value):
                if isinstance(part, str):
                    yield part_name, part, rule


def check_paths(values: Any, config_class: type | None = None, made: Sequence[Path] = ()) -> None:
    """Refuse paths that are not there, and folders that cannot be made.

    Args:
        values: see `check_settings`.
        made: folders that will be there in time; what lies in them is not looked at.

    Raises:
        ValueError: the first such path, by its dotted name.
    """
    for name, value, rule in paths_of(values, config_class):
        path = Path(os.path.abspath(Path(value).expanduser()))
        if any(path.is_relative_to(os.path.abspath(folder)) for folder in made):
            continue
        problem = rule.problem(value)
        if problem:
            raise ValueError(f"{name} is {value!r}, but {problem}")


def as_list(words: str | list[str] | None) -> list[str]:
    """The words of a setting that takes one or several."""
    return [words] if isinstance(words, str) else list(words or ())


def require_different(names: Sequence[str], setting: str) -> None:
    """A ValueError for a name that stands in a list twice."""
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"{setting} names {name!r} twice")


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings; a list is a leaf, an empty mapping too."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, values
