"""Command lines: settings from a dataclass, YAML files and dotted flags; mistakes end in one line."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from tqdm import tqdm

from barrier_diffusers.utils.checks import check_paths, check_settings, deferred_checks, hints_of, section_class
from barrier_diffusers.utils.failures import explanation, is_bug
from barrier_diffusers.utils.group_exit import has_company, leave_at_once
from barrier_diffusers.utils.help_page import groups_of, help_page
from barrier_diffusers.utils.installation import require_assets, resolve_named_files, where_assets_are
from barrier_diffusers.utils.open_settings import class_with_open_sections, yaml_or_text
from barrier_diffusers.utils.overlaps import check_overlaps, expand_outputs
from barrier_diffusers.utils.signals import heeding_signals, stopped_by


def run_script(main: Callable[[Any], None], config_class: type | Callable[[list[str]], Any]) -> None:
    """Read `config_class` from `--config FILE.yaml` and dotted flags, check what they name, then run `main`.

    In place of the class a function may read the command line itself. `--config NAME` also finds NAME.yaml among the
    configurations beside the script that defines `main`. A settings dataclass may have a method `check_inputs`, which
    looks at small files before anything large is read, and `announcement`, a line that says what is going to happen.

    An error of input or environment ends in one line on stderr (failures.py) and exit status 1, a bad flag in exit
    status 2, a signal in one line too, wherever it comes. Set BARRIER_TRACEBACK=1 to see where an error came from.
    A process that was started with others ends at once (group_exit.py).
    """
    try:
        _run(main, config_class)
    except BaseException as error:
        if has_company():
            leave_at_once(error)
        raise
    if has_company():
        leave_at_once(None)


def _run(main: Callable[[Any], None], config_class: type | Callable[[list[str]], Any]) -> None:
    config: Any = None
    try:
        with heeding_signals():
            try:
                read = partial(parse_config, config_class) if isinstance(config_class, type) else config_class
                config = read(
                    resolve_named_files(sys.argv[1:], Path(inspect.unwrap(main).__code__.co_filename).parent)
                )
            except (ArgumentError, ValueError, TypeError, OSError) as error:
                if stopped_by() is not None:
                    raise
                files = [value for word, value in zip(sys.argv, sys.argv[1:], strict=False) if word == "--config"]
                says_no_file = "parsing config" in _message(error)
                where = f" ({', '.join(files)})" if says_no_file else ""
                raise SystemExit(_fail(_message(error) + where, 2)) from error
            prepare(config)
            main(config)
    except Exception as error:
        if (number := stopped_by()) is not None:
            raise SystemExit(128 + number) from error
        if os.environ.get("BARRIER_TRACEBACK") or is_bug(error):
            raise
        raise SystemExit(_fail(explanation(error, getattr(config, "output_dir", None)), 1)) from error


def prepare(config: Any) -> None:
    """Look at what settings name, and say what is going to happen.

    Raises:
        ValueError: a path that is not there, a folder that cannot be made, or what `check_inputs` refuses.
    """
    require_assets(config)
    if is_dataclass(config):
        check_paths(config)
    if hasattr(config, "check_inputs"):
        config.check_inputs()
    if hasattr(config, "announcement") and os.environ.get("RANK", "0") == "0":
        print(config.announcement, flush=True)


def list_fields(config_class: type, prefix: str = "") -> dict[str, bool]:
    """Dotted name of every field of a settings dataclass that takes a list -> whether a bare string will do, too."""
    found: dict[str, bool] = {}
    for name, hint in typing.get_type_hints(config_class).items():
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        for kind in kinds:
            if is_dataclass(kind) and isinstance(kind, type):
                found |= list_fields(kind, f"{prefix}{name}.")
        if any(typing.get_origin(kind) is list for kind in kinds):
            found[prefix + name] = str in kinds
    return found


def join_lists(lists: Mapping[str, bool], arguments: Sequence[str]) -> list[str]:
    """`--name A B` as the one word that the parser takes, `--name ["A", "B"]`, where the setting is a list.

    Args:
        lists: see `list_fields`.
    """
    joined, position = list[str](), 0
    while position < len(arguments):
        name = arguments[position]
        end = position + 1
        while end < len(arguments) and not arguments[end].startswith("--"):
            end += 1
        words = list(arguments[position + 1 : end])
        position = end
        field = name.removeprefix("--")
        as_it_is = len(words) == 1 and (lists.get(field) or words[0].startswith("[") or words[0] == "null")
        if field in lists and words and not as_it_is:
            words = [json.dumps(words)]
        joined += [name, *words]
    return joined


def read_yaml(path: str) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        ValueError: it cannot be read, is no YAML, or no settings by name.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path!r} is no YAML: {error}") from error
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path!r} holds no settings: expected is YAML of the form `name: value`")
    return content


def require_sections(sections: Mapping[str, type], arguments: Sequence[str]) -> None:
    """Refuse anything but settings by name where a section is expected, even if a later word fills the section.

    Args:
        sections: dotted name -> its dataclass.

    Raises:
        ValueError: says where.
    """
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, assigned, value = word.removeprefix("--").partition("=")
        value = value if assigned else following
        where, given = "", {}
        if word.startswith("--config"):
            where, given = f" ({value})", dict(nodes(read_yaml(value)))
        elif word.startswith("--") and name in sections:
            given = {name: yaml_or_text(value)}
        for section in sections.keys() & given.keys():
            if given[section] is not None and not isinstance(given[section], Mapping):
                raise ValueError(f"{section} is {given[section]!r}, but must be settings by name{where}")


def nodes(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings, the mappings included."""
    for name, value in values.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from nodes(value, f"{prefix}{name}.")


def sections_of(config_class: type, prefix: str = "") -> dict[str, type]:
    """Dotted name -> class of every settings dataclass among the fields, at any depth."""
    found: dict[str, type] = {}
    for name, hint in hints_of(config_class).items():
        section = section_class(hint)
        if section is not None:
            found |= {f"{prefix}{name}": section, **sections_of(section, f"{prefix}{name}.")}
    return found


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for a help page."""
    return bool({"-h", "--help", "--help-all"} & set(arguments))


def parse_config(config_class: type, arguments: list[str]) -> Any:
    """An instance of a settings dataclass from `--config FILE.yaml` and dotted flags; lists are `[A, B]` or `A B`.

    A class with a field's name as `POSITIONAL` takes that setting also as a first word without a flag.

    Raises:
        ArgumentError, TypeError, ValueError: a setting that is unknown, missing or not as its rule wants it.
        SystemExit: after the help page that was asked for.
    """
    if wants_help(arguments):
        page = help_page(
            Path(sys.argv[0]).name, config_class.__doc__ or "", groups_of(config_class), "--help-all" in arguments
        )
        print(page, end="")
        raise SystemExit(0)
    first = getattr(config_class, "POSITIONAL", None)
    if first is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    arguments = join_lists(list_fields(config_class), arguments)
    require_sections(sections_of(config_class), arguments)
    config_class = class_with_open_sections(config_class, arguments)
    parser = ArgumentParser(exit_on_error=False, description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class)
    with deferred_checks():
        found = parser.parse_args(join_lists(list_fields(config_class), arguments))
    check_settings(found.as_dict(), config_class)
    values = vars(parser.instantiate_classes(found))
    values.pop("config")
    return complete(config_class(**values))


def complete(config: Any) -> Any:
    """The settings with `~` resolved in what is written; a ValueError if that overlaps with what is read."""
    expand_outputs(config)
    check_overlaps(config)
    return config


@functools.cache  # building one takes longer than using it, and a sweep checks every trial
def _parser_of(config_class: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    return parser


def config_from(config_class: type, values: dict[str, Any]) -> Any:
    """An instance of a settings dataclass from nested mappings, with the checks of the command line.

    Raises:
        ValueError: an unknown field, or a value that the dataclass refuses.
    """
    config_class = class_with_open_sections(config_class, values)
    parser = _parser_of(config_class)
    try:
        with deferred_checks():
            found = parser.parse_object(values)
        check_settings(found.as_dict(), config_class)
        return complete(config_class(**vars(parser.instantiate_classes(found))))
    except (ArgumentError, TypeError) as error:
        raise ValueError(_message(error)) from error


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, ArgumentError) and error.message else str(error)


def _fail(message: str, status: int) -> int:
    last_line("error: " + " ".join(message.split()) + where_assets_are(message))
    return status


def last_line(text: str) -> None:
    """Print a line on stderr below the progress bars that are still open; the error keeps their loops alive."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    sys.stderr.write(f"{text}\n")  # at once: several processes may end at the same time
    sys.stderr.flush()
