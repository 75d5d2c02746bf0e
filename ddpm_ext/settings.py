"""Settings of the DDPM scripts, checked before any work starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from barrier_diffusers.evaluation.attacks.base import (
    FIRST_MARKS,
    LEARNING_RATES,
    MARKS,
    Budget,
    Forgotten,
    LearningBudget,
    Level,
    Variant,
    image_counts,
)
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.evaluation.judge import check_judge
from barrier_diffusers.models.generation import SamplingConfig
from barrier_diffusers.objectives import Objective, load_objective
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.training.run_config import DiffusionUnlearningConfig, RunConfig, StageConfig
from barrier_diffusers.utils.checks import (
    DATA,
    FILE_OR_FOLDER,
    FOLDER,
    OUTPUT,
    Range,
    as_list,
    at_least,
    check_settings,
    require_different,
    rules,
)

DROPOUT = Range(0, 1, without_high=True)


@dataclass
class LabelledDataConfig:
    """A data set of labelled images; from a folder or the hub."""

    train_data_dir: str | None = None  # folder readable by `datasets`: parquet, Arrow or an image folder
    dataset_name: str | None = None  # or a hub name, e.g. uoft-cs/cifar10
    split: str = "train"  # that is trained on
    image_column: str = "image"  # of the data set
    label_column: str = "label"  # of the data set

    RULES = rules(train_data_dir=FILE_OR_FOLDER, dataset_name=DATA)

    def __post_init__(self) -> None:
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("set either data.train_data_dir (a folder) or data.dataset_name (a hub name)")

    @property
    def source(self) -> str:
        """What `load_labelled` is given."""
        return self.train_data_dir or self.dataset_name or ""


def require_labels(folder: str, setting: str, labels: list[str]) -> None:
    """A ValueError for a label that the pipeline in a folder does not have, as far as its model_index.json says so."""
    path = Path(folder).expanduser() / "model_index.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8")).get("labels")
    except (OSError, ValueError):
        return  # loading it says what is wrong
    for label in labels:
        if known and label not in known:
            raise ValueError(f"{setting} names {label!r}, but the pipeline's labels are {', '.join(known)}")


@dataclass
class UnetConfig:
    """The noise predictor; the defaults are the embedded model's."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])  # halves the side at each step but one
    attention_levels: list[bool] = field(default_factory=lambda: [False, True])  # which of them have self-attention
    layers_per_block: int = 1  # residual layers of a level
    attention_head_dim: int = 32  # features per head
    norm_num_groups: int = 16  # of the group norms
    dropout: float = 0.0  # in the residual layers
    patch_size: int = 2  # the UNet sees patches of this side as channels (pipeline.py); 1: plain pixels

    SECTION = "unet."
    RULES = rules(
        block_out_channels=at_least(1),
        layers_per_block=at_least(1),
        attention_head_dim=at_least(1),
        norm_num_groups=at_least(1),
        dropout=DROPOUT,
        patch_size=at_least(1),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError(
                f"unet.attention_levels names {len(self.attention_levels)} levels, "
                f"unet.block_out_channels {len(self.block_out_channels)}"
            )

    @property
    def unit(self) -> int:
        """The image side must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)


@dataclass(kw_only=True)
class TrainConfig(RunConfig, StageConfig):
    """Everything a training run depends on."""

    data: LabelledDataConfig
    output_dir: str  # becomes the pipeline folder
    exclude_labels: list[str] = field(default_factory=list)  # never seen: the "retrained" baseline of unlearning
    resolution: int = 28  # side in pixels
    num_channels: Literal[1, 3] = 1  # grey or colour
    random_flip: bool = False  # mirror half of the images
    train_batch_size: int = 64  # per process
    max_train_steps: int | None = 3000  # None: as many as num_train_epochs take
    learning_rate: float = 1e-3  # peak
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 200
    adam_weight_decay: float = 0.01  # of AdamW
    label_dropout: float = 0.1  # share of labels replaced by "no label", for classifier-free guidance
    ema_decay: float = 0.999  # of the averaged weights that are saved
    num_train_timesteps: int = 1000  # of the linear noise schedule
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the written weights
    unet: UnetConfig = field(default_factory=UnetConfig)

    RULES = rules(
        resolution=at_least(1),
        adam_weight_decay=at_least(0),
        label_dropout=DROPOUT,
        ema_decay=DROPOUT,
        num_train_timesteps=at_least(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_warmup()
        if self.resolution % self.unet.unit:
            raise ValueError(
                f"resolution is {self.resolution}, but must be a multiple of {self.unet.unit} for "
                f"{len(self.unet.block_out_channels)} levels and patch_size {self.unet.patch_size}"
            )

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        without = f", without {' and '.join(self.exclude_labels)}" if self.exclude_labels else ""
        return f"training a class-conditional DDPM from scratch on {self.data.source}{without}"


TARGETS = ["to_q", "to_k", "to_v", "class_embedding"]  # as the paper's DDPM setting


@dataclass
class RowInversionConfig(LearningBudget):
    """Budget of learning a new row of the class embedding."""

    num_steps: int = 200  # of AdamW
    learning_rate: float = 2e-2
    initial_label: str | None = None  # the new row starts as this label's; None: as that of the forgotten one

    SURVIVORS = 2

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """Enough images, and a label to start from."""
        self.require(forgotten.images, forgotten.concept)
        if self.initial_label is not None and self.initial_label not in pipeline.labels:
            raise ValueError(
                f"inversion.initial_label {self.initial_label!r} is no label of the pipeline: "
                f"{', '.join(pipeline.labels)}"
            )

    def variants(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """standard: from the label's own row and another's. thorough: one more start, two learning rates."""
        starts = [None, *forgotten.other_words]
        rates: tuple[float, ...] = (self.learning_rate, 4 * self.learning_rate)
        if level == "standard":
            starts, rates = starts[:2], (self.learning_rate,)
        return [
            Variant(
                f"from {start or forgotten.concept}, {rate:g}",
                replace(self, initial_label=start, learning_rate=rate),
            )
            for start, rate in product(starts, rates)
        ]

    def further(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """A thousand steps."""
        return [Variant("1,000 steps", replace(self, num_steps=1000))] if level == "thorough" else []


@dataclass
class FineTuningConfig(LearningBudget):
    """Budget of fine-tuning the whole network on a few images of the label."""

    num_steps: int = 300  # of AdamW
    batch_size: int = 10
    num_images: int | None = 10
    learning_rate: float = 1e-4

    SURVIVORS = 4

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """Enough images."""
        self.require(forgotten.images, forgotten.concept)

    def variants(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """standard: four learning rates with the settings' images and marks. thorough: every combination with numbers
        of images, few steps and images."""
        if level == "standard":
            marks = self.marks or MARKS
            return [Variant(f"{rate:g}", self.until(marks, learning_rate=rate)) for rate in LEARNING_RATES[:4]]
        return [
            Variant(f"{rate:g}, {count} images", self.until(FIRST_MARKS, learning_rate=rate, num_images=count), 10)
            for rate, count in product(LEARNING_RATES, image_counts(len(forgotten.images)))
        ]

    def further(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """All marks."""
        return [Variant("", self.until(MARKS))] if level == "thorough" else []


@dataclass
class LabelSamplingConfig(SamplingConfig):
    """How labels are sampled."""

    num_inference_steps: int = 25  # of the pipeline's own scheduler


@dataclass
class LabelEvaluationConfig:
    """Which images are judged, and by whom."""

    judge: str | None = "assets/fashion_classifier"  # folder of an AttributeClassifier; null: nothing is judged
    attribute: str = "class"  # of its heads; must know every label
    # how images are shown to it. plain: as they are; ink: a bright photo on black as black ink on white paper, padded
    # (not scaled) to the judge's side, which is what the embedded classifier learned from
    rendering: Literal["plain", "ink"] = "plain"
    images_per_label: int = 50  # of the forgotten labels
    images_per_retained_label: int | None = None  # of every other label; None: as many
    split: str | None = "test"  # real images that FID, precision and recall compare with; null: not compared
    neighbours: int = 3  # of precision and recall
    sampling: LabelSamplingConfig = field(default_factory=LabelSamplingConfig)
    # what is tried to bring forgotten labels back, with images of the split: inversion (a new row of the class
    # embedding is learned), relearning (the whole network is fine-tuned)
    attacks: list[Literal["inversion", "relearning"]] = field(default_factory=list)
    control: str | None = None  # folder of a pipeline that never saw the labels: attacks are tried on it, too
    # None: each attack as its section says. standard: a handful of settings of each; thorough: a grid of dozens
    attack_budget: Literal["standard", "thorough"] | None = None
    attack_workers: int = 1  # processes that attacks run in, each with its share of the cores and its GPU
    inversion: RowInversionConfig = field(default_factory=RowInversionConfig)
    relearning: FineTuningConfig = field(default_factory=FineTuningConfig)

    SECTION = "evaluation."
    RULES = rules(
        judge=FOLDER,
        control=FOLDER,
        images_per_label=at_least(1),
        images_per_retained_label=at_least(1),
        neighbours=at_least(1),
        attack_workers=at_least(1),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"evaluation.attacks names one twice: {', '.join(self.attacks)}")
        if self.attacks and (self.judge is None or self.split is None):
            raise ValueError(
                "evaluation.attacks learn from evaluation.split and are scored by evaluation.judge: set both"
            )

    def check_control(self, labels: list[str]) -> None:
        """A ValueError if there is a control, but no attack, or one without the labels; it is not loaded."""
        for name in ("control", "attack_budget"):
            if getattr(self, name) is not None and not self.attacks:
                raise ValueError(
                    f"evaluation.{name} is about attacks, and there is none: name some in evaluation.attacks"
                )
        if self.control is None:
            return
        require_labels(self.control, "evaluation.control", labels)

    def check_judge(self, labels: list[str]) -> None:
        """A ValueError if there is a judge, but one that does not know the labels; it is not loaded."""
        if self.judge is not None:
            check_judge(self.source, labels, attribute=self.attribute)

    @property
    def source(self) -> ClassifierSource:
        """Of the judge, which there is."""
        assert self.judge is not None
        return ClassifierSource(self.judge, setting="evaluation.judge")

    @property
    def budgets(self) -> dict[str, Budget]:
        """Chosen attack -> what it may spend."""
        return {name: getattr(self, name) for name in self.attacks}


@dataclass(kw_only=True)
class EvaluateConfig:
    """Everything an evaluation depends on."""

    pretrained_model_name_or_path: str  # folder of the pipeline that is judged
    output_dir: str  # gets evaluation.json and the picture
    data: LabelledDataConfig
    concept: str | list[str] = field(default_factory=list)  # labels it was made to forget; none: accuracy of all
    base_model: str | None = None  # the pipeline before it was unlearned, for the "before" columns
    overwrite_output_dir: bool = False  # an earlier evaluation in output_dir is deleted first
    cache_dir: str | None = None  # "before" images, and what each attacker brought back; default output_dir/cache
    evaluation: LabelEvaluationConfig = field(default_factory=LabelEvaluationConfig)

    RULES = rules(pretrained_model_name_or_path=FOLDER, output_dir=OUTPUT, base_model=FOLDER, cache_dir=OUTPUT)

    def __post_init__(self) -> None:
        require_different(self.concepts, "concept")
        if self.evaluation.judge is None:
            raise ValueError("nobody judges the images: set evaluation.judge, a folder of an AttributeClassifier")
        if self.evaluation.attacks and not self.concepts:
            raise ValueError("evaluation.attacks bring forgotten labels back: set concept")

    def check_inputs(self) -> None:
        """A ValueError for a judge that does not know the labels, or labels that the pipeline does not have."""
        self.evaluation.check_judge(self.concepts)
        self.evaluation.check_control(self.concepts)
        require_labels(self.pretrained_model_name_or_path, "concept", self.concepts)

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        about = f" for {' and '.join(self.concepts)}" if self.concepts else ""
        attacks = ", ".join(self.evaluation.attacks) or "no attack"
        if self.evaluation.attack_budget:
            attacks += f" ({self.evaluation.attack_budget})"
        return f"judging {self.pretrained_model_name_or_path}{about} on {self.data.source}; {attacks}"

    @property
    def concepts(self) -> list[str]:
        """The forgotten labels, always a list."""
        return as_list(self.concept)


@dataclass(kw_only=True)
class UnlearnConfig(DiffusionUnlearningConfig):
    """Everything an unlearning run depends on."""

    pretrained_model_name_or_path: str  # folder of a ClassConditionalDDPMPipeline
    output_dir: str  # gets the unlearned pipeline, metrics and pictures
    concept: str | list[str]  # labels to forget
    data: LabelledDataConfig
    max_forget_images: int | None = 1000  # at most so many, drawn at random
    max_retain_images: int | None = 2000  # equally many of every other label
    label_dropout: float = 0.1  # share of retain rows with "no label", as in training: guidance needs it kept, too
    cache_dir: str | None = None  # "before" images; default output_dir/cache
    train_batch_size: int = 64  # forget images per process and step; as many retain images when alpha > 0
    learning_rate: float = 1e-4
    validation_prompt: list[str] = field(default_factory=list)  # labels sampled every validation_steps
    barrier: BarrierConfig = field(default_factory=lambda: BarrierConfig(targets=list(TARGETS)))
    evaluation: LabelEvaluationConfig = field(default_factory=LabelEvaluationConfig)

    RULES = rules(
        pretrained_model_name_or_path=FOLDER,
        max_forget_images=at_least(1),
        max_retain_images=at_least(1),
        label_dropout=DROPOUT,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.concepts:
            raise ValueError("concept is empty: name the labels to forget")
        require_different(self.concepts, "concept")
        if self.robust.context_radius:
            raise ValueError("robust.context_radius moves token embeddings, but labels have none: leave it at 0")
        if self.robust.token_count != 1:
            raise ValueError("robust.token_count is of tokens, but a label is one row of its table: leave it at 1")

    def check_inputs(self) -> None:
        """A ValueError for a judge that does not know the labels, or labels that the pipeline does not have."""
        self.evaluation.check_judge(self.concepts)
        self.evaluation.check_control(self.concepts)
        require_labels(self.pretrained_model_name_or_path, "concept", self.concepts)
        require_labels(self.pretrained_model_name_or_path, "validation_prompt", self.validation_prompt)
        starts = [start for start in self.robust.token_starts if start not in ("name", "random")]
        require_labels(self.pretrained_model_name_or_path, "robust.token_starts", starts)

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        return (
            f"unlearning {' and '.join(self.concepts)} in {self.pretrained_model_name_or_path}: {self.objective.name} "
            f"trains {'all weights' if self.trained_weights == 'all' else ', '.join(self.barrier.targets or [])} on "
            f"{self.data.source}; {self.protection}{self.robust.summary}"
        )

    @property
    def concepts(self) -> list[str]:
        """The labels to forget, always a list."""
        return as_list(self.concept)


def chosen_objective(config: UnlearnConfig) -> Objective:
    """The objective of a run, from the user's module if one is named, checked against every other setting.

    Raises:
        ValueError: an unknown name, a closed-form edit, a setting that the objective does not read, or anchors that do
            not fit.
    """
    options = config.objective
    objective = load_objective(options)
    if objective.edit is not None:
        raise ValueError(f"objective {objective.name!r} edits cross-attention, which a UNet2DModel does not have")
    if options.anchor_prompt is not None:
        raise ValueError("a label is no prompt: set objective.anchor, a label or one per forgotten label")
    options.anchors_of(config.concepts, labels=True)
    return objective
