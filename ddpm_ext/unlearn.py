"""Make a class-conditional DDPM forget labels while BARRIER protects the rest.

    accelerate launch -m ddpm_ext.unlearn --config ddpm_ext/configs/unlearn_fashion.yaml

Any field of `UnlearnConfig` is a dotted flag (`--barrier.lambda_interval 1`). output_dir becomes the unlearned
pipeline, with metrics.json, manifest.json and the pictures beside it.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from barrier_diffusers import Barrier
from barrier_diffusers.data.folders import announce
from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.data.readers import take_evenly
from barrier_diffusers.evaluation.attacks.base import Forgotten
from barrier_diffusers.evaluation.erasure import generate_cached
from barrier_diffusers.evaluation.judge import Judge, as_rgb
from barrier_diffusers.evaluation.pictures import before_after_grid, loss_curves, strip
from barrier_diffusers.evaluation.report import REPORT_NAME, write_report
from barrier_diffusers.evaluation.tables import erase_more, print_metrics, warn_if_not_erased
from barrier_diffusers.models.loading import module_hashes
from barrier_diffusers.models.shared_generation import generate_together, with_helpers
from barrier_diffusers.objectives import Objective
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.protection.targets import Snapshots, snapshot_of
from barrier_diffusers.training.nearest_label import NUM_IMAGES, label_distances, said_of
from barrier_diffusers.training.relearner import adapted_maps
from barrier_diffusers.training.trainer import Trainer, open_run
from barrier_diffusers.training.unlearn import Unlearner, rates_of_maps
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import save_whole, write_json
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, fingerprint, manifest
from ddpm_ext.attacks import attackers_view, run_attacks
from ddpm_ext.diffusion import LABELS, LabelDenoiser, LabelRows, UnlearningRows, draw
from ddpm_ext.loading import load_pipeline, load_rows
from ddpm_ext.metrics import EvaluationLabels, evaluate, make_evaluation_labels, make_judge, real_images
from ddpm_ext.new_rows import LabelVocabulary
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline
from ddpm_ext.settings import UnlearnConfig, chosen_objective


def unlearning_rows(
    config: UnlearnConfig, objective: Objective, pipeline: ClassConditionalDDPMPipeline
) -> UnlearningRows:
    """Forget rows with the anchors that the objective asks for, and retain rows if anything reads them.

    Raises:
        ValueError: a label that there is not, or that the data has no image of.
    """
    data, generator = load_rows(config.data, pipeline), torch.Generator().manual_seed(config.seed)
    forget_ids = [data.index_of(label) for label in config.concepts]
    retain_ids = [index for index in range(len(data.names)) if index not in forget_ids]
    if not retain_ids:
        raise ValueError("every label is to be forgotten: nothing is left to retain")
    forget = draw(data, forget_ids, config.max_forget_images, generator)
    null = pipeline.null_label if objective.needs_unconditional else None
    anchors = anchor_ids(
        config,
        forget,
        pipeline,
        forget_ids=forget_ids,
        retain_ids=retain_ids,
        generator=generator,
    )
    with_images = not objective.samples_from_model or config.reads_forget_images
    rows = LabelRows(
        forget.labels,
        images=forget.images if with_images else None,
        anchors=anchors if objective.needs_anchor else None,
        null_label=null,
    )
    if not config.needs_retain:
        return UnlearningRows(rows, None)
    retain = draw(data, retain_ids, config.max_retain_images, generator)
    dropped = torch.rand(len(retain), generator=generator) < config.label_dropout
    return UnlearningRows(
        rows, LabelRows(retain.labels.masked_fill(dropped, pipeline.null_label), retain.images, None, null)
    )


def anchor_ids(
    config: UnlearnConfig,
    forget: LabelledImages,
    pipeline: ClassConditionalDDPMPipeline,
    *,
    forget_ids: list[int],
    retain_ids: list[int],
    generator: torch.Generator,
) -> Tensor:
    """The label whose prediction each forget image is to get: the named one, the nearest retained one, or a retained
    one at random.

    Raises:
        ValueError: an anchor that there is not.
    """
    labels_N, names = forget.labels, forget.names
    anchors = [anchor for anchor in config.objective.anchors_of(config.concepts, labels=True) if anchor is not None]
    if config.objective.anchor_choice == "nearest":
        anchors = [nearest_label(config, forget, pipeline, label, retain_ids) for label in forget_ids]
    if not anchors:
        return torch.tensor(retain_ids)[torch.randint(len(retain_ids), (len(labels_N),), generator=generator)]
    for anchor in anchors:
        if anchor not in names:
            raise ValueError(f"objective.anchor {anchor!r} is no label of the data: {', '.join(names)}")
    chosen = {label: names.index(anchor) for label, anchor in zip(forget_ids, anchors, strict=True)}
    return torch.tensor([chosen[int(label)] for label in labels_N])


def nearest_label(
    config: UnlearnConfig,
    forget: LabelledImages,
    pipeline: ClassConditionalDDPMPipeline,
    label: int,
    retain_ids: list[int],
) -> str:
    """The retained label that the pipeline tells least from this one, on the label's images."""
    rows = (forget.labels == label).nonzero().flatten()
    images = forget.images[rows[take_evenly(range(len(rows)), NUM_IMAGES, config.seed)]]

    def condition(of: int) -> Condition:
        return {LABELS: torch.full((len(images),), of)}

    found = label_distances(
        LabelDenoiser(pipeline),
        images,
        own=condition(label),
        others={forget.names[other]: condition(other) for other in retain_ids},
        seed=config.seed,
        batch_size=config.train_batch_size,
    )
    announce(said_of(forget.names[label], found))
    return next(iter(found))


@torch.no_grad()
def relative_drifts(barrier: Barrier, before: Snapshots) -> dict[str, float]:
    """|W - W0| / |W0| of every map, with or without a protection."""
    pairs = [(linear_map.layer.weight.float(), before[linear_map.name][0].float()) for linear_map in barrier.maps]
    ratios = torch.stack([(now - then).norm() / then.norm() for now, then in pairs]).tolist()
    return {linear_map.name: round(value, 6) for linear_map, value in zip(barrier.maps, ratios, strict=True)}


@dataclass
class LoadedModel:
    """The pipeline that is unlearned."""

    pipeline: ClassConditionalDDPMPipeline
    barrier: Barrier  # of its UNet; fitted once it is protected
    hashes: dict[str, str]  # part -> SHA-256 of its weights, before anything changes
    snapshots: Snapshots  # of the maps' weights


@dataclass
class Before:
    """What the pipeline is asked before and after, and its answers; images in the main process alone."""

    asked: EvaluationLabels
    judge: Judge | None
    images: np.ndarray = field(default_factory=lambda: np.empty(0))  # (N, S, S, C) of these labels
    real: np.ndarray | None = None
    forgotten: list[Forgotten] = field(default_factory=list)  # as an attacker knows them


def load_model(config: UnlearnConfig, device: torch.device) -> LoadedModel:
    """The pipeline on its device, everything frozen but the targets."""
    pipeline = load_pipeline(config.pretrained_model_name_or_path).to(device)
    barrier = Barrier(pipeline.unet, config.barrier, config.trained_weights)
    rates_of_maps(barrier.maps, config.learning_rates)  # an error now, not after the data is read
    if config.robust.has_adapter:
        adapted_maps(pipeline.unet, config.robust.meta_adapter_targets)
    snapshots = {linear_map.name: snapshot_of(linear_map.layer) for linear_map in barrier.maps}
    return LoadedModel(pipeline, barrier, module_hashes(pipeline), snapshots)


def choose_labels(config: UnlearnConfig, labels: list[str]) -> Before:
    """What a pipeline with these labels is asked, and by whom it is judged.

    Raises:
        ValueError: a label that there is not, or that the judge does not know.
    """
    asked = make_evaluation_labels(config.evaluation, labels, forgotten=config.concepts)
    return Before(asked, make_judge(config.evaluation, labels) if config.evaluation.judge else None)


def look_before(config: UnlearnConfig, model: LoadedModel, before: Before, accelerator: Accelerator) -> None:
    """Let the pipeline answer before it changes; then every process gets random numbers of its own, the first those
    that a single one would have."""
    with_helpers(model.pipeline, partial(_look, config, model, before))
    accelerator.wait_for_everyone()
    if accelerator.process_index:
        set_seed(config.seed + accelerator.process_index)


def _look(config: UnlearnConfig, model: LoadedModel, before: Before) -> None:
    pipeline, evaluation = model.pipeline, config.evaluation
    if before.judge is not None:
        before.real = real_images(evaluation, config.data, pipeline=pipeline, forgotten=config.concepts)
    before.forgotten = attackers_view(evaluation, config.data, pipeline=pipeline, asked=before.asked)
    before.images = generate_cached(
        pipeline,
        before.asked.labels,
        sampling=evaluation.sampling,
        cache=cache_of(config),
        model_hash=fingerprint(model.hashes),
    )


def cache_of(config: UnlearnConfig) -> Path:
    """Folder of what is computed once from the base model."""
    return Path(config.cache_dir or Path(config.output_dir) / "cache")


def validate(config: UnlearnConfig, pipeline: ClassConditionalDDPMPipeline, step: int) -> None:
    """Sample the validation labels as the pipeline is now."""
    with_helpers(pipeline, partial(_validate, config, pipeline, step))


def _validate(config: UnlearnConfig, pipeline: ClassConditionalDDPMPipeline, step: int) -> None:
    labels, sampling = config.validation_prompt, config.evaluation.sampling
    images = generate_together(pipeline, labels, sampling, desc="validation")
    strip(images, labels, Path(config.output_dir) / "validation" / f"step-{step:06d}.png")


def save_weights(config: UnlearnConfig, model: LoadedModel, results: dict[str, Any]) -> dict[str, Any]:
    """Write the barrier and the pipeline; the results without the history, and what trained how far."""
    output, barrier, unet = Path(config.output_dir), model.barrier, model.pipeline.unet
    (barrier if config.protected else config.barrier).save_pretrained(output)
    trained, everything = barrier.num_trainable, sum(parameter.numel() for parameter in unet.parameters())
    facts = {key: value for key, value in results.items() if key != "history"}
    facts |= {"num_trainable": trained, "num_parameters": everything}
    facts |= {"percent_trainable": round(100 * trained / everything, 4)}
    facts["drift"] = relative_drifts(barrier, model.snapshots)
    barrier.remove()
    save_whole(model.pipeline.save_pretrained, output, last="model_index.json")
    return facts


def judge_after(
    config: UnlearnConfig, model: LoadedModel, before: Before, history: dict[str, list[float]], facts: dict[str, Any]
) -> None:
    """The same labels after, what the judge says of them, pictures, manifest, and at last the attacks."""
    output, pipeline, asked = Path(config.output_dir), model.pipeline, before.asked
    after = generate_together(pipeline, asked.labels, config.evaluation.sampling, desc="images after")
    was, now = as_rgb(before.images), as_rgb(after)
    before_after_grid(was, now, asked.labels, asked.forgotten, output / "before_after.png")
    loss_curves(history, output / "loss_curves.png")
    metrics: dict[str, Any] = {"num_images": len(after), **facts}
    if before.judge is not None:
        scores = evaluate(
            config.evaluation,
            before.judge,
            asked=asked,
            before=before.images,
            after=after,
            real=before.real,
            cache=cache_of(config),
        )
        metrics = {**scores, **facts}
        print_metrics(metrics, config.evaluation.attribute, asked.forgotten)
        warn_if_not_erased(metrics["unlearning_accuracy"], asked.forgotten, erase_more(config))
    hashes = {"base_denoiser": model.hashes["unet"], **module_hashes(pipeline)}
    write_json(output / MANIFEST_NAME, manifest(config, hashes, history=history, **facts))
    if before.forgotten and before.judge is not None:
        write_json(output / METRICS_NAME, metrics)  # these stay if an attack fails
        metrics |= run_attacks(
            config.output_dir,
            pipeline,
            config.evaluation,
            forgotten=before.forgotten,
            judge=before.judge,
            asked=asked,
            plain=after,
            output=output,
            cache=cache_of(config),
        )
    write_json(output / METRICS_NAME, metrics)  # last: without it nothing reports on the run


def conclude(config: UnlearnConfig, model: LoadedModel, before: Before, results: dict[str, Any]) -> None:
    """Save -> judge -> report, in the main process."""
    output = Path(config.output_dir)
    facts = save_weights(config, model, results)
    judge_after(config, model, before, history=results["history"], facts=facts)
    print(f"pipeline: {output}\npicture:  {output / 'before_after.png'}")
    print(f"report:   {write_report([output], output / REPORT_NAME)}")


@in_output_folder()
def main(config: UnlearnConfig) -> None:
    """Load -> encode -> protect -> train -> conclude."""
    objective = chosen_objective(config)
    trainer = Trainer(open_run(config), config)
    accelerator = trainer.accelerator
    set_seed(config.seed)
    model = load_model(config, accelerator.device)
    before = choose_labels(config, model.pipeline.labels)
    with accelerator.main_process_first():
        rows = unlearning_rows(config, objective, model.pipeline)
    look_before(config, model, before, accelerator)
    vocabulary = LabelVocabulary(model.pipeline, rows.forget) if config.robust.token_rounds else None
    unlearner = Unlearner(
        trainer,
        objective=objective,
        barrier=model.barrier,
        denoiser=LabelDenoiser(model.pipeline),
        resolution=model.pipeline.resolution,
        vocabulary=vocabulary,
    )
    trainer.checkpoints.inputs = {"base model": fingerprint(model.hashes), "data": rows.digest()}
    unlearner.protect(rows)
    model.barrier = unlearner.barrier
    results = unlearner.train(rows, partial(validate, config, model.pipeline))
    if vocabulary is not None:
        vocabulary.remove()
    model.pipeline.unet.eval()
    with_helpers(model.pipeline, partial(conclude, config, model, before, results))
    trainer.end_run()


if __name__ == "__main__":
    run_script(main, UnlearnConfig)
