"""How a process ends that was started with others: at once, without the interpreter taking it apart.

A thread of gloo may hold the last reference to a tensor and wait for the interpreter, while the interpreter, as it
deletes the group, waits for that thread: such a process never ends, and the launcher waits for it. Leaving the group
in order does not delete it: functions of torch that were defined while it was there hold it as a default, and it goes
when the interpreter clears its modules.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from typing import NoReturn


def has_company() -> bool:
    """Whether this process is, or was, of a group of several; torch is not imported for this."""
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a launcher started it, and it may have left its group by now
        return True
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
