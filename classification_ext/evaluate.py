"""Judge a classifier that was made to forget: UA, RA, TA, MIA, likelihood-ratio attack, gap to retraining.

    python -m classification_ext.evaluate --config classification_ext/configs/fashion_evaluate.yaml

Any field of `EvaluateConfig` is a dotted flag. output_dir gets evaluation.json.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from pathlib import Path

import torch

from barrier_diffusers.evaluation.judged_model import require_another
from barrier_diffusers.evaluation.tables import print_gaps
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import manifest, module_hash
from classification_ext.data import load_split, make_splits
from classification_ext.metrics import evaluate, print_table
from classification_ext.models import load_classifier
from classification_ext.relearning import relearning
from classification_ext.settings import EvaluateConfig

EVALUATION_NAME = "evaluation.json"


@in_output_folder()
def main(config: EvaluateConfig) -> None:
    """Load -> measure -> write."""
    output = Path(config.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_classifier(config.pretrained_model_name_or_path).to(device)
    reads = (model.resolution, model.num_channels, model.names)
    train, test = (load_split(config, split, *reads) for split in (config.train_split, config.test_split))
    splits = make_splits(train, test, config=config)
    metrics = evaluate(model, splits, config=config.evaluation, seed=config.seed, device=device)
    hashes = {"model": module_hash(model), **splits.digests()}
    if config.control is not None:
        control = load_classifier(config.control).to(device)
        if list(control.names) != list(model.names):
            raise ValueError(f"control {config.control!r} has other labels than what is judged")
        hashes["control"] = module_hash(control)
        judged, named = ({"weights": hashes[name]} for name in ("model", "control"))
        require_another("control", config.control, judged=judged, named=named)
        metrics["relearning"] = relearning(model, control, splits, config=config, device=device)
    write_json(output / EVALUATION_NAME, manifest(config, hashes, metrics=metrics))
    print_table(None, metrics, title=config.pretrained_model_name_or_path)
    if "relearning" in metrics:
        what = " and ".join(config.classes) or "the forget images"
        print_gaps([{"attack": "relearning", "concept": what, **metrics["relearning"]["gap"]}])
    print(f"numbers: {output / EVALUATION_NAME}")


if __name__ == "__main__":
    run_script(main, EvaluateConfig)
