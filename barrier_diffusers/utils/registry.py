"""Things that are chosen by name: objectives, architectures, attacks, protocols, extractors, unlearning methods.

A registry has one way in and one way out: `REGISTRY.register(item)` and `REGISTRY.find(name)`. `register` gives the
item back, so that it also decorates a class that carries its `name`. Where an item wraps a function, its folder offers
a decorator that builds the item, `@register_KIND("name", ...)`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Protocol, TypeVar


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


def module_name(path: Path) -> str:
    """What a .py file of the user's is called among the imported modules; without dots, as it is in no package."""
    return f"barrier_module_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"


def load_module(module: str, setting: str, *registries: Registry[Any]) -> None:
    """Run a .py file of the user's, or import a dotted module name, so that it registers what is his; once a process.

    Args:
        setting: that named the module; messages call it so.
        registries: that the module may register in; what it registered before it failed is taken out again.

    Raises:
        ValueError: there is no such file or module, or running it fails.
    """
    is_file = module.endswith(".py")
    path = Path(module).expanduser().resolve()
    if is_file and not path.is_file():
        raise ValueError(f"{setting} {module!r} does not exist")
    name = module_name(path) if is_file else module
    if name in sys.modules:
        return
    known = [set(registry) for registry in registries]
    try:
        if is_file:
            specification = importlib.util.spec_from_file_location(name, path)
            assert specification is not None and specification.loader is not None
            loaded = importlib.util.module_from_spec(specification)
            sys.modules[name] = loaded  # as import does: dataclasses in the file look their module up here
            specification.loader.exec_module(loaded)
        else:
            importlib.import_module(name)
    except Exception as error:
        sys.modules.pop(name, None)
        for registry, before in zip(registries, known, strict=True):
            for new in set(registry) - before:  # a second try may register them again
                del registry[new]
        what = "a .py file or an importable module is needed" if isinstance(error, ImportError) else "it failed"
        raise ValueError(f"{setting} {module!r}: {what} ({type(error).__name__}: {error})") from error
