"""Names of the hub: whether there is anything behind them, said at once and not after the libraries' retries."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

SECONDS = 10  # that the hub has for its answer


def is_cached(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Whether something of a repository was downloaded before."""
    snapshots = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}", "snapshots")
    return snapshots.is_dir() and any(snapshots.iterdir())


_made: ContextVar[tuple[Path, ...]] = ContextVar("made", default=())


@contextmanager
def will_be_made(folders: Sequence[Path]) -> Iterator[None]:
    """In the block what lies in these folders counts as there: an earlier stage of a workflow makes it."""
    token = _made.set(tuple(folder.absolute() for folder in folders))
    try:
        yield
    finally:
        _made.reset(token)


def is_being_made(path: Path) -> bool:
    """Whether what lies here will be there, or be made anew, by the time it is read; see `will_be_made`."""
    return any(path.absolute().is_relative_to(folder) for folder in _made.get())


def require_on_hub(name: str, kind: Literal["model", "dataset"] = "model", revision: str | None = None) -> None:
    """Nothing for a path that is there or will be, and for a repository that is in the hub's cache or on the hub.

    Whatever else the hub answers (a licence to accept, a fault of its own) is left to whoever loads the repository.

    Raises:
        ValueError: there is no such path and no such repository or revision, or the hub cannot be asked.
    """
    path = Path(name).expanduser()
    if path.exists() or is_being_made(path) or is_cached(name, kind):
        return
    _ask(name, kind, revision)


@functools.cache  # one question a run
def _ask(name: str, kind: Literal["model", "dataset"], revision: str | None) -> None:
    what = {"model": "model", "dataset": "data set"}[kind]
    absent = f"there is no file or folder {name!r} here, and"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{absent} no {what} of that name among the downloads (HF_HUB_OFFLINE is set)")
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)
    except RevisionNotFoundError as error:
        raise ValueError(f"{what} {name!r} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        advice = "look at its spelling; for a private one, log in (hf auth login)"
        raise ValueError(f"{absent} no {what} of that name on the hub: {advice}") from error
    except HFValidationError as error:
        raise ValueError(
            f"{absent} no {what} of the hub can be called that: names there are NAME or OWNER/NAME"
        ) from error
    except HfHubHTTPError:
        return
    except Exception as error:  # of the connection: every release of the library has others
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{absent} the hub cannot be asked for a {what} of that name ({said})") from error
