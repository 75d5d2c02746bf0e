"""One HTML page about one run, or about several beside each other.

python train_scripts/report.py --compare runs/fashion_class
python train_scripts/report.py --compare runs/one runs/another --output runs/comparison.html
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from dataclasses import dataclass
from pathlib import Path

from barrier_diffusers.evaluation.report import REPORT_NAME, write_report
from barrier_diffusers.utils.checks import FOLDER, WRITTEN, rules
from barrier_diffusers.utils.command_line import run_script


@dataclass
class ReportConfig:
    """Which runs, and where the page goes."""

    compare: list[str]  # folders that an unlearning or evaluation script wrote
    output: str | None = None  # HTML file; None: report.html in the first folder

    RULES = rules(compare=FOLDER, output=WRITTEN)

    def __post_init__(self) -> None:
        if not self.compare:
            raise ValueError("compare is empty: name at least one folder")
        if self.output is not None and not self.output.endswith(".html"):
            raise ValueError(f"output {self.output!r} must end in .html")


def main(config: ReportConfig) -> None:
    """Read the folders, write the page."""
    path = Path(config.output) if config.output else Path(config.compare[0]) / REPORT_NAME
    print(f"report: {write_report(config.compare, path)}")


def command() -> None:
    """The console command barrier-report."""
    run_script(main, ReportConfig)


if __name__ == "__main__":
    command()
