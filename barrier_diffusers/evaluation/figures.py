"""Figures of the report, each as PNG bytes, so that one page holds them all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})  # long names, too
    plt.close(figure)
    return buffer.getvalue()


def _errors(entry: Mapping[str, Any]) -> list[float]:
    low, high = entry["interval_95"]
    return [max(0.0, entry["value"] - low), max(0.0, high - entry["value"])]


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
        for place, label in enumerate(order):
            if label in shares:
                entry, colour = shares[label], "tab:red" if label in forgotten else "tab:blue"
                error = [[value] for value in _errors(entry)]
                axis.bar(place + shift, entry["value"], 0.38, color=colour, alpha=shade, yerr=error, capsize=2)
    axis.set_xticks(range(len(order)), order, rotation=30, ha="right")
    axis.set_ylim(0, 105)
    axis.set_ylabel("recognised, % (pale: before)" if before else "recognised, %")
    axis.grid(axis="y", alpha=0.3)
    return _png(figure)


def trade_off(points: Sequence[tuple[str, Mapping[str, Any], float, Sequence[float] | None]]) -> bytes:
    """Unlearning accuracy against what the rest lost; the best corner is at the upper left.

    Args:
        points: (name, unlearning accuracy with its interval, drop in points, ends of the drop's interval or None).
    """
    figure, axis = plt.subplots(figsize=(7, 4.6))
    for number, (name, erased, drop, ends) in enumerate(points):
        across = None if ends is None else [[max(0.0, drop - ends[0])], [max(0.0, ends[1] - drop)]]
        up = [[value] for value in _errors(erased)]
        colour = f"C{number % 10}"
        axis.errorbar(drop, erased["value"], up, across, fmt="o", capsize=3, color=colour, label=name)
    axis.set_xlabel("retain accuracy drop, points")
    axis.set_ylabel("unlearning accuracy, %")
    axis.set_ylim(-3, 105)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _png(figure)


def drift_bars(maps: Sequence[Mapping[str, Any]]) -> bytes:
    """Largest relative drift that the test images show in every map, beside the bound that others chose for it."""
    names = [entry["name"] for entry in maps]
    figure, axis = plt.subplots(figsize=(8, max(2.4, 0.24 * len(names) + 1)))
    places = range(len(names))
    certified = [entry["relative"]["certified"] or 0.0 for entry in maps]
    axis.barh(places, certified, 0.8, color="tab:blue", alpha=0.3, label="certified bound")
    shown = [entry["relative"]["largest_test"] or 0.0 for entry in maps]
    axis.barh(places, shown, 0.4, color="tab:blue", label="largest of the test images")
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("relative drift on held-out images")
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    return _png(figure)
