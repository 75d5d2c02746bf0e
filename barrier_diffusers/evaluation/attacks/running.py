"""Run attacks: how often the judge recognises the forgotten concept before and after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.erased_concepts import ErasedConcepts
from barrier_diffusers.data.readers import split_concepts
from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.evaluation.attacks.base import Budget, Forgotten, Level, Variant
from barrier_diffusers.evaluation.attacks.cells import Cell, CellPool, CellResult, Seen
from barrier_diffusers.evaluation.erasure import EvaluationPrompts, ImageEvaluationConfig
from barrier_diffusers.evaluation.evaluation_split import image_text, load_rows, retained_rows

ERASED, CONTROL = "erased", "control"  # models that are attacked
Z_95 = 1.959964  # of a 95 % interval


def rows_of(labels: Sequence[str], concept: str) -> slice:
    """Where a concept's rows are among the labels of all evaluation prompts; they follow one another."""
    first = labels.index(concept)
    return slice(first, first + labels.count(concept))


def forgotten_concepts(
    evaluation: ImageEvaluationConfig,
    config: ConceptConfig,
    asked: EvaluationPrompts,
    erased: Sequence[ErasedConcepts],
    resolution: int,
) -> list[Forgotten]:
    """What an attacker knows of each concept: its prompts, and the images of the evaluation split.

    What was `erased` before, beside the concepts, is left out of the images of other things.

    Raises:
        ValueError: a split or column that does not exist, or a concept without a row.
    """
    loaded = load_rows(config, evaluation.split)
    others = image_text(retained_rows(loaded, config, erased=erased), config)
    found = []
    for concept in config.concepts:
        mine, _ = split_concepts(loaded, config.concept_column, concepts=[concept])
        rows = rows_of(asked.labels, concept)
        found.append(
            Forgotten(
                concept,
                prompts=asked.prompts[rows],
                images=image_text(mine, config),
                others=others,
                sampling=replace(evaluation.sampling, seed=evaluation.sampling.seed + rows.start),
                resolution=resolution,
            )
        )
    return found


@dataclass(frozen=True)
class AttackResults:
    """What one attack brought out of one model that was made to forget a concept.

    A grid runs in two rounds: all variants with little, and then those that were not beaten with more. The first says
    what attackers bring back on average, the results with all images what the strongest does.
    """

    first: list[CellResult]  # by variant
    second: list[CellResult]

    @property
    def whole(self) -> list[CellResult]:
        """The results with an image for each of the concept's prompts."""
        every = [*self.first, *self.second]
        most = max((len(seen.shown) for result in every for seen in result.marks), default=0)
        return [result for result in every if result.marks and len(result.marks[0].shown) == most]

    def strongest_at(self) -> dict[int, tuple[CellResult, Seen]]:
        """Number of steps -> the attacker that showed the concept most often then, the first of equals."""
        found: dict[int, tuple[CellResult, Seen]] = {}
        for result in self.whole:
            for seen in result.marks:
                if seen.num_steps not in found or seen.share > found[seen.num_steps][1].share:
                    found[seen.num_steps] = (result, seen)
        return dict(sorted(found.items()))

    @property
    def strongest(self) -> tuple[CellResult, Seen] | None:
        """The attacker that showed the concept most often at any mark; None if all failed before their first."""
        return max(self.strongest_at().values(), key=lambda pair: pair[1].share, default=None)

    @property
    def seconds(self) -> float:
        """Of all cells together."""
        return sum(result.seconds for result in (*self.first, *self.second))


def clearly_beaten(seen: Seen, best: Seen) -> bool:
    """Whether the upper end of one share's 95 % Wilson interval is below the lower end of the other's."""
    return share(seen.shown)["interval_95"][1] < share(best.shown)["interval_95"][0]


def survivors(results: Sequence[CellResult], count: int) -> list[int]:
    """Numbers of the results that a second round is tried with, at most `count`: in turn the best at each mark that
    is not taken yet, without those that are clearly beaten at every mark. The first of equals wins."""
    ranked: list[list[int]] = []
    alive = set[int]()
    for steps in sorted({seen.num_steps for result in results for seen in result.marks}):
        here = {
            index: seen for index, result in enumerate(results) for seen in result.marks if seen.num_steps == steps
        }
        order = sorted(here, key=lambda index: -here[index].share)
        ranked.append(order)
        alive |= {index for index in order if not clearly_beaten(here[index], here[order[0]])}
    taken: list[int] = []
    for place in range(len(results)):
        for order in ranked:
            if place < len(order) and order[place] in alive and order[place] not in taken and len(taken) < count:
                taken.append(order[place])
    return sorted(taken)


Key = tuple[str, str, str]  # model, attack, concept


def run_attacks(
    pool: CellPool,
    models: Sequence[str],
    forgotten: Sequence[Forgotten],
    budgets: Mapping[str, Budget],
    level: Level | None,
) -> dict[Key, AttackResults]:
    """Run every attack on every concept of every model, each on the model as it is.

    Args:
        budgets: name of the attack -> what it may spend.
        level: of the grid that each attack is tried with; None: only its own budget.
    """
    keys = [(model, name, known) for model in models for name in budgets for known in forgotten]
    first: list[Cell] = []
    for model, name, known in keys:
        budget = budgets[name]
        variants = [Variant("as set", budget)] if level is None else budget.variants(level, known)
        first += [Cell(model, name, known.concept, variant) for variant in variants]
    by_key: dict[Key, list[tuple[Cell, CellResult]]] = {}
    for cell, result in zip(first, pool.run(first), strict=True):
        by_key.setdefault((cell.model, cell.attack, cell.concept), []).append((cell, result))

    second: list[Cell] = []
    for model, name, known in keys if level is not None else []:
        assert level is not None
        pairs = by_key[model, name, known.concept]
        for index in survivors([result for _, result in pairs], budgets[name].SURVIVORS):
            cell = pairs[index][0]
            for longer in cell.variant.budget.further(level, known):
                called = ", ".join(filter(None, (cell.variant.name, longer.name)))
                second.append(replace(cell, variant=replace(longer, name=called)))
    later: dict[Key, list[CellResult]] = {}
    for cell, result in zip(second, pool.run(second), strict=True):
        later.setdefault((cell.model, cell.attack, cell.concept), []).append(result)
    return {key: AttackResults([result for _, result in pairs], later.get(key, [])) for key, pairs in by_key.items()}


def record_of(
    results: AttackResults, budget: Budget, plain: Sequence[bool], level: Level | None, usable: float = 0.0
) -> dict[str, Any]:
    """What metrics.json says of one attack on one concept: with a grid, of the strongest attacker.

    Args:
        plain: which images of the plain prompts show the concept.
        usable: share of what is retained, in percent, below which an attacked model counts as broken.
    """
    cells = [*results.first, *results.second]
    about = {"attack": cells[0].attack, "concept": cells[0].concept, "pre_attack": share(plain)}
    strongest = results.strongest
    if strongest is None:
        nothing = share([False] * len(plain))
        return {**about, "post_attack": nothing, "budget": asdict(budget), "num_training_images": 0, "prompts": [],
                "num_cells": len(cells), "num_failed": len(cells)}  # fmt: skip
    result, seen = strongest if level is not None else (cells[0], cells[0].marks[-1])
    record = {
        **about,
        "post_attack": share(seen.shown),
        "budget": result.budget,
        "num_training_images": result.num_training_images,
        "prompts": result.prompts,
        **result.found,
    }
    if level is not None:
        broken = [is_broken(mark, usable) for cell in cells for mark in cell.marks]
        record |= {
            "variant": result.variant,
            "steps": seen.num_steps,
            "num_cells": len(cells),
            "num_failed": sum(cell.failed is not None for cell in cells),
            "num_broken_marks": sum(broken),
        }
    if level is not None or len(result.marks) > 1:
        record["curve"] = {
            str(steps): {"variant": at.variant, **seen_record(mark)}
            for steps, (at, mark) in results.strongest_at().items()
        }
    return record


def seen_record(seen: Seen) -> dict[str, Any]:
    """Shares with intervals, and the judge's confidence."""
    found: dict[str, Any] = {"shown": share(seen.shown), "confidence": seen.confidence}
    if seen.retained:
        found |= {"retained": share(seen.retained), "retained_confidence": seen.retained_confidence}
    return found


def is_broken(seen: Seen, usable: float) -> bool:
    """Whether an attacked model shows less of what is retained than `usable` percent: it has not resisted."""
    return seen.retained_share is not None and seen.retained_share < usable


def curves_record(results: Mapping[Key, AttackResults]) -> list[dict[str, Any]]:
    """Every cell with its curve, for a file of its own."""
    rows = []
    for found in results.values():
        for number, cells in enumerate((found.first, found.second), start=1):
            for cell in cells:
                values = asdict(replace(cell, marks=[], picture="", tokens=""))
                del values["picture"], values["tokens"], values["seconds"]
                marks = {str(seen.num_steps): seen_record(seen) for seen in cell.marks}
                rows.append({**values, "round": number, "marks": marks})
    return rows


def first_images(results: Mapping[Key, AttackResults], model: str = ERASED) -> dict[str, np.ndarray]:
    """ "attack: concept" -> the first images (N, H, W, 3) of the strongest attacker."""
    return {
        f"{attack}: {concept}": found.strongest[0].images()
        for (attacked, attack, concept), found in results.items()
        if attacked == model and found.strongest is not None
    }


def learned_tokens(results: Mapping[Key, AttackResults], model: str = ERASED) -> dict[str, dict[str, Tensor]]:
    """ "CONCEPT_ATTACK" -> the tokens that the strongest attacker learned, by text encoder; attacks that learn none
    are left out."""
    found = {
        f"{concept}_{attack}": of_attack.strongest[0].learned_tokens()
        for (attacked, attack, concept), of_attack in results.items()
        if attacked == model and of_attack.strongest is not None
    }
    return {name: tokens for name, tokens in found.items() if tokens}
