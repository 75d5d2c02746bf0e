"""The label that a model tells least from a concept: the anchor where a rule picks it, and nobody names one.

Shapes: N images of the concept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm.auto import tqdm

from barrier_diffusers.data.captions import swap_concept
from barrier_diffusers.data.concepts import ConceptData
from barrier_diffusers.data.encoding import encode_moments, encode_prompts
from barrier_diffusers.data.folders import announce
from barrier_diffusers.data.readers import take_evenly
from barrier_diffusers.models.denoiser import Denoiser, PipelineDenoiser
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.training.seeds import seeded
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import fingerprint

NUM_IMAGES = 32  # of the concept that are looked at
NUM_DRAWS = 2  # of noise and timestep for each of them


@torch.no_grad()
def label_distances(
    denoiser: Denoiser, moments: Tensor, own: Condition, others: Mapping[str, Condition], *, seed: int, batch_size: int
) -> dict[str, float]:
    """E |eps(x_t, c) - eps(x_t, c')|^2 over a concept's images for each other label, the nearest first.

    Args:
        moments: what `denoiser.noised` takes, of the images (N, ...).
        own: condition of each image with the concept's own words, or label (N rows).
        others: label -> the same with the label's words in their place.
        batch_size: images in one forward pass.
    """
    network: Any = denoiser.network
    device, generator = next(network.parameters()).device, seeded(seed, "nearest label", 0)
    sums = dict.fromkeys(others, 0.0)

    def rows_of(condition: Condition, start: int) -> Condition:
        return send_to_device({key: value[start : start + batch_size] for key, value in condition.items()}, device)

    starts = [start for _ in range(NUM_DRAWS) for start in range(0, len(moments), batch_size)]
    with tqdm(total=len(starts) * len(others), desc="nearest label", leave=False) as bar:
        for start in starts:
            drawn = denoiser.noised(moments[start : start + batch_size], generator)
            noisy, timesteps = drawn.noisy.to(device), drawn.timesteps.to(device)
            asked = denoiser.predict(network, noisy, timesteps, rows_of(own, start)).float()
            for label, condition in others.items():
                answer = denoiser.predict(network, noisy, timesteps, rows_of(condition, start)).float()
                sums[label] += float((answer - asked).square().flatten(1).mean(1).sum())
                bar.update()
    count = NUM_DRAWS * len(moments)
    return {label: total / count for label, total in sorted(sums.items(), key=lambda item: (item[1], item[0]))}


def said_of(concept: str, found: Mapping[str, float]) -> str:
    """One line about the label that is nearest, of `label_distances`."""
    (nearest, least), *rest = found.items()
    next_one = f"; the next, {rest[0][0]}, at {rest[0][1]:.3g}" if rest else ""
    return f"anchor of {concept}: {nearest}, the nearest of {len(found)} labels at {least:.3g}{next_one}"


def nearest_labels(
    concepts: ConceptData, pipeline: Any, *, resolution: int, seed: int, batch_size: int, cache: Path, base_hash: str
) -> dict[str, str]:
    """Concept -> the retained label of its column that the pipeline tells least from it, found once and cached.

    Raises:
        ValueError: no other label, or a caption that does not name its concept.
    """
    if not concepts.labels:
        raise ValueError("there is no other label that an anchor could be: set objective.anchor")
    config, column = concepts.config, concepts.config.caption_column
    facts = [concepts.forget._fingerprint, concepts.concepts, concepts.labels, config.names]
    path = cache / f"anchors-{fingerprint(base_hash, resolution, seed, batch_size, *facts)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    denoiser, chosen = PipelineDenoiser(pipeline), dict[str, str]()
    for concept in config.concepts:
        mine = [row for row, own in enumerate(concepts.concepts) if own == concept]
        rows = concepts.forget.select([mine[place] for place in take_evenly(range(len(mine)), NUM_IMAGES, seed)])
        captions, names = list(rows[column]), config.names[concept]
        others = {
            label: encode_prompts(pipeline, [swap_concept(caption, names, label) for caption in captions])
            for label in concepts.labels
        }
        found = label_distances(
            denoiser,
            encode_moments(pipeline.vae, rows, config.image_column, resolution, batch_size),
            own=encode_prompts(pipeline, captions),
            others=others,
            seed=seed,
            batch_size=batch_size,
        )
        announce(said_of(concept, found))
        chosen[concept] = next(iter(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, chosen)
    return chosen
