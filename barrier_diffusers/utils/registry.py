"""Entries by name: what objectives, attacks and unlearning methods are kept in."""

from __future__ import annotations

from typing import Protocol, TypeVar


class Named(Protocol):
    """What an entry must have."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


class Registry(dict[str, Entry]):
    """A dictionary from names to entries, each of which has its name once.

    Args:
        kind: what messages call an entry, e.g. `objective`.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def enter(self, entry: Entry) -> None:
        """Add an entry; a second one of the same name is a ValueError."""
        if entry.name in self:
            raise ValueError(f"{self.kind} {entry.name!r} is registered already")
        self[entry.name] = entry

    def find(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; known are {', '.join(sorted(self))}")
        return self[name]
