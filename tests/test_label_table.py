"""An nn.Embedding is protected as the linear map on one-hot rows that it is."""

import copy

import pytest
import torch
from torch import nn

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.protection.targets import input_rows, resolve_targets

TARGETS = ["class_embedding", "to_q", "to_k", "to_v"]


class Table(nn.Module):
    """An embedding and what must be its equal: a Linear without bias on one-hot rows."""

    def __init__(self, as_linear):
        super().__init__()
        torch.manual_seed(0)
        table = torch.randn(6, 4)
        self.as_linear = as_linear
        self.map = nn.Linear(6, 4, bias=False) if as_linear else nn.Embedding(6, 4)
        self.map.weight.data = table.T.clone() if as_linear else table.clone()

    def forward(self, labels):
        return self.map(nn.functional.one_hot(labels, 6).float()) if self.as_linear else self.map(labels)


FORGET = [torch.tensor([1, 1, 1]), torch.tensor([1, 1, 4])]
RETAIN = [torch.tensor([0, 2, 3]), torch.tensor([5, 0, 2])]


def run(model, batch):
    return model(batch)


def trained(as_linear, **options):
    """(barrier, model) after three steps that move every row."""
    model = Table(as_linear)
    barrier = Barrier(model, BarrierConfig(targets=["map"], reduced_dim=3, **options))
    barrier.setup_protection(FORGET, run, RETAIN)
    optimizer = torch.optim.SGD(barrier.trainable_parameters(), lr=0.1)
    for _ in range(3):
        (model(torch.arange(6)) ** 2).sum().backward()
        optimizer.step()
        barrier.project()
        optimizer.zero_grad()
    return barrier, model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"region": "slabs", "residual_source": "both"},
        {"use_actual_bounds": True},
        {"constraint": "projection"},
        {"constraint": "both", "projection_energy": 0.7},
    ],
)
def test_a_table_is_a_linear_map_on_one_hot_rows(options):
    (table, table_model), (linear, linear_model) = (trained(as_linear, **options) for as_linear in (False, True))
    torch.testing.assert_close(table_model.map.weight, linear_model.map.weight.T)
    losses = [barrier.compute_protection_loss() for barrier in (table, linear)]
    torch.testing.assert_close(*losses)
    if options.get("constraint") != "projection":
        assert losses[0] > 0
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(table_model.map.weight.grad, linear_model.map.weight.grad.T)
    certificates = [barrier.certify(RETAIN, run).to_dict() for barrier in (table, linear)]
    assert certificates[0]["holds"] and certificates[1]["holds"]
    for key in ("sound", "largest_output_drift"):
        assert certificates[0]["maps"][0][key] == pytest.approx(certificates[1]["maps"][0][key], rel=1e-4, abs=1e-6)


def test_a_projection_leaves_the_rows_of_retained_labels_alone():
    _, model = trained(False, constraint="projection", projection_energy=1.0)
    before = Table(False).map.weight
    moved = (model.map.weight - before).norm(dim=1)
    assert moved[[0, 2, 3, 5]].max() < 1e-6
    assert moved[[1, 4]].min() > 0.1


def test_saving_and_loading(tmp_path):
    barrier, model = trained(False)
    barrier.save_pretrained(tmp_path)
    again = Barrier.from_pretrained(tmp_path, copy.deepcopy(model))
    assert torch.equal(again.compute_protection_loss(), barrier.compute_protection_loss())
    with barrier.snapshot_weights():
        assert torch.equal(model.map.weight, Table(False).map.weight)


def test_one_label_has_no_covariance_and_fits_all_the_same():
    model = Table(False)
    barrier = Barrier(model, BarrierConfig(targets=["map"], reduced_dim=32))
    barrier.setup_protection([torch.tensor([1, 1])], run)
    region = barrier.regions["map"]
    assert torch.equal(region.mean, torch.eye(6)[1]) and region.basis.shape == (6, 6)  # K is capped at 6
    assert barrier.compute_protection_loss() == 0
    with torch.no_grad():
        model.map.weight[3] += 1
    loss = barrier.compute_protection_loss()
    assert loss > 0 and loss.isfinite()


def test_the_class_embedding_of_a_unet_beside_its_attention(class_unet):
    barrier = Barrier(class_unet, BarrierConfig(targets=TARGETS, reduced_dim=8))
    names = {entry.name: entry.num_features for entry in barrier.maps}
    assert names["class_embedding"] == 10
    assert barrier.num_trainable == sum(p.numel() for p in class_unet.parameters() if p.requires_grad)

    def forward(model, labels):
        return model(torch.ones(len(labels), 3, 8, 8), torch.full((len(labels),), 10), class_labels=labels).sample

    before = forward(class_unet, torch.arange(10))
    barrier.setup_protection([torch.tensor([7, 7])], forward, None)
    barrier.remove()
    assert torch.equal(forward(class_unet, torch.arange(10)), before)
    assert all(parameter.requires_grad for parameter in class_unet.parameters())


def test_rows_of_any_shape():
    table = nn.Embedding(3, 2)
    assert torch.equal(input_rows(torch.tensor([2, 0]), table), torch.eye(3)[[2, 0]][:, None])
    assert input_rows(torch.zeros(4, 5, dtype=torch.long), table).shape == (4, 5, 3)
    assert input_rows(torch.tensor(1), table).shape == (1, 1, 3)


def test_given_retain_labels_need_no_forward_pass():
    config = BarrierConfig(targets=["map"], constraint="projection", projection_energy=1.0)
    barrier = Barrier(Table(False), config)
    barrier.setup_protection(None, run, None, {"map": [torch.tensor([0, 2, 3, 5])]})
    assert barrier.projections["map"].rank == 4
    for wrong in (torch.tensor([0, 6]), torch.tensor([0.0, 1.0]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="whole numbers from 0 to 5, rows of map"):
            Barrier(Table(False), config).setup_protection(None, run, None, {"map": [wrong]})


def test_a_table_that_renormalises_its_rows_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        resolve_targets(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), ["0"])
