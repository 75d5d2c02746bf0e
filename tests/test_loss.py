"""Regions and loss against the float64 oracle, for every variant."""

from dataclasses import replace

import pytest
import torch
from losses import full_loss, linear_layers, lora_layers, lora_loss, stacked_loss
from oracle import Oracle, corners

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.drift import FullDrift, LoraDrift
from barrier_diffusers.protection.loss import interval_ends
from barrier_diffusers.protection.region import (
    ForgetRegion,
    fit_directions,
    fit_region,
    leading_eigenvectors,
    thin_factor,
)
from barrier_diffusers.protection.stacks import runs
from barrier_diffusers.protection.statistics import Moments, ProjectionSketch

D, O, K = 7, 5, 3  # noqa: E741
GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(D, D, generator=GENERATOR)
FORGET = torch.randn(800, D, generator=GENERATOR) @ MIX + 1.5
RETAIN = torch.randn(500, D, generator=GENERATOR) * 2 - 0.5
DELTA = torch.randn(O, D, generator=GENERATOR) * 0.1
DELTA_BIAS = torch.randn(O, generator=GENERATOR) * 0.1
VARIANTS = [
    {},
    {"region": "envelope"},
    {"region": "slabs"},
    {"use_actual_bounds": True},
    {"use_actual_bounds": True, "region": "envelope"},
    {"use_actual_bounds": True, "region": "slabs"},
    {"decomposition": "pca"},
    {"decomposition": "none"},
    {"decomposition": "none", "region": "slabs", "use_actual_bounds": True},
    {"interval": False},
    {"remove_top_directions": True},
    {"include_bias_drift": True},
    {"include_bias_drift": True, "region": "slabs"},
    {"include_bias_drift": True, "region": "envelope"},
    {"residual_weighting": "singular_values"},
    {"residual_source": "retain"},
    {"residual_source": "both", "residual_weighting": "singular_values"},
    {"lower_percentile": 0.2, "upper_percentile": 0.7, "infinity_scale": 3.0},
    {"reduced_dim": D},
]


def fit(options, forget=FORGET, retain=RETAIN):
    config = BarrierConfig(**{"reduced_dim": K, "targets": ["fc"], **options})
    moments, retain_moments = Moments(forget.shape[1]), Moments(forget.shape[1])
    for chunk in forget.split(97):
        moments.update(chunk)
    directions = fit_directions(moments, config, "fc")
    sketches = []
    for rows in (forget, retain):
        sketch = ProjectionSketch(directions.eigenvalues_K.sqrt())
        sketch.update((rows - directions.mean_D.float()) @ directions.basis_DK.float())
        sketches.append(sketch)
    retain_moments.update(retain)
    extra = (retain_moments, sketches[1]) if config.needs_retain_data else (None, None)
    return config, fit_region(moments, directions, sketches[0], config, *extra)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("bias", [None, DELTA_BIAS], ids=["no bias", "bias"])
def test_loss_equals_the_oracle(options, bias):
    config, region = fit(options)
    oracle = Oracle(FORGET, RETAIN, **{"reduced_dim": K, **options}).use_bounds_of(region)
    loss, _ = full_loss(config, region, [DELTA], biases=[bias])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle.loss(DELTA, bias), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_region_equals_the_oracle(options):
    _, region = fit(options)
    oracle = Oracle(FORGET, RETAIN, **{"reduced_dim": K, **options})
    torch.testing.assert_close(region.mean.double(), oracle.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(region.basis.double(), oracle.basis, rtol=1e-3, atol=1e-4)
    spread = (oracle.z_upper - oracle.z_lower).max().item()
    for name in ("z_lower", "z_upper", "outer_lower", "outer_upper"):
        torch.testing.assert_close(getattr(region, name).double(), getattr(oracle, name), rtol=0, atol=0.05 * spread)
    if region.residual is not None:
        torch.testing.assert_close(region.residual.double(), oracle.residual, rtol=1e-3, atol=1e-4)
        assert torch.linalg.eigvalsh(region.residual.double()).min() > -1e-5
        assert (region.basis.T @ region.residual).abs().max() < 1e-4


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_lora_equals_the_same_delta_as_full_weights(options):
    config, region = fit(options)
    lora_A, lora_B = torch.randn(2, D, generator=GENERATOR) * 0.3, torch.randn(O, 2, generator=GENERATOR) * 0.3
    lora, (parameters,) = lora_loss(config, region, [(lora_A, lora_B)], 0.7)
    dense, (weight,) = full_loss(config, region, [0.7 * lora_B @ lora_A])
    torch.testing.assert_close(lora, dense, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(dense, weight)
    expected = [0.7 * lora_B.T @ gradient, 0.7 * gradient @ lora_A.T]
    for ours, theirs in zip(torch.autograd.grad(lora, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    torch.testing.assert_close(LoraDrift(lora_A, lora_B, 0.7).dense(), 0.7 * lora_B @ lora_A)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_and_gradient_are_zero_at_the_snapshot(options):
    config, region = fit(options)
    loss, parameters = full_loss(config, region, [DELTA], [DELTA], [DELTA_BIAS], [DELTA_BIAS])
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, parameters):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradient_equals_the_oracles(options):
    config, region = fit(options)
    oracle = Oracle(FORGET, RETAIN, **{"reduced_dim": K, **options}).use_bounds_of(region)
    loss, parameters = full_loss(config, region, [DELTA], biases=[DELTA_BIAS])
    exact = DELTA.double().requires_grad_(), DELTA_BIAS.double().requires_grad_()
    expected = torch.autograd.grad(oracle.loss(*exact), exact)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours.double() / 3, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_identity_of_the_two_ends():
    _, region = fit({})
    lower, upper = region.z_lower, region.outer_upper
    d = DELTA @ region.basis
    centre, width = (lower + upper) / 2, upper - lower
    expected = ((d.abs() @ width) ** 2 / 2 + 2 * (d @ centre) ** 2).mean()
    ends = interval_ends(d, lower, upper)
    torch.testing.assert_close(sum(end.square() for end in ends).mean(), expected)


@pytest.mark.parametrize("region_kind", ["two_corner", "envelope", "slabs"])
def test_no_z_inside_a_box_drifts_beyond_its_ends(region_kind):
    options = {"use_actual_bounds": True, "region": region_kind}
    _, region = fit(options)
    oracle = Oracle(FORGET, RETAIN, reduced_dim=K, **options).use_bounds_of(region)
    d = DELTA @ region.basis
    for lower, upper in oracle.boxes()[0]:
        low, high = interval_ends(d, lower.float(), upper.float())
        z = lower + (upper - lower) * torch.rand(5000, K, generator=GENERATOR, dtype=torch.float64)
        reached = torch.cat([z, corners(lower, upper)]).float() @ d.T
        slack = 1e-5 * (high - low)
        assert (reached >= low - slack).all() and (reached <= high + slack).all()
        at_corners = corners(lower, upper).float() @ d.T  # the ends are attained, so the bound is not loose
        torch.testing.assert_close(at_corners.amin(0), low, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(at_corners.amax(0), high, rtol=1e-4, atol=1e-5)


def test_the_slabs_are_the_complement_and_two_corners_are_not():
    _, region = fit({"use_actual_bounds": True})
    boxes = {
        kind: Oracle(FORGET, RETAIN, reduced_dim=K, use_actual_bounds=True, region=kind)
        .use_bounds_of(region)
        .boxes()[0]
        for kind in ("two_corner", "slabs")
    }
    low, high = region.outer_lower.double(), region.outer_upper.double()
    z = low + (high - low) * torch.rand(5000, K, generator=GENERATOR, dtype=torch.float64)
    outside_safe = ((z < region.z_lower) | (z > region.z_upper)).any(1)
    covered = {
        kind: torch.stack([((z >= lower) & (z <= upper)).all(1) for lower, upper in parts]).any(0)
        for kind, parts in boxes.items()
    }
    assert torch.equal(covered["slabs"], outside_safe)
    assert (outside_safe & ~covered["two_corner"]).any()


def test_residual_term_is_the_mean_squared_drift_of_residual_parts():
    _, region = fit({})
    centred = (FORGET - FORGET.mean(0)).double()
    parts = centred - centred @ region.basis.double() @ region.basis.double().T
    expected = ((parts @ DELTA.double().T) ** 2).mean(0)
    torch.testing.assert_close(FullDrift(DELTA).energy(region.residual).double(), expected, rtol=1e-3, atol=1e-6)
    mean = (FORGET.double().mean(0) @ DELTA.double().T).square()
    loss, _ = full_loss(BarrierConfig(reduced_dim=K, interval=False), region, [DELTA])
    torch.testing.assert_close(loss.double(), (expected + mean).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input each"])
@pytest.mark.parametrize("options", [{}, {"decomposition": "none"}, {"region": "slabs"}], ids=str)
def test_stacked_maps_equal_separate_maps(options, shared):
    """Of equal shape and not, with and without bias, in value and gradient."""
    config, region = fit(options)
    regions = [region, *(fit(options, forget=FORGET * scale)[1] for scale in (0.5, 2.0))]
    weights = [torch.randn(rows, D, generator=GENERATOR) for rows in (O, 4, O)]
    origins = [torch.randn(rows, D, generator=GENERATOR) for rows in (O, 4, O)]
    biases = [DELTA_BIAS, None, -DELTA_BIAS]
    stacked, parameters = full_loss(config, region if shared else regions, weights, origins, biases)
    separate, others = 0.0, []
    for position in range(3):
        parts = ([values[position]] for values in (weights, origins, biases))
        loss, own = full_loss(config, region if shared else regions[position], *parts)
        separate, others = separate + loss / 3, [*others, *own]
    torch.testing.assert_close(stacked, separate)
    ours, theirs = torch.autograd.grad(stacked, parameters), torch.autograd.grad(separate, others)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input each"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"decomposition": "none"}, {"region": "slabs"}], ids=str)
def test_stacked_lora_maps_equal_their_dense_ones_in_value_and_gradient(options, ranks, shared):
    config, region = fit(options)
    regions = [region, *(fit(options, forget=FORGET * scale)[1] for scale in (0.5, 2.0))]
    regions = region if shared else regions
    factors = [
        (torch.randn(rank, D, generator=GENERATOR), torch.randn(O, rank, generator=GENERATOR)) for rank in ranks
    ]
    stacked, parameters = lora_loss(config, regions, factors, 0.7)
    dense, weights = full_loss(config, regions, [0.7 * up @ down for down, up in factors])
    torch.testing.assert_close(stacked, dense, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(stacked, [part for pair in parameters for part in pair])
    theirs = [
        part
        for (down, up), gradient in zip(factors, torch.autograd.grad(dense, weights), strict=True)
        for part in (0.7 * up.T @ gradient, 0.7 * gradient @ down.T)
    ]
    torch.testing.assert_close(list(ours), theirs, rtol=1e-3, atol=1e-3)


def test_few_distinct_rows_give_a_thin_factor_and_the_same_loss():
    few, width = torch.randn(5, 40, generator=GENERATOR), 40
    config, region = fit({"reduced_dim": 2}, few[torch.arange(600) % 5], torch.randn(9, width))
    factor = region.thin_factor()
    assert factor.shape == (width, 2)  # 5 rows, minus their mean, minus K
    torch.testing.assert_close(factor @ factor.T, region.residual, rtol=1e-4, atol=1e-5)
    model = linear_layers([torch.randn(rows, width, generator=GENERATOR) for rows in (3, 4)], [None, None])
    adapted = lora_layers(
        [(torch.randn(2, width), torch.randn(5, 2)), (torch.randn(2, width), torch.randn(5, 2))], 0.5
    )
    snapshots = {str(i): (torch.zeros_like(layer.weight), None) for i, layer in enumerate(model)}
    for net, adapter in ((model, False), (adapted, True)):
        parameters = [parameter for name, parameter in net.named_parameters() if not adapter or "lora" in name]
        results = []
        for thin in (True, False):
            loss = stacked_loss(net, config, region, adapter)
            assert loss.groups[0].factor_DL is not None
            if not thin:
                loss.groups[0].factor_DL = None
                loss.to(torch.device("cpu"))
            value = loss.of_adapters() if adapter else loss.of_weights(snapshots)
            results.append([value, *torch.autograd.grad(value, parameters)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("spectrum", ["decaying", "few", "flat", "zero"])
def test_leading_eigenvectors_are_those_of_the_whole_decomposition(spectrum):
    """Krylov's for many features, whatever the spectrum; no number is drawn from the global generator."""
    width, num = 800, 6
    values = {
        "decaying": torch.arange(1, width + 1, dtype=torch.float64) ** -1.0,
        "few": torch.cat([torch.linspace(9, 1, 9), torch.zeros(width - 9)]).double(),
        "flat": torch.linspace(2, 1, width, dtype=torch.float64),
        "zero": torch.zeros(width, dtype=torch.float64),
    }[spectrum]
    vectors = torch.linalg.qr(torch.randn(width, width, generator=GENERATOR, dtype=torch.float64))[0]
    state = torch.get_rng_state()
    found, basis = leading_eigenvectors((vectors * values) @ vectors.T, num)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, values[:num], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(basis.T @ basis, torch.eye(num, dtype=torch.float64), rtol=0, atol=1e-12)
    if spectrum != "zero":
        inside = vectors[:, :num].T @ basis
        torch.testing.assert_close(inside.abs(), torch.eye(num, dtype=torch.float64), rtol=0, atol=1e-6)


def test_what_cannot_have_a_thin_factor_is_known_at_once():
    """The bound on the largest eigenvalues refuses nothing that the factorisation would give."""
    wide = torch.randn(12, 300, generator=GENERATOR, dtype=torch.float64)
    few = torch.randn(12, 3, generator=GENERATOR, dtype=torch.float64)
    assert thin_factor(torch.cov(wide), 3) is None
    assert thin_factor(few @ few.T, 3).shape == (12, 3)
    equal = torch.linalg.qr(few)[0]  # three equal eigenvalues: the bound is met exactly
    assert thin_factor(equal @ equal.T, 3).shape == (12, 3)


def test_inputs_without_and_with_a_residual_side_by_side():
    config, region = fit({})
    flat = replace(region, residual=torch.zeros(D, D))
    assert flat.thin_factor().shape == (D, 0) and region.thin_factor() is None
    factors = [(torch.randn(2, D, generator=GENERATOR), torch.randn(O, 2, generator=GENERATOR)) for _ in range(2)]
    delta = [up @ down for down, up in factors]
    lora, parameters = lora_loss(config, [flat, region], factors, 1.0)
    dense, _ = full_loss(config, [flat, region], delta)
    expected = (full_loss(config, flat, delta[:1])[0] + full_loss(config, region, delta[1:])[0]) / 2
    torch.testing.assert_close(dense, expected)
    torch.testing.assert_close(lora, expected, rtol=1e-4, atol=1e-5)
    assert all(
        gradient.any() for gradient in torch.autograd.grad(lora, [part for pair in parameters for part in pair])
    )


def test_a_graph_that_is_kept_gives_the_same_gradient_twice():
    """Although the first backward pass gives its buffers away; the third is scaled as a loss scaler does."""
    config, region = fit({})
    loss, (weight,) = full_loss(config, region, [DELTA])
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 2 * first)
    weight.grad = None
    (1024 * loss).backward()
    torch.testing.assert_close(weight.grad, 1024 * first)


def test_a_covariance_of_high_rank_has_no_thin_factor():
    covariance = torch.cov(torch.randn(12, 300, generator=GENERATOR))
    assert thin_factor(covariance, 3) is None
    assert thin_factor(torch.zeros(12, 12), 3).shape == (12, 0)


def test_stacks_stay_below_their_size():
    assert runs("abcde", [3, 3, 3, 9, 1], most=6) == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize("most", [1, 2 * O * D])
def test_the_size_of_a_stack_changes_no_loss(monkeypatch, most):
    config, region = fit({})
    weights = [torch.randn(O, D, generator=GENERATOR) for _ in range(5)]
    expected, _ = full_loss(config, region, weights)
    monkeypatch.setattr("barrier_diffusers.protection.stacks.MOST_STACKED", most)
    torch.testing.assert_close(full_loss(config, region, weights)[0], expected)
    torch.testing.assert_close(full_loss(config, [region] * 5, weights)[0], expected)


def test_residuals_are_held_once():
    """Those that the loss multiplies by are those of the regions."""
    config, region = fit({})
    loss = stacked_loss(linear_layers([DELTA, DELTA], [None, None]), config, [region, fit({"reduced_dim": 2})[1]])
    storages = {group.region.residual.untyped_storage().data_ptr() for group in loss.groups}
    assert len(loss.groups) == 2 and len(storages) == 2  # two values of K are not stacked
    loss = stacked_loss(linear_layers([DELTA, DELTA], [None, None]), config, [region, region])
    storages = {group.region.residual.untyped_storage().data_ptr() for group in loss.groups}
    assert len(storages) == 1 and torch.equal(loss.groups[1].region.residual, region.residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_give_a_float32_loss(dtype):
    config, region = fit({})
    weight0 = torch.randn(O, D, generator=GENERATOR).to(dtype)
    weight = weight0 + DELTA.to(dtype)
    loss, (parameter,) = full_loss(config, region, [weight], [weight0])
    exact, _ = full_loss(config, region, [weight.float() - weight0.float()])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    loss.backward()
    weight = parameter
    assert weight.grad.dtype == dtype and torch.isfinite(weight.grad).all()


def test_lora_never_forms_a_dense_matrix():
    wide, rank = 2048, 2
    basis, bound = torch.eye(wide)[:, :4], torch.ones(4)
    region = ForgetRegion(torch.zeros(wide), basis, -bound, bound, -2 * bound, 2 * bound, torch.eye(wide), 9)
    model = lora_layers([(torch.randn(rank, wide), torch.randn(wide, rank))], 1.0)
    loss = stacked_loss(model, BarrierConfig(reduced_dim=4), region, adapter=True)
    loss.of_adapters()  # what is made once
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            fresh = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != given
            if fresh:
                largest = max(largest, out.numel())
            return out

    given = loss.groups[0].region.residual.untyped_storage().data_ptr()
    with Watch():
        loss.of_adapters().backward()
    assert wide < largest <= wide * 8


def test_reduced_dim_beyond_the_features_is_an_error():
    moments = Moments(3)
    moments.update(torch.randn(10, 3))
    with pytest.raises(ValueError, match="reduced_dim is 4, but mid.fc has only 3 input features"):
        fit_directions(moments, BarrierConfig(reduced_dim=4), "mid.fc")


def test_retain_data_is_required_where_an_option_reads_it():
    moments = Moments(D)
    moments.update(FORGET)
    config = BarrierConfig(reduced_dim=K, use_actual_bounds=True)
    directions = fit_directions(moments, config)
    with pytest.raises(ValueError, match="need a retain_loader"):
        fit_region(moments, directions, ProjectionSketch(directions.eigenvalues_K), config)


def test_region_round_trips_as_tensors():
    _, region = fit({"residual_weighting": "singular_values"})
    again = ForgetRegion.from_tensors(region.to_tensors())
    assert again.count == region.count and again.residual_multiplier == region.residual_multiplier
    for name in ("mean", "basis", "z_lower", "residual"):
        assert torch.equal(getattr(again, name), getattr(region, name))
    assert region.num_bytes >= 4 * D * D
