"""Run a whole workflow from one YAML file: unlearn -> generate -> evaluate -> track.

    python train_scripts/run_pipeline.py --config train_scripts/configs/pipeline_fashion_class.yaml

Any field is a dotted flag (`--unlearn.learning_rate 1e-5`). A second run of the same command runs only what is not
complete, or depends on something that changed: settings, data, weights, code, versions of libraries.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.installation import ROOT
from barrier_diffusers.workflow.processes import Stopped
from barrier_diffusers.workflow.tracking import RESULTS_NAME
from barrier_diffusers.workflow.workflow import Workflow, parse_workflow, run_workflow, stop_message


def parse(arguments: list[str]) -> Workflow:
    """The workflow that the command line asks for."""
    return parse_workflow(arguments, ROOT)


def main(workflow: Workflow) -> None:
    """Run the stages, print where the numbers are."""
    try:
        results = run_workflow(workflow)
    except Stopped as stopped:
        raise SystemExit(stop_message(stopped)) from stopped
    if results:
        score = f"score {results['score']:.4g}, " if "score" in results else ""
        print(f"{score}{len(results['metrics'])} numbers: {workflow.output / RESULTS_NAME}")


def command() -> None:
    """The console command barrier-workflow."""
    run_script(main, parse)


if __name__ == "__main__":
    command()
