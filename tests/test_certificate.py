"""Bounds of docs/method.md section 6: soundness by sampling, coverage by simulation."""

import json

import numpy as np
import pytest
import torch

from barrier_diffusers.protection.certificate import Certificate, Guarantee, MapObserver, moment_bound, sound_bound
from barrier_diffusers.protection.drift import FullDrift
from barrier_diffusers.protection.order_statistics import Split
from barrier_diffusers.protection.region import ForgetRegion

D, O, K = 6, 4, 2  # noqa: E741


def make_region(seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, K, generator=generator))[0]
    outside = torch.eye(D) - basis @ basis.T
    root = torch.randn(D, D, generator=generator) @ outside
    ends = {"z_lower": -torch.ones(K), "z_upper": torch.ones(K)}
    ends |= {"outer_lower": -3 * torch.ones(K), "outer_upper": 4 * torch.ones(K)}
    return ForgetRegion(mean=torch.randn(D, generator=generator), basis=basis, residual=root.T @ root, count=9, **ends)


def test_sound_bound_holds_for_every_admissible_input_and_is_reached():
    region, generator = make_region(), torch.Generator().manual_seed(1)
    drift = FullDrift(torch.randn(O, D, generator=generator), torch.randn(O, generator=generator))
    z = -3 + 7 * torch.rand(20000, K, generator=generator)
    residual = torch.randn(20000, D, generator=generator)
    residual -= residual @ region.basis @ region.basis.T
    residual *= 2.5 * torch.rand(20000, 1, generator=generator) / residual.norm(dim=1, keepdim=True)
    x = region.mean + z @ region.basis.T + residual
    reached = (x @ drift.delta_OD.T + drift.delta_bias_O).abs().amax(0)
    bound = sound_bound(drift, region, 2.5)
    assert (reached <= bound * (1 + 1e-5)).all()
    assert (reached > 0.3 * bound).all()


def test_moment_bound_holds_with_its_probability():
    region, generator = make_region(), torch.Generator().manual_seed(2)
    drift = FullDrift(torch.randn(O, D, generator=generator))
    values, vectors = torch.linalg.eigh(region.residual)
    root = vectors * values.clamp_min(0).sqrt()
    heavy = torch.from_numpy(np.random.default_rng(0).standard_t(3, (50000, D)) / np.sqrt(3)).float()
    z = -3 + 7 * torch.rand(50000, K, generator=generator)
    x = region.mean + z @ region.basis.T + heavy @ root.T
    kept = (x @ drift.delta_OD.T).abs() <= moment_bound(drift, region, 0.9)
    assert (kept.double().mean(0) >= 0.9).all()


@pytest.mark.parametrize("base_is_current", [False, True])
def test_observer_by_hand(base_is_current, tmp_path):
    region, generator = make_region(), torch.Generator().manual_seed(3)
    delta, delta_bias = torch.randn(O, D, generator=generator), torch.randn(O, generator=generator)
    weight0, bias0 = torch.randn(O, D, generator=generator), torch.randn(O, generator=generator)
    drift = FullDrift(delta, None if base_is_current else delta_bias)
    now = (weight0, bias0) if base_is_current else (weight0 + delta, bias0 + delta_bias)
    observer = MapObserver("m", drift, region, *now, base_is_current, quantile=0.5)
    images = [torch.randn(3, 5, D, generator=generator), torch.randn(2, 5, D, generator=generator)]
    for x in images:
        observer.update(x)
    result = observer.result(Guarantee(0.5, 0.8, Split()))
    x = torch.cat(images)
    change = x @ delta.T + (0 if base_is_current else delta_bias)
    relative = (change.norm(dim=-1) / (x @ weight0.T + bias0).norm(dim=-1)).amax(1)
    assert result.relative.largest == pytest.approx(relative.max().item(), rel=1e-4)
    assert result.relative.num_images == 5 and result.rows == 25 and result.sound_holds
    z = (x - region.mean) @ region.basis
    assert result.rows_outside_envelope == int(((z < -3) | (z > 4)).any(-1).sum())
    assert result.largest_output_drift <= result.sound
    certificate = Certificate([result], result.relative, 0.5, 0.8, Split())
    certificate.save_json(tmp_path / "certificate.json")
    saved = json.loads((tmp_path / "certificate.json").read_text())
    assert saved["holds"] is True and saved["maps"][0]["name"] == "m"
    said = " ".join(str(certificate).split())
    assert "relative drift <=" in said and "sound bound holds" in said
    assert all(len(line) <= 80 for line in str(certificate).splitlines())
    assert "of 2 test images keep it" in said and saved["split"] == {"calibration": 0.6, "seed": 0}


def test_a_broken_bound_is_reported():
    region = make_region()
    observer = MapObserver("m", FullDrift(torch.ones(O, D)), region, torch.ones(O, D), None, False)
    observer.fixed_O, observer.slope_O = torch.zeros(O), torch.zeros(O)  # a bound that is certainly wrong
    observer.update(region.mean.expand(2, 1, D) + 0.1)
    result = observer.result(Guarantee(0.5, 0.5, Split()))
    assert not result.sound_holds and not Certificate([result], None, 0.5, 0.5, Split()).holds
