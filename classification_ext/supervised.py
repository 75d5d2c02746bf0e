"""Training a classifier from scratch: by train.py on all images, by method retrain on the retained ones."""

from __future__ import annotations

from accelerate import Accelerator
from torch.nn import functional as F

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.training.loop import endless
from classification_ext.data import augment, pixels_of, shuffled
from classification_ext.loop import Loop
from classification_ext.models import AnyClassifier
from classification_ext.settings import OptimizerConfig, Recipe


def fit(
    accelerator: Accelerator, config: OptimizerConfig, recipe: Recipe, model: AnyClassifier, images: LabelledImages
) -> tuple[Loop, float]:
    """Train every weight on `images` with augmentation; the loop, for its history, and the seconds."""
    loader = shuffled(images, config.train_batch_size, config.seed, accelerator.num_processes)
    loader = accelerator.prepare(loader)
    loop = Loop(accelerator, config, [model.to(accelerator.device)], model.parameters(), len(loader))
    batches = endless(loader, loop.resume())
    network = loop.models[0]
    network.train()

    def terms(step: int) -> dict:
        batch = next(batches)
        logits = network(augment(pixels_of(batch), recipe.flip, recipe.shift)).float()
        return {"cross_entropy": F.cross_entropy(logits, batch["labels"], label_smoothing=recipe.label_smoothing)}

    seconds = loop.run(terms, "training")
    accelerator.unwrap_model(network, keep_fp32_wrapper=False).eval()
    return loop, seconds
