"""Turn Fashion-MNIST's photos into the captioned image set that the embedded Stable Diffusion learns from.

The photos are real; the colours and the pencil sketches are synthetic. Every photo is tinted in one of six colours on
white, and drawn once more, in another colour, as a pencil sketch (an edge filter). Both choices depend only on the
photo's index and the seed, so the set is the same on every machine.

Shapes: N images, H height, W width, C colour channels.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

import gzip
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from scipy import ndimage

from barrier_diffusers.data.generated_images import write_image_folder
from barrier_diffusers.utils.checks import FOLDER, OUTPUT, SEED, Checked, at_least, rules
from barrier_diffusers.utils.command_line import run_script

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COLOURS = {
    "red": (0.85, 0.05, 0.10),
    "yellow": (0.95, 0.75, 0.00),
    "green": (0.05, 0.60, 0.15),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.55, 0.10, 0.70),
    "black": (0.05, 0.05, 0.05),
}
STYLES = ("photo", "pencil sketch")
SPLITS = {"train": "train", "test": "t10k"}


@dataclass
class PrepareConfig(Checked):
    """Where the photos are and where the captioned set goes."""

    source_dir: str = "/usr/share/datasets/fashion-mnist"  # IDX files of the Debian package dataset-fashion-mnist
    output_dir: str = "runs/fashion_mnist"  # gets train.parquet and test.parquet
    images_dir: str = "assets/fashion_images"  # gets a small image folder, equally many of every caption
    # of the image folder, by split
    images_per_caption: dict[str, int] = field(default_factory=lambda: {"train": 12, "test": 5})
    labelled_dir: str = "assets/fashion_mnist"  # gets the plain photos: the first of every class, as parquet
    # of the plain photos, by split
    photos_per_class: dict[str, int] = field(default_factory=lambda: {"train": 1000, "test": 400})
    all_labelled_dir: str = "runs/fashion_mnist_labelled"  # gets all 70,000 plain photos
    seed: int = 0  # decides which colour each picture has

    RULES = rules(
        source_dir=FOLDER,
        output_dir=OUTPUT,
        images_dir=OUTPUT,
        images_per_caption=at_least(1),
        labelled_dir=OUTPUT,
        photos_per_class=at_least(1),
        all_labelled_dir=OUTPUT,
        seed=SEED,
    )


def read_idx(path: Path) -> np.ndarray:
    """One gzipped IDX file of unsigned bytes as an array."""
    with gzip.open(path, "rb") as file:
        data = file.read()
    num_dims = data[3]
    shape = np.frombuffer(data, ">u4", num_dims, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape.astype(int))


def pad_to_32(photos_NHW: np.ndarray) -> np.ndarray:
    """(N, 28, 28) bytes, bright garment on black -> (N, 32, 32) ink in [0, 1], 0 = paper."""
    return np.pad(photos_NHW, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 255


def sketch(ink_NHW: np.ndarray) -> np.ndarray:
    """Pencil lines: the morphological gradient of the ink (3x3 maximum minus the ink), darkened."""
    edges = ndimage.maximum_filter(ink_NHW, size=(1, 3, 3)) - ink_NHW
    return np.clip(1.5 * edges - 0.1, 0, 1)


def tint(ink_NHW: np.ndarray, colours_NC: np.ndarray) -> np.ndarray:
    """Ink in [0, 1] on white paper -> RGB bytes (N, H, W, 3): no ink is white, full ink is the colour."""
    rgb_NHWC = 1 - ink_NHW[..., None] * (1 - colours_NC[:, None, None, :])
    return (rgb_NHWC * 255).round().astype(np.uint8)


def caption(style: str, colour: str, name: str) -> str:
    """The caption a picture is trained with, e.g. "a pencil sketch of a blue dress"."""
    return f"a {style} of a {colour} {name}"


def encode_png(image_HWC: np.ndarray) -> bytes:
    """PNG bytes of one RGB or grey image."""
    buffer = io.BytesIO()
    PILImage.fromarray(image_HWC).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def build_split(config: PrepareConfig, split: str) -> Dataset:
    """All pictures of a split: row 2 i is photo i, row 2 i + 1 the sketch of it in another colour."""
    source = Path(config.source_dir)
    prefix = SPLITS[split]
    photos = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    ink = pad_to_32(photos)
    names, values = list(COLOURS), np.array(list(COLOURS.values()), np.float32)
    rng = np.random.default_rng([config.seed, len(photos)])
    first = rng.integers(len(names), size=len(photos))
    colour_of = {"photo": first, "pencil sketch": (first + rng.integers(1, len(names), size=len(photos))) % len(names)}
    pictures = {
        "photo": tint(ink, values[first]),
        "pencil sketch": tint(sketch(ink), values[colour_of["pencil sketch"]]),
    }
    rows: dict[str, list] = {key: [] for key in ("image", "text", "class", "colour", "style", "source_index")}
    for index, label in enumerate(labels):
        for style in STYLES:
            colour = names[colour_of[style][index]]
            rows["image"].append({"bytes": encode_png(pictures[style][index]), "path": None})
            rows["text"].append(caption(style, colour, CLASSES[label]))
            rows["class"].append(CLASSES[label])
            rows["colour"].append(colour)
            rows["style"].append(style)
            rows["source_index"].append(index)
    text = Value("string")
    columns = {"image": Image(), "text": text, "class": text, "colour": text, "style": text}
    return Dataset.from_dict(rows, features=Features({**columns, "source_index": Value("int32")}))


def require_own_images(folder: Path) -> None:
    """Refuse a folder with files that `export_images` does not write, as it replaces the folder.

    Raises:
        ValueError: names one of them.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if not re.fullmatch(r"\d{5}\.png|metadata\.(csv|jsonl)", name)]
    if foreign:
        raise ValueError(f"{str(folder)!r} holds other files, {foreign[0]} for one: set images_dir to another folder")


def export_images(dataset: Dataset, folder: Path, per_caption: int) -> int:
    """The first `per_caption` pictures of every caption as an image folder with metadata.csv; returns how many that
    is."""
    seen: dict[str, int] = {}
    chosen = []
    for index, text in enumerate(dataset["text"]):
        seen[text] = seen.get(text, 0) + 1
        if seen[text] <= per_caption:
            chosen.append(index)
    rows = dataset.select(chosen)
    images = np.stack([np.asarray(image) for image in rows["image"]])
    write_image_folder(folder, images, {name: list(rows[name]) for name in ("text", "class", "colour", "style")})
    lines = folder / "metadata.jsonl"
    Dataset.from_json(str(lines)).to_csv(folder / "metadata.csv", lineterminator="\r\n")  # as RFC 4180 has it
    lines.unlink()
    return len(rows)


def export_labelled(config: PrepareConfig, split: str) -> None:
    """The plain photos with a ClassLabel: all of them for training runs, and the first of every class for assets."""
    source = Path(config.source_dir)
    photos = read_idx(source / f"{SPLITS[split]}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{SPLITS[split]}-labels-idx1-ubyte.gz").astype(int)
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    first = np.sort(np.concatenate([np.flatnonzero(labels == c)[: config.photos_per_class[split]] for c in range(10)]))
    for folder, chosen in ((config.all_labelled_dir, np.arange(len(labels))), (config.labelled_dir, first)):
        images = [{"bytes": encode_png(photos[index]), "path": None} for index in chosen]
        rows = Dataset.from_dict({"image": images, "label": labels[chosen].tolist()}, features=features)
        Path(folder).mkdir(parents=True, exist_ok=True)
        rows.to_parquet(Path(folder) / f"{split}.parquet")
        print(f"{folder}/{split}.parquet: {len(rows)} photos")


def main(config: PrepareConfig) -> None:
    """Write the captioned sets (all, and the small image folder) and the labelled ones (all, and the small one)."""
    if not Path(config.source_dir).is_dir():
        raise ValueError(
            f"no Fashion-MNIST in {config.source_dir}: install the Debian package dataset-fashion-mnist "
            "or set --source_dir to the folder with its four IDX files"
        )
    for split in SPLITS:
        require_own_images(Path(config.images_dir) / split)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        dataset = build_split(config, split)
        dataset.to_parquet(output / f"{split}.parquet")
        folder = Path(config.images_dir) / split
        count = export_images(dataset, folder, config.images_per_caption[split])
        print(f"{output / split}.parquet: {len(dataset)} pictures; {folder}: {count}")
        export_labelled(config, split)


if __name__ == "__main__":
    run_script(main, PrepareConfig)
