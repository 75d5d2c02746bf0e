"""The numbers of a finished workflow: one file, one score, and the trackers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from barrier_diffusers.utils.checks import Checked, Tracker, flat, rules
from barrier_diffusers.utils.run_records import numbers

RESULTS_NAME = "results.json"


@dataclass(kw_only=True)
class TrackConfig(Checked):
    """Where the numbers of a finished workflow go."""

    report_to: Literal["tensorboard", "wandb", "all", "none"] = "none"  # gets all numbers once the workflow has ended
    project: str = "barrier_diffusers"  # of wandb

    RULES = rules(report_to=Tracker())


class UnknownMetric(ValueError):
    """The numbers of a workflow do not have the one that was asked for."""


def require_metric(metrics: Mapping[str, float], name: str) -> float:
    """The metric of that name.

    Raises:
        UnknownMetric: there is none; those with the most similar names.
    """
    if name not in metrics:
        near = difflib.get_close_matches(name, metrics, 5, 0.3)
        raise UnknownMetric(f"the workflow gave no {name!r}; of its {len(metrics)} numbers the nearest are {near}")
    return metrics[name]


def score_of(metrics: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of metrics; None without weights.

    Raises:
        UnknownMetric: a metric that the workflow did not give.
    """
    for name in weights:
        require_metric(metrics, name)
    return sum(weight * metrics[name] for name, weight in weights.items()) if weights else None


def collect(results: Mapping[str, Path], weights: Mapping[str, float]) -> dict[str, Any]:
    """{"score", "metrics": dotted name -> number} from the JSON files of the stages that have one.

    There is no score where it asks for a stage that was not chosen.
    """
    metrics: dict[str, float] = {}
    for stage, path in results.items():
        if path.is_file():
            metrics |= dict(numbers(json.loads(path.read_text(encoding="utf-8")), stage))
    asked = {name.split(".")[0] for name in weights}
    score = score_of(metrics, weights) if asked <= results.keys() else None
    return {**({} if score is None else {"score": score}), "metrics": metrics}


def publish(config: TrackConfig, output: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Log all numbers, under their dotted names and `score`, with the settings, to the trackers."""
    if config.report_to == "none":
        return
    accelerator = Accelerator(log_with=config.report_to, project_dir=str(output / "logs"))
    plain = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in flat(settings)
    }
    accelerator.init_trackers(config.project, config=plain, init_kwargs={"wandb": {"name": output.name}})
    score = {"score": results["score"]} if "score" in results else {}
    accelerator.log({**results["metrics"], **score}, step=0)
    accelerator.end_training()
