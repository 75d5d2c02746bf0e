"""Score a text-to-image pipeline: does the classifier recognise, in generated images, what the prompt asked for?"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from barrier_diffusers.data.captions import cycle, labels_in_texts
from barrier_diffusers.data.readers import load_image_text
from barrier_diffusers.evaluation.accuracy import Answers, share
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.evaluation.pictures import image_rows
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.utils.checks import FILE_OR_FOLDER, FOLDER, MODEL, WRITTEN, Checked, at_least, rules
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json


@dataclass
class ScoreConfig(Checked):
    """What is scored, on which prompts."""

    pipeline: str = "assets/fashion_sd"  # folder or hub id of what is scored
    classifier: str = "assets/fashion_classifier"  # folder of the AttributeClassifier that scores
    data_dir: str = "assets/fashion_images"  # its captions are the prompts
    split: str = "test"  # of the data
    label_column: str = "class"  # whose values the images are grouped by
    images_per_label: int = 60  # made for each of them
    output: str = "assets/fashion_sd_scores.json"  # JSON file with the scores
    picture: str = "assets/fashion_sd.png"  # some of the images
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    RULES = rules(
        pipeline=MODEL,
        classifier=FOLDER,
        data_dir=FILE_OR_FOLDER,
        output=WRITTEN,
        picture=WRITTEN,
        images_per_label=at_least(1),
    )


def main(config: ScoreConfig) -> None:
    """Generate, recognise, write the scores and a picture."""
    rows = load_image_text(config.data_dir, config.split)
    captions: dict[str, set[str]] = {}
    for label, text in zip(rows[config.label_column], rows["text"], strict=True):
        captions.setdefault(label, set()).add(text)
    prompts = [text for label in sorted(captions) for text in cycle(sorted(captions[label]), config.images_per_label)]
    pipeline = StableDiffusionPipeline.from_pretrained(config.pipeline, dtype=torch.float32)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    images = generate(pipeline, prompts, sampling=config.sampling)
    classifier = ClassifierSource(config.classifier, setting="classifier").load()
    predicted = Answers.of(classifier, images).labels
    wanted = {name: labels_in_texts(prompts, labels) for name, labels in classifier.attributes.items()}
    scores = {
        name: share([p == w for p, w in zip(predicted[name], wanted[name], strict=True) if w is not None])
        for name in wanted
    }
    name = config.label_column
    pairs = list(zip(predicted[name], wanted[name], strict=True))
    per_label = {label: share([p == w for p, w in pairs if w == label]) for label in sorted(captions)}
    report = {"scores": scores, f"per_{name}": per_label, "settings": asdict(config)}
    write_json(Path(config.output), report)
    labels = [label for label in sorted(captions) for _ in range(config.images_per_label)]
    image_rows(images, labels, path=Path(config.picture), columns=12)
    print("; ".join(f"{key} {entry['value']:.1f} %" for key, entry in scores.items()), f"of {len(images)} images")
    print("; ".join(f"{label} {entry['value']:.0f}" for label, entry in per_label.items()))


if __name__ == "__main__":
    run_script(main, ScoreConfig)
