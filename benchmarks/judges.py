"""Two judges on the same images: what each says of an unlearned model, and how far they agree.

    python -m benchmarks.judges --evaluation_dir runs/fashion_evaluation --concept sneaker

The first is the classifier that every table here is made with. The second is a small ResNet of transformers, an
AutoModelForImageClassification, that this command trains from scratch on the photos of `--train_data_dir` and keeps in
`--judge_dir`. The images are those that evaluate_sd.py left: `before` and `after`, with their labels in prompts.csv.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import cohen_kappa_score
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from barrier_diffusers.data.columns import with_texts
from barrier_diffusers.data.encoding import read_pixels
from barrier_diffusers.data.readers import read_rows
from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.evaluation.image_folder import read_folder
from barrier_diffusers.evaluation.judge import Judge
from barrier_diffusers.evaluation.judged_model import IMAGES_NAME
from barrier_diffusers.utils.checks import DATA, FOLDER, Checked, at_least, rules
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from benchmarks.pages import into_page

PROTOCOL = "concepts"  # of evaluate_sd.py, whose prompts ask for labels
SIDE, BATCH = 32, 128
SHIFT = 2  # pixels, of training images, at most
TEST_IMAGES = 2_000  # of the test split, the first


@dataclass(kw_only=True)
class JudgesConfig(Checked):
    """What is judged, by whom."""

    evaluation_dir: str  # output folder of evaluate_sd.py, which had a base_model
    concept: str  # the label that was forgotten
    classifier: str = "assets/fashion_classifier"  # the first judge
    judge_dir: str = "runs/second_judge"  # the second; trained if it is not there
    train_data_dir: str = "runs/fashion_mnist"  # of the second judge: columns image and class, splits train and test
    num_images: int = 12_000  # of the training split, the first
    num_epochs: int = 4
    seed: int = 0
    page: str | None = None  # gets the table between its marks
    json: str | None = None  # gets all numbers

    RULES = rules(evaluation_dir=FOLDER, train_data_dir=DATA, num_images=at_least(1), num_epochs=at_least(1))


def make_network(labels: Sequence[str]) -> ResNetForImageClassification:
    """A ResNet with one block in each of three stages, 0.7 million parameters."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    return ResNetForImageClassification(config)


def read_split(folder: str, split: str, most: int) -> tuple[torch.Tensor, list[str]]:
    """Pixels (N, 3, 32, 32) in [-1, 1] and their classes."""
    rows = with_texts(read_rows(folder, split, "image", ["class"]), "class")
    rows = rows.select(range(min(len(rows), most)))
    return read_pixels(rows, "image", SIDE, range(len(rows))), list(rows["class"])


def train_judge(config: JudgesConfig) -> None:
    """Train the second judge with AdamW, flips and shifts, say what it knows, and save it."""
    torch.manual_seed(config.seed)
    pixels, classes = read_split(config.train_data_dir, "train", config.num_images)
    names = sorted(set(classes))
    targets = torch.tensor([names.index(name) for name in classes])
    network = make_network(names)
    num_steps = config.num_epochs * (len(pixels) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=num_steps)
    network.train()
    for _ in range(config.num_epochs):
        for rows in torch.randperm(len(pixels)).split(BATCH)[: len(pixels) // BATCH]:
            down, across = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
            images = pixels[rows].roll((down, across), (2, 3))
            images = images.flip(3) if torch.rand(()) < 0.5 else images
            loss = torch.nn.functional.cross_entropy(network(images).logits, targets[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    held_out, wanted = read_split(config.train_data_dir, "test", TEST_IMAGES)
    with torch.no_grad():
        found = torch.cat([network(part).logits.argmax(1) for part in held_out.split(500)])
    right = [names[number] == name for number, name in zip(found.tolist(), wanted, strict=True)]
    network.save_pretrained(config.judge_dir)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(config.judge_dir)  # [-1, 1], as trained
    accuracy = {"test_accuracy": share(right), "num_images": len(pixels), "num_epochs": config.num_epochs}
    write_json(Path(config.judge_dir) / "metrics.json", accuracy)
    print(f"second judge: {100 * np.mean(right):.1f} % of {len(right)} test images")


def agreement(first: Sequence[str], second: Sequence[str]) -> dict[str, Any]:
    """How often two judges say the same, in percent, and Cohen's kappa, which counts out what chance gives (1960).

    Kappa is 1 where both say one and the same label of all images.
    """
    same = [a == b for a, b in zip(first, second, strict=True)]
    constant = len({*first, *second}) == 1
    return {"agreement": share(same), "kappa": 1.0 if constant else float(cohen_kappa_score(first, second))}


def scores(found: Mapping[str, Sequence[str]], labels: Sequence[str], concept: str) -> dict[str, Any]:
    """Unlearning accuracy, retain accuracies and the drop by one judge.

    Args:
        found: before and after -> the label that it gives each image.
        labels: what each image was asked for.
    """
    mine = [index for index, label in enumerate(labels) if label == concept]
    others = [index for index, label in enumerate(labels) if label != concept]
    result: dict[str, Any] = {"unlearning_accuracy": share([found["after"][index] != concept for index in mine])}
    for when in ("before", "after"):
        result[f"retain_accuracy_{when}"] = share([found[when][index] == labels[index] for index in others])
    drop = result["retain_accuracy_before"]["value"] - result["retain_accuracy_after"]["value"]
    return {**result, "retain_accuracy_drop": drop}


def compare(config: JudgesConfig) -> dict[str, Any]:
    """What both judges say of the images, and how far they agree, over all and by the label that was asked for."""
    images = Path(config.evaluation_dir) / IMAGES_NAME / PROTOCOL
    read = {when: read_folder(str(images / when)) for when in ("before", "after")}
    labels = [str(row.label) for row in read["before"][0]]
    sources = {"first": ClassifierSource(config.classifier), "second": ClassifierSource(config.judge_dir)}
    found: dict[str, dict[str, list[str]]] = {}
    for name, source in sources.items():
        judge = Judge(source, sorted(set(labels)))
        found[name] = {
            when: judge.recognise(judge.probabilities(judge.render(files.array())))
            for when, (_, files) in read.items()
        }
    both = {name: answers["before"] + answers["after"] for name, answers in found.items()}
    asked = labels * 2
    per_label = {}
    for label in sorted(set(labels)):
        mine = [index for index, value in enumerate(asked) if value == label]
        per_label[label] = agreement(*([answers[index] for index in mine] for answers in both.values()))
    return {
        "concept": config.concept,
        "judges": {name: scores(answers, labels, config.concept) for name, answers in found.items()},
        "agreement": agreement(both["first"], both["second"]),
        **{f"agreement_{when}": agreement(found["first"][when], found["second"][when]) for when in read},
        "per_label": per_label,
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """Two tables: what each judge says, and how far they agree."""
    names = {"first": "AttributeClassifier", "second": "ResNet of transformers"}
    lines = ["| judge | UA | retain before | retain after | drop |", "|---|---:|---:|---:|---:|"]
    for key, judged in result["judges"].items():
        shares = [judged[name]["value"] for name in ("unlearning_accuracy", "retain_accuracy_before")]
        shares += [judged["retain_accuracy_after"]["value"], judged["retain_accuracy_drop"]]
        lines.append(f"| {names[key]} | " + " | ".join(f"{value:.1f}" for value in shares) + " |")
    lines += ["", "| images of | agreement, % | 95 % interval | kappa | images |", "|---|---:|---:|---:|---:|"]
    rows = {"all": result["agreement"], "before": result["agreement_before"], "after": result["agreement_after"]}
    for name, entry in {**rows, **result["per_label"]}.items():
        same = entry["agreement"]
        low, high = same["interval_95"]
        kappa = f"{entry['kappa']:.2f}" if name in rows else ""  # of one label, chance leaves kappa nothing to say
        lines.append(f"| {name} | {same['value']:.1f} | {low:.1f} to {high:.1f} | {kappa} | {same['num_images']} |")
    return "\n".join(lines)


def main(config: JudgesConfig) -> None:
    """Train the second judge where it is not there, judge, print."""
    if not (Path(config.judge_dir) / "config.json").is_file():
        train_judge(config)
    result = compare(config)
    trained = json.loads((Path(config.judge_dir) / "metrics.json").read_text(encoding="utf-8"))
    result["second_judge"] = trained
    print(as_markdown(result))
    if config.json is not None:
        write_json(Path(config.json), result)
    if config.page is not None:
        into_page(Path(config.page), "judges", as_markdown(result) + "\n")


if __name__ == "__main__":
    run_script(main, JudgesConfig)
