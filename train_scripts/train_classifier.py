"""Train the multi-attribute classifier that scores generated images, and test it on images it never saw."""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from barrier_diffusers.data.columns import with_texts
from barrier_diffusers.data.encoding import read_pixels
from barrier_diffusers.data.readers import read_rows, rows_hash
from barrier_diffusers.evaluation.accuracy import Answers
from barrier_diffusers.evaluation.classifier import AttributeClassifier
from barrier_diffusers.training.run_config import RunConfig, StageConfig
from barrier_diffusers.training.trainer import ONE_CYCLE, Trainer, make_accelerator
from barrier_diffusers.utils.checks import DATA, Range, at_least, rules
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import save_whole, write_json
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import METRICS_NAME


@dataclass(kw_only=True)
class ClassifierConfig(RunConfig, StageConfig):
    """Everything the classifier depends on."""

    train_data_dir: str = "runs/fashion_mnist"  # folder or hub name with an image column and one column per attribute
    output_dir: str = "assets/fashion_classifier"  # gets the classifier and metrics.json
    overwrite_output_dir: bool = True  # an earlier result in output_dir goes when the new one is there
    train_split: str = "train"  # of the data set
    test_split: str = "test"  # of the data set, never trained on
    image_column: str = "image"  # of the data set
    # columns whose values are told apart, each by a head of its own
    attributes: list[str] = field(default_factory=lambda: ["class", "colour", "style"])
    resolution: int = 32  # side of the images in pixels
    channels: list[int] = field(default_factory=lambda: [48, 96, 192])  # of each level of the network
    num_train_epochs: int = 8  # passes over the data
    train_batch_size: int = 128  # images per step
    learning_rate: float = 4e-3  # peak of the one-cycle schedule
    lr_scheduler: str = ONE_CYCLE
    weight_decay: float = 0.02  # of AdamW
    label_smoothing: float = 0.1  # share of each label that all labels get
    max_grad_norm: float | None = None  # None: no clipping
    mixed_precision: Literal["no", "fp16", "bf16"] | None = "bf16"
    report_to: Literal["tensorboard", "wandb", "all", "none"] = "none"

    RULES = rules(
        train_data_dir=DATA,
        resolution=at_least(1),
        channels=at_least(1),
        weight_decay=at_least(0),
        label_smoothing=Range(0, 1, without_high=True),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_split == self.test_split:
            raise ValueError(f"test_split and train_split are both {self.test_split!r}: nothing would be tested")

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        return f"training a classifier from scratch to tell {', '.join(self.attributes)} on {self.train_data_dir}"


def read_split(config: ClassifierConfig, split: str) -> Dataset:
    """A split with the attributes' values as texts."""
    rows = read_rows(config.train_data_dir, split, config.image_column, config.attributes)
    for name in config.attributes:
        rows = with_texts(rows, name)
    return rows


def decode(dataset: Dataset, config: ClassifierConfig) -> Tensor:
    """All images as bytes (N, 3, H, W): decoded once, because decoding would cost more than training on them."""
    images = torch.empty(len(dataset), 3, config.resolution, config.resolution, dtype=torch.uint8)
    for start in tqdm(range(0, len(dataset), 1000), desc="decoding", leave=False):
        rows = range(start, min(start + 1000, len(dataset)))
        pixels = read_pixels(dataset, config.image_column, config.resolution, rows)
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


def train_classifier(trainer: Trainer, config: ClassifierConfig, labels: dict[str, list[str]], train: Dataset) -> Any:
    """A classifier of all attributes; their losses are summed."""
    model = AttributeClassifier(labels, config.channels, config.resolution).to(memory_format=torch.channels_last)
    indices = [torch.tensor([labels[name].index(value) for value in train[name]]) for name in labels]
    rows = TensorDataset(decode(train, config), *indices)
    order = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(rows, config.train_batch_size, shuffle=True, drop_last=True, generator=order)
    parameters = list(model.parameters())
    trainer.checkpoints.inputs = {"data": rows_hash(train, [config.image_column, *config.attributes])}
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    (batches,) = trainer.prepare(models=[model], parameters=parameters, optimizer=optimizer, loaders=[loader])
    network = trainer.models[0].train()

    def terms(step: int) -> dict[str, Tensor]:
        images, *truth = next(batches)
        logits = network(augment(as_pixels(images)))
        return {
            name: F.cross_entropy(logits[name], own, label_smoothing=config.label_smoothing)
            for name, own in zip(labels, truth, strict=True)
        }

    trainer.fit(terms, desc="classifier")
    return model.eval()


def score(model: Any, config: ClassifierConfig, test: Dataset) -> dict[str, Any]:
    """Accuracy in percent of every attribute, and of every label of the first one."""
    found = model.probabilities(as_pixels(images) for images in decode(test, config).split(256))
    predicted = Answers(model.attributes, found).labels
    correct = {
        name: [says == true for says, true in zip(predicted[name], test[name], strict=True)]
        for name in config.attributes
    }
    first = config.attributes[0]
    of_label = {
        label: [ok for ok, true in zip(correct[first], test[first], strict=True) if true == label]
        for label in sorted(set(test[first]))
    }
    return {
        "num_test_images": len(test),
        "test_accuracy": {name: 100 * sum(values) / len(values) for name, values in correct.items()},
        "per_label": {label: 100 * sum(values) / len(values) for label, values in of_label.items()},
    }


@in_output_folder(also_written=["README.md"])
def main(config: ClassifierConfig) -> None:
    """Load -> train -> save -> test."""
    output = Path(config.output_dir)
    accelerator = make_accelerator(config, logs_in=config.output_dir, data_seed=config.seed)
    trainer = Trainer(accelerator, config)
    set_seed(config.seed)
    train, test = (read_split(config, split) for split in (config.train_split, config.test_split))
    labels = {name: sorted(set(train[name])) for name in config.attributes}
    model = train_classifier(trainer, config, labels, train)
    if accelerator.is_main_process:
        save_whole(model.save_pretrained, output, last="config.json")
        scores = score(model, config, test)
        write_json(output / METRICS_NAME, {"config": asdict(config), **scores})
        said = "; ".join(f"{name} {value:.2f} %" for name, value in scores["test_accuracy"].items())
        print(f"{said} on {len(test)} test images")
    trainer.end_run()


if __name__ == "__main__":
    run_script(main, ClassifierConfig)
