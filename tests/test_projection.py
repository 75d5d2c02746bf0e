"""Projection (docs/method.md section 7): what is spanned, what is refused, and the way to disk and back."""

import copy
import json

import pytest
import torch
from conftest import image_batches, make_small_unet, run_net, run_unet, unet_batches
from oracle import net_rows
from projected import CONVS, TEXT, add_lora, config_of, protected, text_batches, train

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.protection.projection import SecondMoment, fit_projection, project_out, spanning_directions

FILES = {"config": "barrier_config.json", "projections": "barrier_projections.safetensors"}


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_the_fewest_directions_that_hold_the_energy(energy):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 8, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 8)
    moment = rows.T @ rows / 50
    basis, energies, share = spanning_directions(moment, energy)
    values = torch.linalg.eigvalsh(moment).flip(0)
    rank = next(k for k in range(1, 9) if values[:k].sum() >= energy * values.sum() * (1 - 1e-12))
    assert basis.shape == (8, rank)
    held = torch.trace(basis.T @ moment @ basis) / torch.trace(moment)
    assert share == pytest.approx(held.item(), rel=1e-12) and share >= energy * (1 - 1e-12)
    assert values[: rank - 1].sum() / values.sum() < energy
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(energies, (basis.T @ moment @ basis).diagonal() / values.mean())


def test_all_energy_means_the_directions_that_the_rows_have():
    """Float32 sums leave a little in every direction; that must not count, whatever the mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 20, generator=generator)
    rows = SecondMoment(20)
    for _ in range(10):
        rows.update((5 + torch.randn(100, 3, generator=generator)) @ directions)
    basis, _, share = spanning_directions(rows.second_moment, 1.0)
    assert basis.shape == (20, 3) and share == 1.0
    torch.testing.assert_close(basis.float() @ (basis.T.float() @ directions.T), directions.T, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_all_zero_span_nothing():
    rows = SecondMoment(4)
    rows.update(torch.zeros(5, 4))
    projection = fit_projection(rows, 0.9)
    assert (projection.rank, projection.energy, projection.radius, projection.count) == (0, 1.0, 0.0, 5)
    weight = torch.ones(2, 4)
    project_out([weight], [torch.zeros(2, 4)], projection.basis[None])
    assert torch.equal(weight, torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moment_is_uncentred_and_needs_no_rows_kept(dtype):
    generator = torch.Generator().manual_seed(0)
    batches = [(3 + torch.randn(size, 6, generator=generator)).to(dtype) for size in (1, 40, 7)]
    rows = SecondMoment(6)
    for batch in [*batches, torch.zeros(0, 6)]:
        rows.update(batch)
    dense = torch.cat(batches).double()
    torch.testing.assert_close(rows.second_moment, dense.T @ dense / 48, rtol=1e-5, atol=1e-6)
    assert rows.largest.item() == pytest.approx(dense.norm(dim=1).max().item(), rel=1e-6)
    with pytest.raises(ValueError, match="no rows were recorded"):
        fit_projection(SecondMoment(6), 0.9)


def test_streaming_equals_the_dense_computation(net):
    names, retain = [*CONVS, "fc"], image_batches(seed=5)
    barrier = Barrier(net, config_of(names, projection_energy=0.8))
    barrier.setup_protection(None, run_net, retain)
    for name, rows in net_rows(net, retain, names).items():
        projection = barrier.projections[name]
        moment = rows.T @ rows / len(rows)
        values, vectors = torch.linalg.eigh(moment)
        held = values.flip(0).cumsum(0) / values.sum()
        rank = int((held < 0.8).sum()) + 1
        assert (projection.rank, projection.count) == (rank, len(rows))
        leading = vectors.flip(1)[:, :rank]
        span, outside = leading @ leading.T, torch.eye(len(moment), dtype=torch.float64) - leading @ leading.T
        basis = projection.basis.double()
        torch.testing.assert_close(basis @ basis.T, span, rtol=0, atol=1e-4)
        torch.testing.assert_close(projection.residual.double(), outside @ moment @ outside, rtol=1e-3, atol=1e-5)
        assert projection.energy == pytest.approx(held[rank - 1].item(), rel=1e-5)
        assert projection.radius == pytest.approx(rows.norm(dim=1).max().item(), rel=1e-5)


def test_project_out_takes_each_weight_back_to_its_own_origin():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 5, generator=generator))[0]
    origins = [torch.randn(4, 3, 2, 2, generator=generator), torch.randn(7, 12, generator=generator), None]
    weights = [torch.randn(4, 3, 2, 2, generator=generator), *torch.randn(2, 7, 12, generator=generator)]
    before = [weight.clone() for weight in weights]
    project_out(weights, origins, basis[None])
    outside = torch.eye(12) - basis @ basis.T
    for weight, old, origin in zip(weights, before, origins, strict=True):
        base = torch.zeros_like(old) if origin is None else origin
        expected = base.flatten(1) + (old - base).flatten(1) @ outside
        torch.testing.assert_close(weight.flatten(1), expected, rtol=1e-5, atol=1e-5)
    again = [weight.clone() for weight in weights]
    project_out(again, origins, basis[None])
    torch.testing.assert_close(again, weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_a_soft_projection_leaves_a_share_of_each_direction(unet, tmp_path, use_lora):
    if use_lora:
        add_lora(unet)
    barrier = protected(unet, projection_softness=0.5)
    (entry, *_), fit = barrier.maps, next(iter(barrier.projections.values()))
    assert fit.rank == 3 and fit.energies.sum().item() == pytest.approx(12, rel=1e-5)  # all energy in 3 of 12

    def moving():
        return entry.lora().parameters[0] if use_lora else entry.layer.weight

    origin = torch.zeros_like(moving()) if use_lora else moving().detach().clone()
    with torch.no_grad():
        moving().copy_(origin + torch.randn(moving().shape, generator=torch.Generator().manual_seed(0)))
    before = moving().detach() - origin
    barrier.save_pretrained(tmp_path)
    for one in (barrier, Barrier.from_pretrained(tmp_path, unet)):
        with torch.no_grad():
            moving().copy_(origin + before)
        one.project()
        taken = torch.eye(12) - fit.basis @ torch.diag(fit.energies / (0.5 + fit.energies)) @ fit.basis.T
        torch.testing.assert_close(moving().detach() - origin, before @ taken, rtol=1e-4, atol=1e-5)


def test_a_soft_projection_closes_no_map(unet):
    barrier = Barrier(unet, config_of(projection_softness=0.1))
    barrier.setup_protection(None, run_unet, unet_batches())
    assert all(fit.rank == fit.num_features for fit in barrier.projections.values())
    before = {entry.name: entry.layer.weight.detach().clone() for entry in barrier.maps}
    train(barrier, run_unet, unet_batches())
    assert all(not torch.equal(before[entry.name], entry.layer.weight) for entry in barrier.maps)
    certificate = barrier.certify(unet_batches(seed=9), run_unet, quantile=0.5)
    assert certificate.holds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_softness": 0.1}, "projection_softness needs constraint='projection' or 'both'"),
        ({"constraint": "both", "projection_softness": -1}, "projection_softness is -1"),
        ({"constraint": "hard"}, "penalty, projection, both"),
        ({"constraint": "both", "projection_energy": 0.0}, "projection_energy is 0.0"),
        ({"constraint": "both", "projection_energy": 1.5}, "projection_energy is 1.5"),
        ({"constraint": "both", "projection_energy": float("nan")}, "projection_energy is nan"),
        ({"projection_energy": 0.9}, "projection_energy needs constraint='projection' or 'both'"),
        ({"constraint": "both", "lambda_interval": 0}, "set constraint='projection'"),
        ({"constraint": "projection", "use_actual_bounds": True}, "no protection loss"),
        ({"constraint": "projection", "region": "slabs"}, "no protection loss"),
        ({"constraint": "projection", "residual_source": "both"}, "no protection loss"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BarrierConfig(**options)


def test_what_a_config_protects_and_how_it_says_so():
    penalty, none = BarrierConfig(), BarrierConfig(lambda_interval=0)
    hard, both = BarrierConfig(constraint="projection", lambda_interval=0), BarrierConfig(constraint="both")
    assert [c.protects for c in (penalty, none, hard, both)] == [True, False, True, True]
    assert [c.needs_retain_data for c in (penalty, none, hard, both)] == [False, False, True, True]
    assert [c.summary for c in (penalty, none, hard, both)] == [
        "protection weight 10",
        "no protection",
        "projection at energy 0.999",
        "protection weight 10, projection at energy 0.999",
    ]


def test_errors_come_before_any_pass(unet):
    def never(model, batch):
        raise AssertionError("a pass was started")

    barrier = Barrier(unet, config_of(constraint="both"))
    with pytest.raises(ValueError, match="needs a forget_loader"):
        barrier.setup_protection(None, never, text_batches())
    with pytest.raises(ValueError, match="a projection need a retain_loader"):
        barrier.setup_protection(unet_batches(), never)
    with pytest.raises(RuntimeError, match="call setup_protection"):
        barrier.project()
    Barrier(unet, config_of(constraint="penalty", projection_energy=0.999)).project()  # nothing to do, nothing said
    Barrier(unet, config_of(reduced_dim=500))  # which a projection alone does not read


def test_retain_inputs_that_leave_no_direction_are_refused(unet):
    barrier = protected(unet)
    kept = barrier.projections
    with pytest.raises(ValueError, match=r"span all directions .* lower projection_energy \(now 1\)"):
        barrier.setup_protection(None, run_unet, unet_batches())
    assert all(barrier.projections[name] is fit for name, fit in kept.items())


def test_an_adapter_added_after_the_set_up_is_noticed(unet):
    barrier = protected(unet)
    add_lora(unet)
    with pytest.raises(ValueError, match="an adapter was added to .*attn2.to_k after setup_protection"):
        barrier.project()


@pytest.mark.parametrize("constraint", ["projection", "both"])
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_a_loaded_barrier_goes_on_as_if_nothing_had_happened(tmp_path, use_lora, constraint):
    models = [make_small_unet(), make_small_unet()]
    if use_lora:
        for model in models:
            add_lora(model)
    barrier = protected(models[0], constraint=constraint)
    forget = unet_batches(num=6)
    optimizer = train(barrier, run_unet, forget[:3])
    barrier.save_pretrained(tmp_path)
    models[1].load_state_dict(models[0].state_dict())
    loaded = Barrier.from_pretrained(tmp_path, models[1])
    resumed = torch.optim.AdamW(loaded.trainable_parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.config == barrier.config and list(loaded.projections) == list(barrier.projections)
    assert len({id(fit) for fit in loaded.projections.values()}) == 1
    for fits in zip(loaded.projections.values(), barrier.projections.values(), strict=True):
        tensors = [fit.to_tensors() for fit in fits]
        assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
        assert fits[0].count == fits[1].count == 60 and isinstance(fits[0].count, int)
    train(barrier, run_unet, forget[3:], optimizer)
    train(loaded, run_unet, forget[3:], resumed)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
    files = set(FILES.values())
    files |= {"barrier_regions.safetensors"} if constraint == "both" else set()
    assert {path.name for path in tmp_path.iterdir()} == files | (
        set() if use_lora else {"barrier_snapshot.safetensors"}
    )


def test_an_empty_span_survives_the_disk(tmp_path, unet):
    silent = [(noisy, time, torch.zeros_like(text)) for noisy, time, text in unet_batches()]
    barrier = Barrier(unet, config_of())
    barrier.setup_protection(None, run_unet, silent)
    barrier.save_pretrained(tmp_path)
    loaded = Barrier.from_pretrained(tmp_path, make_small_unet())
    assert {fit.rank for fit in loaded.projections.values()} == {0}
    train(loaded, run_unet, unet_batches())
    assert loaded.certify(silent, run_unet, quantile=0.5).holds


def test_files_that_do_not_fit_are_refused(tmp_path, unet):
    protected(unet).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the projection of .* has 12 input features, but the map has 20"):
        Barrier.from_pretrained(tmp_path, make_small_unet(cross_attention_dim=20))
    adapted = make_small_unet()
    add_lora(adapted)
    with pytest.raises(ValueError, match="saved for full weights; this model trains adapter ones"):
        Barrier.from_pretrained(tmp_path, adapted)
    path = tmp_path / FILES["config"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "targets": ["attn2.to_k"]}))
    with pytest.raises(ValueError, match="the projections in .* belong to other maps"):
        Barrier.from_pretrained(tmp_path, make_small_unet())
    (tmp_path / FILES["projections"]).unlink()
    with pytest.raises(ValueError, match="holds no barrier_projections.safetensors"):
        Barrier.from_pretrained(tmp_path, make_small_unet())


def test_a_folder_from_before_projections_loads(tmp_path, unet):
    barrier = Barrier(unet, BarrierConfig(targets=TEXT, reduced_dim=4))
    barrier.setup_protection(unet_batches(), run_unet)
    barrier.save_pretrained(tmp_path)
    path = tmp_path / FILES["config"]
    old = json.loads(path.read_text())
    del old["constraint"], old["projection_energy"]
    path.write_text(json.dumps(old))
    loaded = Barrier.from_pretrained(tmp_path, unet)
    assert loaded.config == barrier.config and loaded.config.constraint == "penalty"
    train(barrier, run_unet, unet_batches())
    assert torch.equal(loaded.compute_protection_loss(), barrier.compute_protection_loss())
