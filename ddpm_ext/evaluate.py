"""Judge a class-conditional DDPM: what is recognised, per label, and how near its images are to real ones.

    python -m ddpm_ext.evaluate --config ddpm_ext/configs/evaluate_fashion.yaml

With `concept` and `base_model` the pipeline is compared with the one it was before it forgot these labels.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from pathlib import Path

import torch

from barrier_diffusers.evaluation.erasure import generate_cached
from barrier_diffusers.evaluation.judge import as_rgb
from barrier_diffusers.evaluation.judged_model import require_another
from barrier_diffusers.evaluation.pictures import image_rows
from barrier_diffusers.evaluation.tables import print_metrics
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.loading import module_hashes
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import fingerprint
from ddpm_ext.attacks import attackers_view, run_attacks
from ddpm_ext.loading import load_pipeline
from ddpm_ext.metrics import evaluate, make_evaluation_labels, make_judge, real_images
from ddpm_ext.settings import EvaluateConfig

RESULT_NAME = "evaluation.json"


@in_output_folder()
def main(config: EvaluateConfig) -> None:
    """Generate -> judge -> write evaluation.json and the picture."""
    output = Path(config.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(config.pretrained_model_name_or_path).to(device)
    judge = make_judge(config.evaluation, pipeline.labels)
    asked = make_evaluation_labels(config.evaluation, pipeline.labels, forgotten=config.concepts)
    real = real_images(config.evaluation, config.data, pipeline=pipeline, forgotten=config.concepts)
    forgotten = attackers_view(config.evaluation, config.data, pipeline=pipeline, asked=asked)
    sampling, before = config.evaluation.sampling, None
    cache = Path(config.cache_dir or output / "cache")
    if config.base_model is not None:
        base = load_pipeline(config.base_model).to(device)
        if base.labels != pipeline.labels:
            raise ValueError(f"{config.base_model!r} has other labels than {config.pretrained_model_name_or_path!r}")
        base_hashes = module_hashes(base)
        require_another("base_model", config.base_model, judged=module_hashes(pipeline), named=base_hashes)
        made_by = fingerprint(base_hashes)
        before = generate_cached(base, asked.labels, sampling=sampling, cache=cache, model_hash=made_by)
    images = generate(pipeline, asked.labels, sampling=sampling)
    scores = evaluate(config.evaluation, judge, asked=asked, before=before, after=images, real=real, cache=cache)
    scores |= {"model": module_hashes(pipeline), "scheduler": type(pipeline.scheduler).__name__}
    image_rows(as_rgb(images), asked.labels, path=output / "images.png")
    if asked.forgotten:
        print_metrics(scores, config.evaluation.attribute, forgotten=asked.forgotten)
    else:
        low, high = scores["accuracy"]["interval_95"]
        print(f"recognised: {scores['accuracy']['value']:.1f} % of {len(images)} images ({low:.1f} to {high:.1f})")
    if forgotten:
        scores |= run_attacks(
            config.pretrained_model_name_or_path,
            pipeline,
            config.evaluation,
            forgotten=forgotten,
            judge=judge,
            asked=asked,
            plain=images,
            output=output,
            cache=cache,
        )
    write_json(output / RESULT_NAME, scores)
    print(f"result: {output / RESULT_NAME}")


if __name__ == "__main__":
    run_script(main, EvaluateConfig)
