"""Relearning: how fast a classifier that was made to forget learns it again, beside one that never knew.

Shapes: N images, B batch.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.data.readers import take_evenly
from barrier_diffusers.evaluation.attack_gap import attack_gap
from barrier_diffusers.evaluation.attacks.cells import CellResult, Seen
from barrier_diffusers.evaluation.attacks.running import CONTROL, ERASED, AttackResults, seen_record
from barrier_diffusers.training.learning import every_weight
from classification_ext.data import Splits, pixels_of
from classification_ext.metrics import correct, predict
from classification_ext.settings import EvaluateConfig, RelearningConfig

MOMENTUM = 0.9  # of the attacker's SGD
USABLE = 0.5  # a classifier that recognises less than this part of what it did of the rest is broken


def look(model: nn.Module, splits: Splits, num_steps: int, batch_size: int, device: torch.device | str) -> Seen:
    """Which test images of what was forgotten, and of the rest, are recognised."""
    parts = {name: getattr(splits, name) for name in ("forget_test", "test")}
    logits = {name: predict(model, images, batch_size=batch_size, device=device) for name, images in parts.items()}
    right = {name: correct(logits[name], images.labels).tolist() for name, images in parts.items()}
    confidence = {name: round(values.softmax(1).amax(1).mean().item(), 4) for name, values in logits.items()}
    return Seen(num_steps, right["forget_test"], confidence["forget_test"], right["test"], confidence["test"])


def lesson(splits: Splits, budget: RelearningConfig) -> tuple[LabelledImages, LabelledImages]:
    """Training images of what was forgotten, and as many of the rest."""
    chosen = []
    for images in (splits.forget, splits.retain):
        rows = take_evenly(range(len(images)), min(budget.num_images, len(images)), seed=budget.seed)
        chosen.append(images[torch.tensor(rows)])
    return chosen[0], chosen[1]


def relearn(
    model: nn.Module,
    splits: Splits,
    budget: RelearningConfig,
    learning_rate: float,
    eval_batch_size: int,
    device: torch.device | str = "cpu",
) -> list[Seen]:
    """What a classifier recognises at the marks of a fine-tuning of all its weights, which come back at the end.

    Normalisation layers keep their statistics.
    """
    taught = lesson(splits, budget)
    generator, found = torch.Generator().manual_seed(budget.seed), []
    trained = [value.requires_grad for value in model.parameters()]
    try:
        with every_weight(model) as weights:
            optimizer = torch.optim.SGD(weights, learning_rate, momentum=MOMENTUM)
            for step in tqdm(range(1, budget.marks[-1] + 1), desc=f"relearning at {learning_rate:g}", leave=False):
                model.eval()
                losses = []
                for images in taught:
                    rows = torch.randint(len(images), (budget.batch_size // 2,), generator=generator)
                    losses.append(loss_of(model, images[rows], device))
                torch.stack(losses).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step in budget.marks:
                    found.append(look(model, splits, step, batch_size=eval_batch_size, device=device))
    finally:
        for value, required in zip(model.parameters(), trained, strict=True):
            value.requires_grad_(required)
    return found


def loss_of(model: nn.Module, images: LabelledImages, device: torch.device | str) -> Tensor:
    """Cross-entropy of a batch."""
    batch = {"images": images.images.to(device), "labels": images.labels.to(device)}
    return F.cross_entropy(model(pixels_of(batch)).float(), batch["labels"])


def relearning(
    model: nn.Module, control: nn.Module, splits: Splits, config: EvaluateConfig, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Relearning of what is judged and of a control, with every learning rate, and the gap between the two.

    Returns:
        before: shares recognised of what was forgotten and of the rest, before, of both.
        curves: model -> learning rate -> number of steps -> the same.
        gap: see `attack_gap`.
    """
    budget, size = config.relearning, config.evaluation.eval_batch_size
    models = {ERASED: model, CONTROL: control}
    found: dict[str, Any] = {"budget": asdict(budget), "before": {}, "curves": {}}
    results: dict[str, AttackResults] = {}
    usable: dict[str, float] = {}
    for name, network in models.items():
        plain = look(network, splits, 0, batch_size=size, device=device)
        usable[name] = USABLE * (plain.retained_share or 0.0)
        cells = []
        for rate in budget.learning_rates:
            marks = relearn(network, splits, budget, learning_rate=rate, eval_batch_size=size, device=device)
            cells.append(CellResult(name, "relearning", "", f"{rate:g}", asdict(budget), 0.0, marks=marks))
        results[name] = AttackResults(cells, [])
        found["before"][name] = seen_record(plain)
        found["curves"][name] = {
            cell.variant: {str(seen.num_steps): seen_record(seen) for seen in cell.marks} for cell in cells
        }
    found["gap"] = attack_gap(
        results[ERASED], results[CONTROL], usable_erased=usable[ERASED], usable_control=usable[CONTROL]
    )
    return found
