"""The meta step of robust training for classifiers (docs/method.md section 8): the method's loss is also taken where
an attacker with a few images would have moved the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from barrier_diffusers.training.relearner import gradients_of, restored
from barrier_diffusers.training.seeds import one_of, seeded
from classification_ext.data import Splits
from classification_ext.relearning import MOMENTUM, loss_of
from classification_ext.settings import ClassifierRobustConfig


class ClassifierRelearner:
    """Fine-tunes every weight on a few forgotten images and as many others by SGD, for the time of a block.

    How long, how fast and on which images is drawn anew each time, from random numbers that all processes share: each
    of them does the whole of it.
    """

    def __init__(
        self, config: ClassifierRobustConfig, model: nn.Module, splits: Splits, *, seed: int, device: torch.device
    ):
        self.config, self.model, self.splits = config, model, splits
        self.seed, self.device = seed, device

    @contextmanager
    def relearned(self, number: int) -> Iterator[None]:
        """The classifier after the `number`-th relearning; at the end it is as it was, to the bit."""
        generator = seeded(self.seed, "relearner", number)
        num_steps = one_of(self.config.meta_steps, generator)
        learning_rate = one_of(self.config.meta_learning_rates, generator)
        taught = []
        for images in (self.splits.forget, self.splits.retain):
            taught.append(images[torch.randperm(len(images), generator=generator)[: self.config.meta_num_images]])
        weights = list(self.model.parameters())
        trained = [weight.requires_grad for weight in weights]
        with restored(weights):
            try:
                self.model.requires_grad_(True)
                speeds = [torch.zeros_like(weight) for weight in weights]
                for _ in range(num_steps):
                    losses = [loss_of(self.model, images, self.device) for images in taught]
                    self._step(weights, speeds, gradients_of(torch.stack(losses).mean(), weights), learning_rate)
            finally:
                for weight, required in zip(weights, trained, strict=True):
                    weight.requires_grad_(required)
            yield

    @staticmethod
    @torch.no_grad()
    def _step(weights: Sequence[Tensor], speeds: list[Tensor], gradients: list[Tensor], learning_rate: float) -> None:
        """One step of SGD with momentum, as torch takes it."""
        torch._foreach_mul_(speeds, MOMENTUM)
        torch._foreach_add_(speeds, gradients)
        torch._foreach_add_(list(weights), speeds, alpha=-learning_rate)
