"""LPIPS (Zhang et al., arXiv 1801.03924): perceptual distance of image pairs, from a local backbone file.

torchmetrics' LPIPS builds its backbone with torchvision and downloads its weights. Here the same layers are built
without it and take a local weights file in torchvision's layout; the linear heads come with torchmetrics' package.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from barrier_diffusers.data.images import Images, as_image_set
from barrier_diffusers.utils.checks import FILE, OneOf, at_least, check_settings, rules
from barrier_diffusers.utils.run_records import module_hash

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for [-1, 1]
VGG_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: a pooling


@dataclass
class LpipsConfig:
    """The backbone that LPIPS compares images with."""

    weights: str | None = None  # torchvision's alexnet or vgg16 weights (.pth or .safetensors); None: no LPIPS
    net: str = "alex"  # alex or vgg
    batch_size: int = 32  # pairs of images in the backbone at once

    SECTION = "lpips."
    RULES = rules(weights=FILE, net=OneOf(("alex", "vgg")), batch_size=at_least(1))

    def __post_init__(self) -> None:
        if self.weights is not None and not Path(self.weights).expanduser().is_file():
            raise ValueError(f"lpips.weights {self.weights!r} does not exist")
        check_settings(self)


def alexnet() -> nn.Sequential:
    """AlexNet's convolutions, numbered as torchvision's `alexnet().features`."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )


def vgg16() -> nn.Sequential:
    """VGG-16's convolutions, numbered as torchvision's `vgg16().features`."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG_WIDTHS:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers)


BACKBONES = {  # builder, numbers of the layers whose outputs are compared
    "alex": (alexnet, (1, 4, 7, 9, 11)),
    "vgg": (vgg16, (3, 8, 15, 22, 29)),
}


class Lpips(nn.Module):
    """The distance, in eval mode.

    Raises:
        ValueError: no weights file, or one that is not of this backbone.
    """

    def __init__(self, options: LpipsConfig):
        super().__init__()
        if options.weights is None:
            raise ValueError("LPIPS needs lpips.weights, a file with torchvision's weights of its backbone")
        build, self.taps = BACKBONES[options.net]
        with torch.random.fork_rng():  # building draws first weights
            self.features = build()
        self._load_backbone(Path(options.weights).expanduser())
        spec = importlib.util.find_spec("torchmetrics.functional.image.lpips")
        assert spec is not None and spec.origin is not None
        heads = torch.load(Path(spec.origin).parent / "lpips_models" / f"{options.net}.pth", "cpu", weights_only=True)
        for index in range(len(self.taps)):
            self.register_buffer(f"head{index}", heads[f"lin{index}.model.1.weight"])
        self.eval().requires_grad_(False)

    def _load_backbone(self, path: Path) -> None:
        try:
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
            own = {name.removeprefix("features."): value for name, value in state.items() if "classifier" not in name}
            self.features.load_state_dict(own)
        except Exception as error:  # each way to fail has its own kind, and weights_only a pickle's
            raise ValueError(
                f"lpips.weights {str(path)!r} holds no weights of this backbone in torchvision's layout: {error}"
            ) from error

    def _scaled(self, images: Tensor) -> Tensor:
        device = next(self.parameters()).device
        mean, deviation = (torch.tensor(values, device=device)[:, None, None] for values in (SHIFT, SCALE))
        return (images.to(device).float() / 127.5 - 1 - mean) / deviation

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Byte images (N, 3, H, W), in pairs -> distances (N)."""
        x, y = self._scaled(first), self._scaled(second)
        distance = torch.zeros(len(x), device=x.device)
        for index, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if index in self.taps:
                head = getattr(self, f"head{self.taps.index(index)}")
                squares = (nn.functional.normalize(x, eps=1e-8) - nn.functional.normalize(y, eps=1e-8)) ** 2
                distance = distance + nn.functional.conv2d(squares, head).mean((1, 2, 3))
        return distance


@torch.no_grad()
def lpips_distances(
    first: Images,
    second: Images,
    network: Lpips,
    batch_size: int = 32,
) -> list[float]:
    """Distance of each pair of images of the same size.

    Raises:
        ValueError: sets of different length, or a pair of different sizes.
    """
    first, second = as_image_set(first), as_image_set(second)
    if len(first) != len(second):
        raise ValueError(f"LPIPS compares pairs, but there are {len(first)} and {len(second)} images")
    distances: list[float] = []
    for one, other in zip(first.batches(batch_size), second.batches(batch_size), strict=True):
        if one.shape != other.shape:
            raise ValueError(f"LPIPS compares images of one size, but these are {one.shape[2:]} and {other.shape[2:]}")
        distances += network(one, other).tolist()
    return distances


def lpips_facts(options: LpipsConfig, network: Lpips) -> dict[str, Any]:
    """What has to be known to compute the same distances again."""
    return {
        "net": options.net,
        "weights_hash": module_hash(network),
        "preprocessing": "x / 127.5 - 1, then LPIPS's mean and deviation; not resized",
    }
