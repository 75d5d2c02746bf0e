"""The Makefile removes what it made, and nothing that a user made with it."""

import shutil
import subprocess

from short_runs import ROOT


def test_clean_keeps_runs(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("runs/fashion_class", ".venv/bin", "build", "assets"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(["make", "--no-print-directory", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert {"runs", "assets", "Makefile"} == left and (tmp_path / "runs/fashion_class").is_dir()
