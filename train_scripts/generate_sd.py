"""Make the images that an evaluation judges, and nothing else; evaluate_sd.py then finds them.

    python train_scripts/generate_sd.py --config train_scripts/configs/evaluate_fashion.yaml

The settings are those of evaluate_sd.py. output_dir/images gets a folder for each protocol and pipeline; a run that
was stopped goes on with the images that it has.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from pathlib import Path

from barrier_diffusers.evaluation.judged_model import IMAGES_NAME, JudgedModel
from barrier_diffusers.evaluation.protocols import make_protocols
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.output_folder import in_output_folder


@in_output_folder(kept=[IMAGES_NAME])
def main(config: EvaluateConfig) -> None:
    """Load -> check -> images of every protocol."""
    if config.images_dir is not None:
        raise ValueError("images_dir holds finished images: there is nothing to generate")
    output = Path(config.output_dir)
    judged_model = JudgedModel(config, output)
    counts = [len(protocol.images().after) for protocol in make_protocols(config, judged_model)]
    print(f"{sum(counts)} images after unlearning: {output / IMAGES_NAME}")


if __name__ == "__main__":
    run_script(main, EvaluateConfig)
