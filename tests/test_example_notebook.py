"""examples/unlearn.ipynb runs from its first cell to its last, with fewer steps, and is stored with its outputs."""

import base64

import nbformat
import pytest
from short_runs import ROOT

NOTEBOOK = ROOT / "examples/unlearn.ipynb"
FEWER = "steps, images_per_label, relearning_steps, sampling_steps = 2, 1, 2, 2"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def parameters(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


def pictures(notebook):
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    return [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]


def test_it_is_stored_as_it_was_run():
    notebook = read()
    assert NOTEBOOK.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert len(pictures(notebook)) == 4 and "the same pictures: True" in printed(notebook)
    assert parameters(notebook).source.split("=")[0] == FEWER.split("=")[0]
    assert "/tmp" not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_runs(monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read()
    parameters(notebook).source = FEWER
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert len(pictures(notebook)) == 4 and "the same pictures: True" in printed(notebook)
    assert "of 4 show a sneaker again" in printed(notebook) and "protected maps, " in printed(notebook)
