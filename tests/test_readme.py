"""Code of the README runs as it stands there."""

import re

import pytest
import torch
from short_runs import ROOT


def block(start):
    """The README's Python block that contains `start`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (found,) = [code for code in blocks if start in code]
    return found


def test_notebook(monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    values = {}
    exec(compile(block("encode_images"), "README.md", "exec"), values)
    barrier, step = values["barrier"], values["make_step"](next(iter(values["DataLoader"](values["forget"], 32))))
    assert len(values["forget"]) == 144 and step.noisy.shape[1:] == (4, 8, 8)
    assert barrier.compute_protection_loss().item() > 0
    assert values["objective"].loss(step).item() == pytest.approx(0, abs=0.5)
    body = block("encode_images").split("\n\n")[-1]
    assert len([line for line in body.splitlines() if not line.startswith(" ")]) <= 10
