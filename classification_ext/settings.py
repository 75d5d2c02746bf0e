"""Every setting of training, unlearning and evaluation, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.training.robust_config import MetaStep
from barrier_diffusers.training.run_config import RunConfig, StageConfig, UnlearningConfig
from barrier_diffusers.utils.checks import (
    ABOVE_0,
    DATA,
    FOLDER,
    INNER_SHARE,
    MODEL,
    OUTPUT,
    SEED,
    Checked,
    Range,
    as_list,
    at_least,
    check_settings,
    require_different,
    rules,
)


@dataclass(kw_only=True)
class DataConfig:
    """Where the images are."""

    train_data_dir: str  # folder (parquet, Arrow, image folder) or hub name, e.g. uoft-cs/cifar10
    dataset_subset: str | None = None  # of a hub data set, e.g. cropped_digits of ufldl-stanford/svhn
    train_split: str = "train"  # of the data set
    test_split: str = "test"  # Tiny ImageNet on the hub: valid
    image_column: str = "image"  # of the data set
    label_column: str = "label"  # of the data set

    RULES = rules(train_data_dir=DATA)

    def check_splits(self) -> None:
        """A ValueError where the photos that test are those that train."""
        if self.train_split == self.test_split:
            raise ValueError(f"test_split and train_split are both {self.test_split!r}: nothing would be tested")


@dataclass(kw_only=True)
class ForgetConfig:
    """What is to be forgotten: one of the three."""

    forget_class: str | list[str] | None = None  # every training photo of these labels
    forget_fraction: float | None = None  # (0, 1); a random share of the training photos
    forget_count: int | None = None  # a random number of them
    forget_seed: int = 0  # which random ones; apart from `seed`, so that runs can share them

    RULES = rules(forget_fraction=INNER_SHARE, forget_count=at_least(1), forget_seed=SEED)

    def __post_init__(self) -> None:
        names = ("forget_class", "forget_fraction", "forget_count")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: choose one way to say what is to be forgotten")
        check_settings(self)
        if self.forget_class is not None and not self.classes:
            raise ValueError("forget_class is empty: name at least one label")
        require_different(self.classes, "forget_class")

    @property
    def classes(self) -> list[str]:
        """The forgotten labels; empty for random data."""
        return as_list(self.forget_class)

    @property
    def forgotten(self) -> str:
        """What is forgotten, in words."""
        if self.classes:
            return " and ".join(self.classes)
        count = self.forget_count if self.forget_fraction is None else f"a share of {self.forget_fraction:g}"
        return f"{count} of the photos, drawn with seed {self.forget_seed}"

    @property
    def forgets(self) -> bool:
        """Whether anything is to be forgotten."""
        return bool(self.classes) or self.forget_fraction is not None or self.forget_count is not None


@dataclass(kw_only=True)
class OptimizerConfig(RunConfig, StageConfig):
    """How weights are optimized, with the defaults that suit classifiers."""

    train_batch_size: int = 128  # per process and step
    num_train_epochs: int = 10
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd with momentum, or adamw
    learning_rate: float = 0.01
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0  # of the optimizer
    max_grad_norm: float | None = None  # None: no clipping

    RULES = rules(momentum=Range(0, 1, without_high=True), weight_decay=at_least(0))


@dataclass(kw_only=True)
class Recipe(Checked):
    """How a network is trained from scratch, beyond the loop."""

    label_smoothing: float = 0.0  # share of each label that all labels get
    flip: bool = True  # mirror half of the images; not for digits
    shift: int = 2  # each image by up to this many pixels, on black

    RULES = rules(label_smoothing=Range(0, 1, without_high=True), shift=at_least(0))


@dataclass(kw_only=True)
class RelearningConfig(Checked):
    """What an attacker may spend who teaches the classifier again what it forgot, and as much of the rest."""

    seed: int = 0  # which images, and their order
    num_images: int = 10  # of what was forgotten, and as many others
    batch_size: int = 20  # images per step, half of them of what was forgotten
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])  # of SGD, one attacker each
    marks: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 40])  # steps after which it is judged

    SECTION = "relearning."
    RULES = rules(
        seed=SEED,
        num_images=at_least(1),
        batch_size=at_least(2),
        learning_rates=ABOVE_0,
        marks=at_least(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rates or not self.marks or sorted(set(self.marks)) != self.marks:
            raise ValueError(
                "relearning needs learning_rates, and marks that rise: the steps after which the classifier is judged"
            )


@dataclass(kw_only=True)
class ClassifierRobustConfig(MetaStep):
    """The meta step against relearning, off by default."""

    meta_learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])  # of SGD, one at a time


@dataclass(kw_only=True)
class ClassifierEvaluationConfig:
    """What is measured."""

    eval_batch_size: int = 500  # images in the network at once, without training
    before: bool = True  # unlearn.py: also judge the classifier it starts from
    # members, and as many non-members, that the membership attack learns from: an SVC's cost grows with the square
    num_mia_samples: int = 1000
    # folders of classifiers that never saw the forget images, e.g. retrained ones: with any, the likelihood-ratio
    # attack runs
    shadow_models: list[str] = field(default_factory=list)
    retrained: str | None = None  # folder of a run with method retrain, for the gap to it

    SECTION = "evaluation."
    RULES = rules(
        eval_batch_size=at_least(1),
        num_mia_samples=at_least(1),
        shadow_models=FOLDER,
        retrained=FOLDER,
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(kw_only=True)
class TrainConfig(Recipe, OptimizerConfig, ForgetConfig, DataConfig):
    """Everything a training run depends on; with forget_* it trains on the rest alone."""

    model_name_or_path: str = "resnet18"  # a name in models.ARCHITECTURES, or a folder or hub id to fine-tune
    resolution: int = 32  # of our own architectures; others say it themselves
    num_channels: int = 3  # of our own architectures: 1 grey, 3 colour
    eval_batch_size: int = 500  # images in the network at once, without training
    save_dtype: Literal["fp32", "fp16"] = "fp32"  # of the written weights

    RULES = rules(
        model_name_or_path=MODEL,
        resolution=at_least(1),
        num_channels=at_least(1),
        eval_batch_size=at_least(1),
    )

    def __post_init__(self) -> None:
        OptimizerConfig.__post_init__(self)
        ForgetConfig.__post_init__(self)
        self.check_splits()
        self.check_warmup()

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        without = f", without {self.forgotten}" if self.forgets else ""
        return f"training {self.model_name_or_path} on {self.train_data_dir}{without}"


@dataclass(kw_only=True)
class MethodConfig:
    """The unlearning method; a setting it does not read must keep its default."""

    name: str = "rl"  # see classification_ext/methods
    alpha: float = 0.0  # weight of the retain images' cross-entropy; 0: they are neither loaded nor run
    l1_weight: float = 5e-4  # of l1_sparse, falling linearly to 0
    epsilon: float = 0.1  # boundary_shrink: step across the boundary, in pixels of [-1, 1]
    noise: float = 1e-7  # fisher: variance of a weight's noise is noise / sqrt(its Fisher information)
    damping: float = 1e-3  # wfisher: added to the Fisher matrix
    scale: float = 1.0  # wfisher: multiple of the influence step
    num_samples: int = 256  # fisher, wfisher: retained images that stand for all

    SECTION = "method."
    RULES = rules(
        alpha=at_least(0),
        l1_weight=at_least(0),
        epsilon=at_least(0),
        noise=at_least(0),
        damping=ABOVE_0,
        scale=at_least(0),
        num_samples=at_least(1),
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(kw_only=True)
class UnlearnConfig(OptimizerConfig, UnlearningConfig, ForgetConfig, DataConfig):
    """Everything an unlearning run depends on."""

    pretrained_model_name_or_path: str  # folder of a classifier, or hub id of an AutoModelForImageClassification
    # which weights move: the barrier's targets, or all. Methods that come with no protection usually train all
    trained_weights: Literal["targets", "all"] = "targets"
    method: MethodConfig = field(default_factory=MethodConfig)
    barrier: BarrierConfig = field(default_factory=lambda: BarrierConfig(targets=["Conv2d1x1", "fc"]))
    robust: ClassifierRobustConfig = field(
        default_factory=ClassifierRobustConfig
    )  # what keeps an attacker from teaching it again
    recipe: Recipe = field(default_factory=Recipe)  # of method retrain
    evaluation: ClassifierEvaluationConfig = field(default_factory=ClassifierEvaluationConfig)

    def __post_init__(self) -> None:
        UnlearningConfig.__post_init__(self)
        ForgetConfig.__post_init__(self)
        self.check_splits()
        if not self.forgets:
            raise ValueError("nothing is to be forgotten: set forget_class, forget_fraction or forget_count")
        if self.optimizer != "sgd" and self.momentum != OptimizerConfig.momentum:
            raise ValueError(f"momentum is {self.momentum}, but optimizer {self.optimizer} has none: leave it out")
        if self.trained_weights == "all" and self.protected:
            raise ValueError(
                "BARRIER protects the targets alone: trained_weights='all' needs barrier.lambda_interval 0 and "
                "barrier.constraint penalty"
            )

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        where = "all weights" if self.trained_weights == "all" else ", ".join(self.barrier.targets or [])
        return (
            f"unlearning {self.forgotten} in {self.pretrained_model_name_or_path}: {self.method.name} trains {where} "
            f"on {self.train_data_dir}; {self.protection}{'; robust: meta_steps' if self.robust.meta_steps else ''}"
        )


@dataclass(kw_only=True)
class EvaluateConfig(ForgetConfig, DataConfig):
    """What is judged, and on what."""

    pretrained_model_name_or_path: str  # folder of a classifier, or hub id
    output_dir: str  # gets evaluation.json
    overwrite_output_dir: bool = False  # an earlier evaluation in output_dir is deleted first
    seed: int = 0  # which samples the membership attack draws
    evaluation: ClassifierEvaluationConfig = field(default_factory=ClassifierEvaluationConfig)
    # folder of a classifier that never saw the forget images: both are taught again, and compared
    control: str | None = None
    relearning: RelearningConfig = field(default_factory=RelearningConfig)  # how, where there is a control

    RULES = rules(pretrained_model_name_or_path=MODEL, output_dir=OUTPUT, control=MODEL, seed=SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_splits()
        if not self.forgets:
            raise ValueError("nothing was to be forgotten: set forget_class, forget_fraction or forget_count")

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        return f"judging {self.pretrained_model_name_or_path} for {self.forgotten} on {self.train_data_dir}"
