"""The numbers of a finished workflow: one file, one score, and the trackers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from barrier_diffusers.data.prompt_files import read_prompts
from barrier_diffusers.evaluation.image_folder import PROMPTS_NAME, read_folder
from barrier_diffusers.evaluation.judged_model import IMAGES_NAME
from barrier_diffusers.evaluation.report import RunRecord, read_run
from barrier_diffusers.evaluation.tracker_pages import Comparison, log_artifact, log_comparison, log_record
from barrier_diffusers.utils.checks import Checked, Tracker, flat, require_wandb, rules
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, numbers

RESULTS_NAME = "results.json"


@dataclass(kw_only=True)
class TrackConfig(Checked):
    """Where the numbers of a finished workflow go."""

    report_to: Literal["tensorboard", "wandb", "all", "none"] = "none"  # gets all numbers once the workflow has ended
    project: str = "barrier_diffusers"  # of wandb
    artifact: bool = False  # wandb also gets the unlearned model

    RULES = rules(report_to=Tracker())

    def __post_init__(self) -> None:
        super().__post_init__()
        require_wandb(self.artifact, self.report_to, "track.report_to")


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


def images_of(folder: Path, record: RunRecord) -> Comparison | None:
    """The images before and after that the first protocol of an evaluation left; None where it left none."""
    for prompts in sorted((folder / IMAGES_NAME).glob(f"*/after/{PROMPTS_NAME}")):
        after, before = prompts.parent, prompts.parent.with_name("before")
        if (before / PROMPTS_NAME).is_file():
            facts = json.loads((after / MANIFEST_NAME).read_text(encoding="utf-8"))
            each = facts["num_images"] // len(read_prompts(prompts))
            rows, files = read_folder(str(after), images_per_prompt=each)
            asked = [row for row in rows for _ in range(each)]
            return Comparison(
                [row.prompt for row in asked],
                [row.label or "" for row in asked],
                record.forgotten,
                before_NHWC=read_folder(str(before), images_per_prompt=each)[1].array(),
                after_NHWC=files.array(),
            )
    return None


def publish(
    config: TrackConfig,
    output: Path,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    stages: Mapping[str, Path],
) -> None:
    """Log all numbers, under their dotted names and `score`, with the settings, to the trackers, and show what every
    stage left.

    Args:
        stages: name -> JSON file with its numbers.
    """
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
    for name, path in stages.items():
        if not (path.parent / METRICS_NAME).is_file():
            continue
        record = read_run(path.parent)
        compared = images_of(path.parent, record)
        if compared is not None:
            log_comparison(accelerator.trackers, compared, 0, f"{name}: ")
        log_record(accelerator.trackers, record, 0, f"{name}: ")
        if config.artifact and name == "unlearn":
            log_artifact(accelerator.trackers, path.parent, record)
    accelerator.end_training()
