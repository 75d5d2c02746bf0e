"""Accuracy, membership attacks and the gap to retraining (SETTINGS of the README: UA, RA, TA, MIA).

Shapes: N images, J labels, K shadow models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.svm import SVC
from torch import Tensor, nn

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.utils.run_records import METRICS_NAME
from barrier_diffusers.utils.shown_text import plain_console
from classification_ext.data import Splits, in_order, pixels_of
from classification_ext.models import load_classifier
from classification_ext.settings import ClassifierEvaluationConfig

HEADLINE = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "mia")  # UA, RA, TA, MIA


SHORT = {"unlearning_accuracy": "UA", "retain_accuracy": "RA", "test_accuracy": "TA", "mia": "MIA"}


FEATURES = ("correctness", "confidence", "entropy", "modified_entropy", "probability")


MIA_FEATURE = "confidence"  # the one that `mia` names, as in the tables of the field


@torch.no_grad()
def predict(model: nn.Module, images: LabelledImages, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Logits (N, J), float32 on the CPU; the model is put into eval mode."""
    model.eval()
    return torch.cat([model(pixels_of(batch)).float().cpu() for batch in in_order(images, batch_size, device=device)])


def correct(logits_NJ: Tensor, labels_N: Tensor) -> np.ndarray:
    """Which images get their own label (N,)."""
    return (logits_NJ.argmax(1) == labels_N).numpy()


def attack_features(logits_NJ: Tensor, labels_N: Tensor) -> dict[str, np.ndarray]:
    """What a membership attack sees of each image, (N, 1) or (N, J) each.

    correctness; confidence p_y; entropy - sum p log p; modified entropy - (1 - p_y) log p_y - sum_{j != y} p_j
    log(1 - p_j) (Song and Mittal, arXiv 2003.10595); all probabilities.
    """
    log_NJ = logits_NJ.double().log_softmax(1)
    share_NJ = log_NJ.exp()
    own = labels_N[:, None]
    own_N, own_log_N = share_NJ.gather(1, own)[:, 0], log_NJ.gather(1, own)[:, 0]
    others_NJ = torch.where(torch.zeros_like(share_NJ).scatter(1, own, 1.0) > 0, 0.0, share_NJ)
    not_log_NJ = torch.log1p(-others_NJ.clamp_max(1 - 1e-15))
    values = {
        "correctness": (logits_NJ.argmax(1) == labels_N).double(),
        "confidence": own_N,
        "entropy": -(share_NJ * log_NJ).sum(1),
        "modified_entropy": -(1 - own_N) * own_log_N - (others_NJ * not_log_NJ).sum(1),
    }
    return {name: value[:, None].numpy() for name, value in values.items()} | {"probability": share_NJ.numpy()}


def membership(
    members: Mapping[str, np.ndarray],
    non_members: Mapping[str, np.ndarray],
    forget: Mapping[str, np.ndarray],
    num_samples: int,
    seed: int,
) -> dict[str, float]:
    """Share of forget images judged non-members, in percent, by an RBF SVC (C = 3) per feature.

    It learns from as many members (retained training images) as non-members (test images), both drawn at random: at
    most `num_samples` of each. 100: the forget images look unseen.
    """
    rng = np.random.default_rng(seed)
    sizes = [len(next(iter(group.values()))) for group in (members, non_members)]
    count = min(num_samples, *sizes)
    chosen = [rng.choice(size, count, replace=False) for size in sizes]
    truth = np.repeat([1, 0], count)
    shares = {}
    for name in FEATURES:
        seen = np.concatenate([members[name][chosen[0]], non_members[name][chosen[1]]])
        judge = SVC(C=3, kernel="rbf", gamma="auto").fit(seen, truth)
        shares[name] = round(100 * float(1 - judge.predict(forget[name]).mean()), 3)
    return shares


def log_odds(logits_NJ: Tensor, labels_N: Tensor) -> Tensor:
    """log(p_y / (1 - p_y)) (N,), from the logits, so that confident predictions do not overflow."""
    own = labels_N[:, None]
    rest_NJ = logits_NJ.double().scatter(1, own, -torch.inf)
    return logits_NJ.double().gather(1, own)[:, 0] - rest_NJ.logsumexp(1)


def likelihood_ratio(
    forget: Tensor, unseen: Tensor, shadow_forget: Sequence[Tensor], shadow_unseen: Sequence[Tensor]
) -> dict[str, float]:
    """The offline likelihood-ratio attack (Carlini et al., arXiv 2112.03570) on the forget images.

    Each image's log odds are compared with those under K models that never saw it: a normal distribution with the
    image's own mean and one standard deviation for all, as K is small. The attack has to tell forget images from
    images that the network never saw.

    Args:
        forget, unseen: log odds (N,) under the network; shadow_*: under each shadow model.

    Returns:
        `auc` and `tpr_at_1_fpr` in percent: 50 and about 1 where nothing of the forget images is left.
    """
    outside = [torch.stack(list(values)) for values in (shadow_forget, shadow_unseen)]  # (K, N)
    spreads = [values - values.mean(0) for values in outside]
    num_free = sum(values.numel() - values.shape[1] for values in outside)
    if num_free > 0:
        deviation = (sum(float(spread.square().sum()) for spread in spreads) / num_free) ** 0.5
    else:  # one shadow model: every image has the same spread, and the order does not depend on it
        deviation = 1.0
    scores = [
        ((values - shadows.mean(0)) / max(deviation, 1e-12)).numpy()
        for values, shadows in zip((forget, unseen), outside, strict=True)
    ]
    truth = np.repeat([1, 0], [len(forget), len(unseen)])
    score = np.concatenate(scores)
    false, true, _ = roc_curve(truth, score)
    return {
        "auc": round(100 * float(roc_auc_score(truth, score)), 3),
        "tpr_at_1_fpr": round(100 * float(true[false <= 0.01].max()), 3),
        "num_shadow_models": len(outside[0]),
    }


def gap(metrics: Mapping[str, Any], retrained: Mapping[str, Any]) -> dict[str, float]:
    """|difference| to a retrained model in UA, RA, TA and MIA, and their mean, in points."""
    gaps = {f"{name}_gap": round(abs(metrics[name] - retrained[name]), 3) for name in HEADLINE}
    return {**gaps, "average_gap": round(sum(gaps.values()) / len(gaps), 3)}


def evaluate(
    model: nn.Module, splits: Splits, config: ClassifierEvaluationConfig, seed: int, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """UA, RA, TA, MIA in percent, the likelihood-ratio attack with shadow models, the gap with a retrained one.

    Returns:
        `unlearning_accuracy` (100 - accuracy on the forget images), the same on test images of the forgotten labels,
        `retain_accuracy`, `test_accuracy` (test images of the retained labels), `mia` and its five features, `lira`,
        gaps; `details` holds counts and 95 % intervals, and `per_label` the accuracy on the test images of each label.
    """
    size = config.eval_batch_size
    parts = {name: getattr(splits, name) for name in ("forget", "retain", "test", "forget_test")}
    logits = {name: predict(model, images, batch_size=size, device=device) for name, images in parts.items()}
    right = {name: correct(logits[name], images.labels) for name, images in parts.items()}
    details = {
        "unlearning_accuracy": share(~right["forget"]),
        "unlearning_accuracy_test": share(~right["forget_test"]),
        "retain_accuracy": share(right["retain"]),
        "test_accuracy": share(right["test"]),
    }
    metrics: dict[str, Any] = {name: counted["value"] for name, counted in details.items()}
    details["per_label"] = per_label({name: (parts[name], right[name]) for name in ("test", "forget_test")})
    features = {name: attack_features(logits[name], parts[name].labels) for name in ("forget", "retain", "test")}
    shares = membership(
        features["retain"], features["test"], forget=features["forget"], num_samples=config.num_mia_samples, seed=seed
    )
    metrics |= {"mia": shares[MIA_FEATURE], "mia_features": shares}
    if config.shadow_models:
        metrics["lira"] = against_shadows(logits, splits, config=config, device=device)
    if config.retrained is not None:
        metrics |= gap(metrics, read_metrics(config.retrained))
    return {**metrics, "details": details}


def per_label(parts: Mapping[str, tuple[LabelledImages, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Accuracy on each label's images, of the first of the parts that has any.

    Args:
        parts: images, and whether each (N,) got its own label.
    """
    found: dict[str, dict[str, Any]] = {}
    for images, right in parts.values():
        for index, name in enumerate(images.names):
            mine = (images.labels == index).numpy()
            if mine.any() and name not in found:
                found[name] = share(right[mine])
    return found


def against_shadows(
    logits: Mapping[str, torch.Tensor], splits: Splits, config: ClassifierEvaluationConfig, device: torch.device | str
) -> dict[str, float]:
    """The likelihood-ratio attack: forget images against test images of the same labels."""
    names = ("forget", "forget_test")
    parts = {name: getattr(splits, name) for name in names}
    odds: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for folder in config.shadow_models:
        shadow = load_classifier(folder).to(device)
        for name, images in parts.items():
            odds[name].append(
                log_odds(predict(shadow, images, batch_size=config.eval_batch_size, device=device), images.labels)
            )
    forget, unseen = (log_odds(logits[name], images.labels) for name, images in parts.items())
    return likelihood_ratio(forget, unseen, shadow_forget=odds["forget"], shadow_unseen=odds["forget_test"])


def read_metrics(folder: str) -> dict[str, Any]:
    """The metrics of a finished run.

    Raises:
        ValueError: the folder holds none, or not all that a gap needs.
    """
    path = Path(folder) / METRICS_NAME
    if not path.is_file():
        raise ValueError(f"{folder!r} holds no {METRICS_NAME}: name the output_dir of a finished run")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in HEADLINE if name not in metrics]
    if missing:
        raise ValueError(f"{str(path)!r} has no {', '.join(missing)}: it is not of a run that forgot something")
    return metrics


def print_table(before: Mapping[str, Any] | None, after: Mapping[str, Any], title: str) -> None:
    """UA, RA, TA, MIA before and after, and the gap where there is one."""
    table = Table(title=title)
    for heading in ("", "before", "after", "95 % interval", "gap to retraining"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in HEADLINE:
        ends = after["details"].get(name, {}).get("interval_95")
        cells = [f"{before[name]:.2f}" if before else "", f"{after[name]:.2f}"]
        cells += [f"{ends[0]:.1f} - {ends[1]:.1f}" if ends else ""]
        table.add_row(SHORT[name], *cells, f"{after[f'{name}_gap']:.2f}" if f"{name}_gap" in after else "")
    if "average_gap" in after:
        table.add_row("average", "", "", "", f"{after['average_gap']:.2f}", style="bold")
    plain_console().print(table)
    if "lira" in after:
        print(f"likelihood-ratio attack: AUC {after['lira']['auc']:.1f} % (50: nothing left to tell)")
