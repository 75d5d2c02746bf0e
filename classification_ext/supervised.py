"""Optimizing a classifier: what training and unlearning share, and training from scratch.

`fit` is called by train.py on all images and by method retrain on the retained ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.training.trainer import Trainer, open_run
from classification_ext.data import augment, pixels_of, shuffled
from classification_ext.models import AnyClassifier
from classification_ext.settings import OptimizerConfig, Recipe


def open_seeded_run(config: OptimizerConfig) -> Trainer:
    """The trainer of a run, its output folder claimed; every process has random numbers of its own."""
    trainer = Trainer(open_run(config), config)
    set_seed(config.seed + trainer.accelerator.process_index)
    return trainer


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=decay)
    momentum = config.momentum
    return torch.optim.SGD(parameters, rate, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)


def fit(
    trainer: Trainer, config: OptimizerConfig, *, recipe: Recipe, model: AnyClassifier, images: LabelledImages
) -> float:
    """Train every weight on `images` with augmentation; the seconds it took."""
    parameters = list(model.to(trainer.accelerator.device).parameters())
    loader = shuffled(
        images, config.train_batch_size, seed=config.seed, num_processes=trainer.accelerator.num_processes
    )
    (batches,) = trainer.prepare(
        models=[model], parameters=parameters, optimizer=make_optimizer(config, parameters), loaders=[loader]
    )
    network = trainer.models[0].train()

    def terms(step: int) -> dict[str, Tensor]:
        batch = next(batches)
        logits = network(augment(pixels_of(batch), recipe.flip, recipe.shift)).float()
        return {"cross_entropy": F.cross_entropy(logits, batch["labels"], label_smoothing=recipe.label_smoothing)}

    seconds = trainer.fit(terms, desc="training")
    model.eval()
    return seconds
