"""Every benchmark on the tiny UNet: it runs, its two implementations agree, and its page gets its tables."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import loss
import region_memory
import scaling
import setup
import step
from models import build_unet, forward, make_batches

from barrier_diffusers import Barrier, BarrierConfig

TINY = {"model": "tiny", "repeats": 1}


def run(module, config_class, folder, **settings):
    """The tables of a run, which also puts them into a page."""
    name = module.__name__
    page = folder / "page.md"
    page.write_text(f"before\n<!-- table {name} -->\nold\n<!-- end of table {name} -->\nafter\n")
    config = config_class(**TINY, json=str(folder / f"{name}.json"), page=str(page), **settings)
    module.main(config)
    content = json.loads((folder / f"{name}.json").read_text())
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for title in content["tables"]:
        assert f"{title}\n\n| " in text
    assert content["settings"]["model"] == "tiny" and content["machine"]["torch"] in text
    return content["tables"]


@pytest.mark.parametrize("targets", ["all", "attn2"])
def test_the_baselines_loss_is_the_librarys(targets, tmp_path):
    tables = run(loss, loss.LossConfig, tmp_path, targets=targets, ranks=[2])
    rows, memory = tables.values()
    assert [row["trained"] for row in rows] == ["full weights", "LoRA rank 2"]
    for row in rows:
        assert row["difference of the losses"] < 1e-4
        assert row["maps"] == (96 if targets == "all" else 48) and row["distinct inputs"] < row["maps"]
        assert row["ratio"] == pytest.approx(row["barrier (ms)"] / row["baseline (ms)"])
    assert memory[0]["regions in float32 (MB)"] > 0


def test_the_counted_memory_is_what_regions_take():
    """Of all linear maps, wide ones and others."""
    config = BarrierConfig(targets=region_memory.TARGETS, reduced_dim=4, residual_rank=6, wide_features=40)
    unet = build_unet("tiny")
    barrier = Barrier(unet, config)
    barrier.setup_protection(make_batches("tiny", 1, 12, 8), forward)  # more rows than directions
    widths = region_memory.input_widths("tiny")
    assert sorted(widths) == sorted(group.region.num_features for group in barrier.groups)
    wide = sum(map(config.is_wide, widths))
    assert 0 < wide == sum(group.region.residual_factor is not None for group in barrier.groups) < len(widths)
    total = sum(region_memory.region_bytes(width, config) for width in widths)
    assert total == sum(group.region.num_bytes for group in barrier.groups)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_is_timed_with_and_without_protection(rank, tmp_path):
    ((title, rows),) = run(step, step.StepConfig, tmp_path, rank=rank, side=8, memory=False).items()
    assert [row["step"] for row in rows] == list(step.CASES) and ("LoRA rank 2" in title) == (rank > 0)
    assert rows[0]["time / off"] == 1 and all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow  # many processes
def test_setting_up_beside_bare_passes(tmp_path):
    ((_, rows),) = run(setup, setup.SetupConfig, tmp_path, side=8, sizes=[1], baseline=False).items()
    assert rows[0]["images"] == 2 and rows[0]["barrier / bare"] > 0
    assert rows[0]["barrier peak (GB)"] > 0.1 and rows[0]["barrier peak / 2 images"] == 1


def test_what_grows_and_what_does_not(tmp_path):
    small = {"side": 8, "batches": [1, 4], "reduced_dims": [2, 4], "maps": [12, 96], "processes": []}
    tables = run(scaling, scaling.ScalingConfig, tmp_path, **small)
    data, directions, maps = (tables[name] for name in ("data", "directions", "maps"))
    assert data[0]["regions (MB)"] == data[1]["regions (MB)"] and data[0]["images"] < data[1]["images"]
    assert data[0]["two bare passes (s)"] < data[1]["two bare passes (s)"]
    assert directions[0]["regions (MB)"] < directions[1]["regions (MB)"]
    assert [row["maps"] for row in maps] == [12, 96] and maps[0]["loss (ms)"] < maps[1]["loss (ms)"]


@pytest.mark.slow
def test_processes_that_share_out_the_data(tmp_path):
    row = scaling.over_processes(2, scaling.ScalingConfig(**TINY, side=8, batches=[2]))
    assert row["processes"] == 2 and row["setup (s)"] > row["two bare passes (s)"] > 0
