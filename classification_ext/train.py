"""Train an image classifier, or retrain one without what is to be forgotten.

    accelerate launch -m classification_ext.train --config classification_ext/configs/fashion_train.yaml

Any field of `TrainConfig` is a dotted flag. output_dir becomes the classifier, with metrics.json and manifest.json.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from pathlib import Path
from typing import Any

import torch

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.evaluation.pictures import loss_curves
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import save_whole, write_json
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, fingerprint, manifest, module_hash
from classification_ext.data import load_split, make_splits
from classification_ext.metrics import correct, predict
from classification_ext.models import ARCHITECTURES, AnyClassifier, Classifier, build_classifier
from classification_ext.settings import TrainConfig
from classification_ext.supervised import fit, open_seeded_run


def save_weights(config: TrainConfig, model: AnyClassifier) -> None:
    """Write the classifier in the precision that the settings name."""
    output = Path(config.output_dir)
    if config.save_dtype == "fp16" and isinstance(model, Classifier):
        save_whole(model.half().save_pretrained, output, last="config.json")
        model.float()  # what is tested is what is saved
    else:
        save_whole(model.save_pretrained, output, last="config.json")


def accuracies(config: TrainConfig, model: AnyClassifier, *, name: str, images: LabelledImages) -> dict[str, Any]:
    """The share of all images, and of those of each label, that get their own label."""
    device = next(model.parameters()).device
    right = correct(predict(model, images, config.eval_batch_size, device), images.labels)
    rows = {label: images.rows_of(label).numpy() for label in images.names}
    per_label = {label: share(right[chosen])["value"] for label, chosen in rows.items() if len(chosen)}
    return {f"{name}_accuracy": share(right), f"{name}_per_label": per_label}


@in_output_folder(also_written=["README.md"])
def main(config: TrainConfig) -> None:
    """Load -> build -> train -> test -> save."""
    trainer = open_seeded_run(config)
    accelerator, output = trainer.accelerator, Path(config.output_dir)
    side, channels = config.resolution, config.num_channels
    with accelerator.main_process_first():
        if config.model_name_or_path not in ARCHITECTURES:  # what is fine-tuned says itself what it reads
            probe = build_classifier(config.model_name_or_path, ["0", "1"], side, channels, config.seed)
            side, channels = probe.resolution, probe.num_channels
        train = load_split(config, config.train_split, side, channels)
        test = load_split(config, config.test_split, side, channels, train.names)
    names, digests = train.names, {"train": train.digest(), "test": test.digest()}
    if config.forgets:
        splits = make_splits(train, test, config)
        train, test = splits.retain, splits.test
    model = build_classifier(config.model_name_or_path, names, side, channels, config.seed)
    trainer.checkpoints.inputs = {"base model": module_hash(model), "data": fingerprint(digests)}
    seconds = fit(trainer, config, recipe=config, model=model, images=train)
    if accelerator.is_main_process:
        save_weights(config, model)
        scores: dict[str, Any] = {}
        for name, images in (("train", train), ("test", test)):
            scores |= accuracies(config, model, name=name, images=images)
        facts = {"num_steps": trainer.max_steps, "seconds_training": seconds}
        loss_curves(trainer.history.values, output / "loss_curves.png")
        hashes = {**digests, "model": module_hash(model)}
        write_json(output / MANIFEST_NAME, manifest(config, hashes, **facts, history=trainer.history.values))
        write_json(output / METRICS_NAME, {**scores, **facts})
        said = ", ".join(f"{name} {scores[f'{name}_accuracy']['value']:.2f} %" for name in ("train", "test"))
        print(f"accuracy: {said}; {seconds:.0f} s on {torch.get_num_threads()} threads\nclassifier: {output}")
    trainer.end_run()


if __name__ == "__main__":
    run_script(main, TrainConfig)
