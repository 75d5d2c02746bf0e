"""No noise of libraries before a script's own lines."""

from __future__ import annotations

import logging
import os
import warnings

QUIET = {  # environment variables that keep libraries silent, where they are not set already
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
LOGGERS = ("bitsandbytes", "bitsandbytes.backends.cpu.ops")  # peft imports it, and it reports what it lacks


def quiet_libraries() -> None:
    """Call this before the libraries are imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
