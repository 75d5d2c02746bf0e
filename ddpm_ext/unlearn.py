"""Make a class-conditional DDPM forget labels while BARRIER protects the rest.

    accelerate launch -m ddpm_ext.unlearn --config ddpm_ext/configs/unlearn_fashion.yaml

Any field of `UnlearnConfig` is a dotted flag (`--barrier.lambda_interval 1`). output_dir becomes the unlearned
pipeline, with metrics.json, manifest.json and the pictures beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from barrier_diffusers import Barrier
from barrier_diffusers.evaluation.erasure import generate_cached
from barrier_diffusers.evaluation.judge import Judge, as_rgb
from barrier_diffusers.evaluation.pictures import before_after_grid, loss_curves, strip
from barrier_diffusers.evaluation.report import REPORT_NAME, write_report
from barrier_diffusers.evaluation.tables import print_metrics
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.loading import module_hashes
from barrier_diffusers.objectives import Objective
from barrier_diffusers.protection.targets import Snapshots, snapshot_of
from barrier_diffusers.training.checkpoints import Checkpoints
from barrier_diffusers.training.preparation import rates_of_maps
from barrier_diffusers.training.runs import open_run
from barrier_diffusers.training.unlearn import unlearn
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, fingerprint, manifest
from ddpm_ext.attacks import Images, attack_images, run_attacks
from ddpm_ext.diffusion import LabelDenoiser, LabelRows, UnlearningRows, draw
from ddpm_ext.loading import load_pipeline, load_rows
from ddpm_ext.metrics import EvaluationLabels, evaluate, make_evaluation_labels, make_judge, real_images
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
    anchors = anchor_ids(config, forget.labels, forget_ids, retain_ids, data.names, generator)
    with_images = not objective.samples_from_model or config.saliency_mask is not None
    rows = LabelRows(
        forget.labels, forget.images if with_images else None, anchors if objective.needs_anchor else None, null
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
    labels_N: Tensor,
    forget_ids: list[int],
    retain_ids: list[int],
    names: list[str],
    generator: torch.Generator,
) -> Tensor:
    """The label whose prediction each forget image is to get: the named one, or a retained one at random.

    Raises:
        ValueError: an anchor that there is not.
    """
    anchors = [anchor for anchor in config.objective.anchors_of(config.concepts, labels=True) if anchor is not None]
    if not anchors:
        return torch.tensor(retain_ids)[torch.randint(len(retain_ids), (len(labels_N),), generator=generator)]
    for anchor in anchors:
        if anchor not in names:
            raise ValueError(f"objective.anchor {anchor!r} is no label of the data: {', '.join(names)}")
    chosen = {label: names.index(anchor) for label, anchor in zip(forget_ids, anchors, strict=True)}
    return torch.tensor([chosen[int(label)] for label in labels_N])


@torch.no_grad()
def relative_drifts(barrier: Barrier, before: Snapshots) -> dict[str, float]:
    """|W - W0| / |W0| of every map, with or without a protection."""
    pairs = [(entry.layer.weight.float(), before[entry.name][0].float()) for entry in barrier.maps]
    ratios = torch.stack([(now - then).norm() / then.norm() for now, then in pairs]).tolist()
    return {entry.name: round(value, 6) for entry, value in zip(barrier.maps, ratios, strict=True)}


@dataclass
class Job:
    """What a run started from, as far as its end asks for it again."""

    config: UnlearnConfig
    output: Path
    cache: Path
    pipeline: ClassConditionalDDPMPipeline
    barrier: Barrier
    snapshots: Snapshots
    judge: Judge | None
    questions: EvaluationLabels
    before: np.ndarray  # images (N, S, S, C) of the questions' labels
    real: np.ndarray | None
    attack_images: Images
    base_hash: str


def finish(job: Job, history: dict[str, list[float]], facts: dict[str, Any]) -> None:
    """Save the weights first, then look at what they do: images after, metrics, pictures, manifest, attacks."""
    config, output, pipeline = job.config, job.output, job.pipeline
    pipeline.unet.eval()
    (job.barrier if config.protected else config.barrier).save_pretrained(output)
    trained, everything = job.barrier.num_trainable, sum(p.numel() for p in pipeline.unet.parameters())
    facts |= {"num_trainable": trained, "num_parameters": everything}
    facts |= {"percent_trainable": round(100 * trained / everything, 4)}
    facts["drift"] = relative_drifts(job.barrier, job.snapshots)
    job.barrier.remove()
    pipeline.save_pretrained(output)
    after = generate(pipeline, job.questions.labels, config.evaluation.sampling, desc="images after")
    was, now = as_rgb(job.before), as_rgb(after)
    before_after_grid(was, now, job.questions.labels, job.questions.forgotten, output / "before_after.png")
    loss_curves(history, output / "loss_curves.png")
    metrics: dict[str, Any] = {"num_images": len(after), **facts}
    if job.judge is not None:
        metrics = {
            **evaluate(config.evaluation, job.judge, job.questions, job.before, after, job.real, job.cache),
            **facts,
        }
        print_metrics(metrics, config.evaluation.attribute, job.questions.forgotten)
    write_json(output / METRICS_NAME, metrics)
    hashes = {"base_denoiser": job.base_hash, **module_hashes(pipeline)}
    write_json(output / MANIFEST_NAME, manifest(config, hashes, history=history, **facts))
    if job.attack_images and job.judge is not None:
        place = (job.judge, job.questions, after, output)
        metrics |= run_attacks(pipeline, config.evaluation, job.attack_images, *place)
        write_json(output / METRICS_NAME, metrics)
    print(f"pipeline: {output}\npicture:  {output / 'before_after.png'}")
    print(f"report:   {write_report([output], output / REPORT_NAME)}")


def main(config: UnlearnConfig) -> None:
    """Load -> before -> protect -> train -> save -> after."""
    objective = chosen_objective(config)
    accelerator = open_run(config)
    output, device = Path(config.output_dir), accelerator.device
    checkpoints = Checkpoints(accelerator, output, config, config.checkpoints_total_limit)
    checkpoint = checkpoints.find(config.resume_from_checkpoint)
    set_seed(config.seed)
    pipeline = load_pipeline(config.pretrained_model_name_or_path).to(device)
    unet, denoiser = pipeline.unet, LabelDenoiser(pipeline)
    hashes = module_hashes(pipeline)
    questions = make_evaluation_labels(config.evaluation, pipeline.labels, config.concepts)
    judge = make_judge(config.evaluation, pipeline.labels) if config.evaluation.judge else None
    barrier = Barrier(unet, config.barrier)
    rates_of_maps(barrier.maps, config.learning_rates)  # an error now, not after the data is read
    with accelerator.main_process_first():
        rows = unlearning_rows(config, objective, pipeline)
    cache = Path(config.cache_dir or output / "cache")
    before, real, to_attack = np.empty(0), None, {}
    if accelerator.is_main_process:
        real = real_images(config.evaluation, config.data, pipeline, config.concepts) if judge else None
        to_attack = attack_images(config.evaluation, config.data, pipeline, config.concepts)
        made_by = fingerprint(hashes)
        before = generate_cached(pipeline, questions.labels, config.evaluation.sampling, cache, made_by)
    accelerator.wait_for_everyone()
    if accelerator.process_index:  # the first process draws as a single one would, the others their own noise
        set_seed(config.seed + accelerator.process_index)
    snapshots = {entry.name: snapshot_of(entry.layer) for entry in barrier.maps}

    def validate(step: int) -> None:
        images = generate(pipeline, config.validation_prompt, config.evaluation.sampling, desc="validation")
        strip(images, config.validation_prompt, output / "validation" / f"step-{step:06d}.png")

    barrier, results = unlearn(
        accelerator,
        config,
        objective,
        barrier,
        denoiser,
        rows,
        checkpoints,
        checkpoint,
        {},
        pipeline.resolution,
        validate,
    )
    if accelerator.is_main_process:
        seen = (before, real, to_attack, hashes["unet"])
        job = Job(config, output, cache, pipeline, barrier, snapshots, judge, questions, *seen)
        finish(job, results.pop("history"), results)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, UnlearnConfig)
