"""EvaluateConfig: every setting of an evaluation, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from barrier_diffusers.concepts import ConceptConfig
from barrier_diffusers.evaluation.attacks import (
    BenignConfig,
    Budget,
    InversionConfig,
    MisspelledConfig,
    ParaphrasedConfig,
    RelearningConfig,
    get_attack,
)
from barrier_diffusers.evaluation.erasure import EvaluationConfig

ADAPTER_NAME = "pytorch_lora_weights.safetensors"


@dataclass(kw_only=True)
class EvaluateConfig:
    """Everything an evaluation depends on."""

    pretrained_model_name_or_path: str  # folder, hub id or .safetensors file of the pipeline that is judged
    output_dir: str  # gets evaluation.json, seconds.json and the picture
    concept: str | list[str]  # what it was made to forget: values of concept_column
    concept_column: str = "class"
    train_data_dir: str | None = None  # folder readable by `datasets`; evaluation.split of it is read, nothing else
    dataset_name: str | None = None  # or a hub name
    image_column: str = "image"
    caption_column: str = "text"
    lora_weights: str | None = None  # folder with the adapter that unlearned, merged into the pipeline first
    base_model: str | None = None  # the pipeline before it was unlearned, for the "before" columns
    overwrite_output_dir: bool = False
    resolution: int = 512  # side in pixels at which attacks read images
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    attacks: list[str] = field(default_factory=lambda: ["inversion", "relearning", "benign", "misspelled"])
    inversion: InversionConfig = field(default_factory=InversionConfig)
    relearning: RelearningConfig = field(default_factory=RelearningConfig)
    benign: BenignConfig = field(default_factory=BenignConfig)
    misspelled: MisspelledConfig = field(default_factory=MisspelledConfig)
    paraphrased: ParaphrasedConfig = field(default_factory=ParaphrasedConfig)

    def __post_init__(self) -> None:
        for name in self.attacks:
            get_attack(name)
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks names one twice: {', '.join(self.attacks)}")
        if not (self.train_data_dir or self.dataset_name):
            raise ValueError("prompts and images come from a data set: set train_data_dir or dataset_name")
        if self.evaluation.classifier is None:
            raise ValueError("nobody judges the images: set evaluation.classifier, a folder of an AttributeClassifier")
        if self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}, but must be at least 1")
        if self.lora_weights and not (Path(self.lora_weights) / ADAPTER_NAME).is_file():
            raise ValueError(f"lora_weights {self.lora_weights!r} is not a folder with {ADAPTER_NAME}")
        self.concept_config  # noqa: B018  its own checks

    @property
    def concept_config(self) -> ConceptConfig:
        """The data set and the concepts, as unlearning names them."""
        return ConceptConfig(
            concept=self.concept,
            concept_column=self.concept_column,
            train_data_dir=self.train_data_dir,
            dataset_name=self.dataset_name,
            image_column=self.image_column,
            caption_column=self.caption_column,
        )

    @property
    def budgets(self) -> dict[str, Budget]:
        """Chosen attack -> its settings."""
        return {name: getattr(self, name) for name in self.attacks}
