"""How a process of a group ends that has not left it in order: at once, without the interpreter taking it apart.

A thread of gloo may hold the last reference to a tensor and wait for the interpreter, while the interpreter, as it
deletes the group, waits for that thread: such a process never ends, and the launcher waits for it.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from typing import NoReturn


def is_in_group() -> bool:
    """Whether this process has others that it could wait for; torch is not imported for this."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave_at_once(error: BaseException | None) -> NoReturn:
    """End the process as the error would, or well without one: what was registered for the exit runs, and what was
    printed is written; no object is deleted."""
    status: int | str | None = 0
    if isinstance(error, SystemExit):
        status = error.code
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    if isinstance(status, str):
        sys.stderr.write(f"{status}\n")
        status = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status or 0)
