"""Scripts started as users start them on several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(script, words=(), *, group=True, **variables):
    """A run of two processes on the CPU; with --cpu accelerate starts a single one, whatever --num_processes says.

    Args:
        group: they form a group (gloo); else accelerate, which finds no GPU, leaves each alone.
        variables: of the environment, as the launcher's configuration files set them.
    """
    with socket.socket() as probe:  # a free port, so that parallel tests do not meet
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--multi_gpu", "--num_cpu_threads_per_process", "1", "--main_process_port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true" if group else "false"}
    environment |= variables
    return subprocess.run([*command, *script, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
