"""UnlearnConfig: every setting of an unlearning run, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from barrier_diffusers.data.captions import swap_concept
from barrier_diffusers.data.concepts import ConceptConfig, DataNeeds, concepts_of
from barrier_diffusers.data.drawn_latents import DrawnLatentsConfig
from barrier_diffusers.evaluation.certification import CertificateConfig
from barrier_diffusers.evaluation.erasure import ImageEvaluationConfig
from barrier_diffusers.models.exporting import ExportFormat
from barrier_diffusers.models.loading import require_pipeline
from barrier_diffusers.objectives import Objective, load_objective
from barrier_diffusers.training.run_config import DiffusionUnlearningConfig
from barrier_diffusers.utils.checks import FILE, MODEL, Range, at_least, require_wandb, rules


@dataclass(kw_only=True)
class UnlearnConfig(ConceptConfig, DiffusionUnlearningConfig):  # jsonargparse resolves names for the first base
    """Everything a run depends on."""

    pretrained_model_name_or_path: str  # folder, hub id or .safetensors file of a pipeline (architectures.py)
    output_dir: str  # gets the unlearned pipeline, metrics and pictures
    cache_dir: str | None = None  # latents, text embeddings, "before" images; default output_dir/cache
    revision: str | None = None  # of the hub repository
    variant: str | None = None  # file variant, e.g. fp16
    pipeline_config: str | None = None  # of a single file: diffusers' `config`, a pipeline folder or hub id
    original_config: str | None = None  # of a single file: the YAML file it was trained with
    resolution: int | None = None  # side of the images in pixels; None: the model's own
    vae_batch_size: int | None = None  # images that the VAE encodes at once; None: 64, fewer of large images
    gradient_checkpointing: bool = False  # less memory, more time
    enable_xformers_memory_efficient_attention: bool = False  # needs the package xformers and a GPU
    attention_backend: str | None = None  # of diffusers, e.g. native or flash, on Flux; None: as the denoiser comes
    guidance_scale: float = 3.5  # what a denoiser with a guidance embedding (Flux dev) is told while it trains
    rank: int = 0  # of a LoRA adapter on the targets; 0 trains the full weights
    merge_adapter: bool = False  # with rank > 0: also save the merged pipeline, in output_dir/merged
    # files for other programs (A1111, ComfyUI) in output_dir/exported, of Stable Diffusion 1.x, 2.x and SDXL:
    # single_file, the pipeline as one checkpoint in its first release's layout; kohya, the adapter in kohya's names
    export: list[ExportFormat] = field(default_factory=list)
    push_to_hub: bool = False  # upload output_dir at the end, without checkpoints, cache and logs
    hub_model_id: str | None = None  # repository; default: output_dir's name in the account of the token
    hub_private: bool = False  # a repository that is created is private
    report_artifact: bool = False  # wandb, if report_to names it, also gets the result, without checkpoints and cache
    # what the protection knows of retain inputs: recorded from images, or (keys and values of cross-attention, which
    # read nothing else) the text embeddings of the retain captions and prompts; other maps are recorded either way
    retain_statistics: Literal["images", "prompts"] = "images"
    # what the retain rows are: images, or latents that the pipeline itself draws for their captions before it changes
    # (then no retain image is read), or both
    retain_latents: Literal["images", "drawn", "both"] = "images"
    drawn_latents: DrawnLatentsConfig = field(default_factory=DrawnLatentsConfig)
    # share of the retain rows with the empty prompt in place of their caption, as in training: guidance subtracts its
    # answer from every other one
    caption_dropout: float = 0.0
    evaluation: ImageEvaluationConfig = field(default_factory=ImageEvaluationConfig)
    certificate: CertificateConfig = field(default_factory=CertificateConfig)

    RULES = rules(
        pipeline_config=MODEL,
        original_config=FILE,
        resolution=at_least(1),
        vae_batch_size=at_least(1),
        guidance_scale=at_least(0),
        caption_dropout=Range(0, 1, without_high=True),
        rank=Range(0, 4096),  # no map of a known model is wider than this
    )

    def __post_init__(self) -> None:
        ConceptConfig.__post_init__(self)
        DiffusionUnlearningConfig.__post_init__(self)
        require_wandb(self.report_artifact, self.report_to, "report_to")
        if self.merge_adapter and self.rank == 0:
            raise ValueError("merge_adapter needs an adapter: set rank above 0")
        if len(set(self.export)) < len(self.export):
            raise ValueError(f"export names a format twice: {', '.join(self.export)}")
        if "kohya" in self.export and self.rank == 0:
            raise ValueError("export kohya is of an adapter: set rank above 0, or export single_file")
        if "single_file" in self.export and self.rank and not self.merges_adapter:
            raise ValueError(
                "export single_file is of a whole pipeline, but rank > 0 leaves an adapter: set merge_adapter, or "
                "export kohya"
            )
        if self.trained_weights == "all" and self.rank:
            raise ValueError(
                "trained_weights 'all' trains the weights themselves, not an adapter: set rank to 0, or let "
                "barrier.targets name every map that is to get one (Linear, Conv2d)"
            )
        if self.robust.fresh_share and self.rank:
            raise ValueError("robust.fresh_share is for the weights themselves: set rank to 0")
        if self.needs_retain and not self.has_retain_rows:
            raise ValueError(
                "alpha > 0, use_actual_bounds, residual_source and a projection need retain data: set retain_prompts"
            )
        if self.retain_statistics == "prompts" and not self.barrier.needs_retain_data:
            raise ValueError("retain_statistics='prompts', but the protection reads no retain data")
        if self.retain_latents != "images" and not self.needs_retain:
            raise ValueError(
                f"retain_latents is {self.retain_latents}, but nothing reads retain data: set objective.alpha above 0"
            )
        if self.caption_dropout and not self.needs_retain:
            raise ValueError(
                f"caption_dropout is {self.caption_dropout}, but nothing reads retain data: set objective.alpha"
            )

    def check_inputs(self) -> None:
        """A ValueError for a judge that does not know the concepts, or a base model that is nowhere."""
        require_pipeline(self.pretrained_model_name_or_path, "pretrained_model_name_or_path", self.revision)
        self.evaluation.check_judge(self.concepts)

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        where = ", ".join(self.barrier.targets or ["the model's usual maps"])
        weights = f"a LoRA adapter of rank {self.rank}" if self.rank else "the weights"
        data = self.source or self.forget_data_dir or f"images made of {len(self.forget_prompts)} prompts"
        return (
            f"unlearning {' and '.join(self.concepts)} in {self.pretrained_model_name_or_path}: {self.objective.name} "
            f"trains {'all weights' if self.trained_weights == 'all' else f'{weights} of {where}'} on {data}; "
            f"{self.protection}{self.robust.summary}"
        )

    @property
    def merges_adapter(self) -> bool:
        """Whether the pipeline with the adapter in its weights is saved as well. It always is after robust training:
        who has the adapter apart takes it off, and the concept is back."""
        return self.merge_adapter or bool(self.rank and self.robust.parts)

    @property
    def repo_id(self) -> str:
        """The hub repository that gets the result."""
        return self.hub_model_id or Path(self.output_dir).resolve().name


def chosen_objective(config: UnlearnConfig) -> Objective:
    """The objective of a run, from the user's module if one is named, checked against every other setting.

    Raises:
        ValueError: an unknown name, a setting that the objective does not read, or a missing one.
    """
    objective = load_objective(config.objective)
    if objective.needs_anchor:
        check_anchors(config)
    if objective.edit is not None:
        trains = {
            "rank": config.rank > 0,
            "learning_rates": bool(config.learning_rates),
            "saliency_mask": config.saliency_mask is not None,
            "trained_weights": config.trained_weights != "targets",
            **{f"robust.{part}": True for part in config.robust.parts},
            "resume_from_checkpoint": config.resume_from_checkpoint is not None,
        }
        for name in (name for name, given in trains.items() if given):
            raise ValueError(
                f"objective {objective.name!r} edits the weights without training: leave {name} at its default"
            )
        if config.protected:
            raise ValueError(
                f"objective {objective.name!r} runs no training step that the protection could act on: "
                "set barrier.lambda_interval to 0 and leave barrier.constraint at penalty"
            )
    return objective


def check_anchors(config: UnlearnConfig) -> None:
    """What can be said about the anchors before any data is read or made.

    Raises:
        ValueError: a list of the wrong length, an anchor that is to be forgotten itself, none where there is no other
            label, or words that a forget prompt does not name.
    """
    anchor, concepts = config.objective.anchor, config.concepts
    config.objective.anchors_of(concepts, config.synonyms)
    if config.source is None and anchor is None and config.objective.anchor_prompt is None:
        raise ValueError(
            "without a concept column there is no other label, at random or nearest: set objective.anchor or "
            "anchor_prompt"
        )
    if config.source is None and config.forget_data_dir is None and anchor is not None:
        about = concepts_of(config.forget_prompts, config.names)
        for prompt, concept in zip(config.forget_prompts, about, strict=True):
            swap_concept(prompt, config.names[concept], "")


def data_needs(config: UnlearnConfig, objective: Objective, prompts_suffice: bool = False) -> DataNeeds:
    """What a run reads of its data: an objective that works from prompts alone has no forget image.

    `prompts_suffice` says that text embeddings are all the retain statistics of all maps need.
    """
    forget_images = not objective.samples_from_model or config.reads_forget_images
    recorded = config.needs_retain and not objective.samples_from_model and not prompts_suffice
    retain_images = (config.objective.alpha > 0 or recorded) and config.retain_latents != "drawn"
    return DataNeeds(
        forget_images=forget_images and objective.edit is None,
        retain_images=retain_images,
        retain=config.needs_retain,
        unconditional=objective.needs_unconditional,
        dropout=config.caption_dropout > 0,
        edit=objective.edit is not None,
    )
