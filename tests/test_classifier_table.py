"""The classifier table: rows that parse, numbers that add up, and a runner that keeps finished rows."""

import json
import statistics
from pathlib import Path

import classifier_step
import pytest
from classifier_step import ClassifierStepConfig

from benchmarks.tables.__main__ import write
from benchmarks.tables.classifier import (
    CLASSES,
    METHODS,
    ORIGINAL,
    RANDOM,
    REFERENCE,
    SEEDS,
    TRAIN,
    ClassifierTable,
    classifier,
    is_shadow,
    row_of,
    table_line,
)
from classification_ext.methods import METHODS as REGISTERED

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


def test_every_row_is_a_valid_run_with_a_name_of_its_own():
    table = classifier()
    every = table.rows
    assert len({row.name for row in every}) == len(every) == len(SEEDS) * (len(CLASSES) + 1) * (len(METHODS) + 2)
    assert all(is_shadow(row) for row in every[: len(SEEDS)]) and not any(is_shadow(row) for row in every[3:])
    for method in (REFERENCE, ORIGINAL, *METHODS):
        for case in ("bag", RANDOM):
            row = row_of(case, method, 0)
            assert json.loads(json.dumps(row.flags)) == row.flags  # else the row would never count as finished
            config = TRAIN.parse(table.config_of(row), {"output_dir": "x", **row.flags})
            if method != ORIGINAL:
                REGISTERED.find(config.method.name).check(config)
                assert config.protected == any(word in method for word in ("BARRIER", "projection"))
            assert bool(config.classes) == (case != RANDOM)


def test_the_shadow_models_come_first_and_again_where_they_are_gone(tmp_path):
    table = classifier()
    results = table.finished(ROOT / "docs/tables/classifier.json")
    del results[row_of(RANDOM, "ft", 1).name]
    first, others = table.missing(results, tmp_path)
    assert [row.name for (row,) in first] == [row_of(RANDOM, REFERENCE, seed).name for seed in SEEDS]
    assert [row.name for (row,) in others] == ["random_10_percent-ft-1"]
    for (row,) in first[:2]:
        (tmp_path / row.name).mkdir()
        (tmp_path / row.name / "model.safetensors").touch()
    assert table.missing(results, tmp_path)[0] == first[2:]
    results[others[0][0].name] = {}
    assert table.missing(results, tmp_path) == [[], []]


def numbers_of(given):
    """(method, case, seed) -> UA; the other measures are 90."""
    rest = {"retain_accuracy": 90.0, "test_accuracy": 90.0, "mia": 90.0}
    facts = {"seconds_training": 2.0, "seconds_set_up": 1.0, "trained_percent": 4.0}
    return {
        row_of(case, method, seed).name: {"unlearning_accuracy": ua, **rest, **facts}
        for (method, case, seed), ua in given.items()
    }


def test_gaps_are_taken_class_by_class_between_means_over_the_seeds():
    numbers = {}
    for seed in SEEDS:
        numbers |= {(REFERENCE, "bag", seed): 100.0, (REFERENCE, "boot", seed): 96.0}
        numbers |= {("ga", "bag", seed): 92.0 + seed, ("ga", "boot", seed): 100.0}
    cells = table_line(numbers_of(numbers), ("bag", "boot"), "ga")
    assert cells[0] == "ga" and cells[1] == f"96.50 ± {statistics.stdev([96, 96.5, 97]):.2f}"
    assert cells[5] == f"{(7 / 4 + 4 / 4) / 2:.2f}" and cells[6] == "1.75"
    assert cells[7:] == ["3.0", "4.00"]
    own = table_line(numbers_of(numbers), ("bag", "boot"), REFERENCE)
    assert own[5] == "0.00"
    del numbers["ga", "boot", 1]
    assert table_line(numbers_of(numbers), ("bag", "boot"), "ga") is None


def test_a_row_runs_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    tiny = {"max_train_steps": 1, "evaluation.num_mia_samples": 20}
    monkeypatch.setitem(METHODS, "rl, BARRIER", ({**METHODS["rl, BARRIER"][0], **tiny},) * 2)
    row = row_of("bag", "rl, BARRIER", 0)
    page = tmp_path / "page.md"
    page.write_text("<!-- table classifier_classes -->\n<!-- end of table classifier_classes -->\n")
    table = ClassifierTable(name="classifier", chains=[[row], [row_of("bag", ORIGINAL, 0)]], pages=(str(page),))
    (metrics,), (original,) = (table.run(chain, tmp_path) for chain in table.chains)
    assert metrics["num_steps"] == 1 and metrics["trained_percent"] < 5
    assert original["unlearning_accuracy"] < 10 and original["test_accuracy"] > 85
    assert not (tmp_path / row.name / "model.safetensors").exists() and (tmp_path / "logs").is_dir()
    results = {row.name: table.result(row, metrics)}
    write(table, results, tmp_path / "docs")
    path = tmp_path / "docs" / "classifier.json"
    assert table.finished(path) == results
    assert "| method | UA | RA | TA | MIA |" in page.read_text()
    monkeypatch.setitem(METHODS, "rl, BARRIER", ({"learning_rate": 1.0},) * 2)
    assert ClassifierTable(name="classifier", chains=[[row_of("bag", "rl, BARRIER", 0)]]).finished(path) == {}


def test_the_cost_benchmark_says_what_trains_and_what_a_step_takes(tmp_path):
    path = tmp_path / "cost.json"
    config = ClassifierStepConfig(batch_size=4, num_batches=2, repeats=1, json=str(path))
    classifier_step.main(config)
    (rows,) = json.loads(path.read_text())["tables"].values()
    assert [row["protection"] for row in rows] == ["none", "penalty", "projection"]
    trained = 64 * 10 + 16 * 32 + 32 * 64  # the last layer and two shortcuts, with the last layer's bias or without
    assert rows[1]["trained %"] == round(100 * (trained + 10) / 77_754, 4)
    assert rows[2]["trained %"] == round(100 * trained / 77_754, 4)
    assert all(row["step (s)"] > 0 for row in rows)
