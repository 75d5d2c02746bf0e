"""Make a diffusion pipeline forget a concept while BARRIER protects the rest.

    accelerate launch train_scripts/unlearn_sd.py --config train_scripts/configs/fashion_class.yaml

Any field of `UnlearnConfig` is a dotted flag (`--barrier.lambda_interval 1`). output_dir becomes the unlearned
pipeline (or the LoRA adapter), with metrics.json, manifest.json, the pictures and a model card beside it.
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

from barrier_diffusers import Barrier
from barrier_diffusers.data.concepts import encode_concepts, load_concepts
from barrier_diffusers.data.erased_concepts import ERASED_NAME, ErasedConcepts, as_json, read_erased
from barrier_diffusers.evaluation.certification import HeldOut, held_out_images, write_certificate
from barrier_diffusers.evaluation.erasure import (
    EvaluationPrompts,
    check_evaluation_prompts,
    evaluate_erasure,
    generate_cached,
    make_evaluation_prompts,
)
from barrier_diffusers.evaluation.pictures import before_after_grid, loss_curves, strip
from barrier_diffusers.evaluation.report import REPORT_NAME, write_report
from barrier_diffusers.evaluation.tables import print_metrics
from barrier_diffusers.models.architectures import components, get_architecture
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import generate
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
    push_folder,
    save_adapter,
    save_model_card,
    save_pipeline,
)
from barrier_diffusers.training.checkpoints import Checkpoints
from barrier_diffusers.training.preparation import apply_edit, maps_of_prompts, prompt_inputs, rates_of_maps
from barrier_diffusers.training.runs import open_run
from barrier_diffusers.training.unlearn import unlearn
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, fingerprint, manifest
from barrier_diffusers.workflow.settings import UnlearnConfig, chosen_objective, data_needs


def validate(accelerator: Accelerator, pipeline: Any, config: UnlearnConfig, output: Path, step: int) -> None:
    """Sample the validation prompts as the pipeline is now, for the output folder and the trackers."""
    images = generate(pipeline, config.validation_prompt, config.evaluation.sampling, desc="validation")
    strip(images, config.validation_prompt, output / "validation" / f"step-{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": images}, step=step, **layout)


@dataclass
class Job:
    """What a run started from, as far as its end asks for it again."""

    config: UnlearnConfig
    output: Path
    pipeline: Any
    network: Any
    barrier: Barrier
    questions: EvaluationPrompts
    before: np.ndarray  # images (N, H, W, 3) of the questions' prompts
    base_hash: str
    erased: list[ErasedConcepts]  # by earlier runs and this one
    repo_id: str | None  # hub repository that gets the result
    held_out: HeldOut | None  # what the certificate is about


def finish(job: Job, results: dict[str, Any]) -> None:
    """Save the weights first, then look at what they do: images after, metrics, pictures, model card, manifest."""
    config, output, pipeline, questions = job.config, job.output, job.pipeline, job.questions
    job.network.eval()
    (job.barrier if config.protected else config.barrier).save_pretrained(output)
    if config.rank:
        save_adapter(pipeline, output)
    else:
        save_pipeline(pipeline, output)
    write_json(output / ERASED_NAME, as_json(job.erased))
    write_certificate(output, job.barrier, pipeline, job.held_out, config.certificate, config.resolution)
    job.barrier.remove()
    after = generate(pipeline, questions.prompts, config.evaluation.sampling, desc="images after")
    if config.merge_adapter:
        job.network.fuse_lora()
        job.network.unload_lora()
        save_pipeline(pipeline, output / "merged")
        write_json(output / "merged" / ERASED_NAME, as_json(job.erased))
    red = questions.forgotten + questions.erased_before
    before_after_grid(job.before, after, questions.labels, red, output / "before_after.png")
    if results["history"]:
        loss_curves(results["history"], output / "loss_curves.png")
    facts = {key: value for key, value in results.items() if key != "history"}
    metrics: dict[str, Any] = {"num_images": len(after), **facts}
    if config.evaluation.classifier:
        attribute, scores = evaluate_erasure(config.evaluation, questions, job.before, after)
        metrics = {**scores, **facts}
        print_metrics(metrics, attribute, questions.forgotten)
    write_json(output / METRICS_NAME, metrics)
    objective, protection = config.objective.name, config.barrier.summary
    base, adapter = config.pretrained_model_name_or_path, config.rank > 0
    absent = [part for part in get_architecture(type(pipeline).__name__).optional if getattr(pipeline, part) is None]
    where = job.repo_id or str(output)
    card = ModelCardFacts(
        where=where,
        base=base,
        forgotten=questions.forgotten,
        objective=objective,
        protection=protection,
        adapter=adapter,
        metrics=metrics,
        absent=absent,
    )
    save_model_card(output, card)
    hashes = {"base_denoiser": job.base_hash, **module_hashes(pipeline)}
    write_json(output / MANIFEST_NAME, manifest(config, hashes, **results))
    print(f"{'adapter' if adapter else 'pipeline'}: {output}\npicture:  {output / 'before_after.png'}")
    print(f"report:   {write_report([output], output / REPORT_NAME)}")
    if config.push_to_hub:
        print(f"hub:      {push_folder(output, where)}")


def main(config: UnlearnConfig) -> None:
    """Load -> encode -> before -> protect -> train -> save -> after."""
    objective = chosen_objective(config)
    accelerator, output = open_run(config), Path(config.output_dir)
    repo_id = None
    if config.push_to_hub and accelerator.is_main_process:
        repo_id = claim_repo(config.repo_id, config.hub_private)
    accelerator.wait_for_everyone()
    checkpoints = Checkpoints(accelerator, output, config, config.checkpoints_total_limit)
    checkpoint = checkpoints.find(config.resume_from_checkpoint)
    set_seed(config.seed)
    frozen_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        config.revision,
        config.variant,
        frozen_dtype,
        frozen_dtype if config.rank else torch.float32,
        config.pipeline_config,
        config.original_config,
    )
    denoiser = PipelineDenoiser(pipeline, config.guidance_scale)
    denoiser.check_resolution(config.resolution)
    denoiser.check_text_encoder(pipeline)
    config.barrier.targets = config.barrier.targets or list(denoiser.architecture.targets)
    network = denoiser.network
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(network, accelerator.device)
    if config.attention_backend is not None:
        choose_attention_backend(network, config.attention_backend, accelerator.device)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    for module in components(pipeline).values():
        module.to(accelerator.device)
        module.requires_grad_(module is network).eval()
    hashes = module_hashes(pipeline)
    base_hash, made_by = hashes[denoiser.architecture.denoiser], fingerprint(hashes, str(frozen_dtype))
    cache = Path(config.cache_dir or output / "cache")
    if config.rank:
        add_adapter(network, config.barrier, config.rank)
    barrier = Barrier(network, config.barrier)
    rates_of_maps(barrier.maps, config.learning_rates)  # an error now, not after the data is read
    if objective.check_maps is not None:
        objective.check_maps(barrier.maps)

    by_prompts = maps_of_prompts(config, denoiser)
    steer, needs = config.objective, data_needs(config, objective, set(by_prompts) == set(config.barrier.targets))
    with accelerator.main_process_first():  # the others find the cache filled
        erased = read_erased(config.pretrained_model_name_or_path, config.revision)
        kept = erased if config.protect_erased else []
        concepts = load_concepts(config, pipeline, cache, made_by, config.seed, needs, kept)
        questions = make_evaluation_prompts(config.evaluation, config, erased)
        check_evaluation_prompts(config.evaluation, questions)
        data = None
        if objective.edit is None:
            anchors = (
                concepts.anchors(steer.anchor, steer.anchor_prompt, config.seed) if objective.needs_anchor else None
            )
            data = encode_concepts(concepts, anchors, pipeline, cache, config.resolution, needs)
    before, held_out = np.empty(0), None
    if accelerator.is_main_process:
        before = generate_cached(pipeline, questions.prompts, config.evaluation.sampling, cache, made_by)
        if config.protected:
            held_out = held_out_images(config.certificate, config.evaluation, config, erased, questions, before)
    accelerator.wait_for_everyone()
    if accelerator.process_index:  # the first process draws as a single one would, the others their own noise
        set_seed(config.seed + accelerator.process_index)
    now_erased = [*erased, ErasedConcepts(config.concepts, sorted(set(concepts.forget[config.caption_column])))]
    job = Job(config, output, pipeline, network, barrier, questions, before, base_hash, now_erased, repo_id, held_out)
    if objective.edit is not None:
        if accelerator.is_main_process:
            start = time.perf_counter()
            apply_edit(objective, steer, barrier, pipeline, concepts, config.seed)
            finish(job, {"history": {}, "num_steps": 0, "seconds_training": round(time.perf_counter() - start, 2)})
        accelerator.wait_for_everyone()
        return

    given = prompt_inputs(by_prompts, pipeline, concepts.retain_captions) if by_prompts and not checkpoint else {}
    job.barrier, results = unlearn(
        accelerator,
        config,
        objective,
        barrier,
        denoiser,
        data,
        checkpoints,
        checkpoint,
        given,
        config.resolution,
        partial(validate, accelerator, pipeline, config, output),
    )
    if accelerator.is_main_process:
        finish(job, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def command() -> None:
    """The console command barrier-unlearn."""
    run_script(main, UnlearnConfig)


if __name__ == "__main__":
    command()
