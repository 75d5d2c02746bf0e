"""Measures of the image classifiers against hand-computed values and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from classifiers import labelled
from sklearn.svm import SVC
from torch import nn

from classification_ext.data import make_splits
from classification_ext.metrics import (
    attack_features,
    correct,
    evaluate,
    gap,
    likelihood_ratio,
    log_odds,
    membership,
    read_metrics,
)
from classification_ext.settings import ClassifierEvaluationConfig, ForgetConfig


def test_attack_features_by_hand():
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    labels = torch.tensor([0, 2])
    found = attack_features(shares.log(), labels)
    assert found["correctness"].ravel().tolist() == [1, 0]
    np.testing.assert_allclose(found["confidence"].ravel(), [0.7, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found["probability"], shares.numpy(), rtol=1e-6)
    entropy = [-sum(p * math.log(p) for p in row) for row in shares.tolist()]
    np.testing.assert_allclose(found["entropy"].ravel(), entropy, rtol=1e-6)
    modified = [
        -0.3 * math.log(0.7) - 0.2 * math.log(0.8) - 0.1 * math.log(0.9),
        -0.8 * math.log(0.2) - 0.5 * math.log(0.5) - 0.3 * math.log(0.7),
    ]
    np.testing.assert_allclose(found["modified_entropy"].ravel(), modified, rtol=1e-6)
    sure = attack_features(torch.tensor([[1000.0, 0.0, 0.0]] * 2), torch.tensor([0, 1]))
    assert all(np.isfinite(values).all() for values in sure.values())


def test_membership_is_the_share_that_scikit_learns_svc_calls_unseen():
    generator = torch.Generator().manual_seed(0)

    def features(strength, count):
        labels = torch.randint(4, (count,), generator=generator)
        logits = torch.randn(count, 4, generator=generator)
        return attack_features(logits.scatter_add(1, labels[:, None], torch.full((count, 1), strength)), labels)

    members, others, forget = features(4.0, 60), features(1.0, 60), features(2.0, 50)
    found = membership(members, others, forget, 60, seed=0)
    for name, value in found.items():
        rows = np.concatenate([members[name], others[name]])
        judge = SVC(C=3, kernel="rbf", gamma="auto").fit(rows, [1] * 60 + [0] * 60)
        assert value == pytest.approx(100 * np.mean(judge.predict(forget[name]) == 0), abs=1e-3)
    few = membership(members, others, forget, 20, seed=0)
    assert few == membership(members, others, forget, 20, seed=0) != membership(members, others, forget, 20, seed=1)


def test_log_odds():
    shares = torch.tensor([[0.7, 0.2, 0.1]])
    assert log_odds(shares.log(), torch.tensor([0])).item() == pytest.approx(math.log(0.7 / 0.3), rel=1e-6)
    assert log_odds(torch.tensor([[900.0, 0.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(900 - math.log(2))


def test_likelihood_ratio_tells_what_shadow_models_cannot_explain():
    generator = torch.Generator().manual_seed(0)
    easy_forget, easy_unseen = torch.randn(200, generator=generator), torch.randn(200, generator=generator)

    def shadows(easy):
        return [easy + 0.1 * torch.randn(200, generator=generator) for _ in range(3)]

    known = (shadows(easy_forget), shadows(easy_unseen))
    nothing = likelihood_ratio(easy_forget, easy_unseen, *known)
    assert 40 < nothing["auc"] < 60 and nothing["num_shadow_models"] == 3
    # half a unit is invisible beside the images' own differences, but not beside the shadow models
    remembered = likelihood_ratio(easy_forget + 0.5, easy_unseen, *known)
    assert remembered["auc"] > 99 and remembered["tpr_at_1_fpr"] > 90
    one = likelihood_ratio(easy_forget + 0.5, easy_unseen, known[0][:1], known[1][:1])
    assert one["auc"] > 95


def test_gap():
    metrics = {"unlearning_accuracy": 90.0, "retain_accuracy": 97.0, "test_accuracy": 88.0, "mia": 70.0}
    other = {"unlearning_accuracy": 92.0, "retain_accuracy": 96.0, "test_accuracy": 88.0, "mia": 75.0}
    found = gap(metrics, other)
    assert found["unlearning_accuracy_gap"] == 2 and found["mia_gap"] == 5 and found["average_gap"] == 2


class Bright(nn.Module):
    """Says "north" for images whose upper rows are bright, else "south"."""

    def forward(self, pixels):
        upper, lower = pixels[:, 0, :2].mean((1, 2)), pixels[:, 0, -2:].mean((1, 2))
        zero = torch.zeros_like(upper)
        return torch.stack([upper, zero - 9, lower, zero - 9], 1)


def test_evaluate_counts_the_right_images(tmp_path):
    train, test = labelled(20), labelled(10, seed=1)
    splits = make_splits(train, test, ForgetConfig(forget_class="north"))
    found = evaluate(Bright(), splits, ClassifierEvaluationConfig(num_mia_samples=30), seed=0)
    right = correct(Bright()(train.images.float() / 127.5 - 1), train.labels)
    of = train.labels.numpy()
    assert found["unlearning_accuracy"] == pytest.approx(100 - 100 * right[of == 0].mean(), abs=1e-3)
    assert found["retain_accuracy"] == pytest.approx(100 * right[of != 0].mean(), abs=1e-3)
    assert found["details"]["retain_accuracy"]["num_images"] == 60
    assert found["details"]["test_accuracy"]["num_images"] == 30
    assert found["mia"] == found["mia_features"]["confidence"] and "lira" not in found
    with pytest.raises(ValueError, match="holds no metrics.json"):
        read_metrics(str(tmp_path))
