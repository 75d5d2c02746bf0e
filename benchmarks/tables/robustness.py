"""The tables of robustness: what attacks bring back after ways to erase, beside a control that never knew the class.

Each row erases one class (or leaves the base model as it is), and attacks the result and the control of its class
alike. A class whose control is not among the assets has it trained first, from the recipe's own data
(`runs/fashion_mnist`, train_scripts/prepare_fashion_mnist.py); a control that was stopped goes on.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from barrier_diffusers.evaluation.pictures import error_bar, png
from barrier_diffusers.utils.run_records import METRICS_NAME
from benchmarks.tables.stable_diffusion import (
    ANCHORS,
    CONFIG,
    EVALUATE,
    FID,
    KEYS_AND_VALUES,
    PROJECTION,
    SHORT_LIST,
    UNLEARN,
    JudgedTable,
    objective_row,
    with_interval,
)
from benchmarks.tables.table import Metrics, Row, Script, lines_of, log_of

RECIPE = "barrier_diffusers.scripts.train_text_to_image"
TRAIN = Script(RECIPE, f"{RECIPE}:TrainConfig")
BASE = "assets/fashion_sd"
ROBUST = "train_scripts/configs/fashion_robust.yaml"
ADVERSARIAL = "train_scripts/configs/fashion_adversarial.yaml"  # a peer's recipe: an adversary's tokens in training
CLASSES = SHORT_LIST
TUNED_ON = ("sneaker", "dress")  # the classes that settings were chosen on
NOTHING, NEVER_KNEW = "nothing", "control"
WITHOUT_BARRIER = {"barrier.lambda_interval": 0.0, "barrier.use_actual_bounds": False}
PAGES = ("docs/robustness.md",)
# what the robust recipe aims at and retains by, which costs no more steps
BEYOND = {"objective.anchor_target": "base", "objective.anchor_eta": 1.0, "caption_dropout": 0.2}
KEPT_GAPS = ("strongest", "mean_strongest", "mean_attackers", "half")
ESD = {"objective.name": "esd", "objective.num_inference_steps": 10, "max_train_steps": 150}
UCE = {"objective.name": "uce", "barrier.use_actual_bounds": False, **KEYS_AND_VALUES}

# way to erase -> its configuration file, and the flags that differ from it
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "rl alone": (CONFIG, WITHOUT_BARRIER),
    "BARRIER": (CONFIG, {}),  # as `make unlearn`
    "rl alone, beyond": (CONFIG, {**WITHOUT_BARRIER, **BEYOND}),
    "BARRIER, beyond": (CONFIG, BEYOND),
    "projection": (CONFIG, PROJECTION),
    "UCE": (CONFIG, objective_row("UCE", "none", UCE).flags),
    "ESD": (CONFIG, objective_row("esd", "none", ESD).flags),
    "SalUn mask 0.5": (CONFIG, {**WITHOUT_BARRIER, "saliency_mask": 0.5}),
    "adversarial peer": (ADVERSARIAL, {}),
    "robust without BARRIER": (ROBUST, WITHOUT_BARRIER),
    "robust": (ROBUST, {}),
}
NO_ANCHOR = ("ESD", "adversarial peer")  # ways that steer the class to nothing else


def row_of(concept: str, way: str) -> Row:
    """One class erased in one way."""
    flags: dict[str, Any] = {}
    if way in WAYS:
        flags = {**WAYS[way][1], "concept": concept}
        if way not in NO_ANCHOR:
            flags["objective.anchor"] = ANCHORS[concept]
    return Row({"erased by": way, "class": concept}, flags)


def control_of(concept: str, output: Path) -> Path:
    """The folder of the pipeline that never knew a class."""
    embedded = Path(f"assets/control_{concept}")
    return embedded if embedded.is_dir() else output / f"control_{concept}"


def train_control(concept: str, output: Path) -> Path:
    """The control of a class, trained now unless it is there."""
    folder = control_of(concept, output)
    if not (folder / "model_index.json").is_file():
        flags = {
            "exclude_concepts": f"[{concept}]",
            "pretrained_vae": f"{BASE}/vae",
            "output_dir": folder,
            "work_dir": output / f"control_{concept}_work",
            "checkpointing_steps": 250,
            "report_to": "none",
        }
        if any((output / f"control_{concept}_work").glob("*_training/checkpoints/step-*")):
            flags["resume_from_checkpoint"] = "latest"
        TRAIN.run(None, flags, log_of(output, folder.name))
    return folder


@dataclass(kw_only=True)
class ErasedTable(JudgedTable, ABC):
    """One run of unlearn_sd.py and one of evaluate_sd.py per row; a run that is there is not made again."""

    def files(self, row: Row) -> list[str]:
        """Both configuration files; the control's weights are named by its class."""
        way = row.cells["erased by"]
        return [*([WAYS[way][0]] if way in WAYS else []), self.evaluation]

    def run(self, chain: Sequence[Row], output: Path) -> list[Metrics]:
        """Erase, then judge."""
        return [self._run(row, output) for row in chain]

    @abstractmethod
    def _run(self, row: Row, output: Path) -> Metrics: ...

    def _erase(self, row: Row, output: Path) -> Metrics:
        """What the run says, which is made unless it is there."""
        folder = output / row.name
        if not (folder / METRICS_NAME).is_file() or not (folder / "unet").is_dir():
            flags = {"output_dir": folder, "cache_dir": output / "cache", "report_to": "none"}
            flags |= {"overwrite_output_dir": True, "evaluation.classifier": None}  # it is judged apart
            flags |= {"evaluation.images_per_label": 8}  # of the picture
            UNLEARN.run(WAYS[row.cells["erased by"]][0], {**row.flags, **flags}, log_of(output, row.name))
        return {"seconds_training": json.loads((folder / METRICS_NAME).read_text())["seconds_training"]}

    def _judge(self, flags: Mapping[str, Any], output: Path, name: str) -> dict[str, Any]:
        """The record of the evaluation that it makes in a folder of this name."""
        folder = output / name
        common = {"output_dir": folder, "overwrite_output_dir": True, "cache_dir": output / "attackers"}
        EVALUATE.run(self.evaluation, {**flags, **common, **self.judged}, log_of(output, name))
        return json.loads((folder / METRICS_NAME).read_text())


@dataclass(kw_only=True)
class RobustnessTable(ErasedTable):
    """Both sides under the same attacks; a row that was stopped goes on with the attackers that are left."""

    def _run(self, row: Row, output: Path) -> Metrics:
        way, concept = row.cells.values()
        control = train_control(concept, output)
        flags: dict[str, Any] = {"concept": concept, "control": control, "base_model": BASE}
        erased: dict[str, Any] = {}
        if way == NOTHING:
            flags |= {"pretrained_model_name_or_path": BASE, "base_model": None}
        elif way == NEVER_KNEW:
            flags |= {"pretrained_model_name_or_path": control, "control": None}
        else:
            erased = self._erase(row, output)
            flags["pretrained_model_name_or_path"] = output / row.name
        return {**robustness_numbers(self._judge(flags, output, f"{row.name}-judged")), **erased}

    def markdown(self, results: Mapping[str, Any]) -> dict[str, str]:
        """One line for each row: percentages and points, with 95 % intervals in brackets."""
        headings = ["erased by", "class", "UA", "retain drop", "FID ratio", "inversion over the control's"]
        headings += ["relearning over the control's: strongest", "mean attacker", "steps to half of the images"]
        lines = []
        for row in self.rows:
            if row.name in results:
                lines.append([*row.cells.values(), *cells_of(results[row.name]["metrics"])])
        return {self.name: lines_of([*headings, "seconds"], 2, lines)}

    def picture(self, results: Mapping[str, Any]) -> bytes | None:
        """What the strongest relearner shows over the control, against what was lost and what it took."""
        return trade_offs([results[row.name] for row in self.rows if row.name in results])


@dataclass(kw_only=True)
class RobustClassesTable(ErasedTable):
    """The robust recipe on one class after another, judged without attacks, which need a control for each."""

    def _run(self, row: Row, output: Path) -> Metrics:
        erased = self._erase(row, output)
        flags = {"concept": row.cells["class"], "base_model": BASE, "pretrained_model_name_or_path": output / row.name}
        return robustness_numbers(self._judge(flags, output, f"{row.name}-plain")) | erased

    def markdown(self, results: Mapping[str, Any]) -> dict[str, str]:
        """One line for each class, below them the mean and the worst of each column."""
        headings = ["class", "UA", "retain drop", "FID ratio", "seconds"]
        lines, columns = [], list[list[float]]()
        for row in self.rows:
            if row.name in results:
                numbers = results[row.name]["metrics"]
                accuracy, drop, ratio, *_, seconds = cells_of(numbers)
                lines.append([row.cells["class"], accuracy, drop, ratio, seconds])
                columns.append([numbers["unlearning_accuracy"]["value"], *map(float, (drop, ratio, seconds))])
        (accuracies, *others) = zip(*columns, strict=True)
        digits = (1, 1, 2, 0)
        for name, values in (
            (f"**mean of {len(columns)}**", [sum(column) / len(column) for column in (accuracies, *others)]),
            ("**worst**", [min(accuracies), *map(max, others)]),
        ):
            lines.append([name, *(f"{value + 0.0:.{places}f}" for value, places in zip(values, digits, strict=True))])
        return {self.name: lines_of(headings, 1, lines)}


MARKERS = "os^Dv"  # of the classes


def trade_offs(results: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG file: the relearning gap of each erased row, with its 95 % interval, against retain drop and seconds."""
    erased = [one for one in results if "seconds_training" in one["metrics"]]
    ways, classes = (list(dict.fromkeys(one["cells"][name] for one in erased)) for name in ("erased by", "class"))
    figure, plots = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
    for one in erased:
        metrics, way, concept = one["metrics"], one["cells"]["erased by"], one["cells"]["class"]
        gap = metrics["gaps"]["relearning"]["mean_strongest"]
        look = {"color": f"C{ways.index(way)}", "marker": MARKERS[classes.index(concept) % len(MARKERS)]}
        ends = [[length] for length in error_bar(gap)]
        for plot, key in zip(plots, ("retain_accuracy_drop", "seconds_training"), strict=True):
            plot.errorbar(metrics[key], gap["value"], ends, label=f"{way}, {concept}", capsize=2, alpha=0.8, **look)
    plots[0].set(xlabel="retain drop, points", ylabel="strongest relearner over the control's, points")
    plots[1].set(xlabel="seconds of training", xscale="log")
    for plot in plots:
        plot.axhline(0, color="black", linewidth=0.8)
        plot.grid(alpha=0.3)
    plots[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    return png(figure)


def robustness_numbers(record: Mapping[str, Any]) -> Metrics:
    """The numbers of an evaluation that the table's JSON file keeps."""
    classes = record["classes"]
    fid = {when: values[FID] for when, values in record.get("fidelity", {}).items() if FID in values}
    gaps = {
        gap["attack"]: {name: gap[name] for name in KEPT_GAPS if name in gap} for gap in record.get("attack_gaps", [])
    }
    kept = ("post_attack", "variant", "steps", "curve", "num_cells", "num_failed", "num_broken_marks")
    attacks = {
        attack["attack"]: {name: attack[name] for name in kept if name in attack}
        for attack in record.get("attacks", [])
    }
    return {
        "unlearning_accuracy": classes["details"]["unlearning_accuracy"],
        "retain_accuracy": classes["details"]["retain_accuracy_after"],
        "retain_accuracy_drop": classes.get("retain_accuracy_drop"),
        FID: fid,
        "attacks": attacks,
        "gaps": gaps,
        "control": record.get("control"),
    }


def cells_of(numbers: Mapping[str, Any]) -> list[str]:
    """The numbers of a row as the page shows them."""
    drop, fid, gaps = numbers["retain_accuracy_drop"], numbers[FID], numbers["gaps"]
    inversion, relearning = gaps.get("inversion", {}), gaps.get("relearning", {})
    ratio = f"{fid['after'] / fid['before']:.2f}" if {"before", "after"} <= set(fid) else ""
    half = relearning.get("half", {})
    steps = ""
    if "ratio" in half:
        steps = {None: "", "at_least": "at least ", "at_most": "at most "}[half["bound"]] + f"{half['ratio']:.2f}"
    seconds = numbers.get("seconds_training")
    return [
        with_interval(numbers["unlearning_accuracy"]),
        "" if drop is None else f"{drop + 0.0:.1f}",
        ratio,
        points(inversion.get("strongest", {}).get("gap")),
        points(relearning.get("mean_strongest")),
        points(relearning.get("mean_attackers")),
        steps,
        "" if seconds is None else f"{seconds:.0f}",
    ]


def points(found: Mapping[str, Any] | None) -> str:
    """ "+value (low - high)"."""
    if found is None:
        return ""
    ends = found["interval_95"]
    return f"{found['value']:+.1f}" + (f" ({ends[0]:.1f} - {ends[1]:.1f})" if ends else "")


def robustness() -> RobustnessTable:
    """Ways to erase whose configuration files there are, and the two ends: nothing erased, and never known."""
    ways = [NOTHING, *(way for way, (config, _) in WAYS.items() if Path(config).is_file()), NEVER_KNEW]
    chains = [[row_of(concept, way)] for concept in CLASSES for way in ways]
    judged = {
        "attack_budget": "standard",
        "attacks": "[inversion,relearning]",
        "relearning.marks": "[5,10,20,40]",  # those of the gap
        "evaluation.images_per_label": 30,
        "fidelity.extractors": "[efficientnet_lite0]",
    }
    return RobustnessTable(name="robustness", chains=chains, judged=judged, pages=PAGES)


def robust_classes() -> RobustClassesTable:
    """The robust recipe on all ten classes, one setting."""
    judged = {"attacks": "[]", "fidelity.extractors": "[efficientnet_lite0]"}
    chains = [[row_of(concept, "robust")] for concept in ANCHORS]
    return RobustClassesTable(name="robust_classes", chains=chains, judged=judged, pages=PAGES)
