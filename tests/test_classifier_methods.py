"""The unlearning methods, each against what its formula says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from classifiers import labelled
from torch import nn
from torch.nn.utils import parameters_to_vector

from barrier_diffusers.protection.config import BarrierConfig
from classification_ext.data import in_order, pixels_of
from classification_ext.methods import METHODS, Edit, Method, Step
from classification_ext.methods.boundary_expand import ShadowLabel
from classification_ext.methods.boundary_shrink import nearest_other_label
from classification_ext.methods.fisher import fisher_diagonal
from classification_ext.methods.gradients import flat, sample_gradients
from classification_ext.methods.rl import other_labels
from classification_ext.methods.wfisher import inverse_fisher_product
from classification_ext.settings import MethodConfig, UnlearnConfig

NO_BARRIER = BarrierConfig(targets=["fc"], lambda_interval=0)


class Linear(nn.Module):
    """Softmax regression on the pixels."""

    def __init__(self, scale=0.3):
        super().__init__()
        self.fc = nn.Linear(64, 4)
        with torch.no_grad():
            self.fc.weight.copy_(scale * torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
            self.fc.bias.zero_()

    def forward(self, pixels):
        return self.fc(pixels.flatten(1))


@pytest.fixture
def linear():
    return Linear()


@pytest.fixture
def batch():
    return in_order(labelled(3), 12)[0]


def step(model, batch, name="rl", progress=0.0, **options):
    parameters = list(model.parameters())
    return Step(model, pixels_of(batch), batch["labels"], 4, parameters, progress, MethodConfig(name=name, **options))


def config(**changes):
    places = {"pretrained_model_name_or_path": "x", "train_data_dir": "x", "output_dir": "x", "forget_class": "east"}
    return UnlearnConfig(**{**places, **changes})


def test_ga_ft_and_l1_by_their_formulas(linear, batch):
    ce = F.cross_entropy(linear(pixels_of(batch)), batch["labels"])
    assert torch.equal(METHODS["ga"].loss(step(linear, batch)), -ce)
    assert torch.equal(METHODS["ft"].loss(step(linear, batch)), ce)
    norm = linear.fc.weight.abs().sum() + linear.fc.bias.abs().sum()
    found = METHODS["l1_sparse"].loss(step(linear, batch, "l1_sparse", progress=0.25, l1_weight=0.1))
    torch.testing.assert_close(found, ce + 0.1 * 0.75 * norm)


def test_random_labels_are_others_and_equally_likely(linear, batch):
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(3000)
    drawn = other_labels(labels, 4)
    assert not (drawn == labels).any()
    counts = torch.stack([torch.bincount(drawn[labels == label], minlength=4) for label in range(4)])
    assert counts.diagonal().sum() == 0 and (counts + 1000 * torch.eye(4) - 1000).abs().max() < 100
    assert METHODS["rl"].loss(step(linear, batch)).requires_grad


def test_boundary_shrink_takes_the_likeliest_other_label_across_the_step(linear, batch):
    pixels, labels = pixels_of(batch), batch["labels"]
    found = nearest_other_label(linear, pixels, labels, MethodConfig(epsilon=0.2))
    weight = linear.fc.weight
    shares = linear(pixels).softmax(1) - F.one_hot(labels, 4)
    moved = (pixels.flatten(1) + 0.2 * (shares @ weight).sign()).clamp(-1, 1)  # the loss gradient by hand
    logits = moved @ weight.T
    for row, label in enumerate(labels.tolist()):
        others = [name for name in range(4) if name != label]
        assert found[row] == max(others, key=lambda name, row=row: logits[row, name])
    assert not pixels.requires_grad


def test_shadow_label_is_one_more_output_and_leaves_no_trace(linear, batch):
    pixels = pixels_of(batch)
    shadow = ShadowLabel(linear, 4)
    logits = linear(pixels)
    extended = shadow(logits)
    assert torch.equal(extended[:, :4], logits)
    torch.testing.assert_close(extended[:, 4], pixels.flatten(1) @ linear.fc.weight.mean(0))
    extended[:, 4].sum().backward()
    assert shadow.weight.grad.abs().sum() > 0
    shadow.remove()
    assert not linear.fc._forward_pre_hooks and torch.equal(linear(pixels), logits)
    with pytest.raises(ValueError, match="ends in a Linear with one output per label"):
        ShadowLabel(linear, 5)


def test_fisher_diagonal_of_softmax_regression_is_the_textbook_one(linear):
    images = labelled(6)
    found = fisher_diagonal(linear, dict(linear.named_parameters()), in_order(images, 7))
    x = pixels_of(in_order(images, 24)[0]).flatten(1)
    p = (x @ linear.fc.weight.T).softmax(1)
    torch.testing.assert_close(found["fc.weight"], torch.einsum("nk,nd->kd", p * (1 - p), x**2) / len(x))
    torch.testing.assert_close(found["fc.bias"], (p * (1 - p)).mean(0))


def test_fisher_noise_is_largest_where_the_retained_images_need_least(linear):
    torch.manual_seed(0)
    start = {name: value.detach().clone() for name, value in linear.named_parameters()}
    images = labelled(10)
    edit = Edit(linear, dict(linear.named_parameters()), images, images, torch.device("cpu"), 16, 0, MethodConfig())
    diagonal = fisher_diagonal(linear, edit.parameters, in_order(images, 40))["fc.weight"]
    METHODS["fisher"].edit(edit)
    moved = linear.fc.weight.detach() - start["fc.weight"]
    unit = moved / (1e-7 / diagonal.sqrt()).sqrt()  # divided by its deviation the noise is standard normal
    assert 0.9 < unit.std() < 1.1 and unit.mean().abs() < 0.15
    again = Linear()
    METHODS["fisher"].edit(replace(edit, model=again, parameters=dict(again.named_parameters())))
    assert torch.equal(again.fc.weight, linear.fc.weight)


def test_sample_gradients_are_those_of_one_sample_at_a_time(linear, batch):
    pixels, labels = pixels_of(batch), batch["labels"]
    rows = flat(sample_gradients(linear, dict(linear.named_parameters()), pixels, labels))
    for index in range(len(labels)):
        loss = F.cross_entropy(linear(pixels[index : index + 1]), labels[index : index + 1])
        own = torch.autograd.grad(loss, list(linear.parameters()))
        torch.testing.assert_close(rows[index], torch.cat([value.flatten() for value in own]))


def test_inverse_fisher_product_solves_the_dense_system():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    vector = torch.randn(30, generator=generator, dtype=torch.float64)
    dense = 0.1 * torch.eye(30, dtype=torch.float64) + rows.T @ rows / 9
    torch.testing.assert_close(inverse_fisher_product(rows, vector, 0.1), torch.linalg.solve(dense, vector))


def test_influence_goes_where_retraining_goes():
    """Softmax regression trained to its optimum: the step is near the optimum without the forget images."""
    images = labelled(20)
    chosen = torch.arange(0, 80, 8)  # two labels' images
    kept = torch.tensor([row for row in range(80) if row % 8])

    def optimum(rows):
        model, data = Linear(0.0), images[rows]
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            penalty = sum(parameter.square().sum() for parameter in model.parameters())
            loss = F.cross_entropy(model(data.images.float() / 127.5 - 1), data.labels) + 0.05 * penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    before, after = optimum(torch.arange(80)), optimum(kept)
    start, end = (parameters_to_vector(model.parameters()).detach().clone() for model in (before, after))
    options = MethodConfig(name="wfisher", damping=0.1, num_samples=70)  # the penalty's curvature is 0.1
    forget, retain = images[chosen], images[kept]
    METHODS["wfisher"].edit(
        Edit(before, dict(before.named_parameters()), forget, retain, torch.device("cpu"), 16, 0, options)
    )
    moved = parameters_to_vector(before.parameters()).detach() - start
    assert F.cosine_similarity(moved, end - start, dim=0) > 0.7  # the Fisher matrix is not quite the Hessian


def test_settings_that_a_method_never_reads_are_refused():
    METHODS.find("rl").check(config(method=MethodConfig(name="rl", alpha=0.5)))
    with pytest.raises(ValueError, match="method 'ft' does not read method.alpha: leave it at 0.0"):
        METHODS.find("ft").check(config(method=MethodConfig(name="ft", alpha=1.0)))
    with pytest.raises(ValueError, match="'fisher' runs no training step that the protection could act on"):
        METHODS.find("fisher").check(config(method=MethodConfig(name="fisher")))
    with pytest.raises(ValueError, match="'retrain' trains every weight: set trained_weights to all"):
        METHODS.find("retrain").check(config(method=MethodConfig(name="retrain"), barrier=NO_BARRIER))
    with pytest.raises(ValueError, match="'wfisher' has no training to resume"):
        METHODS.find("wfisher").check(
            config(method=MethodConfig(name="wfisher"), barrier=NO_BARRIER, resume_from_checkpoint="latest")
        )
    with pytest.raises(ValueError, match="unknown method 'gradient'; known are boundary_expand, boundary_shrink"):
        METHODS.find("gradient")
    with pytest.raises(ValueError, match="method 'ga' is registered already"):
        METHODS.register(Method("ga"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_class": None}, "nothing is to be forgotten"),
        ({"trained_weights": "all"}, "BARRIER protects the targets alone"),
        ({"saliency_mask": 1.5}, "saliency_mask is 1.5"),
        ({"train_batch_size": 0}, "train_batch_size is 0, but must be at least 1"),
        ({"method": {"damping": 0.0}}, "method.damping is 0.0, but must be > 0"),
        ({"method": {"alpha": -1.0}}, "method.alpha is -1.0, but must be at least 0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        if isinstance(changes.get("method"), dict):
            changes = {"method": MethodConfig(**changes["method"])}
        config(**changes)
