"""What every unlearning method gets, and the registry that maps a name to it.

Shapes: B batch, N images, C channels, H height, W width, J labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.utils.registry import Registry
from classification_ext.settings import ClassifierRobustConfig, MethodConfig, Recipe, UnlearnConfig

Logits = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [-1, 1] -> logits (B, J)


@dataclass(frozen=True)
class Step:
    """One mini-batch of the images the method is about: forget images, or with over="retain" retained ones."""

    model: Logits  # the network that trains; with shadow_label it has J + 1 outputs
    pixels: Tensor  # (B, C, H, W) in [-1, 1]
    labels: Tensor  # (B,); after `relabel` the method's own
    num_labels: int  # J
    parameters: list[nn.Parameter]  # those that train
    progress: float  # share of the run that is done, [0, 1)
    options: MethodConfig

    def ordinary_loss(self) -> Tensor:
        """Mean cross-entropy: the loss the network was trained with."""
        return F.cross_entropy(self.model(self.pixels).float(), self.labels)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Edit:
    """What a method without training steps gets; it changes the parameters in place."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]  # those that may change, by name
    forget: LabelledImages
    retain: LabelledImages
    device: torch.device
    batch_size: int
    seed: int
    options: MethodConfig


@dataclass(frozen=True)
class Method:
    """A way to unlearn: a loss on batches, a closed-form edit, or (neither) training anew on the retained images."""

    name: str
    loss: Callable[[Step], Tensor] | None = None
    edit: Callable[[Edit], None] | None = None
    relabel: Callable[[Logits, Tensor, Tensor, MethodConfig], Tensor] | None = None  # once, before training
    shadow_label: bool = False  # the forget images' label while training is a further one, dropped afterwards
    over: Literal["forget", "retain"] = "forget"  # whose batches the loss sees, and whose passes are epochs
    reads: tuple[str, ...] = ()  # fields of MethodConfig

    def check(self, config: UnlearnConfig) -> None:
        """Refuse a setting that this method never reads.

        Raises:
            ValueError: says which setting, and what to do.
        """
        read = {"name", *self.reads} | ({"alpha"} if self.loss and self.over == "forget" else set())
        for setting in fields(MethodConfig):
            value = getattr(config.method, setting.name)
            if setting.name not in read and value != setting.default:
                raise ValueError(
                    f"method {self.name!r} does not read method.{setting.name}: leave it at {setting.default}"
                )
        if (self.loss or self.edit) and config.recipe != Recipe():
            raise ValueError(f"method {self.name!r} does not read recipe, which is of retrain: leave it out")
        if config.robust != ClassifierRobustConfig():
            if not config.robust.meta_steps:
                raise ValueError("robust settings are read with robust.meta_steps alone: set it, or leave them out")
            if self.loss is None or self.over != "forget" or self.shadow_label:
                raise ValueError(
                    f"method {self.name!r} has no loss of the forget images with their labels, which an attacker's "
                    "steps could be held against: leave robust.meta_steps empty, or take rl or ga"
                )
            if config.saliency_mask is not None:
                raise ValueError("saliency_mask would hold what robust.meta_steps moves as well: use one of the two")
        if self.loss is None:
            if config.protected:
                raise ValueError(
                    f"method {self.name!r} runs no training step that the protection could act on: set "
                    "barrier.lambda_interval to 0 and leave barrier.constraint at penalty"
                )
            if config.saliency_mask is not None:
                raise ValueError(f"method {self.name!r} does not read saliency_mask: leave it out")
        if self.loss is None and self.edit is None and config.trained_weights != "all":
            raise ValueError(f"method {self.name!r} trains every weight: set trained_weights to all")
        if self.edit is not None and config.resume_from_checkpoint is not None:
            raise ValueError(f"method {self.name!r} has no training to resume: leave out resume_from_checkpoint")


METHODS: Registry[Method] = Registry("method")
