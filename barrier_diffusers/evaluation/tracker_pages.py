"""What a tracker shows a person of a finished run: images before and after with their captions, bars, tables, plots.

Works on the trackers of accelerate. wandb gets tables whose cells are images and plots that it draws itself;
tensorboard gets pictures and text.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from barrier_diffusers.evaluation.report import RunRecord, figures
from barrier_diffusers.utils.shown_text import for_markdown

PER_LABEL, MOST = 4, 64  # images of a label, and of all labels together
KEPT_HERE = ("checkpoints", "cache", "logs")  # folders of a run that belong to no artifact

Table = tuple[list[str], list[list[Any]]]  # headings, rows


@dataclass(frozen=True)
class Comparison:
    """Images of the same prompts and seeds, in the same order."""

    prompts: Sequence[str]
    labels: Sequence[str]
    forgotten: Sequence[str]
    before_NHWC: np.ndarray
    after_NHWC: np.ndarray

    def chosen(self) -> list[int]:
        """Numbers of the images that are shown: the first of every label, those of forgotten labels in front."""
        found: list[int] = []
        for label in sorted(dict.fromkeys(self.labels), key=lambda label: label not in self.forgotten):
            found += [index for index, value in enumerate(self.labels) if value == label][:PER_LABEL]
        return found[:MOST]


def label_table(record: RunRecord) -> Table:
    """Share of each label's images that are recognised, in percent, before (if known) and after; forgotten first."""
    before, after = record.shares("before"), record.shares("after")
    rows = [
        [
            label,
            "forgotten" if label in record.forgotten else "retained",
            before[label]["value"] if label in before else None,
            after[label]["value"],
            *after[label]["interval_95"],
            after[label]["num_images"],
        ]
        for label in record.forgotten_first(after)
    ]
    return ["label", "role", "before, %", "after, %", "lowest, %", "highest, %", "images"], rows


def attack_rows(record: RunRecord) -> Table:
    """Share of the images that show the concept, in percent, of the plain prompts and under every attack."""
    rows = [
        [
            attack["attack"],
            attack["concept"],
            attack["pre_attack"]["value"],
            attack["post_attack"]["value"],
            *attack["post_attack"]["interval_95"],
        ]
        for attack in record.metrics.get("attacks") or []
    ]
    return ["attack", "concept", "plain, %", "attacked, %", "lowest, %", "highest, %"], rows


def trade_off_rows(record: RunRecord) -> Table:
    """What was erased against what the rest lost: one point, which trackers draw beside those of other runs."""
    known = record.erased is not None and record.drop is not None
    rows = [[Path(record.name).name, record.drop, record.erased["value"]]] if known and record.erased else []
    return ["run", "retain accuracy drop, points", "unlearning accuracy, %"], rows


def tables_of(record: RunRecord) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """(name, headings, rows) of every table that has rows."""
    for name, make in (("per label", label_table), ("attacks", attack_rows), ("trade-off", trade_off_rows)):
        headings, rows = make(record)
        if rows:
            yield name, headings, rows


def log_comparison(trackers: Sequence[Any], comparison: Comparison, step: int, prefix: str = "") -> None:
    """Show images before and after, each pair with its prompt."""
    for tracker in trackers:
        if tracker.name in PAGES:
            PAGES[tracker.name](tracker, prefix).comparison(comparison, step)


def log_record(trackers: Sequence[Any], record: RunRecord, step: int, prefix: str = "") -> None:
    """Show the pictures and tables of a run's record, and what came out in a sentence."""
    for tracker in trackers:
        if tracker.name in PAGES:
            PAGES[tracker.name](tracker, prefix).record(record, step)


def log_artifact(trackers: Sequence[Any], folder: Path, record: RunRecord) -> None:
    """Give wandb the folder of a result, without checkpoints, caches and logs, as an artifact of type model.

    Its metadata are the run's numbers; it is called after the folder.
    """
    import wandb

    for tracker in (tracker for tracker in trackers if tracker.name == "wandb"):
        name = re.sub(r"[^\w.-]", "-", folder.resolve().name)
        numbers = {key: value for key, value in record.classes.items() if isinstance(value, int | float)}
        artifact = wandb.Artifact(name, type="model", description=record.verdict, metadata=numbers)
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and inside.parts[0] not in KEPT_HERE and not inside.parts[0].startswith("."):
                artifact.add_file(str(path), name=inside.as_posix())
        tracker.tracker.log_artifact(artifact)


class WandbPage:
    """A run on wandb.

    Args:
        tracker: accelerate's.
        prefix: of the names of all that is shown.
    """

    def __init__(self, tracker: Any, prefix: str):
        self.run, self.prefix = tracker.tracker, prefix

    def comparison(self, comparison: Comparison, step: int) -> None:
        """A table whose rows are prompt, label, and both images."""
        import wandb

        table = wandb.Table(columns=["prompt", "label", "role", "before", "after"])
        for index in comparison.chosen():
            prompt, label = comparison.prompts[index], comparison.labels[index]
            images = (comparison.before_NHWC[index], comparison.after_NHWC[index])
            role = "forgotten" if label in comparison.forgotten else "retained"
            table.add_data(prompt, label, role, *(wandb.Image(image, caption=prompt) for image in images))
        self.run.log({f"{self.prefix}before and after": table}, step=step)

    def record(self, record: RunRecord, step: int) -> None:
        """Pictures, tables, bars and the trade-off as plots of wandb's own; the verdict in the summary."""
        import wandb

        shown: dict[str, Any] = {
            f"{self.prefix}{caption}": wandb.Image(Image.open(io.BytesIO(png)), caption=caption)
            for caption, png in pictures_of(record).items()
        }
        for name, headings, rows in tables_of(record):
            columns: list[str | int] = list(headings)
            table = wandb.Table(columns=columns, data=rows)  # logged with its plot, as NAME_table
            if name == "trade-off":
                plot = wandb.plot.scatter(table, headings[1], headings[2], title="what erasing costs the rest")
            else:
                plot = wandb.plot.bar(table, headings[0], headings[3], title=f"{name}: {headings[3]}")
            shown[f"{self.prefix}{name}"] = plot
        self.run.log(shown, step=step)
        self.run.summary[f"{self.prefix}verdict"] = record.verdict


class TensorboardPage:
    """A run in tensorboard.

    Args:
        tracker: accelerate's.
        prefix: of the names of all that is shown.
    """

    def __init__(self, tracker: Any, prefix: str):
        self.writer, self.prefix = tracker.tracker, prefix

    def comparison(self, comparison: Comparison, step: int) -> None:
        """Of every label its pairs one below another, the image before on the left, and their prompts as text."""
        chosen = comparison.chosen()
        for label in dict.fromkeys(comparison.labels[index] for index in chosen):
            rows = [index for index in chosen if comparison.labels[index] == label]
            pairs = np.concatenate([comparison.before_NHWC[rows], comparison.after_NHWC[rows]], axis=2)
            name = f"{self.prefix}before and after/{label}"
            self.writer.add_image(name, np.concatenate(list(pairs)), step, dataformats="HWC")
            self.writer.add_text(name, markdown(["prompt"], [[comparison.prompts[index]] for index in rows]), step)

    def record(self, record: RunRecord, step: int) -> None:
        """Pictures as images, tables and the verdict as text."""
        for caption, png in pictures_of(record).items():
            image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self.writer.add_image(f"{self.prefix}pictures/{caption}", image, step, dataformats="HWC")
        for name, headings, rows in tables_of(record):
            self.writer.add_text(f"{self.prefix}{name}", markdown(headings, rows), step)
        self.writer.add_text(f"{self.prefix}verdict", for_markdown(record.verdict), step)
        self.writer.flush()


PAGES: Mapping[str, type[WandbPage] | type[TensorboardPage]] = {"wandb": WandbPage, "tensorboard": TensorboardPage}


def pictures_of(record: RunRecord) -> dict[str, bytes]:
    """Caption -> PNG: what the run left, and what is drawn from its numbers."""
    return {**record.pictures, **figures(record)}


def markdown(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for tensorboard, numbers with one decimal."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.1f}" if isinstance(value, float) else for_markdown(str(value))

    lines = [headings, ["---"] * len(headings), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
