"""SIGTERM and Ctrl-C end a script in one line, whenever they come: while it imports, draws images or judges them.

Every script imports this module before anything that takes time; in the main program of another it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from barrier_diffusers.utils.group_exit import end_with_launcher
from barrier_diffusers.utils.quiet import quiet_libraries

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SCRIPTS = ("train_scripts", "scripts", "classification_ext", "ddpm_ext")  # folders of our main programs
START_AGAIN = "start it again"

_way_on = START_AGAIN
_stopped_by: int | None = None


def set_way_on(text: str) -> None:
    """What whoever stops the script from now on is told to do."""
    global _way_on
    _way_on = text


def say_stopped(number: int) -> int:
    """Print the line, in the first of several processes; the exit status of a process that a signal ended."""
    if os.environ.get("RANK", "0") == "0":
        line = f"stopped by {signal.Signals(number).name}: {_way_on}\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except (RuntimeError, ValueError):  # in the middle of another write, or closed
            os.write(2, line.encode())
    return 128 + number


def stopped_by() -> int | None:
    """The signal that ended the last block of `heeding_signals`, which `say_stopped` has told of. Whatever other error
    leaves that block is its consequence: a library that was just importing a part of itself fails in its own way."""
    return _stopped_by


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped_by
    if _stopped_by is not None:  # somebody swallowed the first one, or takes too long
        os._exit(128 + number)
    _stopped_by = number
    raise SystemExit(say_stopped(number))


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """For a script that imports, or is done: nothing is half written, and an error in the middle of an import would
    leave modules that are half there, which others stumble over."""
    status = say_stopped(number)
    with suppress(RuntimeError, ValueError, OSError):  # in the middle of another write, or closed
        sys.stdout.flush()
    os._exit(status)


def heed_signals(handler: Callable[[int, FrameType | None], None] = _stop) -> dict[signal.Signals, Any]:
    """From now on a signal ends the process in one line; the handlers before. An ignored signal (nohup) stays ignored,
    and outside the main thread, where Python handles none, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


@contextmanager
def heeding_signals() -> Iterator[None]:
    """`heed_signals` for the duration of a block, which starts with nothing to go on from."""
    global _stopped_by
    set_way_on(START_AGAIN)
    _stopped_by = None
    before = heed_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_program = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "").resolve()
if _program.parent.name in SCRIPTS or _program.name.startswith("barrier-"):
    heed_signals(_stop_at_once)
    end_with_launcher()
    quiet_libraries()
