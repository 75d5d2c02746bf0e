"""How a failed run ends: one line for errors of input and environment, a traceback for bugs.

The rule. An error that our own code raises on purpose (ValueError, OSError, FloatingPointError) says in one line what
to do. So do errors that only input or the machine can cause, whoever raises them (EXTERNAL, and messages of torch
about memory and devices). Of every other type, an error counts as the input's or the machine's if an installed library
raised it, and as a bug if a line of ours did, or of a file of the user's own; the former, too, end in one line.
Whatever was not raised on purpose by our own code leaves its traceback in a log file, which the line names.
"""

from __future__ import annotations

import csv
import os
import struct
import sysconfig
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path

from safetensors import SafetensorError

OURS = tuple(
    str(Path(__file__).resolve().parents[2] / name) + os.sep
    for name in ("barrier_diffusers", "classification_ext", "ddpm_ext", "train_scripts")
)
LIBRARIES = tuple({os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "purelib", "platlib")})
ON_PURPOSE = (ValueError, OSError, FloatingPointError)
EXTERNAL = (
    *ON_PURPOSE,
    *(MemoryError, EOFError, ImportError, csv.Error, struct.error, zipfile.BadZipFile, zlib.error, SafetensorError),
)
OF_THE_MACHINE = ("out of memory", "can't allocate memory", "not enough memory", "cuda error", "nccl", "cudnn")


def raised_by_library(error: BaseException) -> bool:
    """Whether the line that raised the error is in an installed library, and not in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    where = os.path.realpath(frames[-1].filename) if frames else ""
    return where.startswith(LIBRARIES) and not where.startswith(OURS)


def is_bug(error: BaseException) -> bool:
    """Whether the error is neither of the input nor of the machine; see the module."""
    if isinstance(error, EXTERNAL):
        return False
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OF_THE_MACHINE):
        return False
    return not raised_by_library(error)


def one_line(error: BaseException) -> str:
    """The error in one line, with its type where its own message does not say enough."""
    message = " ".join(str(error).split()) or "no more is known"
    return message if isinstance(error, ON_PURPOSE) else f"{type(error).__name__}: {message}"


def keep_traceback(error: BaseException, output_dir: str | None) -> Path:
    """Write the traceback to a log file, in the logs of the run's folder if there are any; the file's path."""
    logs = Path(output_dir).expanduser() / "logs" if output_dir else None
    folder = logs if logs is not None and logs.is_dir() else Path(tempfile.gettempdir())
    name = f"barrier-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = "".join(traceback.format_exception(error))
    try:
        (folder / name).write_text(text, encoding="utf-8")
    except OSError:
        folder = Path(tempfile.gettempdir())
        (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def explanation(error: BaseException, output_dir: str | None) -> str:
    """The line that a run ends with."""
    if isinstance(error, ON_PURPOSE) and not raised_by_library(error):
        return one_line(error)
    return f"{one_line(error)} (traceback: {keep_traceback(error, output_dir)})"
