"""Pictures that the model itself makes of prompts, kept in the cache as a folder of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from barrier_diffusers.data.folders import read_image_folder
from barrier_diffusers.models.generation import SamplingConfig, filters_off, side_of
from barrier_diffusers.models.shared_generation import generate_together
from barrier_diffusers.utils.files import write_json, written_whole
from barrier_diffusers.utils.run_records import (
    FILES,
    MANIFEST_NAME,
    check_hashes,
    fingerprint,
    hashes_of,
    read_hashes,
)


@dataclass(frozen=True)
class Illustrator:
    """Makes pictures of prompts, once per model, prompts and sampler settings."""

    pipeline: Any
    cache: Path  # folder that keeps them
    base_hash: str  # of the pipeline's weights
    sampling: SamplingConfig
    image_column: str  # names of the columns of the rows that it gives
    caption_column: str

    def __call__(self, prompts: Sequence[str], part: int) -> Dataset:
        """(image, caption) rows, one for each prompt.

        They stay in the cache as PNG files with metadata.jsonl, beside a manifest of how they were made and of the
        files' hashes, which are checked before they are read. No two `part`s of a run (0 forget, 1 retain, 2 erased
        before) start from the same seeds.

        Raises:
            ValueError: an image is missing, has changed, or has come from elsewhere.
        """
        sampling = self.sampling.sized(side_of(self.pipeline, self.sampling))
        sampling = replace(sampling, seed=sampling.seed + part * 1_000_000)
        made_from = {
            "denoiser": self.base_hash,
            "prompts": list(prompts),
            "sampling": asdict(sampling),
            **filters_off(self.pipeline),
        }
        folder = self.cache / f"generated-{fingerprint(made_from)}"
        if not read_hashes(folder):  # new, half made, or of an earlier version
            images = generate_together(self.pipeline, prompts, sampling, desc="illustrating the prompts")
            folder.mkdir(parents=True, exist_ok=True)
            write_image_folder(folder / "images", images, {self.caption_column: list(prompts)})
            write_json(folder / MANIFEST_NAME, {**made_from, FILES: hashes_of(folder, "images")})
        check_hashes(folder, hashes_of(folder, "images"))
        return read_image_folder(
            folder / "images",
            split="train",
            image_column=self.image_column,
            caption_column=self.caption_column,
            quiet=True,
        )


def write_image_folder(folder: Path, images_NHWC: np.ndarray, columns: dict[str, list[str]]) -> None:
    """PNG files and a metadata.jsonl, the layout `datasets` calls imagefolder; whole or not at all."""
    names = [f"{index:05d}.png" for index in range(len(images_NHWC))]
    with written_whole(folder) as temporary:
        temporary.mkdir(parents=True)
        for name, image in zip(names, images_NHWC, strict=True):
            Image.fromarray(image).save(temporary / name, optimize=True)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows = rows or [{} for _ in names]
        lines = [json.dumps({"file_name": name, **row}) for name, row in zip(names, rows, strict=True)]
        (temporary / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
