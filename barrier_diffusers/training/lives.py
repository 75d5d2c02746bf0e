"""Relearners that robust training meets more than once: drawn at birth, and further along at each meeting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from barrier_diffusers.training.robust_config import MetaStep
from barrier_diffusers.training.seeds import one_of, seeded


@contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Whatever is written into the parameters in a block, they are afterwards as they were, to the bit.

    Yields:
        What they were.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield before
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), before)


@dataclass
class Attacker:
    """One relearner, with what it keeps from one meeting to the next."""

    learning_rate: float
    born: int = 0  # number of the batch that it was drawn for
    num_left: int = 0  # meetings that follow
    num_steps: int = 0  # of its optimizer, so far
    lead: list[Tensor] = field(default_factory=list)  # how far it has moved what it trains; empty: not yet
    moments: list[Tensor] = field(default_factory=list)  # of its optimizer; empty: not yet

    KEPT: ClassVar[tuple[str, ...]] = ("born", "num_left", "num_steps", "lead", "moments")  # in a checkpoint

    @torch.no_grad()
    def go_on(self, parameters: Sequence[Tensor]) -> None:
        """Move what it trains to where it was."""
        if self.lead:
            torch._foreach_add_(list(parameters), self.lead)
        self.lead = []

    def note(self, num_steps: int, moments: list[Tensor]) -> None:
        """Keep its optimizer's state, if it is met again."""
        self.num_steps, self.moments = num_steps, moments if self.num_left else []

    @torch.no_grad()
    def note_lead(self, parameters: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Keep how far it has come, if it is met again."""
        self.lead = list(torch._foreach_sub(list(parameters), list(before))) if self.num_left else []


AttackerT = TypeVar("AttackerT", bound=Attacker)
MetaStepT = TypeVar("MetaStepT", bound=MetaStep)


class Lives(ABC, Generic[MetaStepT, AttackerT]):
    """Who is met next. What an attacker is follows from the seed and its birth, so that a checkpoint holds its tensors
    alone, and those only of one that is alive.

    Args:
        config: says how often one relearner is met (`meta_lives`), and how many steps it takes each time
            (`meta_steps`).
    """

    def __init__(self, config: MetaStepT, seed: int):
        self.config, self.seed = config, seed
        self._alive: AttackerT | None = None  # is met again

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network is."""

    @abstractmethod
    def drawn(self, generator: torch.Generator) -> AttackerT:
        """An attacker that has taken no step."""

    def next(self, number: int) -> tuple[AttackerT, int, torch.Generator]:
        """Who is met at the `number`-th batch, how many steps it takes there, and what its noise is drawn from."""
        generator = seeded(self.seed, "relearner", number)
        num_steps = one_of(self.config.meta_steps, generator)
        attacker = self._alive
        if attacker is None:
            attacker = self.drawn(generator)
            attacker.born = number
            attacker.num_left = one_of(self.config.meta_lives, seeded(self.seed, "life of a relearner", number))
        attacker.num_left -= 1
        self._alive = attacker if attacker.num_left else None
        return attacker, num_steps, generator

    def end_life(self) -> None:
        """Whoever is alive is not met again."""
        self._alive = None

    def state_dict(self) -> dict[str, Any]:
        """Of who is met again; empty if that is a new one."""
        return {} if self._alive is None else {name: getattr(self._alive, name) for name in self._alive.KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._alive = None
        if state:
            generator = seeded(self.seed, "relearner", state["born"])
            one_of(self.config.meta_steps, generator)  # as at its birth
            self._alive = self.drawn(generator)
            for name in self._alive.KEPT:
                setattr(self._alive, name, send_to_device(state[name], self.device))
