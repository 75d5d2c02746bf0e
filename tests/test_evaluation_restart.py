"""evaluate_sd.py with every attack, killed in the middle of one: the same command again gives the same files."""

import json
import signal
import time

from forks import Script
from short_evaluations import evaluate, flags
from short_runs import ROOT, run

EVERYTHING = {
    "fidelity.extractors": "[]",
    "membership.enabled": "true",
    "membership.num_images": 6,
    "membership.num_timesteps": 2,
    "membership.num_resamples": 50,
    "relearning.num_images": 4,
    "benign.num_images": 4,
}


def test_killed_during_an_attack_and_restarted_is_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    quick = {"max_train_steps": 1, "evaluation.classifier": "null", "evaluation.images_per_label": 1}
    run(tmp_path / "unlearned", tmp_path / "cache", **quick, **{"certificate.enabled": "false"})
    changes = {**EVERYTHING, "pretrained_model_name_or_path": tmp_path / "unlearned"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    record = evaluate(whole, **changes)
    names = ["inversion", "prompt_search", "relearning", "benign", "misspelled", "paraphrased"]
    assert [entry["attack"] for entry in record["attacks"]] == names and "after" in record["membership"]

    script = Script("barrier_diffusers.scripts.evaluate_sd", flags(killed, **changes), tmp_path / "said")
    while "prompt search 1" not in script.output:
        assert script.is_running, f"it ended before it could be killed: {script.output[-2000:]}"
        time.sleep(0.02)
    assert script.kill() == -signal.SIGKILL and not (killed / "metrics.json").exists()
    made = {path.name: path.stat().st_mtime_ns for path in killed.glob("images/concepts/after/*.png")}
    assert len(made) == 20
    evaluate(killed, **changes)
    for name in ("metrics.json", "certificate.json", "attacks.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((whole / "certificate.json").read_text())["holds"]
    for name, moment in made.items():
        assert (killed / "images/concepts/after" / name).stat().st_mtime_ns == moment
