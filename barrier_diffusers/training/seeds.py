"""Random numbers that follow a run's seed and what they are for, whatever was drawn before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from barrier_diffusers.utils.run_records import fingerprint

ValueT = TypeVar("ValueT")


def seeded(seed: int, what: str, number: int) -> torch.Generator:
    """Random numbers for the `number`-th use: the same in all processes and after a resume."""
    return torch.Generator().manual_seed(int(fingerprint(seed, what, number)[:8], 16))


def one_of(values: Sequence[ValueT], generator: torch.Generator) -> ValueT:
    """One of the values, each as likely."""
    return values[int(torch.randint(len(values), (), generator=generator))]
