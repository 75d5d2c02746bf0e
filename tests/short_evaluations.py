"""Short runs of train_scripts/evaluate_sd.py on the embedded pipeline, in this process."""

import json
import sys

import torch
from short_runs import BASE, ROOT, as_words

from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.models.publishing import save_pipeline
from barrier_diffusers.utils.command_line import parse_config

sys.path.insert(0, str(ROOT / "train_scripts"))

from evaluate_sd import main

SHORT = {
    "pretrained_model_name_or_path": BASE,
    "base_model": "null",
    "evaluation.images_per_label": 2,
    "evaluation.sampling.num_inference_steps": 2,
    "fidelity.extractors": "[classifier=assets/fashion_classifier]",
    "fidelity.kid_subsets": 5,
    "inversion.num_steps": 2,
    "inversion.batch_size": 4,
    "prompt_search.num_steps": 1,
    "prompt_search.batch_size": 4,
    "prompt_search.num_candidates": 2,
    "prompt_search.num_searches": 1,
    "prompt_search.num_checks": 4,
    "certificate.num_images": 8,
    "relearning.num_steps": 2,
    "benign.num_steps": 2,
}


def flags(output, **changes):
    return as_words("evaluate_fashion.yaml", {**SHORT, "output_dir": output, **changes})


def evaluate(output, **changes):
    main(parse_config(EvaluateConfig, flags(output, **changes)))
    return json.loads((output / "metrics.json").read_text())


def twin_of_base(folder):
    """A copy of the embedded pipeline that gives the same images, although one of its weights differs: the embedding
    of a token that no prompt has."""
    pipeline = load_pipeline(str(BASE))
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[0] += 1
    save_pipeline(pipeline, folder)
    return folder
