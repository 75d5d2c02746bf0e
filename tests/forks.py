"""Processes that start at once: they are forked from a server that has imported the heavy libraries.

There is one server in a test process. What starts here runs in a fresh process all the same, with its own state.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
import torch.multiprocessing

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = [  # what the processes of any test import, so that the first one to need the server serves all
    "pytest",
    "barrier_diffusers.scripts.unlearn_sd",
    "barrier_diffusers.scripts.evaluate_sd",
    "barrier_diffusers.scripts.train_text_to_image",
    "classification_ext.unlearn",
    "ddpm_ext.unlearn",
]


def server():
    """The context whose processes are forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def in_ranks(worker, *arguments, count=2):
    """Call worker(rank, *arguments) in `count` processes at once; an error in one of them is raised here."""
    server()
    torch.multiprocessing.start_processes(worker, arguments, nprocs=count, start_method="forkserver")


def _run_script(module, words, said):
    os.chdir(ROOT)
    torch.set_num_threads(1)  # as the tests run: other sums, other last digits
    with open(said, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = [module, *words]
    sys.modules.pop(module, None)  # it is run anew, as the main module
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Script:
    """A script of the repository in a process of its own, started as `python -m MODULE WORDS` in the repository.

    Args:
        said: file that gets what it prints, on either stream.
    """

    def __init__(self, module, words, said):
        self.said = Path(said)
        self.process = server().Process(target=_run_script, args=(module, [str(word) for word in words], said))
        self.process.start()

    @property
    def output(self):
        """What it has printed so far."""
        return self.said.read_text(errors="replace") if self.said.exists() else ""

    @property
    def is_running(self):
        return self.process.exitcode is None

    def send(self, number):
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self):
        """End it at once."""
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, seconds=120):
        """Its exit status, as `subprocess` gives it."""
        self.process.join(seconds)
        assert not self.is_running, f"it runs for more than {seconds} seconds: {self.output[-2000:]}"
        return self.process.exitcode
