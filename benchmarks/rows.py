"""The rows of the README's tables: each is train_scripts/configs/fashion_class.yaml with a few flags changed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    cells: dict[str, str]  # heading -> what tells this line from the others
    flags: dict[str, Any]  # dotted settings that differ from the configuration file

    @property
    def name(self) -> str:
        """Of the run's folder and log."""
        return re.sub(r"[^\w.-]+", "_", "-".join(self.cells.values()))


@dataclass(frozen=True)
class Table:
    """Chains of rows: within one, each row starts from the pipeline that the row before it saved."""

    chains: list[list[Row]]
    metrics: dict[str, str] = field(default_factory=lambda: METRICS)  # heading -> key in metrics.json, or "a - b"
    mean_over: str | None = None  # heading whose rows are averaged below the table
    mean_of: int = 2  # at least so many rows, so that means below one another are of the same ones
    across: tuple[str, ...] = ()  # headings that run across the page in the README's short form


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


def classes() -> Table:
    """Ten classes with rl and full weights, three with ga and with LoRA; each with and without protection."""
    rows = []
    settings = [(0.0, "none"), (0.0, "penalty 1"), (0.0, "projection"), (1.0, "none"), (1.0, "penalty 0.1")]
    for kind, names in ((("rl", 0), tuple(ANCHORS)), (("rl", 16), SHORT_LIST), (("ga", 0), SHORT_LIST)):
        rows += [class_row(name, *kind, *setting) for setting in settings for name in names]
    return Table([[row] for row in rows], mean_over="class", across=("alpha", "protection"))


def objective_row(method: str, protection: str, flags: dict[str, Any]) -> Row:
    """One objective on the class sneaker without retain loss."""
    flags = {**SHORT, "objective.anchor": None, **BARE, **flags}
    if protection == "projection":
        del flags["barrier.lambda_interval"]
        flags |= PROJECTION
    elif protection != "none":
        flags["barrier.lambda_interval"] = float(protection.removeprefix("penalty "))
    return Row({"method": method, "protection": protection}, flags)


def objectives() -> Table:
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
    return Table([[row] for row in rows], {**METRICS, **OTHER_DROPS})


def projection() -> Table:
    """Where the retain statistics of a projection come from (METHOD section 7)."""
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
    return Table([[row] for row in rows], {**METRICS, **OTHER_DROPS})


def concepts() -> Table:
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
    return Table(chains, metrics)


TABLES = {"classes": classes, "objectives": objectives, "projection": projection, "concepts": concepts}
