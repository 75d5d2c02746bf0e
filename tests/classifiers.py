"""Tiny labelled data on disk, a classifier trained on it, and runs of classification_ext in this process."""

import json

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.utils.command_line import parse_config
from classification_ext import train, unlearn
from classification_ext.settings import TrainConfig, UnlearnConfig

NAMES = ["north", "east", "south", "west"]
SIDE = 8
TRAIN = {"model_name_or_path": "resnet8-tiny", "resolution": SIDE, "num_channels": 1, "num_train_epochs": 6}
TRAIN |= {"train_batch_size": 32, "optimizer": "adamw", "learning_rate": 5e-3, "flip": False, "shift": 1}
UNLEARN = {"forget_class": "east", "train_batch_size": 16, "num_train_epochs": 10, "learning_rate": 0.02}
UNLEARN |= {"method.alpha": 1.0, "barrier.lambda_interval": 0.1, "barrier.reduced_dim": 4}
UNLEARN |= {"evaluation.num_mia_samples": 40}


def pictures(per_label, seed):
    """Images (N, 1, 8, 8) in bytes, one bright side per label, and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(len(NAMES)), per_label)
    images = rng.integers(0, 120, (len(labels), SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        side = np.rot90(image, label)  # a view
        side[:2] += 100
    return images[:, None].astype(np.uint8), labels


def labelled(per_label=10, seed=0):
    """The pictures as the package holds them."""
    images, labels = pictures(per_label, seed)
    return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels), list(NAMES))


def write_data(folder, sizes=(40, 20), change=None):
    """Parquet files train and test; `change(images, labels)` may edit the training pictures in place."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    for seed, (split, per_label) in enumerate(zip(("train", "test"), sizes, strict=True)):
        images, labels = pictures(per_label, seed)
        if change is not None and split == "train":
            change(images, labels)
        rows = {"image": [Pictures.fromarray(image[0]) for image in images], "label": labels.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def words(settings):
    """Command-line words."""
    return [
        word for name, value in settings.items() for word in (f"--{name}", "null" if value is None else str(value))
    ]


def run_train(data, output, **changes):
    """The metrics of one training run; accelerate forgets the last run's precision first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"train_data_dir": data, "output_dir": output, **TRAIN, **changes}
    train.main(parse_config(TrainConfig, words(settings)))
    return json.loads((output / "metrics.json").read_text())


def run_unlearn(base, data, output, **changes):
    """(metrics, manifest) of one unlearning run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": output}
    unlearn.main(parse_config(UnlearnConfig, words({**settings, **UNLEARN, **changes})))
    return json.loads((output / "metrics.json").read_text()), json.loads((output / "manifest.json").read_text())
