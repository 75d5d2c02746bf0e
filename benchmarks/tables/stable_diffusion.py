"""The tables of Stable Diffusion: each row is train_scripts/configs/fashion_class.yaml with a few flags changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from barrier_diffusers.utils.run_records import METRICS_NAME
from benchmarks.tables.table import MeansTable, Metrics, Row, Script, Table, lines_of, log_of

UNLEARN = Script("barrier_diffusers.scripts.unlearn_sd", "barrier_diffusers.workflow.settings:UnlearnConfig")
EVALUATE = Script("barrier_diffusers.scripts.evaluate_sd", "barrier_diffusers.evaluation.settings:EvaluateConfig")
CONFIG = "train_scripts/configs/fashion_class.yaml"
KEPT = ("unlearning_accuracy", "retain_accuracy_after")  # metrics whose count and 95 % interval stay in the JSON file
FID = "fid_efficientnet_lite0"  # of the retained classes' images, against real ones

# The class whose pictures are nearest: what the erased class's prompt shows instead.
ANCHORS = {
    "bag": "boot",
    "boot": "sneaker",
    "coat": "pullover",
    "dress": "shirt",
    "pullover": "coat",
    "sandal": "sneaker",
    "shirt": "t-shirt",
    "sneaker": "boot",
    "t-shirt": "shirt",
    "trouser": "dress",
}
COLOURS = ("black", "blue", "green", "purple", "red", "yellow")
SHORT_LIST = ("sneaker", "dress", "bag")  # classes of the ga and LoRA rows
SHORT = {"max_train_steps": 100, "lr_scheduler": "cosine", "evaluation.images_per_label": 30}
BARE = {"objective.alpha": 0.0, "barrier.lambda_interval": 0.0}
KEYS_AND_VALUES = {"barrier.targets": "[attn2.to_k,attn2.to_v]"}
# An update that is confined to a few directions takes longer: more and larger steps than the penalty's rows.
PROJECTION = {"barrier.constraint": "projection", "barrier.use_actual_bounds": False, "objective.alpha": 0.0}
PROJECTION |= {"learning_rate": 1e-3, "max_train_steps": 150, "lr_scheduler": "constant"}


METRICS = {
    "UA": "unlearning_accuracy",
    "retain before": "retain_accuracy_before",
    "retain after": "retain_accuracy_after",
    "drop": "retain_accuracy_drop",
}
OTHER_DROPS = {f"{name} drop": f"{name}_accuracy_before - {name}_accuracy_after" for name in ("colour", "style")}


def run_chain(chain: Sequence[Row], output: Path, keep: bool = False) -> list[Metrics]:
    """The metrics of each row; a row starts from the pipeline that the row before it saved.

    Args:
        keep: leave the pipelines there; else the numbers and the pictures alone stay.
    """
    results, base = list[Metrics](), None
    for row in chain:
        folder = output / row.name
        flags = {**row.flags, "output_dir": folder, "cache_dir": output / "cache", "report_to": "none"}
        flags |= {"overwrite_output_dir": True} | ({"pretrained_model_name_or_path": base} if base else {})
        UNLEARN.run(CONFIG, flags, log_of(output, row.name))
        metrics, base = json.loads((folder / METRICS_NAME).read_text()), folder
        intervals = {key: metrics["details"][key] for key in KEPT}
        results.append({**{key: value for key, value in metrics.items() if key != "details"}, "intervals": intervals})
    for row in chain if not keep else []:
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            shutil.rmtree(output / row.name / part, ignore_errors=True)
    return results


@dataclass(kw_only=True)
class ErasureTable(MeansTable):
    """One run of train_scripts/unlearn_sd.py per row."""

    config: ClassVar[str] = CONFIG
    pages: tuple[str, ...] = ("docs/results.md",)
    metrics: dict[str, str] = field(default_factory=lambda: METRICS)

    def run(self, chain: Sequence[Row], output: Path) -> list[Metrics]:
        """See `run_chain`."""
        return run_chain(chain, output)


@dataclass(kw_only=True)
class JudgedTable(Table):
    """What is erased is judged by a run of train_scripts/evaluate_sd.py of its own."""

    evaluation: ClassVar[str] = "train_scripts/configs/evaluate_fashion.yaml"
    judged: dict[str, Any]  # what differs from `evaluation` in every row

    def files(self, row: Row) -> list[str]:
        """Both configuration files."""
        return [self.config, self.evaluation]

    def made_of(self, row: Row) -> dict[str, Any]:
        """The evaluation's flags as well."""
        return {**super().made_of(row), "judged": self.judged}


@dataclass(kw_only=True)
class AttackTable(JudgedTable):
    """One run of train_scripts/unlearn_sd.py and one of train_scripts/evaluate_sd.py per row."""

    config: ClassVar[str] = CONFIG
    pages: tuple[str, ...] = ("README.md", "docs/evaluation.md")

    def run(self, chain: Sequence[Row], output: Path) -> list[Metrics]:
        """Erase, then judge."""
        erased = run_chain(chain, output, keep=True)
        results = list[Metrics]()
        for row, metrics in zip(chain, erased, strict=True):
            judged = output / f"{row.name}-judged"
            flags = {"pretrained_model_name_or_path": output / row.name, "output_dir": judged}
            flags |= {"overwrite_output_dir": True, **self.judged}
            EVALUATE.run(self.evaluation, flags, log_of(output, judged.name))
            numbers = judged_numbers(json.loads((judged / METRICS_NAME).read_text()))
            results.append({"seconds_training": metrics["seconds_training"], **numbers})
        return results

    def markdown(self, results: Mapping[str, Any]) -> dict[str, str]:
        """Percentages, points for the drop, 95 % intervals in brackets."""
        found = [results[row.name] for row in self.rows if row.name in results]
        attacks = list(dict.fromkeys(name for result in found for name in result["metrics"]["attacks"]))
        headings = [*found[0]["cells"], "UA", "retain drop", "FID (EfficientNet-Lite0)"]
        headings += [f"after {name.replace('_', ' ')}" for name in attacks]
        lines = []
        for result in found:
            numbers = result["metrics"]
            fid = numbers[FID].get("after")
            cells = [*result["cells"].values(), with_interval(numbers["unlearning_accuracy"])]
            cells += [f"{numbers['retain_accuracy_drop'] + 0.0:.1f}", "" if fid is None else f"{fid:.2f}"]
            cells += [with_interval(numbers["attacks"].get(name, {}).get("post_attack")) for name in attacks]
            lines.append(cells)
        return {self.name: lines_of(headings, 1, lines)}

    def short_forms(self, results: Mapping[str, Any]) -> dict[str, str]:
        """The whole table, and one without intervals and with few attacks, for the front page."""
        lines = []
        for result in (results[row.name] for row in self.rows if row.name in results):
            numbers = result["metrics"]
            attacked = [numbers["attacks"].get(name, {}).get("post_attack") for name in IN_SHORT]
            values = [numbers["unlearning_accuracy"]["value"], numbers["retain_accuracy_drop"] + 0.0]
            cells = [f"{value:.1f}" for value in values]
            cells += ["" if share is None else f"{share['value']:.1f}" for share in attacked]
            lines.append([*result["cells"].values(), *cells])
        headings = ["erased by", "UA", "retain drop", *(f"after {name}" for name in IN_SHORT)]
        return {**self.markdown(results), f"{self.name} in short": lines_of(headings, 1, lines)}


IN_SHORT = ("inversion", "relearning")  # attacks that the front page shows


def judged_numbers(record: Mapping[str, Any]) -> Metrics:
    """The numbers of an evaluation that the table's JSON file keeps."""
    classes = record["classes"]
    shares = {name: classes["details"][name] for name in KEPT}
    fid = {when: values.get(FID) for when, values in record.get("fidelity", {}).items()}
    attacks = {
        found["attack"]: {"post_attack": found["post_attack"], "budget": found["budget"]}
        for found in record["attacks"]
    }
    return {**shares, "retain_accuracy_drop": classes["retain_accuracy_drop"], FID: fid, "attacks": attacks}


def with_interval(share: Mapping[str, Any] | None) -> str:
    """ "value (low - high)"."""
    if share is None:
        return ""
    low, high = share["interval_95"]
    return f"{share['value']:.1f} ({low:.1f} - {high:.1f})"


def class_row(concept: str, objective: str, rank: int, alpha: float, protection: str) -> Row:
    """One class; `protection` is "none", "penalty <lambda>" or "projection"; rank 0 trains full weights."""
    cells = {"class": concept, "objective": objective, "weights": f"LoRA {rank}" if rank else "full"}
    cells |= {"alpha": f"{alpha:g}", "protection": protection}
    flags = {**SHORT, "concept": concept, "objective.name": objective, "objective.alpha": alpha}
    flags |= {"objective.anchor": ANCHORS[concept] if objective == "rl" else None}
    if rank:
        flags |= {"rank": rank, "learning_rate": 1e-3}
    if objective == "ga":
        flags |= {"learning_rate": 1e-3}
    if protection == "projection":
        flags |= PROJECTION
    else:
        flags |= {"barrier.lambda_interval": float(protection.removeprefix("penalty ").replace("none", "0"))}
    return Row(cells, flags)


def classes() -> ErasureTable:
    """Ten classes with rl and full weights, three with ga and with LoRA; each with and without protection."""
    rows = []
    settings = [(0.0, "none"), (0.0, "penalty 1"), (0.0, "projection"), (1.0, "none"), (1.0, "penalty 0.1")]
    for kind, names in ((("rl", 0), tuple(ANCHORS)), (("rl", 16), SHORT_LIST), (("ga", 0), SHORT_LIST)):
        rows += [class_row(name, *kind, *setting) for setting in settings for name in names]
    chains = [[row] for row in rows]
    return ErasureTable(name="classes", chains=chains, mean_over="class", across=("alpha", "protection"))


def objective_row(method: str, protection: str, flags: dict[str, Any]) -> Row:
    """One objective on the class sneaker without retain loss."""
    flags = {**SHORT, "objective.anchor": None, **BARE, **flags}
    if protection == "projection":
        del flags["barrier.lambda_interval"]
        flags |= PROJECTION
    elif protection != "none":
        flags["barrier.lambda_interval"] = float(protection.removeprefix("penalty "))
    return Row({"method": method, "protection": protection}, flags)


def objectives() -> ErasureTable:
    """Every objective and baseline on one class: bare, and with what protects the rest."""
    methods = {
        "ga": {"objective.name": "ga", "learning_rate": 1e-3},
        "rl": {"objective.anchor": "boot"},
        "concept": {"objective.name": "concept", "objective.anchor_prompt": "a photo of a boot"},
        "kl": {"objective.name": "kl"},
        "esd": {"objective.name": "esd", "objective.num_inference_steps": 10},
    }
    rows = [objective_row(name, how, flags) for name, flags in methods.items() for how in ("none", "projection")]
    rows.insert(3, objective_row("rl", "penalty 1", methods["rl"]))
    rows.append(objective_row("rl, SalUn mask 0.5", "none", {**methods["rl"], "saliency_mask": 0.5}))
    edit = {"objective.name": "uce", "objective.anchor": "boot", "barrier.use_actual_bounds": False}
    rows.append(objective_row("UCE", "none", {**edit, **KEYS_AND_VALUES}))
    return ErasureTable(name="objectives", chains=[[row] for row in rows], metrics={**METRICS, **OTHER_DROPS})


def projection() -> ErasureTable:
    """Where the retain statistics of a projection come from (docs/method.md section 7)."""
    two, prompts = {"retain_concepts": "[boot,bag]"}, {"retain_statistics": "prompts"}
    keys = {**prompts, **KEYS_AND_VALUES}
    larger = {**keys, "learning_rate": 3e-3}
    cases = [
        ("q, k, v", "images of all classes", "sneaker", {}),
        ("q, k, v", "images of two classes", "sneaker", two),
        ("q, k, v", "images of two classes for q, prompts for k, v", "sneaker", {**two, **prompts}),
        *(("k, v", "prompts", name, keys) for name in ("sneaker", "dress", "t-shirt")),
        *(("k, v", "prompts", f"{name}, learning rate 3e-3", larger) for name in ("dress", "t-shirt")),
    ]
    rows = []
    for maps, source, erased, flags in cases:
        name = erased.partition(",")[0]
        flags = {**PROJECTION, **flags, "concept": name, "objective.anchor": ANCHORS[name]}
        flags |= {"evaluation.images_per_label": 30}
        rows.append(Row({"maps": maps, "retain statistics": source, "erased": erased}, flags))
    return ErasureTable(name="projection", chains=[[row] for row in rows], metrics={**METRICS, **OTHER_DROPS})


def concepts() -> ErasureTable:
    """A style, a colour, two classes, one after another, and a concept from prompts alone; all with a projection."""
    style = {**PROJECTION, "concept": "pencil sketch", "concept_column": "style", "objective.anchor": "photo"}
    style |= {"evaluation.images_per_label": 150}
    colour = {**PROJECTION, "concept": "red", "concept_column": "colour", "objective.anchor": "blue"}
    colour |= {"barrier.projection_energy": 0.98, "learning_rate": 3e-3}  # at 0.999 the other colours span red
    first = {**PROJECTION, "evaluation.images_per_label": 30}
    two = {**first, "concept": "[sneaker,bag]", "objective.anchor": "[boot,coat]", "max_train_steps": 250}
    captions = [f"a {kind} of a {tint} {{}}" for kind in ("photo", "pencil sketch") for tint in COLOURS]
    prompts = {
        **PROJECTION,
        **KEYS_AND_VALUES,
        "retain_statistics": "prompts",
        "train_data_dir": None,
        "concept": "sneaker",
        "forget_prompts": [text.format("sneaker") for text in captions],
        "retain_prompts": [text.format(name) for name in sorted(ANCHORS) if name != "sneaker" for text in captions],
        "num_generated_images": 216,
        "evaluation.images_per_label": 216,
    }
    chains = [
        [Row({"erased": "class: sneaker"}, first), Row({"erased": "then style: pencil sketch"}, style)],
        [Row({"erased": "classes: sneaker and bag"}, two)],
        [Row({"erased": "colour: red"}, colour)],
        [Row({"erased": "style: pencil sketch"}, style)],
        [Row({"erased": "sneaker, from prompts alone"}, prompts)],
    ]
    metrics = {"UA": METRICS["UA"], "drop": METRICS["drop"]}
    metrics["class drop"] = "class_accuracy_before - class_accuracy_after"
    metrics |= OTHER_DROPS
    for when in ("before", "after"):
        metrics[f"UA of the class, {when}"] = f"erased_before_unlearning_accuracy_{when}"
    return ErasureTable(name="concepts", chains=chains, metrics=metrics)


def attacks() -> AttackTable:
    """What attacks bring back after five ways to erase one class.

    Steps and rates are those at which each way erases the class, so that what is left is compared.
    """
    rl = {"objective.anchor": "boot"}
    esd = {"objective.name": "esd", "objective.num_inference_steps": 10, "max_train_steps": 150}
    uce = {"objective.name": "uce", "objective.anchor": "boot", "barrier.use_actual_bounds": False}
    found = {
        "BARRIER": Row({}, {}),  # as `make unlearn`
        "rl alone": objective_row("rl", "none", rl),
        "ESD": objective_row("esd", "none", esd),
        "UCE": objective_row("UCE", "none", {**uce, **KEYS_AND_VALUES}),
        "rl, SalUn mask 0.5": objective_row("rl", "none", {**rl, "saliency_mask": 0.5}),
    }
    chains = [[Row({"erased by": name}, row.flags)] for name, row in found.items()]
    return AttackTable(name="attacks", chains=chains, judged={"evaluation.images_per_label": 30})
