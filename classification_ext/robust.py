"""The meta step of robust training for classifiers (docs/method.md section 8): the method's loss is also taken where
an attacker with a few images would have moved the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.training.lives import Attacker, Lives, restored
from barrier_diffusers.training.relearner import gradients_of
from barrier_diffusers.training.seeds import one_of
from classification_ext.data import Splits
from classification_ext.relearning import MOMENTUM, loss_of
from classification_ext.settings import ClassifierRobustConfig


@dataclass
class ClassifierAttacker(Attacker):
    """It fine-tunes a classifier by SGD with momentum."""

    taught: list[LabelledImages] = field(default_factory=list)  # a few forgotten images, and as many others


class ClassifierRelearner(Lives[ClassifierRobustConfig, ClassifierAttacker]):
    """Fine-tunes every weight on a few forgotten images and as many others by SGD, for the time of a block.

    How long, how fast and on which images is drawn anew each time, from random numbers that all processes share: each
    of them does the whole of it.
    """

    def __init__(self, config: ClassifierRobustConfig, model: nn.Module, splits: Splits, *, seed: int):
        super().__init__(config, seed)
        self.model, self.splits = model, splits

    @property
    def device(self) -> torch.device:
        """See `Lives`."""
        return next(self.model.parameters()).device

    @contextmanager
    def relearned(self, number: int) -> Iterator[None]:
        """The classifier after the `number`-th meeting with a relearner; at the end it is as it was, to the bit."""
        attacker, num_steps, _ = self.next(number)
        weights = list(self.model.parameters())
        trained = [weight.requires_grad for weight in weights]
        with restored(weights) as before:
            attacker.go_on(weights)
            try:
                self.model.requires_grad_(True)
                speeds = attacker.moments or [torch.zeros_like(weight) for weight in weights]
                for _ in range(num_steps):
                    losses = [loss_of(self.model, images, self.device) for images in attacker.taught]
                    gradients = gradients_of(torch.stack(losses).mean(), weights)
                    self._step(weights, speeds, gradients, attacker.learning_rate)
            finally:
                for weight, required in zip(weights, trained, strict=True):
                    weight.requires_grad_(required)
            attacker.note(attacker.num_steps + num_steps, speeds)
            attacker.note_lead(weights, before)
            yield

    def drawn(self, generator: torch.Generator) -> ClassifierAttacker:
        """See `Lives`."""
        attacker = ClassifierAttacker(one_of(self.config.meta_learning_rates, generator))
        for images in (self.splits.forget, self.splits.retain):
            rows = torch.randperm(len(images), generator=generator)[: self.config.meta_num_images]
            attacker.taught.append(images[rows])
        return attacker

    @staticmethod
    @torch.no_grad()
    def _step(weights: Sequence[Tensor], speeds: list[Tensor], gradients: list[Tensor], learning_rate: float) -> None:
        """One step of SGD with momentum, as torch takes it."""
        torch._foreach_mul_(speeds, MOMENTUM)
        torch._foreach_add_(speeds, gradients)
        torch._foreach_add_(list(weights), speeds, alpha=-learning_rate)
