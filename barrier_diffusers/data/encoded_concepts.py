"""Forget and retain rows with everything frozen computed once: latents and text embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from torch.utils.data import Dataset as TorchDataset

from barrier_diffusers.data.concepts import ConceptData, DataNeeds
from barrier_diffusers.data.encoding import EncodedImages, moment_batches, prompt_batches
from barrier_diffusers.data.prompt_checks import require_different_anchors
from barrier_diffusers.data.stored_rows import stored_rows
from barrier_diffusers.models.loading import module_hashes
from barrier_diffusers.utils.run_records import fingerprint, module_hash


@dataclass
class EncodedConcepts:
    """Forget and retain images with their latents and text embeddings; retain is None where nothing needs it."""

    forget: EncodedImages
    retain: TorchDataset | None  # rows as EncodedImages has them
    empty_id: int | None = None  # row of the embeddings for the empty prompt, where one is needed

    def drop_captions(self, share: float, seed: int) -> None:
        """Ask this share of the retain rows, drawn once, with the empty prompt: guidance needs its answer kept."""
        generator = torch.Generator().manual_seed(seed)

        def dropped(rows: Any) -> TorchDataset:
            if isinstance(rows, ConcatDataset):
                return ConcatDataset([dropped(part) for part in rows.datasets])
            chosen = torch.rand(len(rows), generator=generator) < share
            return replace(rows, caption_ids=rows.caption_ids.masked_fill(chosen, self.empty_id))

        self.retain = dropped(self.retain)


def encode_concepts(
    concepts: ConceptData,
    anchors: list[str] | None,
    pipeline: Any,
    cache: Path,
    resolution: int,
    needs: DataNeeds,
    vae_batch_size: int | None = None,
) -> EncodedConcepts:
    """VAE posteriors of every image and one text embedding per distinct prompt, computed once and cached on disk.

    They stay there: a row is read when it is asked for, so memory does not grow with the data.
    Rows of a role that needs no images have no posteriors, and their images are not read.
    """
    config = concepts.config
    if needs.retain and len(concepts.retain) == 0:
        raise ValueError("zero retain rows: alpha > 0, use_actual_bounds, residual_source and a projection need some")
    rows = {"forget": concepts.forget, **({"retain": concepts.retain} if needs.retain else {})}
    captions = {role: list(dataset[config.caption_column]) for role, dataset in rows.items()}
    empty = [""] if needs.unconditional or needs.dropout else []
    prompts = sorted({text for texts in captions.values() for text in texts} | {*(anchors or []), *empty})
    position = {text: index for index, text in enumerate(prompts)}
    text_key = fingerprint(prompts, module_hashes(pipeline, "text_encoder"))
    embeddings = stored_rows(
        cache / f"text-{text_key}.safetensors", len(prompts), lambda: prompt_batches(pipeline, prompts)
    )
    vae_hash = module_hash(pipeline.vae)
    if anchors:
        require_different_anchors(captions["forget"], anchors, embeddings, position)

    def encode(role: str, targets: list[str] | None) -> EncodedImages:
        dataset, moments = rows[role], None
        if role in needs.images:
            key = fingerprint(dataset._fingerprint, vae_hash, resolution, config.image_column)
            batches = moment_batches(pipeline.vae, dataset, config.image_column, resolution, vae_batch_size)
            path = cache / f"latents-{key}.safetensors"
            moments = stored_rows(path, len(dataset), lambda: ({"moments": batch} for batch in batches))["moments"]
        ids = [torch.tensor([position[text] for text in texts]) for texts in (captions[role], targets or [])]
        anchor_ids = ids[1] if targets else None
        return EncodedImages(moments, ids[0], anchor_ids, embeddings, position[""] if needs.unconditional else None)

    retain = encode("retain", None) if needs.retain else None
    return EncodedConcepts(encode("forget", anchors), retain, position[""] if empty else None)
