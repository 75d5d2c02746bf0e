"""The README's tables: rows that parse, and a runner that does not run a finished row again."""

import json
from pathlib import Path

import attack_table
import erasure_table
import pytest
from rows import TABLES, Row, Table
from running import run_rows, words_of
from short_runs import ROOT, SHORT

from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig, chosen_objective


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_valid_run_with_a_name_of_its_own(name):
    rows = [row for chain in TABLES[name]().chains for row in chain]
    assert len({row.name for row in rows}) == len(rows) > 0
    for row in rows:
        assert json.loads(json.dumps(row.flags)) == row.flags  # else the row would never count as finished
        chosen_objective(parse_config(UnlearnConfig, words_of(erasure_table.CONFIG, row.flags)))


def tiny_table():
    few = {**SHORT, "objective.alpha": 0, "barrier.use_actual_bounds": False, "max_train_steps": 1}
    del few["report_to"]
    style = {**few, "concept": "pencil sketch", "concept_column": "style", "objective.anchor": "photo"}
    style["evaluation.images_per_label"] = 8  # in the order of captions, the eighth is about sneakers
    chain = [Row({"erased": "sneaker"}, few), Row({"erased": "then sketches"}, style)]
    return Table([chain], {"UA": "unlearning_accuracy", "drop": "retain_accuracy_before - retain_accuracy_after"})


def test_finished_rows_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TABLES, "tiny", tiny_table)
    page = tmp_path / "page.md"
    page.write_text("Above.\n<!-- table tiny -->\nold\n<!-- end of table tiny -->\nBelow.\n")
    folders = {"docs": str(tmp_path / "docs"), "output_dir": str(tmp_path / "runs"), "readme": str(page)}
    config = erasure_table.TableConfig(["tiny"], workers=1, **folders)
    erasure_table.build(config)
    entries = json.loads((tmp_path / "docs/tiny.json").read_text())
    assert [entry["name"] for entry in entries] == ["sneaker", "then_sketches"]
    assert "erased_before_unlearning_accuracy_after" in entries[1]["metrics"]
    table = (tmp_path / "docs/tiny.md").read_text()
    assert table.splitlines()[0] == "| erased | UA | drop | seconds |" and table in capsys.readouterr().out
    begin, end = "<!-- table tiny -->\n", "<!-- end of table tiny -->"
    assert page.read_text() == f"Above.\n{begin}{table}{end}\nBelow.\n"
    assert not (tmp_path / "runs/sneaker/unet").exists() and (tmp_path / "runs/sneaker/before_after.png").is_file()
    monkeypatch.setattr(erasure_table, "run_chain", lambda *_: pytest.fail("a finished row ran again"))
    erasure_table.build(config)
    assert json.loads((tmp_path / "docs/tiny.json").read_text()) == entries
    other = Path(tmp_path / "other.yaml")
    other.write_text(erasure_table.CONFIG.read_text() + "seed: 1\n")
    monkeypatch.setattr(erasure_table, "CONFIG", other)
    assert erasure_table.finished(tmp_path / "docs/tiny.json") == {}


def share(row, output_dir, threads):
    """A row that fails for 0."""
    return 12 // row, threads > 0


def test_a_row_that_fails_leaves_the_others_alone(tmp_path):
    failed = []
    found = dict(run_rows(share, {"three": 3, "none": 0, "four": 4}, str(tmp_path), 1, failed))
    assert found == {"three": (4, True), "four": (3, True)}
    assert len(failed) == 1 and failed[0].startswith("none: ")


def test_means():
    rows = [Row({"class": name, "kind": kind}, {}) for kind in "ab" for name in ("bag", "boot")]
    table = Table([[row] for row in rows], {"UA": "ua"}, mean_over="class")
    entries = {
        row.name: {"metrics": {"ua": float(index), "seconds_training": 2.0}} for index, row in enumerate(rows[:3])
    }
    lines = erasure_table.markdown(table, entries).splitlines()
    assert lines[2] == "| bag | a | 0.0 | 2 |"
    assert lines[5:] == ["| **mean of 2** | a | 0.5 | 2 |"]  # no mean of one row


def test_short_form():
    rows = [Row({"class": name, "alpha": alpha}, {}) for alpha in "01" for name in ("bag", "boot")]
    table = Table([[row] for row in rows], mean_over="class", across=("alpha",))
    numbers = {"unlearning_accuracy": 90.0, "retain_accuracy_before": 97.0, "retain_accuracy_after": 96.0}
    entries = {row.name: {"metrics": {**numbers, "unlearning_accuracy": 80.0 + i}} for i, row in enumerate(rows[:3])}
    assert erasure_table.short_form(table, entries).splitlines() == [
        "| class | retain before | alpha 0 | alpha 1 |",
        "|---|---:|---:|---:|",
        "| bag | 97.0 | 80.0 / 96.0 | 82.0 / 96.0 |",
        "| boot | 97.0 | 81.0 / 96.0 |  |",
        "| **mean** | 97.0 | 80.5 / 96.0 | 82.0 / 96.0 |",
    ]


def test_unknown_table():
    with pytest.raises(ValueError, match="unknown table 'all'; known are classes"):
        erasure_table.TableConfig(["all"])


def test_attack_rows_are_valid_runs():
    rows = attack_table.attack_rows()
    assert len({row.name for row in rows}) == len(rows) == 5
    for row in rows:
        assert json.loads(json.dumps(row.flags)) == row.flags
        chosen_objective(parse_config(UnlearnConfig, words_of(erasure_table.CONFIG, row.flags)))


def test_the_attack_table_judges_each_row_once(tmp_path, monkeypatch):
    few = {**SHORT, "objective.name": "uce", "objective.alpha": 0, "barrier.lambda_interval": 0}
    few |= {"barrier.use_actual_bounds": False, "barrier.targets": "[attn2.to_k,attn2.to_v]"}
    for name in ("report_to", "max_train_steps", "barrier.reduced_dim"):
        del few[name]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table attacks -->\nold\n<!-- end of table attacks -->\nafter\n")
    config = attack_table.AttackTableConfig(str(tmp_path), [str(page)], str(tmp_path / "runs"), 1, threads=1)
    changes = {"attacks": "[misspelled]", "fidelity.extractors": "[]", "evaluation.sampling.num_inference_steps": 1}
    rows = [Row({"erased by": "a"}, few)]
    attack_table.build(config, rows, changes)
    text, content = (tmp_path / "attacks.md").read_text(), page.read_text()
    assert (
        "| erased by | UA | retain drop | FID (EfficientNet-Lite0) | after misspelled |" in text
        and text.count("\n") == 3
    )
    assert text in content and content.startswith("before") and content.endswith("after\n") and "old" not in content
    entry = json.loads((tmp_path / "attacks.json").read_text())[0]
    assert entry["numbers"]["attacks"]["misspelled"]["post_attack"]["num_images"] == 1
    monkeypatch.setattr(attack_table, "run_chain", lambda *_, **__: pytest.fail("the row was run again"))
    attack_table.build(config, rows, changes)
    assert (tmp_path / "attacks.md").read_text() == text
