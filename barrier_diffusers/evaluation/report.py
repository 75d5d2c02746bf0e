"""Pictures and tables of a run: before / after grid, loss curves, the table that the script prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def _draw_row(axis: Any, images_NHWC: np.ndarray) -> None:
    axis.imshow(np.concatenate(list(images_NHWC), axis=1), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


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
    image_rows(np.concatenate([images[:columns] for images in shown.values()]), labels, path, columns)


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


def print_metrics(metrics: Mapping[str, Any], attribute: str, forgotten: Sequence[str]) -> None:
    """The table of what was forgotten and what was kept."""
    table = Table(title=f"{attribute}: forgotten {', '.join(forgotten)}")
    for heading in ("", "before", "after", "95 % interval after"):
        table.add_column(heading, justify="left" if heading == "" else "right")

    def add(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], style: str | None = None) -> None:
        first = f"{before['value']:.1f}" if before else ""
        table.add_row(name, first, f"{after['value']:.1f}", interval(after), style=style)

    details = metrics["details"]
    before, after = details.get(f"per_{attribute}_before", {}), details[f"per_{attribute}_after"]
    for label in sorted(after, key=lambda label: label not in forgotten):
        add(label, before.get(label), after[label], "red" if label in forgotten else None)
    table.add_section()
    add("all retained labels", details.get("retain_accuracy_before"), details["retain_accuracy_after"], "bold")
    for key in details:
        if key.endswith("_accuracy_after") and key not in ("retain_accuracy_after", "forget_accuracy_after"):
            name = key.removesuffix("_accuracy_after").replace("_", " ")
            add(name, details.get(key.replace("_after", "_before")), details[key])
    console = Console(width=88)
    console.print(table)
    retained = f"retain accuracy {metrics['retain_accuracy_after']:.1f} %"
    if "retain_accuracy_drop" in metrics:
        retained = f"retain accuracy drop {metrics['retain_accuracy_drop']:.1f} points"
    console.print(
        f"unlearning accuracy {metrics['unlearning_accuracy']:.1f} % "
        f"({details['unlearning_accuracy']['num_images']} images), {retained} "
        f"({details['retain_accuracy_after']['num_images']} images)"
    )


def interval(entry: Mapping[str, Any]) -> str:
    """The 95 % interval of a share, in percent."""
    low, high = entry["interval_95"]
    return f"{low:.1f} - {high:.1f}"


def print_attacks(results: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> None:
    """The table of what each attack brought back; `seconds` by the attack's name."""
    table = Table(title="images recognised as the forgotten concept, in %")
    for heading in ("attack", "concept", "plain prompts", "attacked", "95 % interval", "images", "seconds"):
        table.add_column(heading, justify="left" if heading in ("attack", "concept") else "right")
    for result in results:
        before, after = result["pre_attack"], result["post_attack"]
        cells = [f"{before['value']:.1f}", f"{after['value']:.1f}", interval(after), str(after["num_images"])]
        table.add_row(result["attack"], result["concept"], *cells, f"{seconds[result['attack']]:.0f}")
    Console(width=88).print(table)


def print_values(title: str, values: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of numbers, by "before" (if known) and "after"; nothing if there are none. A {mean, std} is one number,
    and what is no number is left out."""

    def written(entry: Any) -> str:
        if isinstance(entry, Mapping):
            return f"{entry['mean']:.4g} ± {entry['std']:.2g}"
        return str(entry) if isinstance(entry, int) else f"{entry:.4g}"

    table = Table(title=title)
    for heading in ("", *values):
        table.add_column(heading, justify="left" if heading == "" else "right")
    names = [name for name in values.get("after", {}) if name != "details"]
    for name in names:
        table.add_row(name.replace("_", " "), *(written(column[name]) for column in values.values()))
    if names:
        Console(width=88).print(table)


def print_membership(found: Mapping[str, Any]) -> None:
    """How well the denoising loss tells trained images from held-out ones; an area of 0.5 is a guess."""
    table = Table(title="membership inference: trained or held out, by the denoising loss")
    for heading in ("images", "pipeline", "area under ROC", "95 % interval", "found, %", "loss trained / held out"):
        table.add_column(heading, justify="left" if heading in ("images", "pipeline") else "right")
    for when in (name for name in ("before", "after") if name in found):
        for role, entry in found[when].items():
            low, high = entry["auc"]["interval_95"]
            area = (f"{entry['auc']['value']:.3f}", f"{low:.3f} - {high:.3f}")
            losses = f"{entry['loss_members']:.4f} / {entry['loss_held_out']:.4f}"
            table.add_row(role, when, *area, f"{entry['true_positive_rate']['value']:.1f}", losses)
    for role, entry in found.get("change", {}).items():
        low, high = entry["auc"]["interval_95"]
        table.add_row(role, "change", f"{entry['auc']['value']:+.3f}", f"{low:+.3f} - {high:+.3f}", "", "")
    Console(width=88).print(table)
