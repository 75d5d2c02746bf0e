"""The classifier table: every method on every case with every seed, one run of classification_ext each.

A case is one class of the embedded data, or a random tenth of its photos. Every method's settings were chosen on
TUNED_ON with seed 100 (and forget_seed 100 for random photos), which the table does not use. Gaps are taken between
means over the seeds, case by case.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import METRICS_NAME
from benchmarks.tables.table import Metrics, Row, Script, Table, lines_of, log_of
from classification_ext.metrics import HEADLINE, SHORT, gap
from classification_ext.settings import EvaluateConfig

TRAIN = Script("classification_ext.unlearn", "classification_ext.settings:UnlearnConfig")
EVALUATE = Script("classification_ext.evaluate", "classification_ext.settings:EvaluateConfig")
WEIGHTS = "assets/fashion_resnet/model.safetensors"
KEPT = (*HEADLINE, "unlearning_accuracy_test", "mia_features", "lira")
FACTS = ("num_steps", "seconds_training", "seconds_set_up", "trained_percent")

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
RANDOM = "random 10 %"
SEEDS = (0, 1, 2)
TUNED_ON = ("shirt", "sneaker", RANDOM)
ORIGINAL, REFERENCE = "original", "retraining"  # no run at all; what the others are measured against

NO_PENALTY = {"barrier.lambda_interval": 0.0, "barrier.use_actual_bounds": False}
ALL = {**NO_PENALTY, "trained_weights": "all"}
PROJECTION = {"barrier.constraint": "projection", "barrier.use_actual_bounds": False}
PROJECTION |= {"barrier.projection_energy": 0.8}
# random photos need more of the weights than a class does
EVERY_MAP = {
    "barrier.targets": ["Conv2d", "fc"],
    "barrier.use_actual_bounds": False,
}

Flags = dict[str, Any]


def how(name: str, rate: float, epochs: int, alpha: float = 0.0, **more: Any) -> Flags:
    """Flags of a method that trains; epochs over the images it is about."""
    return {
        "method.name": name,
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "method.alpha": alpha,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def edit(name: str, **options: float) -> Flags:
    """Flags of a method without training steps."""
    return {**ALL, "method.name": name, "method.alpha": 0.0, **{f"method.{key}": v for key, v in options.items()}}


def both(flags: Flags) -> tuple[Flags, Flags]:
    """The same for a class and for random photos."""
    return flags, flags


def penalty(weight: float) -> Flags:
    """The paper's protection loss."""
    return {"barrier.lambda_interval": weight}


RL_CLASS, RL_RANDOM = how("rl", 3e-3, 10, 10.0), {**how("rl", 1e-3, 10, 10.0), **EVERY_MAP}
GA_CLASS, GA_RANDOM = how("ga", 1e-3, 5, 5.0), {**how("ga", 2e-3, 10, 3.0), **EVERY_MAP}
RL_ALONE = how("rl", 3e-3, 5)  # without any retain loss

# method -> (flags for a class, flags for random photos), beyond the configuration file's
METHODS: dict[str, tuple[Flags, Flags]] = {
    "ft": ({**ALL, **how("ft", 2e-3, 4)}, {**ALL, **how("ft", 1e-3, 2)}),
    "l1-sparse": ({**ALL, **how("l1_sparse", 1e-3, 4)}, {**ALL, **how("l1_sparse", 1e-3, 2)}),
    "ga": ({**ALL, **how("ga", 5e-5, 5)}, {**ALL, **how("ga", 3e-5, 5)}),
    "ga with retain loss": ({**ALL, **how("ga", 2e-4, 5, 10.0)}, {**ALL, **how("ga", 1e-3, 10, 3.0)}),
    "rl with retain loss": both({**ALL, **how("rl", 1e-3, 10, 10.0)}),
    "SalUn": both({**ALL, **how("rl", 1e-3, 10, 10.0), "saliency_mask": 0.5}),
    "boundary shrink": ({**ALL, **how("boundary_shrink", 1e-4, 5)}, {**ALL, **how("boundary_shrink", 3e-5, 5)}),
    "boundary expand": ({**ALL, **how("boundary_expand", 1e-4, 5)}, {**ALL, **how("boundary_expand", 3e-5, 5)}),
    "fisher": both(edit("fisher", noise=1e-5)),
    "influence": (edit("wfisher", damping=1.0), edit("wfisher", damping=0.1)),
    "rl on targets": ({**RL_CLASS, **NO_PENALTY}, {**RL_RANDOM, **NO_PENALTY}),
    "rl, BARRIER": ({**RL_CLASS, **penalty(0.1)}, {**RL_RANDOM, **penalty(0.01)}),
    "rl, projection": both({**how("rl", 1e-2, 10, 10.0), **PROJECTION}),
    "ga on targets": ({**GA_CLASS, **NO_PENALTY}, {**GA_RANDOM, **NO_PENALTY}),
    "ga, BARRIER": ({**GA_CLASS, **penalty(0.1)}, {**GA_RANDOM, **penalty(0.1)}),
    "ga, projection": both({**how("ga", 3e-2, 5, 5.0), **PROJECTION}),
    "rl on targets, no retain loss": both({**RL_ALONE, **NO_PENALTY}),
    "rl, BARRIER, no retain loss": both({**RL_ALONE, **penalty(1.0)}),
}


def row_of(case: str, method: str, seed: int) -> Row:
    """One method on one case with one seed."""
    flags: Flags = {"seed": seed, "evaluation.before": False}
    if case == RANDOM:
        flags |= {"forget_class": None, "forget_fraction": 0.1}  # the same photos for all seeds: forget_seed 0
    else:
        flags |= {"forget_class": case}
    if method in METHODS:
        flags |= METHODS[method][case == RANDOM]
    return Row({"case": case, "method": method, "seed": str(seed)}, flags)


def is_shadow(row: Row) -> bool:
    """Whether other rows read its classifier: it never saw the random photos."""
    return row.cells["method"] == REFERENCE and row.cells["case"] == RANDOM


def shadows(row: Row, output: Path) -> list[str]:
    """Folders of the retrained classifiers of the row's case with the other seeds."""
    if row.cells["case"] != RANDOM:
        return []
    return [str(output / row_of(RANDOM, REFERENCE, seed).name) for seed in SEEDS if str(seed) != row.cells["seed"]]


@dataclass(kw_only=True)
class ClassifierTable(Table):
    """One run of classification_ext per row; two tables of means over the seeds."""

    config: ClassVar[str] = "classification_ext/configs/fashion_class.yaml"
    retrain: ClassVar[str] = "classification_ext/configs/fashion_retrain.yaml"
    pages: tuple[str, ...] = ("classification_ext/README.md",)

    def config_of(self, row: Row) -> str:
        """The configuration file whose settings hold where the row has no flag of its own."""
        return self.retrain if row.cells["method"] == REFERENCE else self.config

    def files(self, row: Row) -> list[str]:
        """The base weights as well, where the row starts from them."""
        return [self.config_of(row), *([] if row.cells["method"] == REFERENCE else [WEIGHTS])]

    def made_of(self, row: Row) -> dict[str, Any]:
        """One hash: the flags of 660 rows would be most of the file."""
        digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in self.files(row)))
        digest.update(json.dumps(row.flags, sort_keys=True).encode())
        return {"fingerprint": digest.hexdigest()[:16]}

    def result(self, row: Row, metrics: Metrics) -> dict[str, Any]:
        """Without the cells, which make up the name."""
        return {"name": row.name, **self.made_of(row), "metrics": metrics}

    def missing(self, results: Mapping[str, Any], output: Path, rows: str = "") -> list[list[list[Row]]]:
        """The shadow models first; one whose folder is gone is made again as long as a missing row reads it."""
        (chains,) = super().missing(results, output, rows)
        first = [chain for chain in chains if is_shadow(chain[0])]
        others = [chain for chain in chains if not is_shadow(chain[0])]
        if any(row.cells["case"] == RANDOM for chain in others for row in chain):
            gone = [
                row for row in self.rows if is_shadow(row) and not (output / row.name / "model.safetensors").is_file()
            ]
            first += [[row] for row in gone if [row] not in first]
        return [first, others]

    def run(self, chain: Sequence[Row], output: Path) -> list[Metrics]:
        """Unlearn, or judge the classifier as it is; only classifiers that other rows read stay."""
        return [self._run(row, output) for row in chain]

    def _run(self, row: Row, output: Path) -> Metrics:
        folder, method = output / row.name, row.cells["method"]
        flags = {**row.flags, "output_dir": folder, "overwrite_output_dir": True}
        if method != REFERENCE:  # a retrained model would be its own shadow's equal
            flags["evaluation.shadow_models"] = json.dumps(shadows(row, output))
        if method == ORIGINAL:
            settings = TRAIN.parse(self.config, flags)
            judged = output / "logs" / f"{row.name}.json"
            judged.parent.mkdir(parents=True, exist_ok=True)
            shared = [field.name for field in fields(EvaluateConfig) if hasattr(settings, field.name)]
            values = {name: getattr(settings, name) for name in shared}
            write_json(judged, {**values, "evaluation": asdict(settings.evaluation)})
            EVALUATE.run(str(judged), {}, log_of(output, row.name))
            content = json.loads((folder / "evaluation.json").read_text())["metrics"]
        else:
            TRAIN.run(self.config_of(row), flags, log_of(output, row.name))
            content = json.loads((folder / METRICS_NAME).read_text())
        if not is_shadow(row):
            for path in folder.glob("*.safetensors"):
                path.unlink()
        return {name: content[name] for name in (*KEPT, *FACTS) if name in content}

    def markdown(self, results: Mapping[str, Any]) -> dict[str, str]:
        """One table of the classes and one of the random photos, of the methods whose rows are all finished."""
        numbers = {name: result["metrics"] for name, result in results.items()}
        return {
            "classifier_classes": method_table(numbers, CLASSES),
            "classifier_random": method_table(numbers, (RANDOM,)),
        }


def mean_and_spread(values: Sequence[float]) -> str:
    """ "mean ± standard deviation"."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


def numbers_of(found: Mapping[str, Metrics], case: str, method: str) -> list[Metrics] | None:
    """The numbers of a method on a case with every seed; None while any is missing."""
    names = [row_of(case, method, seed).name for seed in SEEDS]
    return [found[name] for name in names] if all(name in found for name in names) else None


def means(runs: Sequence[Metrics]) -> dict[str, float]:
    """UA, RA, TA, MIA averaged over runs."""
    return {name: statistics.mean(metrics[name] for metrics in runs) for name in HEADLINE}


def gap_by_chance(retrained: Sequence[Metrics]) -> float:
    """The average gap of one retrained model to the mean of the other two, over the seeds: what chance alone does."""
    gaps = []
    for index, own in enumerate(retrained):
        others = [metrics for position, metrics in enumerate(retrained) if position != index]
        gaps.append(gap(own, means(others))["average_gap"])
    return statistics.mean(gaps)


def table_line(found: Mapping[str, Metrics], cases: Sequence[str], method: str) -> list[str] | None:
    """A method over some cases: means over the cases with the spread over the seeds; None while rows are missing."""
    by_case = [numbers_of(found, case, method) for case in cases]
    retrained = [numbers_of(found, case, REFERENCE) for case in cases]
    if None in by_case or None in retrained:
        return None
    by_seed = list(zip(*by_case, strict=True))

    def over_seeds(read: Callable[[Metrics], float]) -> list[float]:
        return [statistics.mean(read(metrics) for metrics in group) for group in by_seed]

    cells = [method]
    cells += [mean_and_spread(over_seeds(lambda metrics, name=name: metrics[name])) for name in HEADLINE]
    if method == REFERENCE:
        gaps = [gap_by_chance(runs) for runs in retrained]
    else:
        pairs = zip(by_case, retrained, strict=True)
        gaps = [gap(means(own), means(reference))["average_gap"] for own, reference in pairs]
    cells.append(f"{statistics.mean(gaps):.2f}")
    likelihood = [metrics["lira"]["auc"] for group in by_seed for metrics in group if "lira" in metrics]
    if len(cases) > 1:
        cells.append(f"{max(gaps):.2f}")
    else:
        cells.append(mean_and_spread(likelihood) if likelihood else "")
    if method == ORIGINAL:  # no run at all
        return [*cells, "", ""]
    seconds = over_seeds(lambda metrics: metrics.get("seconds_training", 0.0) + metrics.get("seconds_set_up", 0.0))
    return [*cells, f"{statistics.mean(seconds):.1f}", f"{by_seed[0][0]['trained_percent']:.2f}"]


def method_table(found: Mapping[str, Metrics], cases: Sequence[str]) -> str:
    """The methods whose rows are all finished, as a Markdown table."""
    last = "largest gap" if len(cases) > 1 else "LiRA AUC"
    headings = ["method", *SHORT.values(), "average gap", last, "seconds", "trained %"]
    every = [table_line(found, cases, method) for method in (ORIGINAL, REFERENCE, *METHODS)]
    return lines_of(headings, 1, [line for line in every if line])


def classifier() -> ClassifierTable:
    """All rows, the shadow models first."""
    methods = (REFERENCE, ORIGINAL, *METHODS)
    rows = [row_of(case, method, seed) for method in methods for case in (*CLASSES, RANDOM) for seed in SEEDS]
    rows.sort(key=lambda row: not is_shadow(row))
    return ClassifierTable(name="classifier", chains=[[row] for row in rows])
