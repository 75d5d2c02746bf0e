"""Covariances of wide maps in few rows: bounds in the Loewner order, the loss and its gradient, memory, whole runs."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from forks import in_ranks
from losses import full_loss, lora_loss
from peft import LoraConfig, inject_adapter_in_model
from pipelines import build
from safetensors.torch import load_file
from short_runs import run_tiny
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.protection.certificate import moment_bound
from barrier_diffusers.protection.drift import FullDrift
from barrier_diffusers.protection.frequent_directions import FrequentDirections
from barrier_diffusers.protection.region import ForgetRegion, bounded_residual, fit_directions
from barrier_diffusers.protection.sharding import whole as made_whole

D, K, L = 24, 2, 3
WIDE = {"reduced_dim": K, "residual_rank": L, "wide_features": 20}
BASIS = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(num=300, power=1.0, seed=1):
    """Rows about a mean far from 0, with variances i^-power along random directions."""
    spread = torch.arange(1, D + 1).double() ** (-power / 2)
    return ((normal(num, D, seed=seed).double() * spread) @ BASIS.T + 30).float()


def adversarial():
    """Each direction comes once, in a burst, the strongest last: what came before is shrunk away by then."""
    bursts = [(1 + place) * normal(12, 1, seed=place) * BASIS[:, place].float() for place in range(D)]
    return torch.cat(bursts) - 5


ROWS = {
    "flat": decaying(power=0.0),
    "decaying": decaying(),
    "steep": decaying(power=4.0),
    "adversarial": adversarial(),
    "adversarial, backwards": adversarial().flip(0),
    "sorted": decaying()[decaying().norm(dim=1).argsort()],
    "few": decaying(num=4),
}
BATCHES = {"one": [], "single rows": [1], "small": [2], "uneven": [1, 50, 3, 7], "large": [100]}


def batches(x, sizes):
    """The rows in batches of these sizes over and over; no size: one batch."""
    start, turn = 0, 0
    while start < len(x):
        size = sizes[turn % len(sizes)] if sizes else len(x)
        yield x[start : start + size]
        start, turn = start + size, turn + 1


def sketch_of(x, sizes=(50,), most=K + L):
    sketch = FrequentDirections(D, most)
    for batch in batches(x, sizes):
        sketch.update(batch)
    return sketch


def exact(x):
    x = x.double()
    return (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)


def smallest(matrix, scale):
    """Smallest eigenvalue, of the largest of `scale`."""
    return torch.linalg.eigvalsh(matrix).min() / torch.linalg.eigvalsh(scale).max()


def assert_bounds(sketch, x):
    """F^T F <= C <= F^T F + delta I, and delta is no more than the theorem says."""
    covariance, (factor, delta) = exact(x), sketch.bound
    assert smallest(covariance - factor.T @ factor, covariance) > -1e-6
    assert smallest(factor.T @ factor + delta * torch.eye(D) - covariance, covariance) > -1e-6
    assert len(factor) <= sketch.most and sketch.count == len(x)
    torch.testing.assert_close(sketch.mean, x.double().mean(0), rtol=1e-6, atol=1e-5)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    allowed = min(values[k:].sum() / (sketch.most + 1 - k) for k in range(sketch.most + 1))
    assert delta <= allowed * (1 + 1e-5) + 1e-9 * values[0]


@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", ROWS)
def test_the_sketch_bounds_the_covariance_whatever_the_rows_and_batches(name, sizes):
    assert_bounds(sketch_of(ROWS[name], sizes), ROWS[name])


@pytest.mark.parametrize("name", ROWS)
def test_merged_sketches_bound_the_covariance_of_all_rows(name):
    """About the common mean, however far apart the parts' means are."""
    x = ROWS[name] + torch.linspace(0, 9, len(ROWS[name]))[:, None]
    parts = [sketch_of(part) for part in x.tensor_split(3)]
    parts[0].merge(parts[1])
    parts[0].merge(FrequentDirections(D, K + L))
    parts[0].merge(parts[2])
    assert_bounds(parts[0], x)


def low_rank(num=200, rank=K + L, seed=3):
    """Rows with `rank` directions about a mean outside them."""
    return normal(num, rank, seed=seed) @ normal(rank, D, seed=4) + 7 * normal(D, seed=5)


def test_where_the_rank_suffices_nothing_is_lost():
    x = low_rank()
    factor, delta = sketch_of(x, [33]).bound
    assert delta <= 1e-9 * exact(x).trace()
    torch.testing.assert_close(factor.T @ factor, exact(x), rtol=1e-5, atol=1e-5)


def test_directions_are_the_leading_ones_and_orthonormal():
    x = ROWS["steep"]
    known = fit_directions(sketch_of(x), BarrierConfig(**WIDE))
    values, vectors = torch.linalg.eigh(exact(x))
    torch.testing.assert_close(known.basis_DK.T @ known.basis_DK, torch.eye(K).double(), rtol=0, atol=1e-12)
    assert ((known.basis_DK * vectors.flip(1)[:, :K]).sum(0).abs() > 0.999).all()
    torch.testing.assert_close(known.eigenvalues_K, values.flip(0)[:K], rtol=1e-2, atol=0)
    along = (known.basis_DK.T @ exact(x) @ known.basis_DK).diagonal()
    assert (known.eigenvalues_K >= along * (1 - 1e-6)).all()  # the percentiles' scale is no smaller than the spread
    alike = fit_directions(sketch_of(x[:1].expand(9, D)), BarrierConfig(**WIDE))
    torch.testing.assert_close(alike.basis_DK.T @ alike.basis_DK, torch.eye(K).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_the_residual_is_bounded_outside_any_basis(name):
    """The sketch's own and another one's, as with residual_source retain."""
    sketch, covariance = sketch_of(ROWS[name]), exact(ROWS[name])
    for basis in (fit_directions(sketch, BarrierConfig(**WIDE)).basis_DK, BASIS[:, 5 : 5 + K]):
        outside = torch.eye(D).double() - basis @ basis.T
        factor, delta = bounded_residual(sketch, basis, L)
        assert factor.shape[1] <= L and factor.dtype == torch.float32
        found, residual = factor.double() @ factor.double().T, outside @ covariance @ outside
        assert smallest(residual - found, covariance) > -1e-6
        assert smallest(found + delta * outside - residual, covariance) > -1e-6


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows were recorded"):
        FrequentDirections(D, 3).bound  # noqa: B018


def test_half_precision_rows_that_are_overwritten_count_as_they_were():
    sketch, x = FrequentDirections(D, K + L), decaying(num=9)
    with torch.autocast("cpu", torch.bfloat16):
        for row in x.split(1):
            buffer = row.clone()
            sketch.update(buffer)
            buffer.fill_(1e6)
        for row in x.half().split(1):
            sketch.update(row)
    assert_bounds(sketch, torch.cat([x, x.half().float()]))


class Wide(nn.Module):
    """Two maps that read one wide input, with and without bias, a wide convolution, and a narrow map after them."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.conv = nn.Linear(D, 5, bias=False), nn.Linear(D, 5), nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(9, 4)

    def forward(self, x):
        image = x[:, : D // 2].reshape(-1, 3, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.last(torch.cat([self.one(x) + self.two(x), self.conv(image).amax((2, 3))], dim=1))


def run(model, batch):
    return model(batch)


TARGETS = ["one", "two", "conv", "last"]


def model_of(lora, seed=0):
    torch.manual_seed(seed)
    model = Wide()
    if lora:
        inject_adapter_in_model(LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=TARGETS), model)
    return model


def barrier_of(rows=None, retain=None, lora=0, **options):
    model = model_of(lora)
    config = BarrierConfig(**{"targets": TARGETS, "lambda_interval": 0.7, **WIDE, **options})
    barrier = Barrier(model, config)
    rows = decaying() if rows is None else rows
    barrier.setup_protection(rows.split(64), run, None if retain is None else retain.split(50))
    return barrier


def disturb(barrier, seed=1):
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in barrier.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=made)


def whole(region):
    """The same region with a dense residual F F^T + delta (I - basis basis^T)."""
    if region.residual_factor is None:
        return region
    factor, basis = region.residual_factor, region.basis
    dense = factor @ factor.T + region.residual_diagonal * (torch.eye(len(basis)) - basis @ basis.T)
    return replace(region, residual=dense, residual_factor=None, residual_diagonal=0.0)


VARIANTS = [
    {},
    {"region": "slabs", "include_bias_drift": True},
    {"region": "envelope", "residual_weighting": "singular_values"},
    {"interval": False},
    {"remove_top_directions": True},
    {"use_actual_bounds": True},
    {"residual_source": "retain"},
    {"residual_source": "both", "normalize_protection": False},
    {"loss_inside": True},
]


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_value_and_gradient_are_those_of_the_dense_bound(options, lora):
    """Wide and narrow maps side by side, of several shapes and inputs."""
    barrier = barrier_of(retain=decaying(seed=9) * 2, lora=lora, **options)
    wide = [name for name, region in barrier.regions.items() if region.residual_factor is not None]
    assert wide == ["one", "two", "conv"] and all(barrier.regions[name].residual_diagonal > 0 for name in wide)
    disturb(barrier)
    parameters = barrier.trainable_parameters()
    found = barrier.compute_protection_loss()
    gradients = torch.autograd.grad(found, parameters, retain_graph=True)
    for group in barrier.groups:
        group.region = whole(group.region)
    barrier._loss.to(torch.device("cpu"))
    for part in getattr(barrier._loss, "parts", []):
        part.value = None
    expected = barrier.compute_protection_loss()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_gradient_is_that_of_finite_differences(lora):
    """In float32 central differences of a quadratic form are exact but for rounding."""
    factor, basis = normal(D, L, seed=2), BASIS[:, :K].float()
    factor -= basis @ (basis.T @ factor)
    bound = torch.ones(K)
    region = ForgetRegion(torch.zeros(D), basis, -bound, bound, -bound, bound, None, 9, 1.0, factor, 0.5)
    config = BarrierConfig(interval=False, **WIDE)
    start = [normal(2, D, seed=6), normal(4, 2, seed=7)] if lora else [normal(4, D, seed=6)]

    def value(parts):
        loss, parameters = lora_loss(config, region, [parts], 0.5) if lora else full_loss(config, region, parts)
        return loss, parameters[0] if lora else parameters

    loss, parameters = value(start)
    for place, gradient in enumerate(torch.autograd.grad(loss, parameters)):
        for seed in range(3):
            step = normal(*gradient.shape, seed=20 + seed)
            ends = []
            for sign in (1, -1):
                moved = list(start)
                moved[place] = start[place] + sign * step
                ends.append(value(moved)[0])
            torch.testing.assert_close((ends[0] - ends[1]) / 2, (gradient * step).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flat", "decaying", "adversarial"])
def test_the_loss_is_never_below_the_exact_one(name):
    """Its residual term, and the certificate's moment bound, for drifts of every direction; mean and basis alike."""
    covariance, sketch = exact(ROWS[name]), sketch_of(ROWS[name])
    basis = fit_directions(sketch, BarrierConfig(**WIDE)).basis_DK
    outside = torch.eye(D).double() - basis @ basis.T
    factor, delta = bounded_residual(sketch, basis, L)
    ends = {name: torch.ones(K) for name in ("z_lower", "z_upper", "outer_lower", "outer_upper")}
    known = ForgetRegion(
        torch.zeros(D), basis.float(), residual=(outside @ covariance @ outside).float(), count=9, **ends
    )
    bound = replace(known, residual=None, residual_factor=factor, residual_diagonal=delta)
    config = BarrierConfig(interval=False, **WIDE)
    for drift in (*normal(20, 3, D), BASIS.T.float()[:, None], basis.T.float()[None]):
        for one in drift if drift.dim() == 3 else [drift]:
            exactly, above = (full_loss(config, region, [one])[0] for region in (known, bound))
            assert above >= exactly * (1 - 1e-5) - 1e-5
            assert (
                moment_bound(FullDrift(one), bound, 0.9)
                >= moment_bound(FullDrift(one), known, 0.9) * (1 - 1e-4) - 1e-3
            ).all()


@pytest.mark.parametrize("source", ["forget", "retain", "both"])
def test_where_the_rank_suffices_the_loss_is_the_exact_one(source):
    rows = low_rank(rank=K + 1)
    losses = []
    for width in (20, None):
        barrier = barrier_of(
            rows, retain=rows * 2 + 1, wide_features=width, residual_source=source, targets=["one", "two"]
        )
        disturb(barrier)
        losses.append(barrier.compute_protection_loss())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_narrow_maps_and_the_default_are_as_ever():
    barriers = [barrier_of(wide_features=width) for width in (BarrierConfig.wide_features, D)]
    assert [region.residual_factor is None for region in barriers[1].regions.values()] == [True, True, False, True]
    for name in ("one", "two", "last"):
        first, second = (barrier.regions[name].to_tensors() for barrier in barriers)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
def test_it_is_saved_loaded_and_certified(lora, tmp_path):
    barrier = barrier_of(lora=lora)
    disturb(barrier)
    barrier.save_pretrained(tmp_path)
    expected = barrier.compute_protection_loss()
    certificate = barrier.certify(decaying(seed=8).split(50), run, quantile=0.5, confidence=0.5)
    assert certificate.holds and all(one.moment > 0 for one in certificate.maps)
    again = Barrier.from_pretrained(tmp_path, barrier.model)
    assert again.compute_protection_loss() == expected
    for name, region in barrier.regions.items():
        loaded = again.regions[name].to_tensors()
        assert all(torch.equal(loaded[key], value) for key, value in region.to_tensors().items())


@pytest.mark.parametrize("options", [{}, {"lora": 2}, {"loss_inside": True}], ids=str)
def test_a_factor_is_held_once(options):
    """What the loss multiplies by is the region's own; of the convolution, whose input no other map reads."""
    barrier = barrier_of(**options)
    losses = [part.loss for part in getattr(barrier._loss, "parts", [])] or [barrier._loss]
    stacked = [inputs for loss in losses for inputs, groups in loss._inputs if groups[0].maps[0].name == "conv"]
    held = barrier.regions["conv"].residual_factor.untyped_storage().data_ptr()
    assert [inputs.factor_GDL.untyped_storage().data_ptr() for inputs in stacked] == [held]


def _worker(rank, folder):
    """One sketch of two shares of the rows; the loss of weights that two processes share out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sketch = sketch_of(decaying()[:40] if rank == 0 else decaying()[40:])
    sketch.all_reduce()
    found = {"sketch": (sketch.mean, *sketch.bound, sketch.count)}
    for lora in (0, 2):
        barrier = Barrier.from_pretrained(f"{folder}/{lora}", model_of(lora))
        disturb(barrier)
        fully_shard(barrier.model)
        loss = barrier.compute_protection_loss()
        loss.backward()
        found[lora] = [loss.detach(), *(made_whole(one.grad) for one in barrier.trainable_parameters())]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_get_one_sketch_and_one_loss(tmp_path):
    expected = {}
    for lora in (0, 2):
        barrier = barrier_of(lora=lora)
        barrier.save_pretrained(tmp_path / str(lora))
        disturb(barrier)
        loss = barrier.compute_protection_loss()
        loss.backward()
        expected[lora] = [loss.detach(), *(one.grad for one in barrier.trainable_parameters())]
    in_ranks(_worker, str(tmp_path))
    found, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    (mean, factor, delta, count), same = found["sketch"], other["sketch"]
    assert all(map(torch.equal, (mean, factor, delta), same[:3])) and count == same[3] == 300
    merged = sketch_of(decaying()[:40])
    merged.merge(sketch_of(decaying()[40:]))
    torch.testing.assert_close((mean, factor.T @ factor), (merged.mean, merged.bound[0].T @ merged.bound[0]))
    torch.testing.assert_close(delta, merged.bound[1])
    for lora in (0, 2):
        for one in (found, other):
            torch.testing.assert_close(one[lora], expected[lora], rtol=1e-4, atol=1e-5)


class Formed(TorchDispatchMode):
    """How often an operator, by name, gave a tensor of a shape."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.shapes[func.overloadpacket.__name__, tuple(one.shape)] += 1
        return out


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
def test_nothing_of_features_times_features_is_ever_formed(lora, tmp_path):
    """Recorded, fitted, computed with, certified, saved: all in memory linear in the features."""
    wide = 2000
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(wide, 3))
    if lora:
        inject_adapter_in_model(LoraConfig(r=lora, target_modules=["0"]), model)
    rows = [normal(40, wide, seed=seed) for seed in range(3)]
    options = {"use_actual_bounds": True, "residual_source": "both"}
    barrier = Barrier(
        model, BarrierConfig(targets=["0"], reduced_dim=4, residual_rank=8, wide_features=1000, **options)
    )
    with Formed() as formed:
        barrier.setup_protection(rows, run, rows)
        disturb(barrier)
        barrier.compute_protection_loss().backward()
        barrier.certify(rows, run, quantile=0.5, confidence=0.5)
        barrier.save_pretrained(tmp_path)
        Barrier.from_pretrained(tmp_path, model).compute_protection_loss()
    assert 3 * wide <= max(math.prod(shape) for _, shape in formed.shapes) <= 40 * wide
    region = barrier.regions["0"]
    assert region.residual is None and region.num_bytes < 4 * wide * (4 + 8 + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_rank": 0}, "residual_rank is 0, but must be at least 1"),
        ({"wide_features": -1}, "wide_features is -1, but must be at least 0"),
        ({"residual_rank": 8, "decomposition": "none"}, "has no residual: .*residual_rank must keep their defaults"),
        ({"wide_features": 8, "constraint": "projection"}, "no protection loss: .*wide_features"),
    ],
)
def test_what_contradicts_it_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BarrierConfig(**options)


def test_retain_rows_are_gathered_only_where_something_reads_them():
    """Real bounds need no covariance of theirs."""
    products = []
    for options in ({}, {"use_actual_bounds": True}, {"residual_source": "retain"}):
        with Formed() as formed:
            barrier_of(retain=decaying(seed=9), wide_features=None, **options)
        products.append(formed.shapes["mm", (D, D)])
    assert 0 < products[0] == products[1] < products[2]


def test_which_maps_are_wide():
    config = BarrierConfig(reduced_dim=4, residual_rank=6, wide_features=12)
    assert [width for width in range(30) if config.is_wide(width)][0] == 21  # fewer would save nothing
    assert BarrierConfig().is_wide(8193) and not BarrierConfig().is_wide(8192)
    assert not BarrierConfig(wide_features=None).is_wide(10**6)
    assert not BarrierConfig(decomposition="none").is_wide(10**6)


@pytest.mark.parametrize("source", ["forget", "both"])
def test_a_projection_beside_it_takes_whole_second_moments(source):
    barrier = barrier_of(retain=low_rank(), constraint="both", projection_energy=0.9, residual_source=source)
    defaults = {name: getattr(BarrierConfig, name) for name in ("residual_rank", "wide_features")}
    alone = barrier_of(retain=low_rank(), constraint="projection", projection_energy=0.9, **defaults)
    assert barrier.regions["one"].residual_factor is not None
    assert torch.equal(barrier.projections["one"].basis, alone.projections["one"].basis)
    penalty = barrier_of(retain=low_rank(), residual_source=source)
    for name, region in penalty.regions.items():
        found = barrier.regions[name].to_tensors()
        assert all(torch.equal(found[key], value) for key, value in region.to_tensors().items())


def test_a_run_protects_wide_convolutions(tmp_path):
    """train_scripts/unlearn_sd.py on every linear map of a tiny UNet, from flags to a pipeline that loads."""
    build("sd").save_pretrained(tmp_path / "base")
    settings = {"barrier.targets": "[Linear, Conv2d]", "barrier.wide_features": 60, "barrier.residual_rank": 3}
    content = run_tiny(tmp_path / "base", tmp_path / "run", **settings, **{"barrier.residual_source": "both"})
    assert content["history"]["protection"][0] == 0 < content["history"]["protection"][1] < math.inf
    found = load_file(tmp_path / "run" / "barrier_regions.safetensors")
    ranks = {value.shape[1] for name, value in found.items() if name.endswith("residual_factor")}
    wide = [name for name, value in found.items() if name.endswith(".mean") and len(value) > 60]
    assert ranks == {3} and len(wide) == sum(name.endswith("residual_factor") for name in found)
    StableDiffusionPipeline.from_pretrained(tmp_path / "run")
