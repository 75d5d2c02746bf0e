"""Command lines: settings from a dataclass, YAML files and dotted flags; mistakes end in one line."""

from __future__ import annotations

import functools
import json
import os
import sys
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from barrier_diffusers.utils.installation import require_assets, resolve_named_files, where_assets_are
from barrier_diffusers.utils.open_settings import class_with_open_sections
from barrier_diffusers.utils.signals import heeding_signals


def run_script(main: Callable[[Any], None], config_class: type | Callable[[list[str]], Any]) -> None:
    """Read `config_class` from `--config FILE.yaml` and dotted flags, then run `main`.

    In place of the class a function may read the command line itself.

    `--config NAME` also finds NAME.yaml among the configurations beside the script that defines `main`.

    A mistake of the user (ValueError, OSError, FloatingPointError) ends in one line on stderr and exit status 1; a bad
    flag in exit status 2; a signal in one line too, wherever it comes. Set BARRIER_TRACEBACK=1 to see where an error
    came from.
    """
    try:
        read = partial(parse_config, config_class) if isinstance(config_class, type) else config_class
        config = read(resolve_named_files(sys.argv[1:], Path(main.__code__.co_filename).parent))
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        files = [value for word, value in zip(sys.argv, sys.argv[1:], strict=False) if word == "--config"]
        where = f" ({', '.join(files)})" if "parsing config" in _message(error) else ""  # which does not name its file
        raise SystemExit(_fail(error, 2, where)) from error
    try:
        require_assets(config)
        with heeding_signals():
            main(config)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("BARRIER_TRACEBACK"):
            raise
        raise SystemExit(_fail(error, 1)) from error


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


def parse_config(config_class: type, arguments: list[str]) -> Any:
    """An instance of a settings dataclass from `--config FILE.yaml` and dotted flags; lists are `[A, B]` or `A B`."""
    config_class = class_with_open_sections(config_class, join_lists(list_fields(config_class), arguments))
    parser = ArgumentParser(exit_on_error=False, description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class)
    values = vars(parser.instantiate_classes(parser.parse_args(join_lists(list_fields(config_class), arguments))))
    values.pop("config")
    return config_class(**values)


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
        return config_class(**vars(parser.instantiate_classes(parser.parse_object(values))))
    except (ArgumentError, TypeError) as error:
        raise ValueError(_message(error)) from error


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, ArgumentError) and error.message else str(error)


def _fail(error: BaseException, status: int, where: str = "") -> int:
    message = _message(error)
    print("error: " + " ".join(message.split()) + where + where_assets_are(message), file=sys.stderr)
    return status
