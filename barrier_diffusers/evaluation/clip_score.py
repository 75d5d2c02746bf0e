"""CLIP score: 100 times the cosine between an image's and its prompt's CLIP embedding, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPModel, CLIPProcessor

from barrier_diffusers.data.images import Images, as_image_set
from barrier_diffusers.utils.hub import require_on_hub
from barrier_diffusers.utils.run_records import module_hash

CLIP_MODEL = "openai/clip-vit-base-patch32"


class Clip(nn.Module):
    """transformers' CLIP, whose embeddings are plain tensors (N, D), as torchmetrics takes them, in every version."""

    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model, self.config = model.eval().requires_grad_(False), model.config
        self.num_positions: int = model.text_model.config.max_position_embeddings
        self.num_features: int = model.visual_projection.out_features

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Prepared images -> projected embeddings."""
        return _embedding(self.model.get_image_features(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids (N, L) -> projected embeddings."""
        return _embedding(self.model.get_text_features(input_ids, attention_mask))


class Processor:
    """What torchmetrics calls; unlike its own cut, a cut text keeps its end token, which the embedding is read at."""

    def __init__(self, processor: Any, num_positions: int):
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.num_positions = num_positions

    def __call__(self, text: Any = None, images: Any = None, padding: bool = False, **options: Any) -> Any:
        if text is None:
            return self.image_processor(images=images, **options)
        return self.tokenizer(text, truncation=True, max_length=self.num_positions, padding=padding, **options)


def _embedding(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@dataclass(frozen=True)
class LoadedClip:
    """A loaded CLIP with its processor."""

    name: str  # as it was asked for
    network: Clip
    processor: Processor

    @cached_property
    def weights_hash(self) -> str:
        """Of the network, which is frozen."""
        return module_hash(self.network.model)


def load_clip(name: str) -> LoadedClip:
    """CLIP from a folder or a hub id; only safetensors are read.

    Raises:
        ValueError: a folder that does not exist or holds no CLIP, or a hub id that cannot be had.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"CLIP folder {name!r} does not exist")
    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    require_on_hub(source)
    try:
        with torch.random.fork_rng():  # missing weights would be drawn
            model = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
            network = Clip(model)
        return LoadedClip(name, network, Processor(CLIPProcessor.from_pretrained(source), network.num_positions))
    except OSError as error:
        raise ValueError(f"no CLIP model {name!r} could be had, give a local folder: {error}") from error


@torch.no_grad()
def clip_score(
    images: Images,
    prompts: Sequence[str],
    clip: str | LoadedClip = CLIP_MODEL,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Mean over (image, prompt) pairs; a mean below 0 is 0, as the score is defined.

    Prompts longer than the text encoder's positions are cut, and `num_cut_prompts` counts them.

    Raises:
        ValueError: not one prompt for each image, or a CLIP that cannot be had.
    """
    images = as_image_set(images)
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images, but {len(prompts)} prompts: give one for each image")
    loaded = load_clip(clip) if isinstance(clip, str) else clip
    network, processor = loaded.network, loaded.processor
    load: Any = lambda: (network, processor)  # noqa: E731  torchmetrics takes a network of ours as such a function
    metric = CLIPScore(load).to(device)
    lengths = [len(ids) for ids in processor.tokenizer(list(prompts)).input_ids]
    start = 0
    for batch in images.batches(batch_size):
        metric.update(list(batch.to(device)), list(prompts[start : start + len(batch)]))
        start += len(batch)
    return {
        "clip_score": round(float(metric.compute()), 6),
        "details": {
            "num_images": len(images),
            "num_cut_prompts": sum(length > network.num_positions for length in lengths),
            "clip": loaded.name,
            "weights_hash": loaded.weights_hash,
        },
    }
