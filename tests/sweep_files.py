"""Sweep files of the light workflow, written on the fly."""

import yaml

COMMAND = ["${env}", "${interpreter}", "${program}", "--config", "pipeline.yaml", "--output_dir=x/{hash}", "${args}"]
BASE = {
    "program": "train_scripts/run_pipeline.py",
    "method": "grid",
    "metric": {"name": "score", "goal": "maximize"},
    "parameters": {"unlearn.learning_rate": {"values": [1, 2]}},
    "command": COMMAND,
}


def write(path, **changes):
    """A sweep file with these keys changed, None for one left out; its path."""
    content = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content))
    return str(path)
