"""The page that `--help` prints: every flag with its type, its default and its field's comment, in groups.

A group is what one class of a settings dataclass adds. Comments are read from the source, where they stand behind a
field or above it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

from barrier_diffusers.utils.checks import ANY_NUMBER, SEED, Range, hints_of, rules_of, section_class

WIDTH, LINES = 100, 120  # columns and lines of a page at most, the latter without `--help-all`
FLAG_WIDTH = 34  # columns of the flags


@dataclass
class Flag:
    """One setting on a help page."""

    name: str
    kind: str  # of its value, in words
    default: str | None  # None: it has to be given
    comment: str


@dataclass
class Group:
    """Flags that belong together."""

    title: str
    flags: list[Flag]
    prefix: str = ""  # of their names, where they are a section of the settings


@functools.cache
def comments_of(config_class: type) -> dict[str, str]:
    """Field -> the comment behind it and above it, of the fields that the class itself declares."""
    try:
        lines = textwrap.dedent(inspect.getsource(config_class)).splitlines()
        body = ast.parse("\n".join(lines)).body[0]
    except (OSError, TypeError, SyntaxError):  # made at run time
        return {}
    found = {}
    for node in getattr(body, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above: list[str] = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("#"):
                    break
                above.insert(0, line.strip().lstrip("# "))
            end = node.end_lineno or node.lineno
            behind = lines[end - 1][node.end_col_offset :].strip()
            behind = behind.lstrip("# ") if behind.startswith("#") else ""
            found[node.target.id] = "; ".join(filter(None, [behind, " ".join(above)]))
    return found


def first_sentence(text: str | None) -> str:
    """A docstring's first sentence, without its full stop."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def kind_of(hint: Any) -> str:
    """A type in words: `int`, `A|B` for choices, `X ...` for a list."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind_of(part) for part in typing.get_args(hint) if part is not type(None)]
        return "|".join(dict.fromkeys(kinds))
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (element,) = typing.get_args(hint)
        return f"{kind_of(element)} ..."
    if typing.get_origin(hint) is dict:
        return "'{name: value}'"
    return {bool: "true|false", str: "text"}.get(hint, getattr(hint, "__name__", str(hint)))


def default_of_field(field: Field[Any]) -> Any:
    """A field's default; MISSING where there is none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def shown(value: Any) -> str:
    """A default as it would be given."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def flags_of(
    config_class: type, prefix: str = "", skip: Sequence[str] = (), defaults: Any = None
) -> dict[str, list[Flag]]:
    """First sentence of each class that a settings dataclass is made of -> the flags of the fields it adds.

    Args:
        skip: fields that are left out, as are those that are settings dataclasses themselves.
        defaults: an instance whose values they have where they are not given; None: each field's own.
    """
    classes = [part for part in config_class.__mro__ if is_dataclass(part)]
    hints, rules = hints_of(config_class), rules_of(config_class)
    home = {name: part for part in classes for name in part.__dataclass_fields__}  # the last that has it adds it
    comments: dict[str, str] = {}
    for part in reversed(classes):
        comments |= {name: text for name, text in comments_of(part).items() if text}
    found: dict[str, list[Flag]] = {}
    for part in classes:
        for item in fields(config_class):
            if home[item.name] is not part or item.name in skip or section_class(hints[item.name]) is not None:
                continue
            kind, rule, default = kind_of(hints[item.name]), rules.get(item.name), default_of_field(item)
            default = default if defaults is None else getattr(defaults, item.name)
            if isinstance(rule, Range) and rule not in (SEED, ANY_NUMBER):
                kind = f"{kind} {rule}"
            given = None if default is MISSING else shown(default)
            flag = Flag(prefix + item.name, kind, given, comments.get(item.name, ""))
            found.setdefault(first_sentence(part.__doc__), []).append(flag)
    return found


def groups_of(config_class: type, prefix: str = "", skip: Sequence[str] = ()) -> list[Group]:
    """The flags that have to be given, those of each class of a settings dataclass, and those of each section in it.

    Args:
        skip: see `flags_of`.
    """
    own = flags_of(config_class, prefix, skip)
    groups = [Group("Needed", [flag for flags in own.values() for flag in flags if flag.default is None])]
    groups += [Group(title, [flag for flag in flags if flag.default is not None]) for title, flags in own.items()]
    return [group for group in groups if group.flags] + section_groups(config_class, prefix, skip)


def section_groups(
    config_class: type, prefix: str = "", skip: Sequence[str] = (), defaults: Any = None
) -> list[Group]:
    """A group for each section of a settings dataclass, at any depth; see `flags_of`."""
    groups = []
    for item in fields(config_class):
        section = section_class(hints_of(config_class)[item.name])
        if section is not None and item.name not in skip:
            start = f"{prefix}{item.name}."
            own = default_of_field(item) if defaults is None else getattr(defaults, item.name)
            own = own if is_dataclass(own) else None
            flags = [flag for part in flags_of(section, start, defaults=own).values() for flag in part]
            groups.append(Group(first_sentence(section.__doc__), flags, start))
            groups += section_groups(section, start, defaults=own)
    return groups


def words_of(flag: Flag) -> str:
    """A flag's comment, and in brackets its type and its default."""
    default = "needed" if flag.default is None else flag.default
    return f"{flag.comment} [{flag.kind}; {default}]".strip()


def beside(head: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines beside a flag, or below it where it is too long."""
    first = head.ljust(FLAG_WIDTH)
    if not first.endswith(" "):
        yield head
        first = " " * FLAG_WIDTH
    for line in lines:
        yield (first + line).rstrip()
        first = " " * FLAG_WIDTH


def lines_of(group: Group, num_lines: int | None) -> Iterator[str]:
    """A group: each of its flags in at most `num_lines` lines, or (None) with its whole comment.

    With a number of lines, the flags of a section are only named.
    """
    columns = WIDTH - FLAG_WIDTH
    if group.prefix and num_lines is not None:
        names = ", ".join(flag.name.removeprefix(group.prefix) for flag in group.flags)
        text = textwrap.shorten(f"{group.title}: {names}", columns * num_lines - 8, placeholder=" ...")
        yield from beside(f"  --{group.prefix}*", textwrap.wrap(text, columns, break_on_hyphens=False))
        return
    title = f"{group.prefix}*: {group.title}" if group.prefix else group.title
    yield textwrap.shorten(title, WIDTH, placeholder=" ...")
    for flag in group.flags:
        text = words_of(flag)
        if num_lines is not None:
            fitting = columns * num_lines - 8 * (num_lines > 1)
            if len(text) > fitting and flag.comment:
                facts = text.removeprefix(flag.comment)
                text = textwrap.shorten(flag.comment, max(20, fitting - len(facts)), placeholder=" ...") + facts
            text = textwrap.shorten(text, fitting, placeholder=" ...")
        yield from beside(f"  --{flag.name}", textwrap.wrap(text, columns, break_on_hyphens=False))


def help_page(script: str, about: str, groups: Sequence[Group], in_full: bool) -> str:
    """The text of a help page.

    Args:
        in_full: every flag with its whole comment; else at most LINES lines, in which sections are only named.
    """
    about = " ".join(about.strip().split("\n\n")[0].split())
    head = [f"usage: {script} [--config FILE.yaml] [--FLAG VALUE ...]", "", *textwrap.wrap(about, WIDTH)]
    tail = [
        "",
        "A list is '[A, B]' or its words one after another; null stands for None. A flag wins over the file.",
        "--help-all describes every flag in full; --print_config prints what would be used.",
    ]
    for num_lines in [None] if in_full else [3, 2, 1]:
        body = [line for group in groups for line in ([""] * (not group.prefix) + [*lines_of(group, num_lines)])]
        page = [*head, *body, *tail]
        if num_lines is None or len(page) <= LINES:
            break
    return "\n".join(page) + "\n"
