"""Things that are chosen by name: objectives, architectures, attacks, protocols, extractors, unlearning methods.

A registry has one way in and one way out: `REGISTRY.register(item)` and `REGISTRY.find(name)`. `register` gives the
item back, so that it also decorates a class that carries its `name`. Where an item wraps a function, its folder offers
a decorator that builds the item, `@register_KIND("name", ...)`.
"""

from __future__ import annotations

from typing import Protocol, TypeVar


class Named(Protocol):
    """What an item must have."""

    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=Named)


class Registry(dict[str, Item]):
    """A dictionary from names to items, each of which has its name once.

    Args:
        kind: what messages call an item, e.g. `objective`.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, item: Item) -> Item:
        """Add an item and return it.

        Raises:
            ValueError: the name is taken.
        """
        if item.name in self:
            raise ValueError(f"{self.kind} {item.name!r} is registered already")
        self[item.name] = item
        return item

    def find(self, name: str) -> Item:
        """The item called `name`.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; known are {', '.join(sorted(self))}")
        return self[name]
