"""An objective of the user's own, from a file or module that he names; nothing else is ever imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from barrier_diffusers.objectives.base import OBJECTIVES, Objective, get_objective


def load_module(module: str) -> None:
    """Run the .py file, or import the dotted module name, so that it registers its objectives; once a process.

    Raises:
        ValueError: there is no such file or module, or running it fails.
    """
    is_file = module.endswith(".py")
    path = Path(module).expanduser().resolve()
    if is_file and not path.is_file():
        raise ValueError(f"objective.module {module!r} does not exist")
    name = f"barrier_objective:{path}" if is_file else module
    if name in sys.modules:
        return
    known = set(OBJECTIVES)
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
        for name_of_new in set(OBJECTIVES) - known:  # a second try may register them again
            del OBJECTIVES[name_of_new]
        what = "a .py file or an importable module is needed" if isinstance(error, ImportError) else "it failed"
        raise ValueError(f"objective.module {module!r}: {what} ({type(error).__name__}: {error})") from error


def load_objective(options: Any) -> Objective:
    """The objective that the settings name, from the user's module if they name one, checked against the others.

    Raises:
        ValueError: a module that does not load, an unknown name, or a setting that the objective does not read.
    """
    if options.module is not None:
        load_module(options.module)
    objective = get_objective(options.name)
    objective.check(options)
    return objective
