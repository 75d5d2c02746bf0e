"""Networks that judge generated images: what they have in common, and our own small residual network with one head per
attribute (class, colour, style, ...).

Shapes: N images, C channels, H height, W width, J labels of an attribute, D features.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from barrier_diffusers.data.images import Images, as_image_set
from barrier_diffusers.utils.words import JOINT, parts_of


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """What a residual block adds its input through: nothing, or a 1x1 convolution where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        hidden = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ImageClassifier(nn.Module, ABC):
    """A network that says what images show, with one set of labels per attribute.

    Attributes:
        attributes: attribute -> its labels, in the order of the logits.
        resolution: side in pixels of the images that it sees.
        batch_size: images that it is shown at once.
    """

    attributes: dict[str, list[str]]
    resolution: int
    batch_size = 256

    @abstractmethod
    def pixels(self, images: Tensor) -> Tensor:
        """Bytes (N, 3, H, W) -> what `forward` takes."""

    @torch.no_grad()
    def probabilities(self, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        """Batches of what `pixels` gives -> probability of each label (N, J) per attribute, on the CPU."""
        self.eval()
        device = next(self.parameters()).device
        found: dict[str, list[Tensor]] = {name: [] for name in self.attributes}
        for pixels in batches:
            for name, logits in self(pixels.to(device).float()).items():
                found[name].append(logits.float().softmax(1).cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def probabilities_of(self, images: Images) -> dict[str, Tensor]:
        """Probability of each label (N, J) per attribute, of N byte images; other sizes are resampled."""
        batches = as_image_set(images).batches(self.batch_size)
        return self.probabilities(self.pixels(batch) for batch in batches)


class AttributeClassifier(ImageClassifier, PyTorchModelHubMixin):
    """Predicts several attributes of an image at once.

    The image's darkest channel (the amount of ink, whatever its colour) is shown to the network as a fourth one.

    Args:
        attributes: attribute name -> its labels, in the order of that head's outputs.
        channels: width of each stage; the stem and every stage after the first halve the side.
        resolution: side in pixels of the images it was trained on.

    `save_pretrained` and `from_pretrained` (safetensors and config.json) come from huggingface_hub.
    """

    def __init__(
        self, attributes: Mapping[str, Sequence[str]], channels: Sequence[int] = (48, 96, 192), resolution: int = 32
    ):
        super().__init__()
        self.attributes = {name: list(labels) for name, labels in attributes.items()}
        self.resolution = resolution
        layers: list[nn.Module] = [
            nn.Conv2d(4, channels[0], 4, 2, 1, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
        ]
        for index, width in enumerate(channels):
            layers.append(ResidualBlock(channels[max(index - 1, 0)], width, 1 if index == 0 else 2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(channels[-1], len(v)) for name, v in self.attributes.items()})

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Self:
        """The classifier of a folder; the library prints that it is a folder, which nobody has to read."""
        with contextlib.redirect_stdout(io.StringIO()):
            return super().from_pretrained(*arguments, **options)

    def pixels(self, images: Tensor) -> Tensor:
        """Bytes (N, 3, H, W) -> (N, 3, resolution, resolution) in [-1, 1]; other sizes are resampled."""
        pixels, side = images.float() / 127.5 - 1, self.resolution
        if pixels.shape[2:] != (side, side):
            pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        return pixels

    def embed(self, pixels: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> the features (N, D) that every head reads."""
        return self.features(torch.cat([pixels, pixels.amin(1, keepdim=True)], dim=1))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) in [-1, 1] -> logits (N, J) per attribute."""
        features = self.embed(pixels)
        return {name: head(features) for name, head in self.heads.items()}


class JointClassifier(ImageClassifier):
    """A classifier that also says what images show of several attributes at once ("red + sneaker"): the probability of
    a joint label is the product of those of its parts.

    Args:
        classifier: whose attributes they are.
        names: of the attributes, in the order of the parts.
    """

    def __init__(self, classifier: ImageClassifier, names: Sequence[str]):
        super().__init__()
        self.classifier, self.names = classifier, list(names)
        self.attributes = with_joint(classifier.attributes, names)
        self.resolution, self.batch_size = classifier.resolution, classifier.batch_size

    def pixels(self, images: Tensor) -> Tensor:
        """What the classifier is shown."""
        return self.classifier.pixels(images)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Images -> logits (N, J) per attribute, the joint one's in the order of `itertools.product`."""
        found = self.classifier(pixels)
        joint_NJ = torch.zeros(len(pixels), 1, device=pixels.device)
        for name in self.names:
            joint_NJ = (joint_NJ.unsqueeze(2) + found[name].float().log_softmax(1).unsqueeze(1)).flatten(1)
        return {**found, JOINT.join(self.names): joint_NJ}


def with_joint(attributes: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[str]]:
    """The attributes, and the joint one of those that are named ("colour + class")."""
    joint = [JOINT.join(parts) for parts in itertools.product(*(attributes[name] for name in names))]
    return {**{name: list(labels) for name, labels in attributes.items()}, JOINT.join(names): joint}


def joint_attributes(attributes: Mapping[str, Sequence[str]], wanted: Sequence[str]) -> list[str]:
    """The attributes that the parts of joint labels are labels of; none if the labels are not joint, or unknown."""
    parts = [parts_of(label) for label in wanted]
    if not parts or len(parts[0]) < 2 or len({len(one) for one in parts}) > 1:
        return []
    if any(set(wanted) <= set(known) for known in attributes.values()):
        return []
    owners = [
        next((name for name, known in attributes.items() if set(labels) <= set(known)), None)
        for labels in zip(*parts, strict=True)
    ]
    return [name for name in owners if name is not None] if None not in owners else []
