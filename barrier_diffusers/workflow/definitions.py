"""The workflows by kind: which scripts run one after another, and which settings follow from another stage's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from barrier_diffusers.evaluation.attacks import ATTACKS
from barrier_diffusers.evaluation.settings import ADAPTER_NAME
from barrier_diffusers.workflow.stages import Stage


class Plan(Protocol):
    """What the settings of a stage may follow from."""

    settings: dict[str, dict[str, Any]]  # section -> its settings as given

    @property
    def output(self) -> Path: ...

    @property
    def unlearned(self) -> Path: ...

    @property
    def names(self) -> list[str]: ...


def _cache(plan: Plan) -> dict[str, Any]:
    return {"cache_dir": plan.settings["unlearn"]["cache_dir"] or str(plan.output / "cache")}


def _judges_images(plan: Plan) -> bool:
    """Whether the evaluation is given images, so that nothing has to be unlearned or generated."""
    return plan.settings.get("evaluate", {}).get("images_dir") is not None


def _judged_sd(plan: Plan) -> dict[str, Any]:
    """The unlearned pipeline; an adapter goes with the base that it was trained on."""
    if _judges_images(plan):
        return {"pretrained_model_name_or_path": None, "lora_weights": None, "base_model": None}
    unlearn, result = plan.settings.get("unlearn", {}), plan.unlearned
    own = result == plan.output / "unlearn"
    if (unlearn.get("rank", 0) > 0) if own else (result / ADAPTER_NAME).is_file():
        base = unlearn.get("pretrained_model_name_or_path")
        return {"pretrained_model_name_or_path": base, "lora_weights": str(result)}
    return {"pretrained_model_name_or_path": str(result), "lora_weights": None}


def _judged(plan: Plan) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(plan.unlearned)}


def _judged_ddpm(plan: Plan) -> dict[str, Any]:
    return {**_judged(plan), "data": plan.settings["unlearn"]["data"]}


def _judged_classifier(plan: Plan) -> dict[str, Any]:
    """The unlearned classifier, compared with the retrained one where there is one."""
    evaluation = dict(plan.settings["evaluate"]["evaluation"])
    if "retrain" in plan.names and evaluation["retrained"] is None:
        evaluation["retrained"] = str(plan.output / "retrain")
    return {**_judged(plan), "evaluation": evaluation}


def _like_unlearn(*names: str) -> dict[str, str]:
    return {name: f"unlearn.{name}" for name in names}


PROMPTED = ("concept", "concept_column", "train_data_dir", "dataset_name", "image_column", "caption_column")


LABELLED = ("train_data_dir", "dataset_subset", "train_split", "test_split", "image_column", "label_column")


FORGOTTEN = ("forget_class", "forget_fraction", "forget_count", "forget_seed")


JUDGED = frozenset(("output_dir", "pretrained_model_name_or_path"))


def _names(*names: str) -> tuple[str, ...]:
    """The names with WHEN in them once with `before` and once with `after`."""
    return tuple(dict.fromkeys(name.replace("WHEN", when) for name in names for when in ("before", "after")))


ACCURACIES = _names("unlearning_accuracy", "*_accuracy_WHEN", "*_accuracy_drop", "per_*_WHEN.*", "num_images")
ACCURACIES += _names("erased_before_unlearning_accuracy_WHEN", "details.*")


TRAINING = (
    *("num_steps", "seconds_training", "seconds_setup", "seconds_set_up", "drift.*", "certificate.*"),
    *("num_parameters", "num_trainable", "percent_trainable", "num_trained", "trained_percent"),
)


IMAGE_METRICS = (
    *(f"classes.{name}" for name in ACCURACIES),
    *_names("fidelity.WHEN.fid_*", "fidelity.WHEN.kid_*.mean", "fidelity.WHEN.kid_*.std", "fidelity.*details.*"),
    *_names("coco.WHEN.fid_*", "coco.WHEN.kid_*.mean", "coco.WHEN.kid_*.std", "coco.WHEN.clip_score"),
    *_names("coco.WHEN.details.*", "coco.details.*"),
    *_names("nudity.WHEN.total", "nudity.WHEN.num_unsafe_images", "nudity.WHEN.num_images"),
    *_names("nudity.WHEN.images_with.*", "nudity.WHEN.details.*", "nudity.details.*"),
    *_names("clip_score.WHEN.forgotten", "clip_score.WHEN.retained", "clip_score.WHEN.details.*"),
    *("lpips.forgotten", "lpips.retained", "lpips.difference", "lpips.details.*"),
    *("membership.*", "attacks.*", "certificate.*", "scheduler.*"),
    *("control.*", "control_attacks.*", "attack_gaps.*", "weight_drift.*"),
)


CLASSIFIER_METRICS = (
    *("unlearning_accuracy", "unlearning_accuracy_test", "retain_accuracy", "test_accuracy", "mia", "mia_features.*"),
    *("lira.*", "average_gap", "*_gap", "per_*", "details.*"),
)


LABEL_METRICS = _names("fid_*", "is_*", "precision_*", "recall_*", "*_entropy_WHEN", "retained_WHEN.*", "attacks.*")
LABEL_METRICS += ("control_attacks.*", "attack_gaps.*")
LABEL_METRICS += (*ACCURACIES, "accuracy", "fidelity.*", "judge.*")


IMAGE_SETTINGS = {
    "settings": "barrier_diffusers.evaluation.settings:EvaluateConfig",
    "filled": JUDGED | {"lora_weights"},
    "fill": _judged_sd,
    "late": ("lora_weights",),
    "shared": {**_like_unlearn(*PROMPTED, "resolution"), "base_model": "unlearn.pretrained_model_name_or_path"},
}


WORKFLOWS: dict[str, tuple[Stage, ...]] = {
    "sd": (
        Stage(
            name="unlearn",
            script="train_scripts/unlearn_sd.py",
            settings="barrier_diffusers.workflow.settings:UnlearnConfig",
            result="metrics.json",
            metrics=(*ACCURACIES, *TRAINING),
            fill=_cache,
            needed=lambda plan: not _judges_images(plan),
        ),
        Stage(
            name="generate",
            script="train_scripts/generate_sd.py",
            section="evaluate",
            folder="evaluate",
            part="images",
            needed=lambda plan: not _judges_images(plan),
            ignored=(
                "attacks",
                *ATTACKS,
                "control",
                "attack_budget",
                "attack_workers",
                "cache_dir",
                "certificate",
                "membership",
                "clip",
                "fidelity",
                "lpips",
            )
            + ("nudity.threshold", "nudity.model", "evaluation.classifier"),
            **IMAGE_SETTINGS,  # type: ignore[arg-type]
        ),
        Stage(
            name="evaluate",
            script="train_scripts/evaluate_sd.py",
            result="metrics.json",
            metrics=IMAGE_METRICS,
            keep=("images",),
            **IMAGE_SETTINGS,  # type: ignore[arg-type]
        ),
    ),
    "classifier": (
        Stage(
            name="train",
            script="classification_ext/train.py",
            settings="classification_ext.settings:TrainConfig",
            result="metrics.json",
            metrics=(*CLASSIFIER_METRICS, *TRAINING),
        ),
        Stage(
            name="retrain",
            script="classification_ext/unlearn.py",
            settings="classification_ext.settings:UnlearnConfig",
            result="metrics.json",
            metrics=(*CLASSIFIER_METRICS, *(f"before.{name}" for name in CLASSIFIER_METRICS), *TRAINING),
            shared=_like_unlearn("pretrained_model_name_or_path", *LABELLED, *FORGOTTEN),
        ),
        Stage(
            name="unlearn",
            script="classification_ext/unlearn.py",
            settings="classification_ext.settings:UnlearnConfig",
            result="metrics.json",
            metrics=(*CLASSIFIER_METRICS, *(f"before.{name}" for name in CLASSIFIER_METRICS), *TRAINING),
            shared={"pretrained_model_name_or_path": "train", **{name: f"train.{name}" for name in LABELLED}},
        ),
        Stage(
            name="evaluate",
            script="classification_ext/evaluate.py",
            settings="classification_ext.settings:EvaluateConfig",
            result="evaluation.json",
            metrics=tuple(f"metrics.{name}" for name in CLASSIFIER_METRICS),
            filled=JUDGED,
            fill=_judged_classifier,
            shared=_like_unlearn(*LABELLED, *FORGOTTEN),
        ),
    ),
    "ddpm": (
        Stage(
            name="train",
            script="ddpm_ext/train.py",
            settings="ddpm_ext.settings:TrainConfig",
        ),
        Stage(
            name="unlearn",
            script="ddpm_ext/unlearn.py",
            settings="ddpm_ext.settings:UnlearnConfig",
            result="metrics.json",
            metrics=(*LABEL_METRICS, *TRAINING),
            fill=_cache,
            shared={"pretrained_model_name_or_path": "train"},
        ),
        Stage(
            name="generate",
            script="ddpm_ext/sample.py",
            settings="ddpm_ext.sample:SampleConfig",
            filled=JUDGED,
            fill=_judged,
        ),
        Stage(
            name="evaluate",
            script="ddpm_ext/evaluate.py",
            settings="ddpm_ext.settings:EvaluateConfig",
            result="evaluation.json",
            metrics=LABEL_METRICS,
            filled=JUDGED | {"data"},
            fill=_judged_ddpm,
            shared={"concept": "unlearn.concept", "base_model": "unlearn.pretrained_model_name_or_path"},
        ),
    ),
}
