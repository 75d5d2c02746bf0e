"""The steps of unlearning a text-to-image pipeline: load -> encode -> protect -> train -> save -> judge.

`train_scripts/unlearn_sd.py` takes them from the command line, `notebook.unlearn` from Python.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from barrier_diffusers.data.concepts import ConceptData, load_concepts
from barrier_diffusers.data.drawn_latents import with_drawn_latents
from barrier_diffusers.data.encoded_concepts import EncodedConcepts, encode_concepts
from barrier_diffusers.data.encoding import EncodedImages
from barrier_diffusers.data.erased_concepts import ERASED_NAME, ErasedConcepts, as_json
from barrier_diffusers.data.readers import rows_hash
from barrier_diffusers.evaluation.certification import HeldOut, held_out_images, write_certificate
from barrier_diffusers.evaluation.erasure import (
    EvaluationPrompts,
    check_evaluation_prompts,
    evaluate_erasure,
    generate_cached,
    make_evaluation_prompts,
)
from barrier_diffusers.evaluation.pictures import before_after_grid, loss_curves, strip
from barrier_diffusers.evaluation.report import read_run
from barrier_diffusers.evaluation.tables import erase_more, print_metrics, warn_if_not_erased
from barrier_diffusers.evaluation.tracker_pages import Comparison, log_artifact, log_comparison, log_record
from barrier_diffusers.models.architectures import Architecture, components, get_architecture
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.exporting import (
    ExportFormat,
    export_kohya,
    export_single_file,
    exported_path,
    require_layout,
)
from barrier_diffusers.models.loading import (
    add_adapter,
    choose_attention_backend,
    enable_xformers,
    load_pipeline,
    module_hashes,
)
from barrier_diffusers.models.publishing import (
    ModelCardFacts,
    claim_repo,
    save_adapter,
    save_model_card,
    save_pipeline,
)
from barrier_diffusers.models.shared_generation import generate_together, with_helpers
from barrier_diffusers.objectives import Objective
from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.training.checkpoints import SIZE
from barrier_diffusers.training.nearest_label import nearest_labels
from barrier_diffusers.training.relearner import adapted_maps
from barrier_diffusers.training.token_adversary import PromptVocabulary
from barrier_diffusers.training.trainer import Trainer, open_run
from barrier_diffusers.training.unlearn import Unlearner, apply_edit, maps_of_prompts, prompt_inputs, rates_of_maps
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, fingerprint, manifest
from barrier_diffusers.workflow.settings import UnlearnConfig, chosen_objective, data_needs


def frozen_dtype(config: UnlearnConfig) -> torch.dtype:
    """Precision of the weights that are not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.mixed_precision or "no", torch.float32)


@dataclass
class Run:
    """What a run is told, and what trains in it."""

    config: UnlearnConfig
    objective: Objective
    trainer: Trainer
    repo_id: str | None = None  # hub repository that gets the result

    @property
    def accelerator(self) -> Accelerator:
        """Of all its processes."""
        return self.trainer.accelerator

    @property
    def output(self) -> Path:
        """Folder of the result."""
        return Path(self.config.output_dir)

    def exported(self, kind: ExportFormat) -> Path:
        """The file for other programs."""
        return exported_path(self.output, self.output, kind)

    @property
    def cache(self) -> Path:
        """Folder of what is computed once from the base model."""
        return Path(self.config.cache_dir or self.output / "cache")


@dataclass
class LoadedModel:
    """The pipeline that is unlearned."""

    pipeline: Any
    denoiser: PipelineDenoiser
    barrier: Barrier  # of the denoiser's network; fitted once it is protected
    resolution: int  # side in pixels at which images are read
    hashes: dict[str, str]  # part -> SHA-256 of its weights, before anything changes
    erased: list[ErasedConcepts]  # by earlier runs

    def made_by(self, config: UnlearnConfig) -> str:
        """What images and texts that it makes depend on."""
        return fingerprint(self.hashes, str(frozen_dtype(config)))


@dataclass
class RunData:
    """What a run learns from, and what it is asked before and after."""

    concepts: ConceptData
    encoded: EncodedConcepts | None  # None for a closed-form edit, which reads captions alone
    prompts: EvaluationPrompts
    prompt_targets: list[str]  # targets whose retain inputs are the retain prompts' embeddings

    def digest(self) -> str:
        """SHA-256 of what a run learns from."""
        rows = {"forget": self.concepts.forget, "retain": self.concepts.retain}
        config = self.concepts.config
        wanted = (config.image_column, config.caption_column)
        columns = {role: [name for name in wanted if name in part.column_names] for role, part in rows.items()}
        return fingerprint({role: rows_hash(part, columns[role]) for role, part in rows.items()})

    @property
    def forgotten(self) -> ErasedConcepts:
        """What this run erases."""
        config = self.concepts.config
        captions = sorted(set(self.concepts.forget[config.caption_column]))
        return ErasedConcepts(config.concepts, captions, config.synonyms)


@dataclass
class Before:
    """How the pipeline was."""

    images: np.ndarray  # (N, H, W, 3) of the evaluation prompts; none in all processes but the main one
    held_out: HeldOut | None  # what the certificate is about


def open_unlearning(config: UnlearnConfig) -> Run:
    """Check the settings against one another, claim the output folder (and the hub repository, where one gets the
    result), find the checkpoint, set the seed.

    Raises:
        ValueError: settings that contradict one another, or a folder or repository that may not be used.
    """
    objective, accelerator = chosen_objective(config), open_run(config)
    repo_id = None
    if config.push_to_hub and accelerator.is_main_process:
        repo_id = claim_repo(config.repo_id, config.hub_private)
    accelerator.wait_for_everyone()
    trainer = Trainer(accelerator, config)
    set_seed(config.seed)
    return Run(config, objective, trainer, repo_id)


def load_base(config: UnlearnConfig) -> Any:
    """The pipeline that the settings name; what trains has full precision."""
    return load_pipeline(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        dtype=frozen_dtype(config),
        denoiser_dtype=frozen_dtype(config) if config.rank else torch.float32,
        pipeline_config=config.pipeline_config,
        original_config=config.original_config,
    )


def check_row(config: UnlearnConfig, objective: Objective, row: Architecture) -> None:
    """Refuse what a pipeline class cannot do.

    Raises:
        ValueError: an adapter where diffusers saves and loads none, a closed-form edit of tokens that are not where
            the tokenizer puts them, or a file for other programs that know no such file.
    """
    if config.rank and not row.has_adapters:
        raise ValueError(
            f"rank is {config.rank}, but diffusers saves and loads no LoRA adapter for a {row.name}: "
            "set rank to 0, which trains the chosen weights themselves"
        )
    for kind in config.export:
        require_layout(row, f"export {kind}")
    if objective.edit is not None and not row.aligned_tokens:
        raise ValueError(
            f"objective {objective.name!r} pairs the tokens of two prompts, but the denoiser of a {row.name} does not "
            "read them where the tokenizer puts them: choose another objective"
        )


def make_ready(run: Run, pipeline: Any, erased: list[ErasedConcepts]) -> LoadedModel:
    """Move the pipeline to the run's device, add what the settings ask for, and freeze all but the targets.

    Raises:
        ValueError: settings that do not fit the pipeline.
    """
    config, device = run.config, run.accelerator.device
    denoiser = PipelineDenoiser(pipeline, config.guidance_scale)
    config.resolution = denoiser.checked_resolution(config.resolution)
    denoiser.check_text_encoder(pipeline)
    check_row(config, run.objective, denoiser.architecture)
    config.barrier.targets = config.barrier.targets or list(denoiser.architecture.targets)
    network = denoiser.network
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(network, device)
    if config.attention_backend is not None:
        choose_attention_backend(network, config.attention_backend, device)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    for module in components(pipeline).values():
        module.to(device)
        module.requires_grad_(module is network).eval()
    hashes = module_hashes(pipeline)
    if config.rank:
        add_adapter(network, config.barrier, config.rank)
    barrier = Barrier(network, config.barrier, config.trained_weights)
    rates_of_maps(barrier.maps, config.learning_rates)  # an error now, not after the data is read
    if config.robust.has_adapter:
        adapted_maps(network, config.robust.meta_adapter_targets)
    if run.objective.check_maps is not None:
        run.objective.check_maps(barrier.maps)
    return LoadedModel(pipeline, denoiser, barrier=barrier, resolution=config.resolution, hashes=hashes, erased=erased)


def encode_data(run: Run, model: LoadedModel) -> RunData:
    """Read or make the images of what is forgotten and retained, and encode them; cached on disk.

    The main process goes first, so that the others find the cache filled; they help to make images.

    Raises:
        ValueError: data that cannot be read, or evaluation prompts that the classifier cannot judge.
    """
    data = with_helpers(model.pipeline, partial(_read_and_encode, run, model))
    return _read_and_encode(run, model) if data is None else data


def _read_and_encode(run: Run, model: LoadedModel) -> RunData:
    config, objective, options = run.config, run.objective, run.config.objective
    prompt_targets = maps_of_prompts(config, model.denoiser)
    needs = data_needs(config, objective, set(prompt_targets) == set(config.barrier.targets or []))
    concepts = load_concepts(
        config,
        model.pipeline,
        run.cache,
        base_hash=model.made_by(config),
        seed=config.seed,
        needs=needs,
        erased=model.erased if config.protect_erased else [],
    )
    prompts = make_evaluation_prompts(config.evaluation, config, model.erased)
    check_evaluation_prompts(config.evaluation, prompts)
    if options.anchor_choice == "nearest":
        with run.accelerator.autocast():
            concepts.nearest = nearest_labels(
                concepts,
                model.pipeline,
                resolution=model.resolution,
                seed=config.seed,
                batch_size=config.train_batch_size,
                cache=run.cache,
                base_hash=model.made_by(config),
            )
    if objective.edit is not None:
        return RunData(concepts, None, prompts, prompt_targets)
    anchors = None
    if objective.needs_anchor:
        anchors = concepts.anchors(options.anchor, options.anchor_prompt, config.seed)
    encoded = encode_concepts(
        concepts,
        anchors,
        pipeline=model.pipeline,
        cache=run.cache,
        resolution=model.resolution,
        needs=needs,
        vae_batch_size=config.vae_batch_size,
    )
    if config.retain_latents != "images" and isinstance(encoded.retain, EncodedImages):
        with run.accelerator.autocast():
            encoded.retain = with_drawn_latents(
                encoded.retain,
                config.drawn_latents,
                pipeline=model.pipeline,
                resolution=model.resolution,
                cache=run.cache,
                base_hash=model.made_by(config),
            )
    if config.caption_dropout:
        encoded.drop_captions(config.caption_dropout, config.seed)
    return RunData(concepts, encoded, prompts, prompt_targets)


def look_before(run: Run, model: LoadedModel, data: RunData) -> Before:
    """The pipeline's answers to the evaluation prompts, which the main process gets, and what is held out; then every
    process gets random numbers of its own, the first those that a single one would have."""
    before = with_helpers(model.pipeline, partial(_look, run, model, data))
    if before is None:
        images = None if run.config.source is not None else _images_before(run, model, data)  # the cache has them
        before = Before(np.empty(0), _held_out(run, model, data, images))
    run.accelerator.wait_for_everyone()
    if run.accelerator.process_index:
        set_seed(run.config.seed + run.accelerator.process_index)
    return before


def _look(run: Run, model: LoadedModel, data: RunData) -> Before:
    images = _images_before(run, model, data)
    return Before(images, _held_out(run, model, data, images))


def _images_before(run: Run, model: LoadedModel, data: RunData) -> np.ndarray:
    config = run.config
    return generate_cached(
        model.pipeline,
        data.prompts.prompts,
        sampling=config.evaluation.sampling,
        cache=run.cache,
        model_hash=model.made_by(config),
    )


def _held_out(run: Run, model: LoadedModel, data: RunData, images: np.ndarray | None) -> HeldOut | None:
    config = run.config
    if not config.protected:
        return None
    return held_out_images(
        config.certificate,
        config.evaluation,
        concepts=config,
        erased=model.erased,
        asked=data.prompts,
        before_NHWC=images,
    )


def protect(run: Run, model: LoadedModel, data: RunData) -> Unlearner:
    """Fit the barrier, or load a checkpoint's; what then trains the model."""
    assert data.encoded is not None
    vocabulary, robust = None, run.config.robust
    if robust.token_rounds:
        assert data.encoded.forget.moments is not None
        vocabulary = PromptVocabulary(
            model.pipeline,
            data.encoded.forget.moments,
            captions=list(data.concepts.forget[run.config.caption_column]),
            concepts=data.concepts.concepts,
            count=robust.token_count,
        )
    unlearner = Unlearner(
        run.trainer,
        objective=run.objective,
        barrier=model.barrier,
        denoiser=model.denoiser,
        resolution=model.resolution,
        vocabulary=vocabulary,
    )
    inputs_of_run = {"base model": fingerprint(model.hashes), "data": data.digest(), SIZE: str(model.resolution)}
    run.trainer.checkpoints.inputs = inputs_of_run
    inputs = {}
    if data.prompt_targets and run.trainer.checkpoint is None:
        inputs = prompt_inputs(data.prompt_targets, model.pipeline, data.concepts.retain_captions)
    unlearner.protect(data.encoded, inputs)
    model.barrier = unlearner.barrier
    return unlearner


def validate(run: Run, model: LoadedModel, step: int) -> None:
    """Sample the validation prompts as the pipeline is now, for the output folder and the trackers."""
    with_helpers(model.pipeline, partial(_validate, run, model, step))


def _validate(run: Run, model: LoadedModel, step: int) -> None:
    prompts = run.config.validation_prompt
    images = generate_together(model.pipeline, prompts, run.config.evaluation.sampling, desc="validation")
    strip(images, prompts, run.output / "validation" / f"step-{step:06d}.png")
    for tracker in run.accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": images}, step=step, **layout)


def train(run: Run, model: LoadedModel, data: RunData, unlearner: Unlearner) -> dict[str, Any]:
    """Train to the end: `history`, `num_steps` and seconds. Then the network is ready to draw."""
    assert data.encoded is not None
    results = unlearner.train(data.encoded, lambda step: validate(run, model, step))
    model.denoiser.network.eval()
    return results


def edit(run: Run, model: LoadedModel, data: RunData) -> dict[str, Any]:
    """Change the weights in closed form, every process its own in the same way; the same results."""
    run.accelerator.init_trackers("logs")  # no loop does
    start = time.perf_counter()
    apply_edit(
        run.objective,
        run.config.objective,
        barrier=model.barrier,
        pipeline=model.pipeline,
        concepts=data.concepts,
        seed=run.config.seed,
    )
    return {"history": {}, "num_steps": 0, "seconds_training": round(time.perf_counter() - start, 2)}


def save_weights(run: Run, model: LoadedModel, data: RunData) -> None:
    """Write what is erased by now, the barrier, and last the pipeline or its adapter: what loads is whole. Then the
    same for other programs, if they are to have it."""
    config, output = run.config, run.output
    write_json(output / ERASED_NAME, as_json([*model.erased, data.forgotten]))
    (model.barrier if config.protected else config.barrier).save_pretrained(output)
    if config.rank:
        save_adapter(model.pipeline, output)
        if "kohya" in config.export:
            export_kohya(model.denoiser.architecture, output, run.exported("kohya"))
    else:
        save_pipeline(model.pipeline, output)
        if "single_file" in config.export:
            export_single_file(model.pipeline, run.exported("single_file"))


def save_merged(run: Run, model: LoadedModel, data: RunData) -> None:
    """Fuse the adapter into the weights for good, and write the pipeline in output_dir/merged."""
    model.denoiser.network.fuse_lora()
    model.denoiser.network.unload_lora()
    (run.output / "merged").mkdir(exist_ok=True)
    write_json(run.output / "merged" / ERASED_NAME, as_json([*model.erased, data.forgotten]))
    save_pipeline(model.pipeline, run.output / "merged")
    if "single_file" in run.config.export:
        export_single_file(model.pipeline, run.exported("single_file"))


def certify(run: Run, model: LoadedModel, before: Before) -> None:
    """Write the certificate; every process looks at its share of what is held out."""
    write_certificate(
        run.output,
        model.barrier,
        pipeline=model.pipeline,
        held_out=before.held_out,
        certificate=run.config.certificate,
        resolution=model.resolution,
    )


def judge(run: Run, model: LoadedModel, data: RunData, before: Before, results: dict[str, Any]) -> dict[str, Any]:
    """The same images after, what the classifier says of them, and pictures; the metrics."""
    config, output, prompts = run.config, run.output, data.prompts
    after = generate_together(model.pipeline, prompts.prompts, config.evaluation.sampling, desc="images after")
    if config.merges_adapter:
        save_merged(run, model, data)
    red = prompts.forgotten + prompts.erased_before
    before_after_grid(before.images, after, prompts.labels, red, output / "before_after.png")
    if results["history"]:
        loss_curves(results["history"], output / "loss_curves.png")
    shown = Comparison(prompts.prompts, prompts.labels, red, before_NHWC=before.images, after_NHWC=after)
    log_comparison(run.accelerator.trackers, shown, results["num_steps"])
    facts = {key: value for key, value in results.items() if key != "history"}
    if data.concepts.nearest:
        facts["anchors"] = data.concepts.nearest
    metrics: dict[str, Any] = {"num_images": len(after), **facts}
    if config.evaluation.classifier:
        attribute, scores = evaluate_erasure(config.evaluation, prompts, before.images, after)
        metrics = {**scores, **facts}
        print_metrics(metrics, attribute, prompts.forgotten)
        advice = erase_more(config) if run.objective.edit is None else "choose another anchor, or more forget prompts"
        warn_if_not_erased(metrics["unlearning_accuracy"], prompts.forgotten, advice)
    return metrics


def save_records(
    run: Run, model: LoadedModel, data: RunData, metrics: dict[str, Any], results: dict[str, Any]
) -> None:
    """Write the model card, the manifest and last the metrics, without which nothing reports on the run; then show it
    in the trackers."""
    config, pipeline = run.config, model.pipeline
    row = get_architecture(type(pipeline).__name__)
    card = ModelCardFacts(
        where=run.repo_id or config.output_dir,
        base=config.pretrained_model_name_or_path,
        forgotten=data.prompts.forgotten,
        objective=config.objective.name,
        protection=config.barrier.summary,
        adapter=config.rank > 0,
        metrics=metrics,
        absent=[part for part in row.optional if getattr(pipeline, part) is None],
    )
    save_model_card(run.output, card)
    hashes = {"base_denoiser": model.hashes[row.denoiser], **module_hashes(pipeline)}
    write_json(run.output / MANIFEST_NAME, manifest(config, hashes, **results))
    write_json(run.output / METRICS_NAME, metrics)
    trackers, record = run.accelerator.trackers, read_run(run.output)
    log_record(trackers, record, results["num_steps"])
    if config.report_artifact:
        log_artifact(trackers, run.output, record)
