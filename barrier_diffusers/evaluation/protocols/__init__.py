"""Protocols, one file each; importing a file of this folder registers its protocol.

See base.py for what they share.
"""

import importlib
import pkgutil

from barrier_diffusers.evaluation.protocols.base import PROTOCOLS, Protocol, make_protocols, register_protocol

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["PROTOCOLS", "Protocol", "make_protocols", "register_protocol"]
