"""Settings whose fields depend on a choice made in them: a section's class is looked up before it is parsed.

A settings dataclass is open if it has a class method `class_for(values)`, which gives the class that holds these
values (`ObjectiveConfig` does: the objective's own settings are its fields; `EvaluateConfig` does: each attack's
settings are a section of it).
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")


def class_with_open_sections(config_class: type, values: Mapping[str, Any] | Sequence[str]) -> type:
    """`config_class`, or a subclass of it that has, as have its open sections, the fields that these values call for.

    Args:
        values: nested mappings, or the words of a command line.

    Raises:
        ValueError: what `class_for` refuses.
    """
    if hasattr(config_class, "class_for"):
        config_class = config_class.class_for(values if isinstance(values, Mapping) else _top_level(values))
    for name, kind in typing.get_type_hints(config_class).items():
        if not hasattr(kind, "class_for"):
            continue
        section = values.get(name) if isinstance(values, Mapping) else section_of(values, name)
        found = kind.class_for(section if isinstance(section, Mapping) else {})
        if found is not kind:
            config_class = _with_section(config_class, name, found)
    return config_class


def with_sections(config_class: type[Config], sections: Mapping[str, type[Any]]) -> type[Config]:
    """`config_class`, or a subclass of it that also has a field for each of these settings dataclasses, by name.

    Raises:
        ValueError: a section that is called like a setting of another kind.
    """
    kinds, found = typing.get_type_hints(config_class), config_class
    for name, kind in sections.items():
        if name not in kinds:
            found = _with_section(found, name, kind)  # type: ignore[arg-type]
        elif kinds[name] is not kind:
            raise ValueError(f"{name!r} cannot be registered: it is a setting of {config_class.__name__} already")
    return found


@functools.cache  # one class and one parser for all trials of a sweep
def _with_section(config_class: type, name: str, kind: type) -> type:
    members = {
        "__annotations__": {name: kind},
        name: field(default_factory=kind),
        "__doc__": config_class.__doc__,
        "__module__": config_class.__module__,
    }
    return dataclass(kw_only=True)(type(config_class.__name__, (config_class,), members))


def _top_level(arguments: Sequence[str]) -> dict[str, Any]:
    """What the words of a command line, `--config` files included, say about settings that are in no section."""
    values: dict[str, Any] = {}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, assigned, value = word.removeprefix("--").partition("=")
        value = value if assigned else following
        if not word.startswith("--") or "." in flag:
            continue
        if flag == "config":
            values |= _mapping(value, is_file=True)
        else:
            values[flag] = yaml_or_text(value)
    return values


def section_of(arguments: Sequence[str], section: str) -> dict[str, Any]:
    """What the words of a command line, `--config` files included, say about one section, as nested mappings; a later
    word wins.

    Whatever cannot be read is left to the parser, which says so.
    """
    values: dict[str, Any] = {}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if not word.startswith("--"):
            continue
        flag, assigned, value = word[2:].partition("=")
        value = value if assigned else following
        if flag == "config":
            values |= _mapping(_mapping(value, is_file=True).get(section))
        elif flag == section:
            values |= _mapping(value)
        elif flag.startswith(f"{section}."):
            *parents, name = flag.removeprefix(f"{section}.").split(".")
            inner = values
            for parent in parents:
                inner[parent] = dict(_mapping(inner.get(parent)))
                inner = inner[parent]
            inner[name] = yaml_or_text(value)
    return values


def yaml_or_text(value: str) -> Any:
    """A word of a command line as YAML reads it, as it is where it is none."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _mapping(content: Any, is_file: bool = False) -> dict[str, Any]:
    try:
        if is_file:
            content = Path(content).expanduser().read_text(encoding="utf-8")
        found = yaml.safe_load(content) if isinstance(content, str) else content
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
