"""Images of prompts as a folder of PNG files that an interrupted run goes on with, image by image.

The folder holds `{case_number}_{i}.png`, prompts.csv, and manifest.json with all that pixels depend on. Batches are
fixed by the prompts alone, and one that lacks an image is sampled again whole: pixels depend, in their last bits, on
the batch, so the files are the same whether or not the run was interrupted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from barrier_diffusers.data.folders import is_image_file
from barrier_diffusers.data.images import ImageFiles
from barrier_diffusers.data.prompt_files import PromptRow, read_prompts, write_prompts
from barrier_diffusers.models.generation import SamplingConfig, filters_off, sample, side_of
from barrier_diffusers.utils.files import clear_leftovers, file_hash, write_json, written_whole
from barrier_diffusers.utils.output_folder import set_aside
from barrier_diffusers.utils.run_records import FILES, MANIFEST_NAME, read_hashes

PROMPTS_NAME = "prompts.csv"
IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*_\d+\.png")
PACKAGES = ("torch", "diffusers", "transformers")  # whose versions pixels depend on


@dataclass(frozen=True)
class ImageRequest:
    """One image to be sampled: its file name, prompt, seed and guidance scale."""

    name: str
    prompt: str
    seed: int
    guidance: float


def batches_of(
    rows: Sequence[PromptRow], images_per_prompt: int, sampling: SamplingConfig
) -> list[list[ImageRequest]]:
    """All images in batches of one guidance scale; a function of its arguments alone."""
    by_guidance: dict[float, list[ImageRequest]] = {}
    for row in rows:
        guidance = sampling.guidance_scale if row.guidance is None else row.guidance
        for index, name in enumerate(row.image_names(images_per_prompt)):
            by_guidance.setdefault(guidance, []).append(ImageRequest(name, row.prompt, row.seed + index, guidance))
    size = sampling.batch_size or len(rows)
    return [
        requests[start : start + size] for requests in by_guidance.values() for start in range(0, len(requests), size)
    ]


def made_from(
    pipeline: Any,
    rows: Sequence[PromptRow],
    images_per_prompt: int,
    sampling: SamplingConfig,
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """All that the pixels of a folder depend on."""
    prompts = json.dumps([asdict(row) for row in rows]).encode()
    facts = {
        "hashes": dict(hashes),
        "scheduler": scheduler_facts(pipeline),
        "sampling": asdict(sampling),
        "prompts": hashlib.sha256(prompts).hexdigest(),
        "num_images": len(rows) * images_per_prompt,
        "device": str(pipeline.device.type),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **filters_off(pipeline),
    }
    return facts


def scheduler_facts(pipeline: Any) -> dict[str, Any]:
    """Class and configuration of the pipeline's scheduler, in plain values."""
    facts = {"class": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
    return json.loads(json.dumps(facts, default=str))


def generate_folder(
    pipeline: Any,
    rows: Sequence[PromptRow],
    sampling: SamplingConfig,
    folder: Path,
    hashes: Mapping[str, str],
    images_per_prompt: int = 1,
    overwrite: bool = False,
) -> ImageFiles:
    """The images of the prompts, in the rows' order; complete ones that the folder has already are not made again.

    Args:
        hashes: of the pipeline's weights.
        overwrite: empty a folder that was made from something else, instead of refusing it.

    Raises:
        ValueError: the folder holds other files, or images made from something else; the message says what differs.
        FloatingPointError: non-finite pixels.
    """
    sampling = sampling.sized(side_of(pipeline, sampling))
    facts = made_from(pipeline, rows, images_per_prompt=images_per_prompt, sampling=sampling, hashes=hashes)
    refuse_or_empty(folder, facts, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder, lambda path: path.suffix in (".png", ".csv", ".json"), alone=True)
    made = whole_images(folder)
    write_json(folder / MANIFEST_NAME, {**facts, FILES: dict(sorted(made.items()))})
    write_prompts(folder / PROMPTS_NAME, rows)
    for batch in tqdm(
        batches_of(rows, images_per_prompt, sampling=sampling), desc=f"images {folder.name}", leave=False
    ):
        missing = [index for index, request in enumerate(batch) if request.name not in made]
        if not missing:
            continue
        prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
        images = sample(pipeline, prompts, seeds=seeds, sampling=sampling, guidance_scale=batch[0].guidance)
        files = {batch[index].name: png_bytes(images[index]) for index in missing}
        made |= {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        # first, so that every image has its hash
        write_json(folder / MANIFEST_NAME, {**facts, FILES: dict(sorted(made.items()))})
        for name, content in files.items():
            with written_whole(folder / name) as temporary:
                temporary.write_bytes(content)
    return ImageFiles(folder, [name for row in rows for name in row.image_names(images_per_prompt)])


def png_bytes(image_HWC: np.ndarray) -> bytes:
    """A byte image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG")
    return buffer.getvalue()


def whole_images(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the images that are there as they were made; one without a hash, as earlier versions left
    them, does not count.

    Raises:
        ValueError: one has changed.
    """
    known = refuse_changed(folder)
    without = sum(path.suffix == ".png" and path.name not in known for path in folder.iterdir())
    if without:
        print(f"{str(folder)!r}: {without} images without a hash are made again")
    return known


def refuse_changed(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the images of the folder's manifest that are there.

    Raises:
        ValueError: one is not as it was made.
    """
    known = {name: digest for name, digest in read_hashes(folder).items() if (folder / name).is_file()}
    for name, digest in known.items():
        if file_hash(folder / name) != digest:
            raise ValueError(
                f"{str(folder / name)!r} is not as it was made: delete the folder {str(folder)!r} to make it again"
            )
    return known


def refuse_or_empty(folder: Path, facts: Mapping[str, Any], overwrite: bool) -> None:
    """Leave a folder that is new, or was made from the same, as it is."""
    if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    try:
        before = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    foreign = [name for name in names if name not in (MANIFEST_NAME, PROMPTS_NAME) and not IMAGE_NAME.fullmatch(name)]
    if not isinstance(before, dict) or not {"sampling", "prompts", "versions"} <= before.keys() or foreign:
        raise ValueError(f"image folder {str(folder)!r} holds other files: name another output_dir")
    changed = [name for name in facts if before.get(name) != facts[name]]
    if not changed:
        return
    if not overwrite:
        raise ValueError(
            f"image folder {str(folder)!r} was made from other {', '.join(changed)}: name another output_dir or set "
            "--overwrite_output_dir"
        )
    set_aside(folder)


def read_folder(
    folder: str, prompts_file: str | None = None, images_per_prompt: int = 1, label_column: str = "label"
) -> tuple[list[PromptRow], ImageFiles]:
    """Prompts and images that were made earlier; the prompts are of the file, or of the folder's prompts.csv.

    Raises:
        ValueError: no prompt file, an image of the prompts that is not there or has changed, images that no prompt
            names, or that are black.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"images_dir {folder!r} does not exist")
    prompts = Path(prompts_file).expanduser() if prompts_file else path / PROMPTS_NAME
    if not prompts.is_file():
        raise ValueError(f"images_dir {folder!r} has no {PROMPTS_NAME}: name the CSV file of its prompts")
    rows = read_prompts(prompts, label_column=label_column)
    files = ImageFiles(path, [name for row in rows for name in row.image_names(images_per_prompt)])
    refuse_changed(path)
    found = {file.name for file in path.iterdir() if file.name[0] != "." and is_image_file(file)}
    unknown = sorted(found - set(files.names))
    if unknown:
        raise ValueError(
            f"images_dir {folder!r} holds {len(unknown)} images that no prompt names, {unknown[0]} for one: expected "
            f"are {images_per_prompt} for each of {len(rows)} prompts, called case_number_i.png"
        )
    refuse_black(files)
    return rows, files


def refuse_black(files: ImageFiles) -> None:
    """Refuse images that are black in every pixel, which a safety checker leaves: they say nothing of a model.

    Raises:
        ValueError: names one of them.
    """
    black = [name for name, image in zip(files.names, files, strict=True) if not image.any()]
    if black:
        raise ValueError(
            f"image folder {str(files.folder)!r} holds {len(black)} images that are all black, {black[0]} for one, as "
            "a safety checker leaves them: make the images again without it"
        )
