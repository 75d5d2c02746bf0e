"""Load a class-conditional pipeline, with one clear line where that cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from barrier_diffusers.data.labelled_images import LabelledImages, LabelledSource, load_labelled
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline
from ddpm_ext.settings import LabelledDataConfig


def load_pipeline(folder: str, dtype: torch.dtype = torch.float32) -> ClassConditionalDDPMPipeline:
    """The pipeline of a folder that `save_pretrained` wrote.

    Raises:
        ValueError: no folder, or one with another kind of pipeline.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder!r} is not the folder of a pipeline: it holds no model_index.json")
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if name != ClassConditionalDDPMPipeline.__name__:
        raise ValueError(f"{folder!r} holds a {name}; only a ClassConditionalDDPMPipeline can be read here")
    pipeline = ClassConditionalDDPMPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    return pipeline


def load_rows(
    data: LabelledDataConfig, pipeline: ClassConditionalDDPMPipeline, split: str | None = None
) -> LabelledImages:
    """A split's images as the pipeline draws them: its size, its channels, its labels in its order.

    Raises:
        ValueError: data that cannot be read, or with labels that the pipeline does not have.
    """
    source = LabelledSource(data.source, split or data.split, data.image_column, data.label_column)
    return load_labelled(source, pipeline.resolution, pipeline.num_channels, pipeline.labels)
