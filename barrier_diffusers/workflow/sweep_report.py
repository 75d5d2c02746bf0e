"""What a sweep found: a table, which settings mattered, and what one metric costs in another."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from matplotlib import pyplot as plt
from optuna.trial import FrozenTrial, TrialState

from barrier_diffusers.utils.files import written_whole
from barrier_diffusers.utils.shown_text import as_written, for_markdown
from barrier_diffusers.workflow.sweep_file import Sweep
from barrier_diffusers.workflow.sweeps import retried
from barrier_diffusers.workflow.tracking import RESULTS_NAME

matplotlib.use("Agg")


TABLE_NAME, MARKDOWN_NAME = "results.csv", "results.md"


IMPORTANCE_NAME, TRADE_OFF_NAME = "importances.png", "trade_off.png"


def metrics_of(trial: FrozenTrial) -> dict[str, float]:
    """The numbers of a trial's workflow, as far as they are there."""
    path = Path(trial.user_attrs.get("output_dir", "")) / RESULTS_NAME
    return json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.is_file() else {}


def rows_of(sweep: Sweep, trials: Sequence[FrozenTrial], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row per trial that came to an end, best first; those that failed stand last, with why."""
    rows, again = [], retried(trials)
    for trial in trials:
        if trial.number in again or not trial.state.is_finished():
            continue
        numbers = metrics_of(trial) if trial.state == TrialState.COMPLETE else {}
        row = {"trial": trial.number, **trial.user_attrs.get("settings", {}), sweep.metric: trial.value}
        row |= {name: numbers.get(name) for name in metrics if name != sweep.metric}
        error = "" if trial.state == TrialState.COMPLETE else trial.user_attrs.get("error", "killed too often")
        rows.append({**row, "error": error, "folder": trial.user_attrs.get("output_dir")})
    sign = -1 if sweep.goal == "maximize" else 1
    return sorted(rows, key=lambda row: (row[sweep.metric] is None, sign * (row[sweep.metric] or 0), row["trial"]))


def write_table(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """The rows as CSV and as Markdown."""
    names = list(rows[0])
    with written_whole(output / TABLE_NAME) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [
            f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
            for value in row.values()
        ]
        lines.append("| " + " | ".join(for_markdown(cell) for cell in cells) + " |")
    with written_whole(output / MARKDOWN_NAME) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def fanova() -> optuna.importance.FanovaImportanceEvaluator:
    """How much each setting explains of the metric's variance over all trials, with a fixed seed."""
    return optuna.importance.FanovaImportanceEvaluator(seed=0)


def importance_plot(study: optuna.Study, path: Path) -> str | None:
    """Draw how much each setting explains of the metric's variance ; why not, where that cannot be said."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({trial.value for trial in trials}) < 2:
        return f"no importances: {len(trials)} complete trials with one value"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.visualization.matplotlib.plot_param_importances(study, evaluator=fanova())
    _save(path)
    return None


@as_written
def trade_off_plot(rows: Sequence[dict[str, Any]], axes: Sequence[str], path: Path) -> str | None:
    """Draw one metric of every trial against another; why not, where no trial has both."""
    points = [row for row in rows if all(row.get(name) is not None for name in axes)]
    if not points:
        return f"no trade-off: no trial has {axes[0]} and {axes[1]}"
    plt.style.use("default")  # optuna leaves another one behind
    _, plot = plt.subplots(figsize=(6, 4.5))
    plot.scatter([row[axes[0]] for row in points], [row[axes[1]] for row in points], color="tab:blue", alpha=0.7)
    for row in points:
        plot.annotate(str(row["trial"]), (row[axes[0]], row[axes[1]]), xytext=(4, 4), textcoords="offset points")
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    plot.grid(alpha=0.3)
    _save(path)
    return None


def _save(path: Path) -> None:
    plt.tight_layout()
    with written_whole(path) as temporary:
        plt.savefig(temporary, format="png", dpi=120)
    plt.close("all")


def report(study: optuna.Study, sweep: Sweep, axes: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Write table and plots of the trials that have ended; the rows."""
    rows = rows_of(sweep, study.get_trials(deepcopy=False), axes)
    if rows:
        write_table(rows, output)
        notes = [importance_plot(study, output / IMPORTANCE_NAME)]
        notes.append(trade_off_plot(rows, axes, output / TRADE_OFF_NAME) if axes else "no trade-off: set trade_off")
        for note in filter(None, notes):
            print(note)
    return rows
