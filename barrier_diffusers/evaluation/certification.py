"""certificate.json: what is certified about an unlearned pipeline, on images that nothing was fitted to or trained on.

docs/certificate.md says what it promises and what not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.encoding import EncodedImages, NoisedBatches, encode_moments, encode_prompts
from barrier_diffusers.data.erased_concepts import ErasedConcepts
from barrier_diffusers.data.readers import take_evenly
from barrier_diffusers.evaluation.erasure import EvaluationPrompts, ImageEvaluationConfig
from barrier_diffusers.evaluation.evaluation_split import image_text, images_hash, load_rows, retained_rows
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import autocast_denoiser
from barrier_diffusers.models.loading import load_adapter, load_pipeline, module_hashes
from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.order_statistics import Split, attainable_quantile, samples_needed
from barrier_diffusers.protection.storage import PROJECTIONS_NAME, REGIONS_NAME
from barrier_diffusers.utils.checks import INNER_SHARE, SEED, at_least, check_settings, rules
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.output_folder import is_first_process, say

CERTIFICATE_NAME = "certificate.json"


@dataclass
class CertificateConfig:
    """What is certified, and on how much."""

    enabled: bool = True  # has no effect where nothing is protected
    quantile: float = 0.99  # of the images whose drift the distribution-free bound speaks of
    confidence: float = 0.95  # with which it does
    num_images: int | None = None  # held-out images, drawn once; None: all
    calibration: float = 0.6  # share of them that the distribution-free bound is chosen on; the others check it
    seed: int = 0  # of these draws and of the images' noise and timesteps
    batch_size: int = 32  # images in the network at once

    SECTION = "certificate."
    RULES = rules(
        quantile=INNER_SHARE,
        confidence=INNER_SHARE,
        num_images=at_least(1),
        calibration=INNER_SHARE,
        seed=SEED,
        batch_size=at_least(1),
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def split(self) -> Split:
        """Which of the images choose the distribution-free bound."""
        return Split(self.calibration, self.seed)


@dataclass(frozen=True)
class HeldOut:
    """Retained images that were never used for fitting or training."""

    images: Dataset  # columns image and text
    where: str  # they come from


def held_out_images(
    certificate: CertificateConfig,
    evaluation: ImageEvaluationConfig,
    concepts: ConceptConfig,
    erased: Sequence[ErasedConcepts] = (),
    asked: EvaluationPrompts | None = None,
    before_NHWC: np.ndarray | None = None,
) -> HeldOut | None:
    """The retained rows of the evaluation split; without a data set, the base pipeline's own images of the retained
    prompts, whose seeds no other image has. None, and one line that says why, if there is nothing of the kind.

    Says at once if the images are too few for the quantile, and which one they allow.
    """
    if not certificate.enabled:
        return None
    if concepts.source is not None:
        if evaluation.split == concepts.train_split:
            say(f"no certificate: evaluation.split {evaluation.split!r} is what was trained on")
            return None
        rows = image_text(retained_rows(load_rows(concepts, evaluation.split), concepts, erased=erased), concepts)
        where = f"split {evaluation.split!r} of {concepts.source}, without what is forgotten"
    elif asked is None or before_NHWC is None:
        say("no certificate: there is no data set, and no image of the pipeline before it was changed")
        return None
    else:
        gone = {*asked.forgotten, *asked.erased_before, *(" and ".join(earlier.concepts) for earlier in erased)}
        kept = [index for index, label in enumerate(asked.labels) if label not in gone]
        columns = {
            "image": [PILImage.fromarray(before_NHWC[index]) for index in kept],
            "text": [asked.prompts[index] for index in kept],
        }
        rows = Dataset.from_dict(columns, Features({"image": Image(), "text": Value("string")}))
        where = "images that the pipeline made of the retained prompts before it was changed"
    rows = rows.select(take_evenly(range(len(rows)), certificate.num_images, seed=certificate.seed))
    if len(rows) == 0:
        say("no certificate: there are no held-out images of what is retained")
        return None
    needed, chosen = samples_needed(certificate.quantile, certificate.confidence), certificate.split
    if chosen.num_calibration(len(rows)) < needed:
        say(
            f"certificate: {chosen.num_calibration(len(rows))} of {len(rows)} held-out images choose its bound, and "
            f"allow quantile {quantile_for(certificate, len(rows)):.2%} at confidence {certificate.confidence:.0%}; "
            f"{certificate.quantile:.2%} takes {needed}"
        )
    return HeldOut(rows, where)


def quantile_for(certificate: CertificateConfig, num_images: int) -> float:
    """The quantile asked for, or the largest one that the calibration part of so few images allows, rounded down."""
    num_calibration = certificate.split.num_calibration(num_images)
    attainable = math.floor(1e4 * attainable_quantile(num_calibration, certificate.confidence)) / 1e4
    return min(certificate.quantile, attainable)


def certify_pipeline(
    barrier: Barrier, pipeline: Any, held_out: HeldOut, certificate: CertificateConfig, resolution: int
) -> dict[str, Any]:
    """The certificate as plain values, with what it was computed from; the same for the same weights and images, and
    for any number of processes, which all have to call this.

    Draws from no random state but its own.
    """
    denoiser, rows = PipelineDenoiser(pipeline), held_out.images
    moments = encode_moments(pipeline.vae, rows, image_column="image", resolution=resolution)
    captions = list(rows["text"])
    distinct = sorted(set(captions))
    ids = torch.tensor([distinct.index(caption) for caption in captions])
    images = EncodedImages(moments, ids, None, encode_prompts(pipeline, distinct))
    device = next(denoiser.network.parameters()).device
    batches = NoisedBatches(images, denoiser, certificate.batch_size, certificate.seed, device)
    quantile = quantile_for(certificate, len(rows))
    with autocast_denoiser(pipeline):
        result = barrier.certify(
            batches, denoiser.predict_batch, quantile, certificate.confidence, certificate.split, shared=True
        )
    say(str(result))
    return {
        **result.to_dict(),
        "settings": asdict(certificate),
        "held_out": {
            "where": held_out.where,
            "num_images": len(rows),
            "num_captions": len(distinct),
            "resolution": resolution,
            "sha256": images_hash(rows),
            **parts_facts(rows, certificate.split),
        },
        "drift_norms": barrier.drift_norms(),
        "hashes": module_hashes(pipeline),
    }


def parts_facts(rows: Dataset, split: Split) -> dict[str, Any]:
    """Counts and SHA-256 of the calibration and the test images, and how many captions are in both."""
    parts = dict(zip(("calibration", "test"), split.parts(len(rows)), strict=True))
    chosen = {name: rows.select(indices) for name, indices in parts.items()}
    captions = [set(part["text"]) for part in chosen.values()]
    facts = {
        name: {"num_images": len(part), "num_captions": len(texts), "sha256": images_hash(part)}
        for (name, part), texts in zip(chosen.items(), captions, strict=True)
    }
    return {**facts, "num_captions_in_both": len(captions[0] & captions[1])}


def write_certificate(
    output: Path,
    barrier: Barrier,
    pipeline: Any,
    held_out: HeldOut | None,
    certificate: CertificateConfig,
    resolution: int,
) -> None:
    """Write certificate.json, if there is anything held out; nothing of an earlier run stays. All processes of a run
    have to call this, and the first one writes."""
    if is_first_process():
        (output / CERTIFICATE_NAME).unlink(missing_ok=True)
    if held_out is not None:
        record = certify_pipeline(barrier, pipeline, held_out=held_out, certificate=certificate, resolution=resolution)
        if is_first_process():
            write_json(output / CERTIFICATE_NAME, record)


def has_barrier(pipeline: str | None, lora_weights: str | None) -> bool:
    """Whether what is judged was saved with a fitted barrier."""
    folder = Path(lora_weights or pipeline or "").expanduser()
    return any((folder / name).is_file() for name in (REGIONS_NAME, PROJECTIONS_NAME))


def certify_saved(
    output: Path,
    pipeline: Any,
    folder: str,
    lora_weights: str | None,
    held_out: HeldOut | None,
    certificate: CertificateConfig,
    resolution: int,
) -> None:
    """Write certificate.json for a run that was saved with its barrier.

    Args:
        pipeline: what is judged, as loaded from `folder`; not used with `lora_weights`, as an adapter that was merged
            into its base has lost the factors that the barrier speaks of.
        folder, lora_weights: what a run saved, or its base and the folder with its adapter.
    """
    if held_out is None:
        return
    if lora_weights:
        pipeline = load_pipeline(folder)
        load_adapter(pipeline, lora_weights)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    barrier = Barrier.from_pretrained(lora_weights or folder, PipelineDenoiser(pipeline).network)
    write_certificate(
        output, barrier, pipeline=pipeline, held_out=held_out, certificate=certificate, resolution=resolution
    )
    barrier.remove()
    pipeline.to("cpu")
