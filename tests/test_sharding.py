"""Weights shared out over two processes by `fully_shard`: losses, gradients and weights are those of one process."""

import pytest
import torch
from sharded import INSIDE, RUNS, in_two_processes, train, train_inside

pytestmark = pytest.mark.timeout(1800)  # two processes on cores that others use, too


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes found in every case."""
    folder = tmp_path_factory.mktemp("sharded")
    in_two_processes(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    known = {}

    def find(name):
        if name not in known:
            known[name] = train(name, tmp_path_factory.mktemp("one"))
        return known[name]

    return find


def differ(found, expected):
    """Norm of the difference of two lists of tensors, relative to the second one's."""
    pairs = list(zip(found, expected, strict=True))
    change = sum((one - other).square().sum() for one, other in pairs).sqrt()
    return float(change / sum(other.square().sum() for _, other in pairs).sqrt())


@pytest.mark.parametrize(("name", "sharded_first"), RUNS)
def test_two_processes_equal_one(name, sharded_first, folder, one_process):
    expected = one_process(name)
    for rank in range(2):
        found = torch.load(folder / f"{name} {sharded_first} {rank}.pt", weights_only=False)
        assert found["losses"][0] == 0
        assert found["losses"][1:] == pytest.approx(expected["losses"][1:], rel=1e-5)
        assert differ(found["gradient"], expected["gradient"]) < 1e-5
        assert list(found["weights"]) == list(expected["weights"])
        assert differ(found["weights"].values(), expected["weights"].values()) < 1e-5
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for map_name, bounds in expected["bounds"].items():
            assert found["bounds"][map_name] == pytest.approx(bounds, rel=1e-4, abs=1e-7)
        assert found["holds"]
        assert found["resumed"] == found["losses"][3:]  # to the bit
        assert all(map(torch.equal, found["resumed weights"].values(), found["weights"].values()))
        assert found["frozen"] == expected["frozen"]


@pytest.mark.parametrize(("name", "kind", "checkpointing"), INSIDE)
def test_the_loss_inside_equals_one_process_under_every_engine(name, kind, checkpointing, folder):
    """FSDP 1 makes weights whole only while their block runs."""
    expected = train_inside(name)
    for rank in range(2):
        found = torch.load(folder / f"{name} {kind} {rank}.pt", weights_only=False)
        assert found["losses"][0] == 0 < found["losses"][-1]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert list(found["weights"]) == list(expected["weights"])
        assert differ(found["weights"].values(), expected["weights"].values()) < 1e-5
        if kind == "FSDP 1":
            assert "are shared out over processes, and it did not run in this step" in found["without a forward pass"]
