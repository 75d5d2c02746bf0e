"""The robustness table: rows that parse, runs that go on, and what a line says."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from short_evaluations import twin_of_base
from short_runs import ROOT

from barrier_diffusers.workflow.settings import chosen_objective
from benchmarks.tables.robustness import (
    CLASSES,
    NEVER_KNEW,
    NOTHING,
    RECIPE,
    TRAIN,
    WAYS,
    RobustnessTable,
    cells_of,
    robust_classes,
    robustness,
    robustness_numbers,
    row_of,
    train_control,
)
from benchmarks.tables.stable_diffusion import EVALUATE, UNLEARN
from benchmarks.tables.table import Script


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


def test_every_row_is_a_valid_run_with_a_name_of_its_own():
    table = robustness()
    assert len({row.name for row in table.rows}) == len(table.rows) >= len(CLASSES) * 9
    for row in table.rows:
        assert json.loads(json.dumps(row.flags)) == row.flags  # else the row would never count as finished
        assert len(table.hash_of(row)) == 16
        way = row.cells["erased by"]
        if way in WAYS:
            chosen_objective(UNLEARN.parse(WAYS[way][0], row.flags))
    EVALUATE.parse(table.evaluation, {**table.judged, "control": "assets/fashion_sd"})


@pytest.mark.parametrize("make", [robustness, robust_classes])
def test_no_committed_row_has_to_run_again(make):
    table = make()
    path = ROOT / f"docs/tables/{table.name}.json"
    results = table.finished(path)
    assert list(results) == [result["name"] for result in json.loads(path.read_text())]
    text = table.markdown(results)[table.name]
    assert text == (ROOT / f"docs/tables/{table.name}.md").read_text(encoding="utf-8")
    marked = f"<!-- table {table.name} -->\n{text}<!-- end of table {table.name} -->"
    assert marked in (ROOT / table.pages[0]).read_text(encoding="utf-8")
    table.rows[0].flags["seed"] = 7
    assert len(table.finished(path)) == len(results) - (table.rows[0].name in results)


def test_a_control_that_is_there_is_not_trained_again(tmp_path, monkeypatch):
    trained = []

    def train(script, config, flags, log):
        trained.append(flags)
        (tmp_path / "control_dress").mkdir(exist_ok=True)
        (tmp_path / "control_dress" / "model_index.json").write_text("{}")

    monkeypatch.chdir(tmp_path)  # without assets
    monkeypatch.setattr(Script, "run", train)
    for _ in range(2):
        assert train_control("dress", tmp_path) == tmp_path / "control_dress"
    (flags,) = trained
    assert flags["exclude_concepts"] == "[dress]" and "resume_from_checkpoint" not in flags
    (tmp_path / "control_dress" / "model_index.json").unlink()  # it was stopped
    (tmp_path / "control_dress_work/unet_training/checkpoints/step-250").mkdir(parents=True)
    train_control("dress", tmp_path)
    assert trained[-1]["resume_from_checkpoint"] == "latest"
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    settings = TRAIN.parse(None, {**flags, "train_data_dir": "assets/fashion_images"})
    assert settings.exclude_concepts == ["dress"] and RECIPE.endswith("train_text_to_image")


GAP = {"value": 12.0, "interval_95": [3.0, 21.0]}
NUMBERS = {
    "unlearning_accuracy": {"value": 98.0, "interval_95": [90.0, 99.0], "num_images": 60},
    "retain_accuracy_drop": -0.0,
    "fid_efficientnet_lite0": {"before": 10.0, "after": 10.5},
    "gaps": {
        "inversion": {"strongest": {"gap": GAP}},
        "relearning": {"mean_strongest": GAP, "half": {"ratio": 0.5, "bound": "at_most"}},
    },
    "seconds_training": 61.4,
}


def test_a_line_of_the_table():
    gap = "+12.0 (3.0 - 21.0)"
    assert cells_of(NUMBERS) == ["98.0 (90.0 - 99.0)", "0.0", "1.05", gap, gap, "", "at most 0.50", "61"]
    nothing = {**NUMBERS, "retain_accuracy_drop": None, "fid_efficientnet_lite0": {}, "gaps": {}}
    del nothing["seconds_training"]
    assert cells_of(nothing) == ["98.0 (90.0 - 99.0)", *[""] * 7]


def test_the_picture_shows_every_erased_row():
    table = robustness()
    rows = {row.name: {"cells": row.cells, "metrics": NUMBERS} for row in table.rows[1:4]}
    other = {**NUMBERS, "retain_accuracy_drop": 4.0}
    name = table.rows[3].name
    pictures = [table.picture(found) for found in (rows, {**rows, name: {**rows[name], "metrics": other}})]
    images = [np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures]
    assert images[0].shape == images[1].shape and (images[0] != images[1]).any()
    without = {key: value for key, value in NUMBERS.items() if key != "seconds_training"}
    assert table.picture({name: {**rows[name], "metrics": without}}) is not None  # no row was erased


def test_an_evaluation_without_attacks_has_numbers_too():
    share = {"value": 98.0, "num_images": 50, "interval_95": [90.0, 99.0]}
    record = {"classes": {"details": {"unlearning_accuracy": share, "retain_accuracy_after": share}}}
    numbers = robustness_numbers(record)
    assert numbers["unlearning_accuracy"] == share and numbers["attacks"] == numbers["gaps"] == {}


def test_ten_classes_with_their_mean_and_the_worst_of_each_column():
    table = robust_classes()
    assert len(table.rows) == 10 and len({row.name for row in table.rows}) == 10
    for row in table.rows:
        chosen_objective(UNLEARN.parse(WAYS["robust"][0], row.flags))
    assert not EVALUATE.parse(table.evaluation, {**table.judged, "base_model": "assets/fashion_sd"}).chosen_attacks
    other = {**NUMBERS, "unlearning_accuracy": {"value": 100.0, "interval_95": [94.0, 100.0], "num_images": 60}}
    other |= {"retain_accuracy_drop": 1.0, "fid_efficientnet_lite0": {"before": 10.0, "after": 10.1}}
    found = {row.name: {"metrics": one} for row, one in zip(table.rows, (NUMBERS, other), strict=False)}
    assert table.markdown(found)["robust_classes"].splitlines()[2:] == [
        "| bag | 98.0 (90.0 - 99.0) | 0.0 | 1.05 | 61 |",
        "| boot | 100.0 (94.0 - 100.0) | 1.0 | 1.01 | 61 |",
        "| **mean of 2** | 99.0 | 0.5 | 1.03 | 61 |",
        "| **worst** | 98.0 | 1.0 | 1.05 | 61 |",
    ]


@pytest.mark.slow
def test_rows_erase_attack_and_go_on(tmp_path):
    twin_of_base(tmp_path / "control_sneaker")
    judged = {"attack_budget": "standard", "attacks": "[misspelled]", "evaluation.images_per_label": 2}
    judged |= {"evaluation.sampling.num_inference_steps": 2, "fidelity.extractors": "[]", "certificate.num_images": 8}
    rows = [row_of("sneaker", way) for way in (NOTHING, "rl alone", NEVER_KNEW)]
    rows[1].flags.update({"max_train_steps": 1, "evaluation.images_per_label": 1})
    table = RobustnessTable(name="tiny", chains=[[row] for row in rows], judged=judged)
    found = {row.name: table.result(row, table.run([row], tmp_path)[0]) for row in rows}
    assert [set(result["metrics"]["gaps"]) for result in found.values()] == [{"misspelled"}, {"misspelled"}, set()]
    assert [("seconds_training" in result["metrics"]) for result in found.values()] == [False, True, False]
    text = table.markdown(found)["tiny"]
    assert len(text.splitlines()) == 2 + 3 and "rl alone" in text
    erased = tmp_path / rows[1].name / "metrics.json"
    moment = erased.stat().st_mtime_ns
    table.run([rows[1]], tmp_path)
    assert erased.stat().st_mtime_ns == moment  # it was erased already
    (tmp_path / "tiny.json").write_text(json.dumps(list(found.values())))
    assert set(table.finished(tmp_path / "tiny.json")) == set(found)
