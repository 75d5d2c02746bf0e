"""Pictures of a run, as PNG files or bytes: grids of images, loss curves, bars, the trade-off between runs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from barrier_diffusers.utils.shown_text import as_written


def _draw_row(axis: Any, images_NHWC: np.ndarray) -> None:
    axis.imshow(np.concatenate(list(images_NHWC), axis=1), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


@as_written
def before_after_grid(
    before_NHWC: np.ndarray,
    after_NHWC: np.ndarray,
    labels: Sequence[str],
    forgotten: Sequence[str],
    path: Path,
    columns: int = 6,
) -> None:
    """One row per label: `columns` images before, drawn at random from the label's, and the same seeds after.

    Forgotten labels come first, in red.
    """
    order = sorted(dict.fromkeys(labels), key=lambda label: label not in forgotten)
    figure, axes = plt.subplots(len(order), 2, figsize=(1.7 * columns, 0.92 * len(order) + 0.6), squeeze=False)
    for row, label in enumerate(order):
        mine = [index for index, value in enumerate(labels) if value == label]
        chosen = sorted(np.random.default_rng(0).permutation(mine)[:columns])
        for axis, images in zip(axes[row], (before_NHWC, after_NHWC), strict=True):
            _draw_row(axis, images[chosen])
        colour = "tab:red" if label in forgotten else "black"
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", color=colour)
    axes[0, 0].set_title("before")
    axes[0, 1].set_title("after (same prompts and seeds)")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@as_written
def image_rows(images_NHWC: np.ndarray, labels: Sequence[str], path: Path, columns: int = 12) -> None:
    """One row per label with its first `columns` images."""
    order = list(dict.fromkeys(labels))
    figure, axes = plt.subplots(len(order), 1, figsize=(0.9 * columns + 1, 0.92 * len(order)), squeeze=False)
    for axis, label in zip(axes[:, 0], order, strict=True):
        _draw_row(axis, images_NHWC[[index for index, value in enumerate(labels) if value == label][:columns]])
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110, bbox_inches="tight")  # long labels, too
    plt.close(figure)


def attacks_picture(
    plain: Mapping[str, np.ndarray], attacked: Mapping[str, np.ndarray], path: Path, columns: int
) -> None:
    """The first images (N, H, W, 3) of each concept's plain prompts, and the same seeds under each attack."""
    shown = {f"plain: {concept}": images for concept, images in plain.items()} | dict(attacked)
    labels = [label for label, images in shown.items() for _ in images[:columns]]
    image_rows(np.concatenate([images[:columns] for images in shown.values()]), labels, path=path, columns=columns)


@as_written
def strip(images_NHWC: np.ndarray, titles: Sequence[str], path: Path) -> None:
    """The images in one row, each under its title."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(images_NHWC), figsize=(2 * len(images_NHWC), 2.4), squeeze=False)
    for axis, image, title in zip(axes[0], images_NHWC, titles, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=7)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@as_written
def loss_curves(history: Mapping[str, Sequence[float]], path: Path) -> None:
    """One panel per recorded loss over the optimisation steps."""
    figure, axes = plt.subplots(1, len(history), figsize=(4.2 * len(history), 3), squeeze=False)
    for axis, (name, values) in zip(axes[0], history.items(), strict=True):
        axis.plot(range(1, len(values) + 1), values, linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def png(figure: Any) -> bytes:
    """A figure as a PNG file, the same bytes each time; it is closed."""
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})  # long names, too
    plt.close(figure)
    return buffer.getvalue()


def error_bar(counted: Mapping[str, Any]) -> list[float]:
    """Lengths of the error bar of a share below and above its value."""
    low, high = counted["interval_95"]
    return [max(0.0, counted["value"] - low), max(0.0, high - counted["value"])]


@as_written
def label_bars(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]], forgotten: Sequence[str]
) -> bytes:
    """Accuracy of every label with its 95 % interval, before (if known) and after; forgotten labels first, in red.

    Args:
        before, after: label -> {"value" in percent, "interval_95"}.
    """
    order = sorted(after, key=lambda label: label not in forgotten)
    figure, axis = plt.subplots(figsize=(max(6.0, 0.8 * len(order) + 1), 3.6))
    for shift, shares, shade in ((-0.2, before, 0.45), (0.2, after, 1.0)):
        for position, label in enumerate(order):
            if label in shares:
                counted, colour = shares[label], "tab:red" if label in forgotten else "tab:blue"
                error = [[value] for value in error_bar(counted)]
                axis.bar(position + shift, counted["value"], 0.38, color=colour, alpha=shade, yerr=error, capsize=2)
    axis.set_xticks(range(len(order)), order, rotation=30, ha="right")
    axis.set_ylim(0, 105)
    axis.set_ylabel("recognised, % (pale: before)" if before else "recognised, %")
    axis.grid(axis="y", alpha=0.3)
    return png(figure)


@as_written
def trade_off(points: Sequence[tuple[str, Mapping[str, Any], float, Sequence[float] | None]]) -> bytes:
    """Unlearning accuracy against what the rest lost; the best corner is at the upper left.

    Args:
        points: (name, unlearning accuracy with its interval, drop in points, ends of the drop's interval or None).
    """
    figure, axis = plt.subplots(figsize=(7, 4.6))
    for number, (name, erased, drop, ends) in enumerate(points):
        across = None if ends is None else [[max(0.0, drop - ends[0])], [max(0.0, ends[1] - drop)]]
        up = [[value] for value in error_bar(erased)]
        colour = f"C{number % 10}"
        axis.errorbar(drop, erased["value"], up, across, fmt="o", capsize=3, color=colour, label=name)
    axis.set_xlabel("retain accuracy drop, points")
    axis.set_ylabel("unlearning accuracy, %")
    axis.set_ylim(-3, 105)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return png(figure)


@as_written
def gap_curves(marks: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Images that show the concept after each number of steps, of the erased model and of the control, in percent.

    Args:
        marks: number of steps -> {"erased", "control"}, shares with their intervals.
    """
    figure, axis = plt.subplots(figsize=(6, 3.6))
    steps = [int(number) for number in marks]
    for side, colour in (("erased", "tab:red"), ("control", "tab:blue")):
        shares = [at[side] for at in marks.values()]
        errors = np.array([error_bar(counted) for counted in shares]).T
        values = [counted["value"] for counted in shares]
        axis.errorbar(steps, values, errors, marker="o", capsize=3, color=colour, label=side)
    if min(steps) > 0:
        axis.set_xscale("log")
    axis.set_xticks(steps, [str(number) for number in steps])
    axis.minorticks_off()
    axis.set_ylim(-3, 105)
    axis.set_xlabel("steps of the attack")
    axis.set_ylabel("images that show it, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return png(figure)


@as_written
def drift_bars(maps: Sequence[Mapping[str, Any]]) -> bytes:
    """Largest relative drift that the test images show in every map, beside the bound that others chose for it."""
    names = [linear_map["name"] for linear_map in maps]
    figure, axis = plt.subplots(figsize=(8, max(2.4, 0.24 * len(names) + 1)))
    positions = range(len(names))
    certified = [linear_map["relative"]["certified"] or 0.0 for linear_map in maps]
    axis.barh(positions, certified, 0.8, color="tab:blue", alpha=0.3, label="certified bound")
    shown = [linear_map["relative"]["largest_test"] or 0.0 for linear_map in maps]
    axis.barh(positions, shown, 0.4, color="tab:blue", label="largest of the test images")
    axis.set_yticks(positions, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("relative drift on held-out images")
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    return png(figure)
