"""Files and folders that are written whole or not at all, and one clear message where they cannot be."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from barrier_diffusers.utils.locks import is_alive


def file_names(texts: Iterable[str]) -> dict[str, str]:
    """Text -> the beginning of a file name made of its letters, digits, dots and dashes, and of no other text's.

    Texts may come from anywhere: no name has a folder in it or is hidden, and names differ in more than case.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in dict.fromkeys(texts):
        plain = re.sub(r"[^\w.-]+", "_", text)[:40].strip(".") or "_"  # 40 letters: at most 160 bytes
        name, number = plain, 1
        while name.casefold() in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.casefold())
        names[text] = name
    return names


@contextmanager
def reading_tensors(path: Path) -> Iterator[None]:
    """In the block a safetensors file is read, or those of a folder; a ValueError that names one that is damaged."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
            try:
                safe_open(file, "np")
            except SafetensorError as damage:
                raise ValueError(
                    f"{str(file)!r} is no whole .safetensors file ({damage}): copy it again, or make it anew"
                ) from error
        raise


class WriteError(OSError):
    """Something could not be written; the target is as it was before."""

    def __init__(self, path: Path, reason: str, advice: str = "free disk space, or check the rights of its folder"):
        super().__init__(f"cannot write {str(path)!r} ({reason}): {advice}")
        self.reason = reason


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, if it is there; what links lead to stays.

    Folders that may not be written in are made writable first.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        with suppress(OSError):  # the deletion says so
            os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _give_usual_rights(path: Path) -> None:
    """Let others read a new file, or those of a new folder, as the user's umask has it: safetensors does not."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            mode = stat.S_IMODE(file.stat().st_mode)
            if (usual := mode | 0o666 & ~umask) != mode:
                file.chmod(usual)


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a finished file or folder its name; what has that name is replaced, and is never half there."""
    _give_usual_rights(temporary)
    if target.is_dir():
        old = target.with_name(f".old-{target.name}")
        remove(old)
        os.replace(target, old)
        os.replace(temporary, target)
        remove(old)
    else:
        os.replace(temporary, target)


LEFTOVERS = (  # hidden names that a killed process leaves, with the name of what it was writing or replacing
    re.compile(r"\.old-(?P<name>.+)"),
    re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)"),
    re.compile(r"\.(?P<name>step-\d+|pipeline|adapter)"),
    re.compile(r"\.(?P<name>write-test)-(?P<pid>\d+)"),
)


def leftover(path: Path) -> re.Match[str] | None:
    """What a killed process left, by the parts of its name; None for any other file."""
    return next((found for pattern in LEFTOVERS if (found := pattern.fullmatch(path.name))), None)


def clear_leftovers(folder: Path, is_own: Callable[[Path], bool], alone: bool) -> None:
    """Delete what killed processes left half written in a folder; a whole one that was to be replaced comes back.

    Args:
        is_own: whether something at the top of the folder, by the name it would have had, is ours; nothing else is
            looked at.
        alone: no other process works in the folder; else what a running one of this machine is writing stays.
    """
    for path in list(folder.iterdir()):
        found = leftover(path)
        wanted = path.with_name(found["name"]) if found else path
        temporary = wanted.name in ("pipeline", "adapter", "write-test")
        if not temporary and not is_own(wanted):
            continue
        if found is None:
            if path.is_dir() and not path.is_symlink():
                clear_leftovers(path, lambda _: True, alone)
            continue
        pid = found.groupdict().get("pid")
        if not alone and (pid is None or is_alive(int(pid))):
            continue
        if path.name.startswith(".old-") and not os.path.lexists(wanted):
            os.replace(path, wanted)
        else:
            remove(path)


@contextmanager
def removed_on_failure(temporary: Path, target: Path) -> Iterator[None]:
    """Delete `temporary` if the block, which does nothing but write it, does not end well.

    Raises:
        WriteError: a failed write. torch.save reports one as a RuntimeError, safetensors as an error of its own.
    """
    try:
        yield
    except BaseException as error:
        try:
            remove(temporary)
        except OSError:  # a read-only file system: there is nothing to delete then
            pass
        if isinstance(error, OSError | RuntimeError | SafetensorError):
            raise WriteError(target, _reason(error)) from error
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, WriteError):
        return error.reason
    if "inline_container" in str(error):  # torch.save tells a line of its source instead of the system's answer
        return "the file could not be written to its end, as on a full disk"
    return getattr(error, "strerror", None) or str(error).split("\n")[0]


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """The path of a temporary file or folder beside `target`, which gets the name of `target` when the block ends.

    Raises:
        WriteError: it cannot be written; nothing is left of it, and `target` is as it was.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with removed_on_failure(temporary, target):
        remove(temporary)
        yield temporary
        put_in_place(temporary, target)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all.

    Raises:
        WriteError: see `written_whole`.
    """
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def can_write_in(folder: Path) -> str | None:
    """Why no file can be written in a folder that may not be there yet; None if one can. Nothing is left behind."""
    above = next((path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink()), folder)
    if not above.is_dir():
        return f"{str(above)!r} is a file" if above.exists() else f"{str(above)!r} leads nowhere"
    probe = above / f".write-test-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def require_writable(output_dir: str) -> Path:
    """Create a folder if it is not there, and write a file in it to be sure.

    Raises:
        ValueError: it is a file, or not writable.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {output_dir!r} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = can_write_in(folder)
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(f"output_dir {output_dir!r} is not writable: {reason}")
    return folder


def move_into(source: Path, target: Path, last: str) -> None:
    """Move all that `source` holds over its namesakes in `target`, what is called `last` at the end; drop `source`."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        put_in_place(path, target / path.name)
    source.rmdir()


def save_whole(save: Callable[[Path], Any], output: Path, last: str) -> None:
    """Write the files of a model with `save(folder)` and move them into `output`, the file without which nothing loads
    at the end.

    Raises:
        WriteError: see `written_whole`; nothing is moved then.
    """
    temporary = output / ".pipeline"
    with removed_on_failure(temporary, output):
        remove(temporary)
        temporary.mkdir(parents=True)
        save(temporary)
        move_into(temporary, output, last)
