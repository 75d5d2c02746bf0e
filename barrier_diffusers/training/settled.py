"""Whether training has erased: the objective's loss on the same draws before and after, by every name."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import default_collate

from barrier_diffusers.objectives import Objective
from barrier_diffusers.training.steps import StepMaker
from barrier_diffusers.training.token_adversary import TokenAdversary

NUM_ROWS = 64  # forget rows that are measured, at most
LEFT = 0.5  # share of a squared distance to the target that may be left of an erased concept


class ErasureGauge:
    """Measures the objective's loss on fixed forget rows, noise and timesteps; it draws from no other random state.

    Args:
        make_step: of the bare network.
        images: forget rows.
        device: where the network is.
    """

    def __init__(self, objective: Objective, make_step: StepMaker, images: Any, device: torch.device, seed: int):
        self.objective, self.make_step, self.seed = objective, make_step, seed
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:NUM_ROWS]
        self.batches = [default_collate([images[int(row)] for row in part]) for part in rows.split(16)]
        self.device, self.before = device, 0.0

    def loss(self, adversary: TokenAdversary | None = None, which: int = -1) -> float:
        """The mean loss as the network is now; asked for by a learned name, or by the concept's own."""
        total, count = 0.0, 0
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for batch in self.batches:
                size = len(batch["index"])
                moved = send_to_device(batch, self.device)
                if adversary is not None:
                    moved = adversary.named(moved, torch.full((size,), which))
                total += float(self.objective.loss_of(self.make_step(moved)).detach()) * size
                count += size
        return total / count

    def measure_before(self) -> None:
        """Note the loss before training."""
        self.before = self.loss()

    def is_erased(self, adversary: TokenAdversary | None) -> bool:
        """Whether no name shows what was to be erased, as `result` counts it."""
        return self._num_unsettled(self._losses(adversary)) == 0

    def _losses(self, adversary: TokenAdversary | None) -> list[float]:
        """By the concept's own name, and by every learned one."""
        learned = len(adversary.tables) if adversary is not None else 0
        return [self.loss(), *(self.loss(adversary, which) for which in range(learned))]

    def _num_unsettled(self, losses: list[float]) -> int:
        limit = LEFT * self.before if self.before > 0 else self.before
        return sum(not loss < limit for loss in losses)

    def result(self, adversary: TokenAdversary | None, warn: bool = True) -> dict[str, Any]:
        """The losses before and after, and how many of the names still show what was to be erased; a line of warning
        if any does.

        An objective whose loss is a distance (rl, concept, esd) has settled where at most the share LEFT of it is
        left; one without a floor (ga, kl) where it has fallen.
        """
        after = self._losses(adversary)
        unsettled = self._num_unsettled(after)
        if unsettled and warn:
            print(
                f"warning: not erased: of {len(after)} names, the concept's own and learned ones, {unsettled} have an "
                f"unlearning loss of up to {max(after):.3g}, which was {self.before:.3g} before training: raise "
                "max_train_steps or learning_rate, lower objective.alpha or barrier.lambda_interval, or choose "
                "another anchor",
                file=sys.stderr,
            )
        return {"loss_before": self.before, "loss_after": after[0], "token_losses": after[1:], "unsettled": unsettled}

    def state_dict(self) -> dict[str, Any]:
        """The loss before training."""
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.before = state["before"]
