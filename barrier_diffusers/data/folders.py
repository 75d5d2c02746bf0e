"""Folders of images: which files count, what is known of each, and one printed line that says so.

Training, evaluation, FID and the extensions read folders through here. Every image file counts once, equal files too;
links are followed; hidden files, and the output folders of earlier runs of this program, stay out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from barrier_diffusers.data.csv_files import CsvFile, read_text
from barrier_diffusers.utils.output_folder import RECORD_NAME, say
from barrier_diffusers.utils.run_records import MANIFEST_NAME

CAPTION_SUFFIXES = (".txt", ".caption")  # beside an image, as trainers of adapters have them
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLITS = {  # name of a top folder -> the split that it holds
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
}
NOT_PICTURES = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "MPEG", "WMF"}  # films, data, and what runs a program
OTHER_PICTURES = {".arw", ".cr2", ".dng", ".eps", ".heic", ".heif", ".jxl", ".nef", ".raw", ".svg"}
OUTPUTS = ("barrier_config.json", "erased_concepts.json", "model_index.json")  # what earlier versions left
NO_CAPTION = "without a caption"


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in small letters, of the files that Pillow reads as pictures."""
    kinds = PILImage.registered_extensions()  # loads all of Pillow's plugins
    return frozenset(end for end, kind in kinds.items() if kind in PILImage.OPEN and kind not in NOT_PICTURES)


def is_image_file(path: Path) -> bool:
    """Whether a file's name, or the beginning of a file without suffix, says that it is a picture."""
    if path.suffix:
        return path.suffix.lower() in image_suffixes()
    try:
        with PILImage.open(path) as image:
            return image.format not in NOT_PICTURES
    except Exception:  # Pillow's decoders raise whatever they meet
        return False


@dataclass
class FolderContent:
    """The image files of a folder, its subfolders included."""

    root: Path
    names: list[str]  # paths relative to `root`, with slashes, sorted
    left_out: Counter[str] = field(default_factory=Counter)  # why -> how many
    top: str = ""  # folder of the split that is read, where `root` holds several

    @property
    def num_found(self) -> int:
        """Image files that are not hidden, used or not."""
        return len(self.names) + sum(count for why, count in self.left_out.items() if why != "hidden")

    @property
    def classes(self) -> list[str]:
        """The folder of each image within its split, if all images lie in one."""
        inner = [name.removeprefix(f"{self.top}/") for name in self.names]
        return [name.split("/", 1)[0] for name in inner] if all("/" in name for name in inner) else []

    def keep(self, names: Sequence[str], why: str) -> None:
        """Leave all but these files out, and say why."""
        gone = len(self.names) - len(names)
        if gone:
            self.left_out[why] += gone
        self.names = list(names)

    def report(self) -> str:
        """How many images were found and are used, and what was left out why."""
        rest = ", ".join(f"{count} {why}" for why, count in sorted(self.left_out.items()))
        used = f"{self.num_found} images found, {len(self.names)} used"
        return f"{self.root / self.top}: {used}" + (f"; left out: {rest}" if rest else "")


_printed: set[str] = set()


def announce(line: str) -> None:
    """Print a line once a process, and in the first process of a run alone."""
    if line not in _printed:
        _printed.add(line)
        say(line)


def find_images(folder: str | Path) -> FolderContent:
    """The image files of a folder.

    Raises:
        ValueError: no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"image folder {str(folder)!r} does not exist")
    content = FolderContent(root, [])
    for path in _walk(root, (), content.left_out):
        if path.is_symlink() and not path.exists():
            if path.suffix.lower() in image_suffixes():
                content.left_out["links that lead nowhere"] += 1
        elif path.suffix.lower() in OTHER_PICTURES:
            content.left_out[f"of a kind that cannot be read ({path.suffix.lower()})"] += 1
        elif is_image_file(path):
            content.names.append(path.relative_to(root).as_posix())
    content.names.sort()
    return content


def _walk(folder: Path, above: tuple[str, ...], left_out: Counter[str]) -> Iterator[Path]:
    """Files below a folder that count; `above` are the real paths around it, so that links cannot loop."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__MACOSX":
            left_out["hidden"] += _count(path)
        elif not path.is_dir():
            yield path
        elif is_output(path):
            left_out["in folders of earlier runs"] += _count(path)
        else:
            yield from _walk(path, (*above, here), left_out)
    for why in ("hidden", "in folders of earlier runs"):
        if not left_out[why]:
            del left_out[why]


def _count(path: Path) -> int:
    found = path.rglob("*") if path.is_dir() else [path]
    return sum(file.suffix.lower() in image_suffixes() for file in found)


def is_output(folder: Path) -> bool:
    """Whether a folder was written by a run of this program: unlearned, evaluated, or images made from prompts."""
    if any((folder / name).is_file() for name in (RECORD_NAME, *OUTPUTS)):
        return True
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    keys = set(manifest) if isinstance(manifest, Mapping) else set()
    return {"settings", "hashes"} <= keys or {"denoiser", "prompts", "sampling"} <= keys


def split_folders(content: FolderContent) -> dict[str, str]:
    """Split -> the top folder that holds it, if all images lie in top folders that are called like splits; else empty.

    A word in a file's name says nothing.
    """
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in content.names}
    return {SPLITS[top.lower()]: top for top in tops} if tops and all(top.lower() in SPLITS for top in tops) else {}


def read_image_folder(
    folder: Path, split: str, image_column: str, caption_column: str, needed: Sequence[str] = (), quiet: bool = False
) -> Dataset:
    """A row for every image file: its picture, the columns of a metadata file, captions of text files, class folders.

    Metadata files (`metadata.csv`, `.jsonl` or `.parquet`, with a column file_name) describe the images beside and
    below them. Where they give no `caption_column`, a text file beside the image of the same name does. Images that
    all lie in subfolders have the name of the first one as their class, in column label.

    Args:
        needed: columns without which an image that no metadata file describes is left out; one that no image has is
            for the caller to miss.
        quiet: do not print the line about the folder.

    Raises:
        ValueError: no image, no such split, or a metadata file that cannot be read.
    """
    content = find_images(folder)
    splits = split_folders(content)
    if content.names and split not in (splits or {"train": ""}):
        there = ", ".join(sorted(splits or {"train"}))
        raise ValueError(f"cannot read split {split!r} of {str(folder)!r}: it has {there}")
    if splits:
        content.top = splits[split]
        content.names = [name for name in content.names if name.startswith(f"{content.top}/")]
    rows, described = _described(content, caption_column)
    for column in needed:
        if column == image_column or not any(column in row for row in rows.values()):
            continue
        kept = [name for name in content.names if name in described or column in rows[name]]
        content.keep(kept, NO_CAPTION if column == caption_column else f"without a {column}")
    if not content.names:
        raise ValueError(f"{content.report()}: no image to read")
    if not quiet:
        announce(content.report())
    return _as_dataset(content, [rows[name] for name in content.names], image_column)


def _described(content: FolderContent, caption_column: str) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """(image -> what the folder says of it by column; the images that a metadata file has a row for)."""
    described: set[str] = set()
    rows: dict[str, dict[str, Any]] = {name: {} for name in content.names}
    folders = sorted({parent.as_posix() for name in content.names for parent in Path(name).parents}, key=len)
    known = set(content.names)
    for folder in folders:  # a metadata file further down knows better
        found = [name for name in METADATA_NAMES if (content.root / folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{str(content.root / folder)!r} holds {' and '.join(found)}: keep the one that is right")
        for path in (content.root / folder / name for name in found):
            own: set[str] = set()
            for number, row in enumerate(read_metadata(path)):
                named = os.path.normpath(os.path.join(folder, str(row.pop("file_name")))).replace(os.sep, "/")
                if named in own:
                    announce(f"{path}: row {number} names {named!r} again; its first row counts")
                    continue
                own.add(named)
                if named not in known:
                    if not (content.root / named).exists():
                        announce(f"{path}: row {number} names {named!r}, which is not there")
                    continue
                rows[named] |= row
            described |= own & known
    classes = content.classes or [""] * len(content.names)
    for name, class_name in zip(content.names, classes, strict=True):
        row = rows[name]
        path = content.root / name
        if row.get(caption_column) is None:
            text = next((path.with_suffix(end) for end in CAPTION_SUFFIXES if path.with_suffix(end).is_file()), None)
            caption = " ".join(read_text(text).split()) if text is not None else ""
            if caption:
                row[caption_column] = caption
        if class_name:
            row.setdefault("label", class_name)
    return rows, described


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The rows of a metadata file, each with a file_name; empty cells of a CSV file are None.

    Raises:
        ValueError: a file that cannot be read, or a row without file_name; the message names file and line.
    """
    try:
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
        else:
            rows = [{name: cell or None for name, cell in row.items()} for _, row in CsvFile(path)]
    except (json.JSONDecodeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            there = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
            raise ValueError(f"{str(path)!r}, row {number}: there is no file_name{there}")
    return rows


def _as_dataset(content: FolderContent, rows: list[dict[str, Any]], image_column: str) -> Dataset:
    paths = [str(content.root / name) for name in content.names]
    columns: dict[str, list[Any]] = {image_column: paths}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name != image_column:
            columns[name] = _of_one_type([row.get(name) for row in rows])
    features = Features({**Dataset.from_dict(columns).features, image_column: Image()})
    classes = sorted(set(content.classes))
    if "label" in columns and set(columns["label"]) <= set(classes):
        features["label"] = ClassLabel(names=classes)
        columns["label"] = [classes.index(name) for name in columns["label"]]
    dataset = Dataset.from_dict(columns, features=features)
    digest = hashlib.sha256(json.dumps([image_column, *rows], sort_keys=True, default=str).encode())
    for name, path in zip(content.names, paths, strict=True):
        digest.update(name.removeprefix(f"{content.top}/").encode())
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    dataset._fingerprint = digest.hexdigest()[:16]  # of names, contents and columns, wherever the folder lies
    return dataset


def _of_one_type(values: list[Any]) -> list[Any]:
    try:
        pyarrow.array(values)
    except pyarrow.ArrowException:
        return [None if value is None else str(value) for value in values]
    return values
