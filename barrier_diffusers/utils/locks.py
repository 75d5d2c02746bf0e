"""One process at a time in a folder: a lock that goes with its process, and says who has it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ModuleNotFoundError:
    msvcrt = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
EXCLUSIVE_NAME = ".lock-held"  # a file whose being there is the lock, where files cannot be locked
FAR = 1 << 30  # the byte that msvcrt locks: one that nobody reads


class Held(Exception):
    """Somebody else has the lock."""


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a process of somebody else counts."""
    if pid <= 0:
        return False
    if sys.platform == "win32":  # where signal 0 ends the process
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)
        ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _lock_file(handle: int) -> None:
    """Lock an open file until its last copy is closed; `Held` if another has it, an OSError where that cannot be."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Held from error
    elif msvcrt is not None:
        os.lseek(handle, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:
            raise Held from error
    else:
        raise OSError("files cannot be locked here")


class FolderLock:
    """Within its block no other process that asks for it works in the folder.

    A child that inherits `handle` holds it on, so that a killed parent's child keeps its folder to itself. The lock of
    a process that has ended, killed or not, counts for nothing.

    Args:
        folder: gets a hidden file with who has it, as long as somebody has.
        wait_seconds: how long to wait for whoever has it.
    """

    def __init__(self, folder: Path, wait_seconds: float = 0):
        self.folder, self.wait_seconds = folder, wait_seconds
        self.handle = -1
        self._own: Path | None = None  # the file that is the lock, where files cannot be locked

    def __enter__(self) -> FolderLock:
        """Raises:
        ValueError: another process still has the folder when the time is over.
        """
        deadline = time.monotonic() + self.wait_seconds
        while True:
            try:
                self._take()
                return self
            except Held:
                if time.monotonic() > deadline:
                    raise ValueError(self._refusal()) from None
                time.sleep(min(1.0, max(0.01, deadline - time.monotonic())))

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            (self.folder / LOCK_NAME).unlink()
        os.close(self.handle)  # and with the last copy of the handle the lock goes
        if self._own is not None:
            self._own.unlink(missing_ok=True)

    def _take(self) -> None:
        path = self.folder / LOCK_NAME
        self.handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            try:
                _lock_file(self.handle)
            except OSError:  # a file system without locks
                self._own = _create_exclusively(self.folder / EXCLUSIVE_NAME)
            if not _is_same_file(self.handle, path):  # whoever had it has deleted it meanwhile
                raise Held
        except BaseException:
            if self._own is not None:
                self._own.unlink(missing_ok=True)
                self._own = None
            os.close(self.handle)
            raise
        os.ftruncate(self.handle, 0)
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, json.dumps(_who()).encode())

    def _refusal(self) -> str:
        where = f"another process works in {str(self.folder)!r}"
        advice, exclusive = "wait for it, or name another output_dir", self.folder / EXCLUSIVE_NAME
        if exclusive.is_file():
            advice += f"; if it has ended, delete {str(exclusive)!r}"
        holder = _read(self.folder / LOCK_NAME) or _read(exclusive)
        if not {"pid", "host", "script", "since"} <= holder.keys():
            return f"{where}: {advice}"
        who = "{script}, process {pid} on {host}, since {since}".format(**holder)
        return f"{where} ({who}): {advice}"


def _who() -> dict[str, str | int]:
    script = Path(sys.argv[0]).name or "python"
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    facts: dict[str, str | int] = {"pid": os.getpid(), "host": socket.gethostname()}
    return {**facts, "script": script, "since": now}


def _read(path: Path) -> dict[str, str | int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        there, open_file = path.stat(), os.fstat(handle)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (open_file.st_dev, open_file.st_ino)


def _create_exclusively(path: Path, alive: Callable[[int], bool] = is_alive) -> Path:
    """Create the file that is the lock; one of a process of this machine that has ended counts for nothing."""
    for _ in range(2):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            holder = _read(path)
            ours = holder.get("host") == socket.gethostname()
            if ours and not alive(int(holder.get("pid", 0))):
                path.unlink(missing_ok=True)
                continue
            raise Held from None
        os.write(handle, json.dumps(_who()).encode())
        os.close(handle)
        return path
    raise Held
