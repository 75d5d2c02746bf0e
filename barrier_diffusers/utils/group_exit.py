"""How a process ends that was started with others: at once, without the interpreter taking it apart.

A thread of gloo may hold the last reference to a tensor and wait for the interpreter, while the interpreter, as it
deletes the group, waits for that thread: such a process never ends, and the launcher waits for it. Leaving the group
in order does not delete it: functions of torch that were defined while it was there hold it as a default, and it goes
when the interpreter clears its modules.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import NoReturn

LOOK, GRACE = 2.0, 300.0  # seconds between two looks at the launcher; and for what is left to do once it is gone


def has_company() -> bool:
    """Whether this process is, or was, of a group of several; torch is not imported for this."""
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a launcher started it, and it may have left its group by now
        return True
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def end_with_launcher(look: float = LOOK, grace: float = GRACE) -> None:
    """From now on this process gets a SIGTERM, as the launcher itself would send it, when the launcher that started it
    is gone without a word (killed, out of memory): training leaves a checkpoint. What has not ended after `grace`
    seconds, as it waits for the store that went with the launcher, ends at once.

    Nothing happens in a process that no launcher of torch started, or whose launcher keeps no store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or sys.platform == "win32":
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(look)
        with suppress(OSError):  # whoever read it may be gone, too
            os.write(2, b"the launcher is gone\n")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


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
