"""A class-conditional pipeline as training sees it, and its labelled images as rows of a data set.

Shapes: B batch, N images, C channels, S image side, c, h, w what the UNet sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from barrier_diffusers.data.labelled_images import LabelledImages, as_pixels
from barrier_diffusers.models.architectures import CallContext
from barrier_diffusers.models.noising import DiffusionNoising, Noised, Noising
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.utils.run_records import fingerprint
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline

LABELS = "class_labels"  # the condition of a sample: the row of the class embedding


class LabelDenoiser:
    """`barrier_diffusers.models.denoiser.Denoiser` for a UNet2DModel: its condition is a label's number.

    Raises:
        ValueError: a prediction type other than epsilon and velocity.
    """

    def __init__(self, pipeline: ClassConditionalDDPMPipeline):
        self.pipeline = pipeline
        self.network: Any = pipeline.unet
        self.context = CallContext(vae_scale_factor=pipeline.config.patch_size, guidance=None)
        self.noising: Noising = DiffusionNoising(pipeline.scheduler, 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(c, h, w) of what the UNet sees of square images."""
        side = resolution // self.pipeline.config.patch_size
        return self.network.config.in_channels, side, side

    def noised(self, moments: Tensor, generator: torch.Generator | None = None) -> Noised:
        """Noise and timesteps for images in bytes (B, C, S, S)."""
        return self.noising(self.pipeline.to_patches(as_pixels(moments)), generator)

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The prediction (B, c, h, w) of `model`, the UNet or what wraps it."""
        return model(noisy, timesteps, class_labels=condition[LABELS]).sample

    def predict_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """One forward pass on a recorded batch: the forward function of the protection."""
        return self.predict(model, batch["noisy"], batch["timesteps"], batch["condition"])


@dataclass
class LabelRows(Dataset):
    """Images with a label each, under the keys that training reads: "moments" are the bytes that `noised` takes."""

    labels: Tensor  # (N,)
    images: Tensor | None = None  # bytes (N, C, S, S); None for rows that are labels only
    anchors: Tensor | None = None  # labels (N,); None: the objective needs no anchor
    null_label: int | None = None  # where an objective reads "no label"

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """SHA-256 over all of it."""
        found = hashlib.sha256(repr(self.null_label).encode())
        for values in (self.labels, self.images, self.anchors):
            found.update(b"none" if values is None else values.contiguous().cpu().numpy().tobytes())
        return found.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"index": torch.tensor(index), "condition": {LABELS: self.labels[index]}}
        if self.anchors is not None:
            row["anchor"] = {LABELS: self.anchors[index]}
        if self.images is not None:
            row["moments"] = self.images[index]
        if self.null_label is not None:
            row["unconditional"] = {LABELS: torch.tensor(self.null_label)}
        return row


@dataclass
class UnlearningRows:
    """What is forgotten and what is retained; retain is None where nothing needs it."""

    forget: LabelRows
    retain: LabelRows | None

    def digest(self) -> str:
        """SHA-256 over both."""
        return fingerprint(self.forget.digest(), self.retain.digest() if self.retain is not None else None)


def draw(rows: LabelledImages, ids: list[int], limit: int | None, generator: torch.Generator) -> LabelledImages:
    """Rows of these labels, equally many of each and at most `limit` together, drawn at random, in random order.

    Raises:
        ValueError: a label without a row.
    """
    chosen = []
    for place, label in enumerate(ids):
        mine = (rows.labels == label).nonzero().flatten()
        if not len(mine):
            raise ValueError(f"the data has no image of {rows.names[label]!r}")
        share = len(mine) if limit is None else limit // len(ids) + (place < limit % len(ids))
        chosen.append(mine[torch.randperm(len(mine), generator=generator)[:share]])
    together = torch.cat(chosen)
    return rows[together[torch.randperm(len(together), generator=generator)]]
