"""Short runs of train_scripts/unlearn_sd.py on the embedded pipeline, in this process."""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_scripts"))

from unlearn_sd import main

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "assets" / "fashion_sd"
SHORT = {
    "max_train_steps": 3,
    "evaluation.images_per_label": 2,
    "evaluation.sampling.num_inference_steps": 2,
    "report_to": "none",
    "barrier.reduced_dim": 4,
    "max_retain_images": 64,
    "certificate.num_images": 8,
}


def as_words(config, settings):
    """Command-line words: a file of train_scripts/configs and what differs from it."""
    words = ["--config", str(ROOT / "train_scripts/configs" / config)]
    return words + [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def flags(output, **changes):
    """Command-line words of a short run."""
    return as_words("fashion_class.yaml", {**SHORT, "output_dir": output, **changes})


def run(output, cache, **changes):
    """(metrics, manifest) of one run; accelerate forgets the last run's precision first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse_config(UnlearnConfig, flags(output, cache_dir=cache, **changes)))
    return json.loads((output / "metrics.json").read_text()), json.loads((output / "manifest.json").read_text())


TINY = {
    "concept": "boot",
    "forget_prompts": '["a photo of a red boot"]',
    "retain_prompts": '["a sneaker"]',
    "num_generated_images": 2,
    "generation.num_inference_steps": 2,
    "generation.resolution": 32,
    "evaluation.sampling.num_inference_steps": 2,
    "evaluation.sampling.resolution": 32,
    "evaluation.images_per_label": 1,
    "resolution": 32,
    "train_batch_size": 2,
    "max_train_steps": 2,
    "learning_rate": 0.01,
    "report_to": "none",
    "objective.anchor": "sneaker",
    "objective.alpha": 1.0,
    "barrier.reduced_dim": 4,
    "barrier.use_actual_bounds": "true",
}


def run_tiny(source, output, **changes):
    """The manifest of one run on a pipeline of `pipelines`, from its folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"pretrained_model_name_or_path": source, "output_dir": output, **TINY, **changes}
    main(parse_config(UnlearnConfig, [word for name, value in settings.items() for word in (f"--{name}", str(value))]))
    return json.loads((output / "manifest.json").read_text())
