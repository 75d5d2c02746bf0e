"""EvaluateConfig: every setting of an evaluation, checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.prompt_files import PromptsConfig
from barrier_diffusers.evaluation.attacks import ATTACKS, Budget
from barrier_diffusers.evaluation.certification import CertificateConfig
from barrier_diffusers.evaluation.erasure import ImageEvaluationConfig
from barrier_diffusers.evaluation.extractors import EXTRACTORS
from barrier_diffusers.evaluation.fidelity import FidelityConfig
from barrier_diffusers.evaluation.lpips import LpipsConfig
from barrier_diffusers.evaluation.membership import MembershipConfig
from barrier_diffusers.evaluation.protocols import PROTOCOLS
from barrier_diffusers.models.loading import ADAPTER_NAME, require_pipeline
from barrier_diffusers.utils.checks import (
    DATA,
    FILE_OR_FOLDER,
    FOLDER,
    MODEL,
    MODULE,
    OUTPUT,
    as_list,
    at_least,
    check_settings,
    rules,
)
from barrier_diffusers.utils.hub import require_on_hub
from barrier_diffusers.utils.open_settings import with_sections
from barrier_diffusers.utils.registry import load_module

Config = TypeVar("Config")
DEFAULT_ATTACKS = ("inversion", "prompt_search", "relearning", "benign", "misspelled")
WITHOUT_TRAINING = ("completion", "latent_inversion")  # run by default, too, where attack_budget is set


def own_sections() -> dict[str, type[Any]]:
    """Name of every registered attack and protocol that has settings -> their dataclass."""
    found: dict[str, type[Any]] = {name: item.settings for name, item in PROTOCOLS.items() if item.settings}
    return found | {name: item.budget for name, item in ATTACKS.items()}


def with_own_sections(config_class: type[Config]) -> type[Config]:
    """Decorator: a settings dataclass with a section for every attack and protocol that has settings of its own."""
    return with_sections(config_class, own_sections())


@with_own_sections
@dataclass(kw_only=True)
class EvaluateConfig:
    """Everything an evaluation depends on. Images are made by a pipeline, or were made earlier (images_dir).

    Raises:
        ValueError: settings that do not go together, or that an attack or a protocol cannot work with.
    """

    output_dir: str  # gets metrics.json, seconds.json, pictures and the generated images
    pretrained_model_name_or_path: str | None = None  # folder, hub id or .safetensors file of what is judged
    images_dir: str | None = None  # or images made earlier, called case_number_i.png, beside their prompts.csv
    base_images_dir: str | None = None  # those of the pipeline before it was unlearned, of the same prompts
    protocol: str | list[str] = "class"  # class, style, nudity, coco: docs/evaluation.md
    concept: str | list[str] = field(default_factory=list)  # class, style: what was forgotten
    concept_column: str = "class"  # whose values the concepts are; of a prompt file, too
    train_data_dir: str | None = None  # folder readable by `datasets`; evaluation.split of it is read, nothing else
    dataset_name: str | None = None  # or a hub name
    prompts: PromptsConfig = field(default_factory=PromptsConfig)  # or, for class and style, a prompt file
    forget_prompts: list[str] = field(default_factory=list)  # or lists of prompts
    retain_prompts: list[str] = field(default_factory=list)  # of what is to stay
    image_column: str = "image"  # of the data set
    caption_column: str = "text"  # of the data set
    caption_template: str = "a photo of a {}"  # caption of a row where the data have none; {}: its concept_column
    lora_weights: str | None = None  # folder with the adapter that unlearned, merged into the pipeline first
    base_model: str | None = None  # the pipeline before it was unlearned, for the "before" columns
    overwrite_output_dir: bool = False  # an earlier evaluation in output_dir is deleted first
    resolution: int | None = None  # side in pixels at which attacks read images; None: the model's own
    evaluation: ImageEvaluationConfig = field(default_factory=ImageEvaluationConfig)
    certificate: CertificateConfig = field(default_factory=CertificateConfig)  # of a pipeline saved with its barrier
    clip: str | None = None  # folder or hub id of a CLIP; class, style and coco then give its score
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)  # FID and KID of class, style, coco
    lpips: LpipsConfig = field(default_factory=LpipsConfig)  # of style: distance before - after
    membership: MembershipConfig = field(default_factory=MembershipConfig)  # of class and style, with a data set
    # None: DEFAULT_ATTACKS if class or style is judged on a pipeline and a data set, else none
    attacks: list[str] | None = None
    # .py files or importable modules that register attacks, protocols or extractors of yours: they are run
    module: str | list[str] | None = None
    # pipeline that was trained in the same way without the concept: every attack is tried on it, too
    control: str | None = None
    # None: each attack as its section says. standard: a handful of settings of each; thorough: a grid of hundreds
    attack_budget: Literal["standard", "thorough"] | None = None
    # what each attacker brought back, which evaluations beside the same control may share; default output_dir/cache
    cache_dir: str | None = None
    attack_workers: int = 1  # processes that attacks run in, each with its share of the cores and its GPU
    # beside these: one section for each attack and protocol that has settings of its own, called as it is

    RULES = rules(
        dataset_name=DATA,
        output_dir=OUTPUT,
        pretrained_model_name_or_path=MODEL,
        images_dir=FOLDER,
        base_images_dir=FOLDER,
        train_data_dir=FILE_OR_FOLDER,
        lora_weights=FOLDER,
        base_model=MODEL,
        resolution=at_least(1),
        clip=MODEL,
        module=MODULE,
        control=MODEL,
        cache_dir=OUTPUT,
        attack_workers=at_least(1),
    )

    def __post_init__(self) -> None:
        for module in as_list(self.module):
            load_module(module, "module", ATTACKS, PROTOCOLS, EXTRACTORS)
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocol is {self.protocol!r}, but must name each at most once: {', '.join(PROTOCOLS)}")
        protocols = [PROTOCOLS.find(name).protocol for name in self.protocols]
        self._check_images()
        for protocol in protocols:
            protocol.check(self)
        self._check_attacks()
        check_settings(self)
        if self.lora_weights and not (Path(self.lora_weights) / ADAPTER_NAME).is_file():
            raise ValueError(f"lora_weights {self.lora_weights!r} is not a folder with {ADAPTER_NAME}")

    def check_inputs(self) -> None:
        """A ValueError for a pipeline or a CLIP that is nowhere, or a judge that does not know the concepts."""
        for setting in ("pretrained_model_name_or_path", "base_model", "control"):
            name = getattr(self, setting)
            if name is not None:
                require_pipeline(name, setting)
        if self.clip is not None:
            require_on_hub(self.clip)
        if self.judges_concepts:
            self.evaluation.check_judge(self.concept_config.concepts)

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        judged = self.lora_weights or self.pretrained_model_name_or_path or self.images_dir
        about = f" for {' and '.join(as_list(self.concept))}" if self.concept else ""
        attacks = ", ".join(self.chosen_attacks) or "no attack"
        if self.attack_budget:
            attacks += f" ({self.attack_budget})"
        if self.control:
            attacks += f"; control {self.control}"
        return f"judging {judged}{about}: {', '.join(self.protocols)}; {attacks}"

    def _check_images(self) -> None:
        if (self.pretrained_model_name_or_path is None) == (self.images_dir is None):
            raise ValueError("what is judged? Set pretrained_model_name_or_path or images_dir, one of the two")
        if self.images_dir is not None:
            if self.lora_weights or self.base_model:
                raise ValueError("images_dir holds finished images: leave out lora_weights and base_model")
            if len(self.protocols) > 1:
                raise ValueError("images_dir holds the images of one protocol: name one")
        if self.base_images_dir is not None and self.images_dir is None:
            raise ValueError("base_images_dir goes with images_dir; for a pipeline, set base_model")
        for name in ("images_dir", "base_images_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).expanduser().is_dir():
                raise ValueError(f"{name} {folder!r} does not exist")

    def _check_attacks(self) -> None:
        names = self.attacks or []
        for name in names:
            ATTACKS.find(name)
        if len(set(names)) < len(names):
            raise ValueError(f"attacks names one twice: {', '.join(names)}")
        for name in ("control", "attack_budget"):
            if getattr(self, name) is not None and not self.chosen_attacks:
                raise ValueError(f"{name} is about attacks, and there is none: name some in attacks, or leave it out")
        if not names:
            return
        if self.evaluation.classifier is None:
            raise ValueError("nobody judges what attacks bring back: set evaluation.classifier")
        if not self.judges_concepts or self.images_dir is not None or self.prompts.file is not None:
            raise ValueError(
                "attacks ask a pipeline for forgotten concepts, by prompts of a data set or of forget_prompts: set "
                "--attacks '[]' for other protocols, for images_dir and for prompts.file"
            )

    @property
    def protocols(self) -> list[str]:
        """The names in `protocol`, always a list."""
        return as_list(self.protocol)

    @property
    def judges_concepts(self) -> bool:
        """Whether a protocol asks for forgotten concepts."""
        return any(PROTOCOLS.find(name).protocol.judges_concepts for name in self.protocols)

    @property
    def chosen_attacks(self) -> list[str]:
        """Names of the attacks that are run."""
        if self.attacks is not None:
            return self.attacks
        has_data = bool(self.train_data_dir or self.dataset_name) and self.evaluation.classifier is not None
        if not (self.judges_concepts and self.images_dir is None and has_data):
            return []
        return [*DEFAULT_ATTACKS, *(WITHOUT_TRAINING if self.attack_budget else ())]

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
            caption_template=self.caption_template,
            forget_prompts=self.forget_prompts,
            retain_prompts=self.retain_prompts,
        )

    def settings_of(self, name: str) -> Any:
        """The section of an attack or a protocol; its defaults where it has none."""
        return getattr(self, name) if hasattr(self, name) else own_sections()[name]()

    @property
    def budgets(self) -> dict[str, Budget]:
        """Chosen attack -> its settings."""
        return {name: self.settings_of(name) for name in self.chosen_attacks}

    @classmethod
    def class_for(cls, values: Mapping[str, Any]) -> type[EvaluateConfig]:
        """The class that also has the sections of what the user's modules register, which `values` name.

        Raises:
            ValueError: a module that does not load.
        """
        for module in as_list(values.get("module")):
            load_module(str(module), "module", ATTACKS, PROTOCOLS, EXTRACTORS)
        return with_sections(cls, own_sections())
