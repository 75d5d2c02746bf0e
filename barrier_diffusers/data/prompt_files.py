"""Prompt files: CSV with case_number, prompt, evaluation_seed; I2P's guidance columns count. One row, some images.

Image i of a row starts from noise of seed `evaluation_seed + i` and is called `{case_number}_{i}.png`.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from barrier_diffusers.data.csv_files import CsvFile
from barrier_diffusers.utils.checks import FILE, at_least, check_settings, rules
from barrier_diffusers.utils.files import written_whole

SEED_COLUMNS = ("evaluation_seed", "sd_seed")


GUIDANCE_COLUMNS = ("evaluation_guidance", "sd_guidance_scale")


COLUMNS = ("case_number", "prompt", "evaluation_seed", "evaluation_guidance", "label")


SEED_LIMIT = 2**63  # of torch's generators


CASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class PromptsConfig:
    """Which prompts a protocol asks, and how many images of each."""

    file: str | None = None  # CSV with case_number, prompt, evaluation_seed
    images_per_prompt: int = 1  # made for each row

    RULES = rules(file=FILE, images_per_prompt=at_least(1))

    def __post_init__(self) -> None:
        if self.file is not None and not Path(self.file).expanduser().is_file():
            raise ValueError(f"prompt file {self.file!r} does not exist")
        check_settings(self)


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt file."""

    case: str
    prompt: str
    seed: int
    guidance: float | None = None  # None: the sampler's own
    label: str | None = None  # what the prompt asks for, where the file says so

    def image_names(self, images_per_prompt: int) -> list[str]:
        """File names of the row's images."""
        return [f"{self.case}_{index}.png" for index in range(images_per_prompt)]


def read_prompts(path: str | Path, first_seed: int = 0, label_column: str = "label") -> list[PromptRow]:
    """The rows of a prompt file.

    Without a case_number column rows are numbered from 0; without a seed column row n gets `first_seed + n`. Other
    columns (I2P's categories, toxicity, image size) are not read.

    Raises:
        ValueError: no such file, one that is not in UTF-8, no prompt column, no rows, or a row (named by its line)
            with more or fewer cells than columns, an empty prompt, a case number that is taken or no file name, or a
            seed or guidance that is no number.
    """
    file_path = Path(path).expanduser()
    if not file_path.is_file():
        raise ValueError(f"prompt file {str(path)!r} does not exist")
    file = CsvFile(file_path, must_fill="prompt")
    if "prompt" not in file.columns:
        raise ValueError(f"prompt file {str(path)!r} has no column 'prompt'; it has {', '.join(file.columns)}")
    seed_column = next((name for name in SEED_COLUMNS if name in file.columns), None)
    guidance_column = next((name for name in GUIDANCE_COLUMNS if name in file.columns), None)
    rows: list[PromptRow] = []
    taken: set[str] = set()
    for index, (line, row) in enumerate(file):
        where = f"prompt file {str(path)!r}, line {line}"
        case, prompt = (row.get("case_number") or str(index)).strip(), row["prompt"].strip()
        if not prompt:
            raise ValueError(f"{where}: the prompt is empty")
        if case in taken or not CASE.fullmatch(case):
            raise ValueError(f"{where}: case_number {case!r} is {'taken' if case in taken else 'no file name'}")
        taken.add(case)
        seed = first_seed + index
        if seed_column is not None:
            seed = _seed(row[seed_column].strip(), f"{where}: {seed_column}")
        guidance = None
        if guidance_column is not None and row[guidance_column].strip():
            guidance = _guidance(row[guidance_column].strip(), f"{where}: {guidance_column}")
        rows.append(PromptRow(case, prompt, seed, guidance, (row.get(label_column) or "").strip() or None))
    if not rows:
        raise ValueError(f"prompt file {str(path)!r} has no rows")
    return rows


def _seed(text: str, where: str) -> int:
    """A whole number, to its last digit; 7.0 is one, too, as pandas writes whole numbers beside gaps."""
    try:
        seed = int(text) if re.fullmatch("[+-]?[0-9]+", text) else Fraction(text)
    except (ValueError, ZeroDivisionError):
        seed = Fraction(-1)
    if seed < 0 or seed != int(seed) or seed >= SEED_LIMIT:
        raise ValueError(f"{where} is {text!r}, but must be a whole number that is not negative and below 2^63")
    return int(seed)


def _guidance(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{where} is {text!r}, but must be a number that is not negative")
    return value


def write_prompts(path: Path, rows: Sequence[PromptRow]) -> None:
    """A prompt file that `read_prompts` reads back as it was."""
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            guidance = "" if row.guidance is None else repr(row.guidance)
            writer.writerow((row.case, row.prompt, row.seed, guidance, row.label or ""))
