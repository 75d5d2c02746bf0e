"""A local page: type a prompt, and see what the base and the unlearned pipeline draw from the same noise.

    python train_scripts/demo.py runs/fashion_class --evaluation_dir runs/fashion_evaluation

Below the pictures stand the run's verdict, its certificate and what attacks brought back. An adapter's strength can be
chosen. It needs Gradio: pip install 'barrier-diffusers[demo]'.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.workflow.demo import DemoConfig, serve


def main(config: DemoConfig) -> None:
    """Load both pipelines, serve the page until told to end."""
    serve(config)


def command() -> None:
    """The console command barrier-demo."""
    run_script(main, DemoConfig)


if __name__ == "__main__":
    command()
