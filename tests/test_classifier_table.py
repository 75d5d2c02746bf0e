"""The classifier table: rows that parse, numbers that add up, and a runner that keeps finished rows."""

import json
import statistics
from pathlib import Path

import classifier_step
import classifier_table
import pytest
from classifier_rows import CLASSES, METHODS, ORIGINAL, RANDOM, REFERENCE, SEEDS, Row, rows
from classifier_step import ClassifierStepConfig
from running import words_of

from barrier_diffusers.utils.command_line import parse_config
from classification_ext.methods import get_method
from classification_ext.settings import UnlearnConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


def test_every_row_is_a_valid_run_with_a_name_of_its_own():
    every = rows()
    assert len({row.name for row in every}) == len(every) == len(SEEDS) * (len(CLASSES) + 1) * (len(METHODS) + 2)
    assert all(row.case == RANDOM and row.method == REFERENCE for row in every[: len(SEEDS)])  # the shadow models
    for row in rows(("bag", RANDOM), (0,)):
        assert json.loads(json.dumps(row.flags)) == row.flags  # else the row would never count as finished
        config = parse_config(UnlearnConfig, words_of(row.config, {"output_dir": "x", **row.flags}))
        if row.method != ORIGINAL:
            get_method(config.method.name).check(config)
            assert config.protected == any(word in row.method for word in ("BARRIER", "projection"))
        assert bool(config.classes) == (row.case != RANDOM)


def entries_of(numbers):
    """(method, case, seed) -> UA; the other measures are 90."""
    rest = {"retain_accuracy": 90.0, "test_accuracy": 90.0, "mia": 90.0}
    facts = {"seconds_training": 2.0, "seconds_set_up": 1.0, "trained_percent": 4.0}
    return {
        Row(case, method, seed).name: {"metrics": {"unlearning_accuracy": ua, **rest, **facts}}
        for (method, case, seed), ua in numbers.items()
    }


def test_gaps_are_taken_class_by_class_between_means_over_the_seeds():
    numbers = {}
    for seed in SEEDS:
        numbers |= {(REFERENCE, "bag", seed): 100.0, (REFERENCE, "boot", seed): 96.0}
        numbers |= {("ga", "bag", seed): 92.0 + seed, ("ga", "boot", seed): 100.0}
    line = classifier_table.table_line(entries_of(numbers), ("bag", "boot"), "ga")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "ga" and cells[1] == f"96.50 ± {statistics.stdev([96, 96.5, 97]):.2f}"
    assert cells[5] == f"{(7 / 4 + 4 / 4) / 2:.2f}" and cells[6] == "1.75"
    assert cells[7:] == ["3.0", "4.00"]
    own = classifier_table.table_line(entries_of(numbers), ("bag", "boot"), REFERENCE)
    assert own.split("|")[6].strip() == "0.00"
    del numbers["ga", "boot", 1]
    assert classifier_table.table_line(entries_of(numbers), ("bag", "boot"), "ga") is None


def test_a_row_runs_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    tiny = {"max_train_steps": 1, "evaluation.num_mia_samples": 20}
    monkeypatch.setattr(classifier_table, "rows", lambda: [Row("bag", "rl, BARRIER", 0), Row("bag", ORIGINAL, 0)])
    monkeypatch.setitem(METHODS, "rl, BARRIER", ({**METHODS["rl, BARRIER"][0], **tiny},) * 2)
    row = Row("bag", "rl, BARRIER", 0)
    metrics = classifier_table.run_row(row, str(tmp_path), 1)
    assert metrics["num_steps"] == 1 and metrics["trained_percent"] < 5
    original = classifier_table.run_row(Row("bag", ORIGINAL, 0), str(tmp_path), 1)
    assert original["unlearning_accuracy"] < 10 and original["test_accuracy"] > 85
    assert not (tmp_path / row.name / "model.safetensors").exists() and (tmp_path / "logs").is_dir()
    entries = {row.name: {"fingerprint": classifier_table.fingerprint(row), "metrics": metrics}}
    page = tmp_path / "page.md"
    page.write_text("<!-- table classifier_classes -->\n<!-- end of table classifier_classes -->\n")
    classifier_table.write(entries, tmp_path / "docs", page)
    path = tmp_path / "docs" / "classifier.json"
    assert classifier_table.finished(path, [row], str(tmp_path)) == entries
    assert "| method | UA | RA | TA | MIA |" in page.read_text()
    monkeypatch.setitem(METHODS, "rl, BARRIER", ({"learning_rate": 1.0},) * 2)
    assert classifier_table.finished(path, [row], str(tmp_path)) == {}
    with pytest.raises(ValueError, match="unknown value 'shoe' in cases; known are t-shirt"):
        classifier_table.TableConfig(cases=["shoe"])


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
