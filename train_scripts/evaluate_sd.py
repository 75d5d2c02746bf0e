"""Judge an unlearned diffusion pipeline: what it still shows on plain prompts, and what attacks bring back.

    python train_scripts/evaluate_sd.py --config train_scripts/configs/evaluate_fashion.yaml

Any field of `EvaluateConfig` is a dotted flag (`--inversion.num_steps 1000`). output_dir gets evaluation.json, the
same for the same settings, weights, images and machine; seconds.json, which never is; and attacks.png.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from barrier_diffusers.architectures import Diffusion
from barrier_diffusers.erased import ErasedConcepts, read_erased
from barrier_diffusers.evaluation.erasure import evaluate_erasure, make_questions
from barrier_diffusers.evaluation.post_attack import Judge, forgotten_concepts, images_hash, rows_of, run_attacks
from barrier_diffusers.evaluation.report import image_rows, print_attacks, print_metrics
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.files import write_json
from barrier_diffusers.generation import generate
from barrier_diffusers.hub import load_pipeline
from barrier_diffusers.training import claim_output_dir, manifest, module_hash, module_hashes, run_script

EVALUATION_NAME, SECONDS_NAME, PICTURE_NAME = "evaluation.json", "seconds.json", "attacks.png"
PLACES = ("output_dir", "overwrite_output_dir")  # settings that change no number


def load_judged(config: EvaluateConfig) -> Any:
    """The pipeline under judgement, its adapter merged into the weights."""
    pipeline = load_pipeline(config.pretrained_model_name_or_path)
    if config.lora_weights:
        pipeline.load_lora_weights(config.lora_weights)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline


def erased_besides(config: EvaluateConfig) -> list[ErasedConcepts]:
    """What the pipeline was made to forget beside the concepts of this evaluation."""
    found = read_erased(config.lora_weights or config.pretrained_model_name_or_path)
    mine = set(config.concept_config.concepts)
    others = [ErasedConcepts([name for name in entry.concepts if name not in mine], entry.captions) for entry in found]
    return [entry for entry in others if entry.concepts]


def main(config: EvaluateConfig) -> None:
    """Load -> check -> plain prompts -> attacks -> table, JSON, picture."""
    output = claim_output_dir(config.output_dir, config.overwrite_output_dir, resume=False)
    for name in (EVALUATION_NAME, SECONDS_NAME, PICTURE_NAME):
        (output / name).unlink(missing_ok=True)
    evaluation, concepts = config.evaluation, config.concept_config
    judge = Judge(str(evaluation.classifier), concepts.concepts)
    pipeline = load_judged(config)
    Diffusion(pipeline).check_resolution(config.resolution)
    erased = erased_besides(config)
    questions = make_questions(evaluation, concepts, erased)
    forgotten = forgotten_concepts(evaluation, concepts, questions, erased, config.resolution)
    for budget in config.budgets.values():
        for entry in forgotten:
            budget.check(pipeline, entry)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, hashes = None, module_hashes(pipeline)
    if config.base_model:
        base = load_pipeline(config.base_model)
        hashes |= {f"base_{name}": digest for name, digest in module_hashes(base).items()}
        before = generate(base.to(device), questions.prompts, evaluation.sampling, desc="images before")
        del base
    after = generate(pipeline.to(device), questions.prompts, evaluation.sampling, desc="images after")
    attribute, metrics = evaluate_erasure(evaluation, questions, before, after)
    print_metrics(metrics, attribute, questions.forgotten)
    plain = {entry.concept: after[rows_of(questions, entry.concept)] for entry in forgotten}
    results, seconds, attacked = run_attacks(pipeline, forgotten, config.budgets, judge, plain)
    print_attacks(results, seconds)

    shown = {f"plain: {concept}": images for concept, images in plain.items()} | attacked
    columns = min(12, evaluation.images_per_label)
    labels = [label for label, images in shown.items() for _ in images[:columns]]
    rows = np.concatenate([images[:columns] for images in shown.values()])
    image_rows(rows, labels, output / PICTURE_NAME, columns)
    hashes |= {"classifier": module_hash(judge.classifier)}
    hashes |= {f"images of {entry.concept}": images_hash(entry.images) for entry in forgotten}
    record = manifest(config, hashes, classes=metrics, attacks=results)
    record["settings"] = {name: value for name, value in record["settings"].items() if name not in PLACES}
    write_json(output / SECONDS_NAME, seconds)
    write_json(output / EVALUATION_NAME, record)
    print(f"numbers: {output / EVALUATION_NAME}\npicture: {output / PICTURE_NAME}")


if __name__ == "__main__":
    run_script(main, EvaluateConfig)
