"""The documentation's tables: rows that parse, and a runner that does not run a finished row again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from short_runs import ROOT, SHORT

from barrier_diffusers.workflow.settings import chosen_objective
from benchmarks.tables import TABLES
from benchmarks.tables.__main__ import TableConfig, main, write
from benchmarks.tables.stable_diffusion import UNLEARN, AttackTable, ErasureTable
from benchmarks.tables.table import MeansTable, Row
from benchmarks.tables.workers import run_all


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


ROWS = {"classes": 80, "objectives": 13, "projection": 8, "concepts": 6, "attacks": 5, "robust_classes": 10}
ROWS |= {"classifier": 660, "ddpm": 38}


@pytest.mark.parametrize("name", ROWS)
def test_no_row_of_the_committed_tables_has_to_run_again(name, tmp_path):
    table = TABLES[name]()
    results = table.finished(ROOT / f"docs/tables/{name}.json")
    assert len(table.rows) == len(results) == ROWS[name]
    assert not any(table.missing(results, tmp_path))
    for page, text in table.markdown(results).items():
        assert (ROOT / f"docs/tables/{page}.md").read_text(encoding="utf-8") == text
    for changed in (table.rows[0], table.rows[-1]):  # a row with another flag is not finished
        changed.flags["seed"] = 7
    assert len(table.finished(ROOT / f"docs/tables/{name}.json")) == ROWS[name] - 2


@pytest.mark.parametrize("name", ["classes", "objectives", "projection", "concepts", "attacks"])
def test_every_row_is_a_valid_run_with_a_name_of_its_own(name):
    table = TABLES[name]()
    assert len({row.name for row in table.rows}) == len(table.rows) > 0
    for row in table.rows:
        assert json.loads(json.dumps(row.flags)) == row.flags  # else the row would never count as finished
        chosen_objective(UNLEARN.parse(table.config, row.flags))


def tiny_table():
    few = {**SHORT, "objective.alpha": 0, "barrier.use_actual_bounds": False, "max_train_steps": 1}
    del few["report_to"]
    style = {**few, "concept": "pencil sketch", "concept_column": "style", "objective.anchor": "photo"}
    style["evaluation.images_per_label"] = 8  # in the order of captions, the eighth is about sneakers
    chain = [Row({"erased": "sneaker"}, few), Row({"erased": "then sketches"}, style)]
    columns = {"UA": "unlearning_accuracy", "drop": "retain_accuracy_before - retain_accuracy_after"}
    return ErasureTable(name="tiny", chains=[chain], metrics=columns, pages=("page.md",))


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch):
    """The working folder is an empty one that has what the rows read."""
    for name in ("assets", "train_scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


def must_not_run(monkeypatch):
    def refuse(*_):
        raise AssertionError("a finished row ran again")

    monkeypatch.setattr(ErasureTable, "run", refuse)
    monkeypatch.setattr(AttackTable, "run", refuse)


def test_finished_rows_are_not_run_again(tmp_path, monkeypatch, capsys, in_a_copy):
    monkeypatch.setitem(TABLES, "tiny", tiny_table)
    page = tmp_path / "page.md"
    page.write_text("Above.\n<!-- table tiny -->\nold\n<!-- end of table tiny -->\nBelow.\n")
    config = TableConfig(["tiny"], docs="docs", output_dir="runs", workers=1)
    main(config)
    found = json.loads((tmp_path / "docs/tiny.json").read_text())
    assert [result["name"] for result in found] == ["sneaker", "then_sketches"]
    assert "erased_before_unlearning_accuracy_after" in found[1]["metrics"]
    table = (tmp_path / "docs/tiny.md").read_text()
    assert table.splitlines()[0] == "| erased | UA | drop | seconds |" and table in capsys.readouterr().out
    begin, end = "<!-- table tiny -->\n", "<!-- end of table tiny -->"
    assert page.read_text() == f"Above.\n{begin}{table}{end}\nBelow.\n"
    assert not (tmp_path / "runs/sneaker/unet").exists() and (tmp_path / "runs/sneaker/before_after.png").is_file()
    must_not_run(monkeypatch)
    main(config)
    assert json.loads((tmp_path / "docs/tiny.json").read_text()) == found
    other = Path(tmp_path / "other.yaml")
    other.write_text(Path(ErasureTable.config).read_text() + "seed: 1\n")
    monkeypatch.setattr(ErasureTable, "config", str(other))
    assert tiny_table().finished(tmp_path / "docs/tiny.json") == {}


def test_rows_that_another_command_finished_meanwhile_stay(tmp_path, in_a_copy):
    """Each of two commands writes what it has run; neither knows of the other's rows."""
    table = tiny_table()
    table.pages = ()
    metrics = {"unlearning_accuracy": 100.0, "retain_accuracy_before": 90.0, "retain_accuracy_after": 88.0}
    made = {row.name: table.result(row, {**metrics, "seconds_training": 1.0}) for row in table.rows}
    for name, result in reversed(made.items()):
        all_rows = write(table, {name: result}, tmp_path / "docs")
    assert all_rows == made
    found = json.loads((tmp_path / "docs/tiny.json").read_text())
    assert [result["name"] for result in found] == ["sneaker", "then_sketches"]  # the table's order
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"tiny.json", "tiny.md"}  # and no lock


def share(row):
    """A row that fails for 0."""
    return 12 // row


def test_a_row_that_fails_leaves_the_others_alone():
    failed = []
    found = dict(run_all(share, {"three": (3,), "none": (0,), "four": (4,)}, 1, failed))
    assert found == {"three": 4, "four": 3}
    assert len(failed) == 1 and failed[0].startswith("none: ")


def test_the_command_hands_its_rows_to_other_processes(tmp_path):
    """As `make table` calls it; here without assets, so that a row fails, and says so, as soon as it runs."""
    for name in ("train_scripts", "ddpm_ext"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = ["--tables", "objectives", "--rows", "UCE", "--workers", "1", "--docs", "tables", "--output_dir", "runs"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (  # the row's own message
        done.returncode == 1
        and "copy its assets folder here" in done.stderr
        and "terminated abruptly" not in done.stderr
    )


def test_means():
    rows = [Row({"class": name, "kind": kind}, {}) for kind in "ab" for name in ("bag", "boot")]
    table = MeansTable(name="t", chains=[[row] for row in rows], metrics={"UA": "ua"}, mean_over="class")
    results = {
        row.name: {"metrics": {"ua": float(index), "seconds_training": 2.0}} for index, row in enumerate(rows[:3])
    }
    lines = table.markdown(results)["t"].splitlines()
    assert lines[2] == "| bag | a | 0.0 | 2 |"
    assert lines[5:] == ["| **mean of 2** | a | 0.5 | 2 |"]  # no mean of one row


def test_short_form():
    rows = [Row({"class": name, "alpha": alpha}, {}) for alpha in "01" for name in ("bag", "boot")]
    table = MeansTable(name="t", chains=[[row] for row in rows], mean_over="class", across=("alpha",))
    numbers = {"unlearning_accuracy": 90.0, "retain_accuracy_before": 97.0, "retain_accuracy_after": 96.0}
    results = {row.name: {"metrics": {**numbers, "unlearning_accuracy": 80.0 + i}} for i, row in enumerate(rows[:3])}
    assert table.short_forms(results)["t"].splitlines() == [
        "| class | retain before | alpha 0 | alpha 1 |",
        "|---|---:|---:|---:|",
        "| bag | 97.0 | 80.0 / 96.0 | 82.0 / 96.0 |",
        "| boot | 97.0 | 81.0 / 96.0 |  |",
        "| **mean** | 97.0 | 80.5 / 96.0 | 82.0 / 96.0 |",
    ]


def test_bad_settings():
    with pytest.raises(ValueError, match="unknown table 'all'; known are classes"):
        TableConfig(["all"])
    with pytest.raises(ValueError, match="workers is 0"):
        TableConfig(workers=0)
    with pytest.raises(ValueError, match="rows is no regular expression"):
        TableConfig(rows="(")


def test_rows_can_be_chosen_by_name(tmp_path):
    (chains,) = TABLES["classes"]().missing({}, tmp_path, "bag-.*-projection")
    assert [row.name for chain in chains for row in chain] == [
        f"bag-{how}-0-projection" for how in ("rl-full", "rl-LoRA_16", "ga-full")
    ]


def test_the_attack_table_judges_each_row_once(tmp_path, monkeypatch, in_a_copy):
    few = {**SHORT, "objective.name": "uce", "objective.alpha": 0, "barrier.lambda_interval": 0}
    few |= {"barrier.use_actual_bounds": False, "barrier.targets": "[attn2.to_k,attn2.to_v]"}
    for name in ("report_to", "max_train_steps", "barrier.reduced_dim"):
        del few[name]
    (tmp_path / "page.md").write_text("before\n<!-- table attacks -->\nold\n<!-- end of table attacks -->\nafter\n")
    judged = {"attacks": "[misspelled]", "fidelity.extractors": "[]", "evaluation.sampling.num_inference_steps": 1}
    judged |= {"evaluation.images_per_label": 1}
    chains = [[Row({"erased by": "a"}, few)]]
    table = AttackTable(name="attacks", chains=chains, judged=judged, pages=("page.md",))
    monkeypatch.setitem(TABLES, "attacks", lambda: table)
    config = TableConfig(["attacks"], docs="docs", output_dir="runs", workers=1)
    main(config)
    text, content = (tmp_path / "docs/attacks.md").read_text(), (tmp_path / "page.md").read_text()
    heading = "| erased by | UA | retain drop | FID (EfficientNet-Lite0) | after misspelled |"
    assert heading in text and text.count("\n") == 3
    assert text in content and content.startswith("before") and content.endswith("after\n") and "old" not in content
    (result,) = json.loads((tmp_path / "docs/attacks.json").read_text())
    assert result["metrics"]["attacks"]["misspelled"]["post_attack"]["num_images"] == 1
    must_not_run(monkeypatch)
    main(config)
    assert (tmp_path / "docs/attacks.md").read_text() == text
    table.judged = {**judged, "evaluation.images_per_label": 2}
    assert table.finished(tmp_path / "docs/attacks.json") == {}
