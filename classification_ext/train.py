"""Train an image classifier, or retrain one without what is to be forgotten.

    accelerate launch -m classification_ext.train --config classification_ext/configs/fashion_train.yaml

Any field of `TrainConfig` is a dotted flag. output_dir becomes the classifier, with metrics.json and manifest.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.evaluation.pictures import loss_curves
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, manifest, module_hash
from classification_ext.data import load_split, make_splits
from classification_ext.metrics import correct, predict
from classification_ext.models import ARCHITECTURES, Classifier, build_classifier
from classification_ext.settings import TrainConfig
from classification_ext.supervised import fit, open_seeded_run


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
    seconds = fit(trainer, config, recipe=config, model=model, images=train)
    if not accelerator.is_main_process:
        return
    if config.save_dtype == "fp16" and isinstance(model, Classifier):
        model.half().save_pretrained(output)
        model.float()  # what is tested is what is saved
    else:
        model.save_pretrained(output)
    scores: dict[str, Any] = {}
    for name, images in (("train", train), ("test", test)):
        right = correct(predict(model, images, config.eval_batch_size, accelerator.device), images.labels)
        scores[f"{name}_accuracy"] = share(right)
        present = [label for label in names if len(images.rows_of(label))]
        scores[f"{name}_per_label"] = {
            label: share(right[images.rows_of(label).numpy()])["value"] for label in present
        }
    facts = {"num_steps": trainer.max_steps, "seconds_training": seconds}
    loss_curves(trainer.history.values, output / "loss_curves.png")
    write_json(output / METRICS_NAME, {**scores, **facts})
    hashes = {**digests, "model": module_hash(model)}
    write_json(output / MANIFEST_NAME, manifest(config, hashes, **facts, history=trainer.history.values))
    said = ", ".join(f"{name} {scores[f'{name}_accuracy']['value']:.2f} %" for name in ("train", "test"))
    print(f"accuracy: {said}; {seconds:.0f} s on {torch.get_num_threads()} threads\nclassifier: {output}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, TrainConfig)
