"""Scripts run as processes of their own: output to a log, signals handed on, nobody else in the same folder."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


# a tracker's run belongs to the workflow, and a script of it must not go on with that run as its own
NOT_INHERITED = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


class Stopped(Exception):
    """A signal ended the process that was waited for, and the waiting one has to end likewise.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def _die_with_parent() -> None:
    """In the child: SIGTERM when the parent is killed, so that it writes a checkpoint and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run_logged(command: Sequence[str], log: Path, keep_open: int, environment: Mapping[str, str]) -> int:
    """The exit status of a command whose output goes to a file; SIGTERM and SIGINT are handed on to it.

    Args:
        keep_open: file descriptor of the folder's lock.

    Raises:
        Stopped: a signal came.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child.poll() is None:
            os.killpg(child.pid, number)

    kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**kept, **environment},
            pass_fds=[keep_open],
            start_new_session=True,  # so that Ctrl-C reaches it once, by `hand_on`
            preexec_fn=_die_with_parent,
        )
        before = {}
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            before = {number: signal.signal(number, hand_on) for number in heeded}
        try:
            status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        raise Stopped(received[0])
    return status


def last_error(log: Path) -> str:
    """The line that says why a script failed: its last "error: ...", else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]
