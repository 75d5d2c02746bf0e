"""The attacks of an evaluation: on what is judged and on the control, and what is said of both.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from barrier_diffusers.data.readers import rows_hash
from barrier_diffusers.evaluation.attack_gap import attack_gap
from barrier_diffusers.evaluation.attacks.base import Budget, Forgotten, Level
from barrier_diffusers.evaluation.attacks.cells import CellPool, CellRunner, Scene, first_small
from barrier_diffusers.evaluation.attacks.running import (
    CONTROL,
    ERASED,
    AttackResults,
    Key,
    curves_record,
    first_images,
    learned_tokens,
    record_of,
    run_attacks,
)
from barrier_diffusers.evaluation.judge import as_rgb
from barrier_diffusers.evaluation.judged_model import CONTROL_PREFIX, JudgedModel, source_of_judged
from barrier_diffusers.evaluation.protocols.concepts import ConceptProtocol
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.evaluation.tables import print_attacks, print_gaps
from barrier_diffusers.utils.checks import as_list
from barrier_diffusers.utils.files import file_hash
from barrier_diffusers.utils.run_records import fingerprint, module_hash

CURVES_NAME = "attack_curves.json"  # every attacker with its curve, of a grid or of attacks with marks
USABLE = 0.5  # a model that shows less than this part of what it showed of retained prompts is broken
CONTROL_SHARES = ("unlearning_accuracy", "retain_accuracy_after")  # of the control's plain images, in metrics.json


@dataclass(frozen=True)
class Attacked:
    """What the attacks of an evaluation brought back."""

    metrics: dict[str, Any]  # attacks; with a control, control, control_attacks and attack_gaps as well
    seconds: dict[str, float]  # by attack
    curves: list[dict[str, Any]]  # every attacker with its curve
    has_curves: bool  # whether there is more to them than `metrics` says
    plain: dict[str, np.ndarray]  # concept -> the first images (N, H, W, 3) of its plain prompts
    pictures: dict[str, np.ndarray]  # "attack: concept" -> the first images (N, H, W, 3) under attack
    tokens: dict[str, dict[str, Tensor]]  # "CONCEPT_ATTACK" -> tokens that were learned, by text encoder


@dataclass(frozen=True)
class Plain:
    """What a model draws without an attack."""

    numbers: Mapping[str, Any]  # of `erasure_metrics`
    images: Mapping[str, np.ndarray]  # concept -> bytes (N, H, W, 1 or 3)


def check_attacks(config: EvaluateConfig, judged_model: JudgedModel, forgotten: Sequence[Forgotten]) -> None:
    """Refuse, before any long work, what an attack cannot work with.

    Raises:
        ValueError: says what is missing and what to do.
    """
    pipelines = [judged_model.pipeline, *([judged_model.control] if judged_model.control is not None else [])]
    check_budgets(config.budgets, config.attack_budget, pipelines, forgotten)


def check_budgets(
    budgets: Mapping[str, Budget], level: Level | None, pipelines: Sequence[Any], forgotten: Sequence[Forgotten]
) -> None:
    """A ValueError if an attack of the grid, or as it is set, cannot work with one of the pipelines or concepts, or if
    a setting is one that no attacker of the grid has."""
    for name, budget in budgets.items():
        for known in forgotten:
            tried = [budget]
            if level is not None:
                tried = [variant.budget for variant in budget.variants(level, known)]
                require_tried(name, budget, level, known)
            for pipeline in pipelines:
                for one in tried:
                    one.check(pipeline, known)


def require_tried(name: str, budget: Budget, level: Level, known: Forgotten) -> None:
    """A ValueError if a setting of an attack is no default, and no attacker of the grid has it."""
    first = [variant.budget for variant in budget.variants(level, known)]
    tried = [*first, *(longer.budget for one in first for longer in one.further(level, known))]
    defaults = type(budget)()
    for setting in (one.name for one in fields(budget)):
        value = getattr(budget, setting)
        if value != getattr(defaults, setting) and all(getattr(one, setting) != value for one in tried):
            raise ValueError(
                f"{name}.{setting} is set to {value!r}, but no attacker of attack_budget {level} has it: the grid "
                f"tries others in its place; leave out {name}.{setting}, or attack_budget for an attacker as it is set"
            )


def scene_of(config: EvaluateConfig, concepts: ConceptProtocol, forgotten: Sequence[Forgotten]) -> Scene:
    """What the cells of this evaluation share."""
    judged_model, judge = concepts.judged_model, concepts.judge
    assert judge is not None
    models: dict[str, tuple[str, str | None, str | None]] = {ERASED: source_of_judged(config)}
    hashes = {ERASED: fingerprint(judged_model.hashes_of(""))}
    if config.control is not None:
        models[CONTROL] = (config.control, None, None)
        hashes[CONTROL] = fingerprint(judged_model.hashes_of(CONTROL_PREFIX))
    files = [path for path in as_list(config.module) if path.endswith(".py")]
    facts = [module_hash(judge.classifier)]
    facts += [rows_hash(rows, ["image", "text"]) for known in forgotten for rows in (known.images, known.others)]
    facts += [file_hash(Path(path).expanduser()) for path in files]
    return Scene(
        models=models,
        hashes=hashes,
        forgotten=list(forgotten),
        classifier=judge.source,
        facts=facts,
        cache=Path(config.cache_dir or judged_model.output / "cache"),
        modules=as_list(config.module),
        first_failure_ends=config.attack_budget is None,
    )


def attack(
    config: EvaluateConfig, concepts: ConceptProtocol, forgotten: Sequence[Forgotten], classes: Mapping[str, Any]
) -> Attacked:
    """Attack what is judged, and the control if there is one; print the tables.

    Args:
        concepts: the protocol that judged the plain prompts.
        classes: its numbers.

    Raises:
        FloatingPointError: without a grid, an attack ended in non-finite numbers.
    """
    judged_model = concepts.judged_model
    names = [known.concept for known in forgotten]
    plain = {ERASED: Plain(classes, {name: concepts.plain_images(name) for name in names})}
    pipelines = {ERASED: judged_model.pipeline}
    if judged_model.control is not None:
        images, numbers = concepts.control()
        plain[CONTROL] = Plain(numbers, {name: concepts.plain_images(name, images) for name in names})
        pipelines[CONTROL] = judged_model.control
    runner = CellRunner(scene_of(config, concepts, forgotten), judged_model.device, pipelines)
    return attack_models(runner, config.budgets, config.attack_budget, plain, workers=config.attack_workers)


def attack_models(
    runner: CellRunner,
    budgets: Mapping[str, Budget],
    level: Level | None,
    plain: Mapping[str, Plain],
    workers: int = 1,
) -> Attacked:
    """Every attack on every concept of the models that `plain` has answers of; print the tables.

    Args:
        budgets: name of the attack -> what it may spend.
        level: of the grid that each attack is tried with; None: only its own budget.
        plain: ERASED, and CONTROL if there is one -> what it draws without an attack.
        workers: processes.

    Raises:
        FloatingPointError: without a grid, an attack ended in non-finite numbers.
    """
    judge, forgotten = runner.judge, runner.scene.forgotten
    with CellPool(runner, workers) as pool:
        results = run_attacks(pool, list(plain), forgotten, budgets=budgets, level=level)
    usable = {model: USABLE * answers.numbers["retain_accuracy_after"] for model, answers in plain.items()}
    shows = {
        (model, concept): judge.shows(images, concept)
        for model, answers in plain.items()
        for concept, images in answers.images.items()
    }
    records: dict[str, list[dict[str, Any]]] = {model: [] for model in plain}
    seconds: dict[str, float] = {}
    for (model, name, concept), found in results.items():
        mine = shows[model, concept]
        records[model].append(record_of(found, budgets[name], mine, level=level, usable=usable[model]))
        label = name if model == ERASED else f"{name}, {model}"
        seconds[label] = round(seconds.get(label, 0.0) + found.seconds, 2)
    metrics: dict[str, Any] = {"attacks": records[ERASED]}
    print_attacks(records[ERASED], {name: seconds[name] for name in budgets})
    if CONTROL in records:
        details = plain[CONTROL].numbers["details"]
        metrics["control"] = {name.removesuffix("_after"): details[name] for name in CONTROL_SHARES}
        metrics["control_attacks"] = records[CONTROL]
        metrics["attack_gaps"] = gaps(results, usable)
        print_gaps(metrics["attack_gaps"])
    curves = curves_record(results)
    has_curves = level is not None or any(len(row["marks"]) > 1 for row in curves)
    shown = {concept: first_small(as_rgb(images)) for concept, images in plain[ERASED].images.items()}
    return Attacked(metrics, seconds, curves, has_curves, shown, first_images(results), learned_tokens(results))


def gaps(results: Mapping[Key, AttackResults], usable: Mapping[str, float]) -> list[dict[str, Any]]:
    """The attack gap of each attack and concept."""
    found = []
    for (model, attack, concept), erased in results.items():
        if model == ERASED:
            control = results[CONTROL, attack, concept]
            gap = attack_gap(erased, control, usable_erased=usable[ERASED], usable_control=usable[CONTROL])
            found.append({"attack": attack, "concept": concept, **gap})
    return found
