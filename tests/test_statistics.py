"""Streaming statistics against numpy on all rows at once."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forks import in_ranks

from barrier_diffusers.protection.statistics import Moments, ProjectionSketch


def rows(n=1000, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(3.0, 2.0, (n, d)) @ rng.normal(size=(d, d))).float()


def test_moments_equal_numpy_whatever_the_batches():
    x = rows()
    moments = Moments(6)
    for chunk in x.split([1, 499, 300, 200]):
        moments.update(chunk)
    np.testing.assert_allclose(moments.mean, x.double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.covariance, np.cov(x.double().numpy().T, bias=True), rtol=1e-5, atol=1e-5)
    assert moments.count == 1000


def test_a_large_offset_does_not_destroy_the_covariance():
    x = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)) + 1e3
    moments = Moments(3)
    for chunk in x.split(64):
        moments.update(chunk)
    np.testing.assert_allclose(moments.covariance, np.cov(x.double().numpy().T, bias=True), atol=1e-4)


def test_merge_equals_one_stream():
    x = rows()
    whole, left, right, empty = Moments(6), Moments(6), Moments(6), Moments(6)
    whole.update(x)
    left.update(x[:123])
    right.update(x[123:])
    left.merge(right)
    left.merge(empty)
    torch.testing.assert_close(left.covariance, whole.covariance, rtol=1e-6, atol=1e-6)
    assert left.count == whole.count


def test_half_precision_rows_are_accumulated_in_full():
    x = rows().bfloat16()
    moments = Moments(6)
    for chunk in x.split(10):
        moments.update(chunk)
    np.testing.assert_allclose(moments.covariance, np.cov(x.double().numpy().T, bias=True), rtol=1e-4, atol=1e-4)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows were recorded"):
        Moments(3).covariance  # noqa: B018
    with pytest.raises(ValueError, match="no rows were recorded"):
        ProjectionSketch(torch.ones(2)).quantile(0.5)
    sketch = ProjectionSketch(torch.ones(1))
    sketch.update(torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        sketch.quantile(1.5)


RNG = np.random.default_rng(1)
COLUMNS = {
    "gaussian": RNG.normal(size=20000),
    "uniform": RNG.uniform(-3, 5, 20000),
    "heavy tails": RNG.standard_t(1.5, 20000),
    "skewed": RNG.exponential(2.0, 20000),
    "a dozen values": RNG.choice(RNG.normal(size=12), 20000),
    "two values": RNG.choice([-1.0, 2.0], 20000),
    "constant": np.full(20000, 0.25),
    "tiny": RNG.normal(size=20000) * 1e-12,
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("p", [0.01, 0.05, 0.25, 0.5, 0.95, 0.999])
def test_percentiles_are_within_one_percent_of_rank(name, p):
    x = COLUMNS[name] - COLUMNS[name].mean()
    z = torch.from_numpy(x).float()[:, None]
    sketch = ProjectionSketch(torch.tensor([x.std()]))
    for chunk in z.split(777):
        sketch.update(chunk)
    value = sketch.quantile(p).item()
    slack = 1e-6 * max(abs(value), 1e-30)
    below, upto = (z < value - slack).double().mean().item(), (z <= value + slack).double().mean().item()
    assert below - 0.01 <= p <= upto + 0.01


def test_extremes_are_exact():
    z = torch.randn(5000, 3, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 100.0, 0.0])
    sketch = ProjectionSketch(torch.tensor([1.0, 100.0, 0.0]))
    for chunk in z.split(100):
        sketch.update(chunk)
    assert torch.equal(sketch.minimum, z.amin(0)) and torch.equal(sketch.maximum, z.amax(0))
    assert torch.equal(sketch.quantile(0.0), z.amin(0)) and torch.equal(sketch.quantile(1.0), z.amax(0))


def test_sketch_does_not_depend_on_order_or_split():
    z = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    whole, parts = ProjectionSketch(torch.ones(2)), [ProjectionSketch(torch.ones(2)) for _ in range(3)]
    whole.update(z)
    shuffled = z[torch.randperm(3000, generator=torch.Generator().manual_seed(1))]
    for part, chunk in zip(parts, shuffled.split(1000), strict=True):
        part.update(chunk)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert torch.equal(parts[0].counts_KS, whole.counts_KS)
    torch.testing.assert_close(parts[0].quantile(0.05), whole.quantile(0.05), rtol=1e-6, atol=0)


def test_nan_does_not_crash_the_sketch():
    sketch = ProjectionSketch(torch.ones(2))
    sketch.update(torch.tensor([[float("nan"), 1.0], [float("inf"), -float("inf")]]))
    assert sketch.count == 2 and sketch.maximum[0].isnan()


def test_memory_does_not_grow_with_the_rows():
    moments, sketch = Moments(6), ProjectionSketch(torch.ones(6))
    sizes = []
    for _ in range(3):
        for _ in range(20):
            moments.update(rows(500))
            sketch.update(rows(500))
        held = [value for entry in (moments, sketch) for value in vars(entry).values()]
        sizes.append(sum(value.numel() for value in held if isinstance(value, torch.Tensor)))
    assert sizes[0] == sizes[1] == sizes[2]


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = rows()[:300] if rank == 0 else rows()[300:]
    moments, sketch = Moments(6), ProjectionSketch(torch.full((6,), 5.0))
    moments.update(x)
    sketch.update(x)
    moments.all_reduce()
    sketch.all_reduce()
    torch.save({"covariance": moments.covariance, "count": moments.count, "low": sketch.quantile(0.05),
                "min": sketch.minimum, "sketch_count": sketch.count}, f"{folder}/{rank}.pt")  # fmt: skip
    dist.destroy_process_group()


def test_two_processes_give_the_same_statistics(tmp_path):
    in_ranks(_worker, str(tmp_path))
    whole, sketch = Moments(6), ProjectionSketch(torch.full((6,), 5.0))
    whole.update(rows())
    sketch.update(rows())
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result["covariance"], whole.covariance, rtol=1e-6, atol=1e-6)
        assert result["count"] == result["sketch_count"] == 1000
        torch.testing.assert_close(result["low"], sketch.quantile(0.05), rtol=1e-6, atol=0)
        assert torch.equal(result["min"], sketch.minimum)
