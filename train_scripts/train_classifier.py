"""Train the multi-attribute classifier that scores generated images, and test it on images it never saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from barrier_diffusers.data.encoding import to_pixels
from barrier_diffusers.data.readers import load_image_text
from barrier_diffusers.evaluation.classifier import AttributeClassifier
from barrier_diffusers.utils.command_line import run_script


@dataclass
class ClassifierConfig:
    """Everything the classifier depends on."""

    train_data_dir: str = "runs/fashion_mnist"  # folder or hub name with an image column and one column per attribute
    output_dir: str = "assets/fashion_classifier"
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    attributes: list[str] = field(default_factory=lambda: ["class", "colour", "style"])
    resolution: int = 32
    channels: list[int] = field(default_factory=lambda: [48, 96, 192])
    num_train_epochs: int = 8
    train_batch_size: int = 128
    learning_rate: float = 4e-3  # peak of the one-cycle schedule
    weight_decay: float = 0.02
    label_smoothing: float = 0.1
    mixed_precision: Literal["no", "bf16"] = "bf16"
    seed: int = 0


def decode(dataset: Dataset, config: ClassifierConfig) -> Tensor:
    """All images as bytes (N, 3, H, W): decoded once, because decoding would cost more than training on them."""
    images = torch.empty(len(dataset), 3, config.resolution, config.resolution, dtype=torch.uint8)
    for start in tqdm(range(0, len(dataset), 1000), desc="decoding", leave=False):
        pixels = to_pixels(dataset[start : start + 1000][config.image_column], config.resolution)
        images[start : start + len(pixels)] = ((pixels + 1) * 127.5).round().byte()
    return images


def as_pixels(images: Tensor) -> Tensor:
    """Bytes -> [-1, 1]."""
    return images.float() / 127.5 - 1


def augment(pixels: Tensor) -> Tensor:
    """Mirror half of the images and shift each by up to two pixels on white."""
    flip = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    pixels = torch.where(flip, pixels.flip(3), pixels)
    side = pixels.shape[-1]
    padded = F.pad(pixels, (2, 2, 2, 2), value=1.0)
    top, left = torch.randint(5, (2,)).tolist()
    return padded[..., top : top + side, left : left + side]


def main(config: ClassifierConfig) -> None:
    """Train, test, save."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    train = load_image_text(config.train_data_dir, config.train_split, config.image_column, config.attributes[0])
    test = load_image_text(config.train_data_dir, config.test_split, config.image_column, config.attributes[0])
    labels = {name: sorted(set(train[name])) for name in config.attributes}
    model = AttributeClassifier(labels, config.channels, config.resolution).to(memory_format=torch.channels_last)
    indices = [torch.tensor([labels[name].index(value) for value in train[name]]) for name in labels]
    rows = TensorDataset(decode(train, config), *indices)
    loader = DataLoader(rows, config.train_batch_size, shuffle=True, drop_last=True)
    steps = config.num_train_epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps, pct_start=0.2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    progress = tqdm(total=steps, desc="classifier", disable=not accelerator.is_local_main_process)
    for _ in range(config.num_train_epochs):
        model.train()
        for images, *truth in loader:
            logits = model(augment(as_pixels(images)))
            smoothing = config.label_smoothing
            losses = [
                F.cross_entropy(logits[n], t, label_smoothing=smoothing) for n, t in zip(labels, truth, strict=True)
            ]
            accelerator.backward(torch.stack(losses).sum())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()
    if not accelerator.is_main_process:
        return
    judge = accelerator.unwrap_model(model).eval()
    predicted = judge.predict(as_pixels(images) for images in decode(test, config).split(256))
    correct = {n: [p == t for p, t in zip(predicted[n], test[n], strict=True)] for n in labels}
    accuracy = {n: 100 * sum(values) / len(values) for n, values in correct.items()}
    first = config.attributes[0]
    per_label = {
        label: 100
        * sum(ok for ok, t in zip(correct[first], test[first], strict=True) if t == label)
        / test[first].count(label)
        for label in labels[first]
    }
    judge.save_pretrained(config.output_dir)
    report = {
        "config": asdict(config),
        "num_test_images": len(test),
        "test_accuracy": accuracy,
        "per_label": per_label,
    }
    Path(config.output_dir, "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    print("; ".join(f"{name} {value:.2f} %" for name, value in accuracy.items()), f"on {len(test)} test images")


if __name__ == "__main__":
    run_script(main, ClassifierConfig)
