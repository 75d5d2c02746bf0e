"""The kinds of pipelines: which scripts run one after another, and which settings follow from those of `unlearn`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from barrier_diffusers.evaluation.settings import ADAPTER_NAME
from barrier_diffusers.stages import Stage


class Plan(Protocol):
    """What the settings of a stage may follow from."""

    settings: dict[str, dict[str, Any]]  # stage -> its settings as given

    @property
    def output(self) -> Path: ...

    @property
    def unlearned(self) -> Path: ...


def _unlearn_sd(plan: Plan) -> dict[str, Any]:
    return {"cache_dir": plan.settings["unlearn"]["cache_dir"] or str(plan.output / "cache")}


def _judged_sd(plan: Plan) -> dict[str, Any]:
    """The unlearned pipeline; an adapter goes with the base that it was trained on."""
    unlearn, result = plan.settings["unlearn"], plan.unlearned
    own = result == plan.output / "unlearn"
    if (unlearn["rank"] > 0) if own else (result / ADAPTER_NAME).is_file():
        return {
            "pretrained_model_name_or_path": unlearn["pretrained_model_name_or_path"],
            "lora_weights": str(result),
        }
    return {"pretrained_model_name_or_path": str(result), "lora_weights": None}


SAME_DATA = ("concept", "concept_column", "train_data_dir", "dataset_name", "image_column", "caption_column")

KINDS: dict[str, tuple[Stage, ...]] = {
    "sd": (
        Stage(
            name="unlearn",
            script="train_scripts/unlearn_sd.py",
            settings="barrier_diffusers.settings:UnlearnConfig",
            result="metrics.json",
            fill=_unlearn_sd,
        ),
        Stage(
            name="evaluate",
            script="train_scripts/evaluate_sd.py",
            settings="barrier_diffusers.evaluation.settings:EvaluateConfig",
            result="evaluation.json",
            filled=frozenset(("output_dir", "pretrained_model_name_or_path", "lora_weights")),
            fill=_judged_sd,
            shared={
                **{name: name for name in (*SAME_DATA, "resolution")},
                "base_model": "pretrained_model_name_or_path",
            },
        ),
    ),
}
