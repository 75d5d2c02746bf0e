"""Image classifiers: our own small family and any AutoModelForImageClassification, behind one interface.

Shapes: N images, C channels, H height, W width, J labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from barrier_diffusers.evaluation.classifier import ResidualBlock, shortcut
from barrier_diffusers.utils.files import reading_tensors
from barrier_diffusers.utils.hub import require_on_hub

# only classes of transformers: no code of a model's folder is ever run, nor is leave asked to run it
OURS = {"trust_remote_code": False}
EXPANSION = 4  # of a bottleneck: outputs per inner channel
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: halve the side


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with batch normalisation and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1, self.norm1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 width, H / stride, W / stride)."""
        hidden = torch.relu(self.norm1(self.conv1(x)))
        hidden = torch.relu(self.norm2(self.conv2(hidden)))
        return torch.relu(self.norm3(self.conv3(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network with the stem that small images need: one 3x3 convolution, no pooling.

    Args:
        depths: blocks per stage; every stage after the first halves the side.
        widths: channels of each stage (of a bottleneck: its inner ones).
        stem_stride: 2 halves the side at once.
    """

    def __init__(
        self,
        block: type[ResidualBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        num_channels: int,
        num_labels: int,
        stem_stride: int = 1,
    ):
        super().__init__()
        width = widths[0]
        self.conv1 = nn.Conv2d(num_channels, width, 3, stem_stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        stages = []
        for stage, (depth, inner) in enumerate(zip(depths, widths, strict=True)):
            blocks: list[nn.Module] = []
            for index in range(depth):
                blocks.append(block(width, inner, 2 if stage and index == 0 else 1))
                width = inner * (EXPANSION if block is Bottleneck else 1)
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, J)."""
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.fc(self.stages(x).mean((2, 3)))


class VGG(nn.Module):
    """VGG-16 with batch normalisation and one linear layer, as used on 32 x 32 images (arXiv 1409.1556)."""

    def __init__(self, num_channels: int, num_labels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for width in VGG16:
            if width:
                layers += [nn.Conv2d(num_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                num_channels = width
            else:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(num_channels, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, J)."""
        return self.fc(self.features(x).mean((2, 3)))


ARCHITECTURES: dict[str, Callable[[int, int], nn.Module]] = {  # (channels, labels) -> network
    "resnet8-tiny": lambda c, j: ResNet(ResidualBlock, (1, 1, 1), (16, 32, 64), c, j, stem_stride=2),
    "resnet18": lambda c, j: ResNet(ResidualBlock, (2, 2, 2, 2), (64, 128, 256, 512), c, j),
    "resnet20s": lambda c, j: ResNet(ResidualBlock, (3, 3, 3), (16, 32, 64), c, j),
    "resnet50": lambda c, j: ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), c, j),
    "vgg16-bn": VGG,
}


class Classifier(nn.Module, PyTorchModelHubMixin):
    """One of ARCHITECTURES with the labels and the image size it was made for.

    `save_pretrained` and `from_pretrained` (safetensors and config.json) come from huggingface_hub.

    Raises:
        ValueError: an unknown architecture.
    """

    def __init__(self, architecture: str, names: Sequence[str], resolution: int = 32, num_channels: int = 3):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
        self.architecture, self.names = architecture, list(names)
        self.resolution, self.num_channels = resolution, num_channels
        self.network = ARCHITECTURES[architecture](num_channels, len(self.names))

    def forward(self, pixels: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] -> logits (N, J)."""
        return self.network(pixels)

    def fresh(self) -> Classifier:
        """The same network with new random weights."""
        return Classifier(self.architecture, self.names, self.resolution, self.num_channels)


class TransformersClassifier(nn.Module):
    """An AutoModelForImageClassification (ViT, Swin, ConvNeXt, ...) that takes images in [-1, 1] and gives logits."""

    def __init__(self, network: Any, processor: Any):
        super().__init__()
        self.network, self.processor = network, processor
        labels = network.config.id2label
        self.names = [labels[index] for index in range(network.config.num_labels)]
        size = getattr(network.config, "image_size", None) or processor.size
        size = size if isinstance(size, int) else dict(size).get("height") or dict(size)["shortest_edge"]
        self.resolution, self.num_channels = int(size), int(getattr(network.config, "num_channels", 3))
        for name in ("mean", "std"):
            values = torch.tensor(getattr(processor, f"image_{name}"), dtype=torch.float32)
            self.register_buffer(name, values.view(1, -1, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] -> logits (N, J)."""
        return self.network(pixel_values=((pixels + 1) / 2 - self.mean) / self.std).logits

    def save_pretrained(self, folder: str | Path) -> None:
        """What `AutoModelForImageClassification.from_pretrained` loads, with the image processor beside it."""
        self.network.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def fresh(self) -> TransformersClassifier:
        """The same network with new random weights."""
        config = AutoConfig.for_model(**self.network.config.to_dict())
        return TransformersClassifier(AutoModelForImageClassification.from_config(config, **OURS), self.processor)


AnyClassifier = Classifier | TransformersClassifier


def load_classifier(name_or_path: str) -> AnyClassifier:
    """A classifier from a folder or the hub, in float32; no random number is drawn from the global generator.

    Raises:
        ValueError: there is none, its files do not fit, or its labels have no names.
    """
    folder = Path(name_or_path).expanduser()
    known = _config(folder)
    require_on_hub(name_or_path)
    try:
        with torch.random.fork_rng(), reading_tensors(folder):
            if "architecture" in known:
                return Classifier.from_pretrained(str(folder)).float()
            network = AutoModelForImageClassification.from_pretrained(name_or_path, dtype=torch.float32, **OURS)
            return TransformersClassifier(network, AutoImageProcessor.from_pretrained(name_or_path, **OURS))
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        said = str(error).split("\n")[0]
        raise ValueError(f"no image classifier could be loaded from {name_or_path!r}: {said}") from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if folder.is_dir() and not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no config.json: it is not the folder of a classifier")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def build_classifier(name: str, names: Sequence[str], resolution: int, num_channels: int, seed: int) -> AnyClassifier:
    """A network to train: one of ARCHITECTURES with new weights, or a folder or hub id with a head for `names`.

    The weights depend on `seed`; the global generator is left alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name in ARCHITECTURES:
            return Classifier(name, list(names), resolution, num_channels)
        labels = dict(enumerate(names))
        try:
            require_on_hub(name)
            network = AutoModelForImageClassification.from_pretrained(
                name,
                dtype=torch.float32,
                id2label=labels,
                label2id={label: index for index, label in labels.items()},
                ignore_mismatched_sizes=True,
                **OURS,
            )
            return TransformersClassifier(network, AutoImageProcessor.from_pretrained(name, **OURS))
        except (OSError, ValueError) as error:
            said = str(error).split("\n")[0]
            raise ValueError(
                f"{name!r} is neither one of {', '.join(ARCHITECTURES)} nor a classifier to load: {said}"
            ) from error


def restart(model: AnyClassifier, seed: int) -> AnyClassifier:
    """The same network with new random weights that depend on `seed` alone, for retraining from scratch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.fresh()
