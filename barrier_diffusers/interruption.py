"""SIGTERM and Ctrl-C during training: the step ends, a checkpoint is written, then the process does."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Within its block SIGTERM and SIGINT are noted and nothing else; `requested` tells whether one came.

    A signal that the process ignores (nohup) stays ignored. Outside the main thread, where Python handles no signals,
    it does nothing.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self._received is not None:  # it came after the last look
            signal.raise_signal(self._received)

    def flag(self, device: torch.device) -> Tensor:
        """1 if this process got a signal, else 0: to be summed over the processes along with other numbers."""
        return torch.full((), float(self._received is not None), device=device)

    @property
    def requested(self) -> bool:
        """Whether any process of the run got a signal; every process has to ask, at the same step. With several of
        them it waits for the device: a loop that sums `flag` along with its losses does not."""
        if self.accelerator.num_processes == 1:
            return self._received is not None
        if self._received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def leave(self, checkpoint: Path) -> NoReturn:
        """End the process as one that the signal ended: exit status 143 (SIGTERM) or 130 (SIGINT)."""
        number = signal.Signals(self._received or signal.SIGTERM)
        if self.accelerator.is_main_process:
            print(
                f"stopped by {number.name}: checkpoint {checkpoint} is whole; the same command with "
                "--resume_from_checkpoint latest goes on from it",
                file=sys.stderr,
            )
        self.accelerator.end_training()
        raise SystemExit(128 + number)
