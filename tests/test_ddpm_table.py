"""The DDPM table: rows that parse, and a runner that keeps finished rows."""

import json
from pathlib import Path

import pytest
import yaml

from barrier_diffusers.utils.command_line import parse_config
from benchmarks.tables import TABLES
from benchmarks.tables.__main__ import TableConfig, main
from benchmarks.tables.ddpm import (
    EVERY_LABEL,
    HIGHER,
    LABELS,
    METRICS,
    OBJECTIVES,
    ONE_RATE,
    PROTECTIONS,
    UNLEARN,
    DdpmTable,
    ddpm,
)
from benchmarks.tables.stable_diffusion import SHORT_LIST
from benchmarks.tables.table import Row
from ddpm_ext.settings import EvaluateConfig, chosen_objective

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


def test_every_row_is_a_valid_run_with_a_name_of_its_own():
    rows = ddpm().rows
    labels = len(SHORT_LIST) * len(PROTECTIONS) + (len(LABELS) - len(SHORT_LIST)) * len(EVERY_LABEL)
    assert len({row.name for row in rows}) == len(rows) == labels + (len(OBJECTIVES) - 1) * len(EVERY_LABEL)
    table_rates = {row.cells["protection"]: set() for row in rows}
    for row in rows:
        assert json.loads(json.dumps(row.flags)) == row.flags  # else the row would never count as finished
        config = UNLEARN.parse(DdpmTable.config, row.flags)
        chosen_objective(config)
        assert config.protected == (row.cells["protection"] in ("penalty", "projection"))
        table_rates[row.cells["protection"]].add(config.learning_rates.get("class_embedding"))
    assert table_rates.pop(ONE_RATE) == table_rates.pop(HIGHER) == {None} and set.union(*table_rates.values()) == {
        0.02
    }  # a fair comparison


def test_the_yardstick_is_judged_as_a_row_is_and_the_pipeline_trains_as_the_example_does():
    row = next(row for row in ddpm().rows if row.name == "sneaker-rl-projection")
    config = UNLEARN.parse(DdpmTable.config, row.flags)
    yardstick = parse_config(EvaluateConfig, ["--config", "ddpm_ext/configs/evaluate_retrained.yaml"])
    assert (yardstick.evaluation, yardstick.concepts) == (config.evaluation, config.concepts)
    stage = yaml.safe_load(Path("train_scripts/configs/pipeline_fashion_ddpm.yaml").read_text())["unlearn"]
    example = yaml.safe_load(Path(DdpmTable.config).read_text())
    for settings in (stage, example):
        for name in ("output_dir", "checkpointing_steps", "evaluation"):
            settings.pop(name, None)
    assert stage == example


def test_a_row_runs_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    tiny = {"concept": "bag", "train_batch_size": 4, "max_train_steps": 1, "max_forget_images": 8}
    tiny |= {"max_retain_images": 18, "evaluation.images_per_label": 2, "evaluation.sampling.num_inference_steps": 2}
    tiny |= {"evaluation.inversion.num_steps": 1}
    row = Row({"label": "bag", "objective": "rl"}, tiny)
    page = tmp_path / "page.md"
    page.write_text("<!-- table ddpm -->\n<!-- end of table ddpm -->\n")
    table = DdpmTable(name="ddpm", chains=[[row]], metrics=METRICS, pages=(str(page),))
    monkeypatch.setitem(TABLES, "ddpm", lambda: table)
    config = TableConfig(["ddpm"], docs=str(tmp_path / "docs"), output_dir=str(tmp_path / "runs"), workers=1)
    main(config)
    (result,) = json.loads((tmp_path / "docs/ddpm.json").read_text())
    assert set(METRICS.values()) <= set(result["metrics"])
    assert result["metrics"]["fidelity"]["num_reference_images"] == 9 * 400
    assert [attack["attack"] for attack in result["metrics"]["attacks"]] == ["inversion"]
    assert not (tmp_path / "runs" / row.name / "unet").exists()
    assert table.markdown({row.name: result})["ddpm"] in page.read_text()
    monkeypatch.setattr(DdpmTable, "run", None)
    main(config)
