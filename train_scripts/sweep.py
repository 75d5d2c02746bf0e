"""One worker of a sweep over a workflow's settings; start the same command as often as there are machines for it.

    python train_scripts/sweep.py --sweep train_scripts/sweeps/fashion_class.yaml --output_dir runs/sweeps/fashion

The file is in wandb's sweep format. Optuna draws the trials, and a journal in output_dir holds them; the last worker
leaves results.csv, results.md, importances.png and trade_off.png. With `--wandb true` the same trials are a sweep on
wandb's server, which this command creates, and whose first agent it is.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

import shlex

from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import require_writable
from barrier_diffusers.utils.installation import ROOT, shipped
from barrier_diffusers.workflow.processes import Stopped
from barrier_diffusers.workflow.sweep_file import read_sweep
from barrier_diffusers.workflow.sweep_report import MARKDOWN_NAME, report
from barrier_diffusers.workflow.sweeps import SweepConfig, Worker, check_sweep
from barrier_diffusers.workflow.wandb_sweeps import check_wandb, run_on_wandb
from barrier_diffusers.workflow.workflow import stop_message


def main(config: SweepConfig) -> None:
    """Read and check the file -> trials until none is left -> table and plots."""
    sweep = read_sweep(config.sweep)
    workflows = check_sweep(sweep, ROOT, config.trade_off or [])
    if config.dry_run:
        points = sweep.grid() if sweep.method == "grid" else []
        for point in points:
            print(shlex.join([str(shipped("train_scripts/run_pipeline.py")), *sweep.command_line(point)]))
        print(f"{len(points) or 'no fixed'} trials; {len(workflows)} of them checked in full")
        return
    if config.wandb:
        check_wandb(sweep.words)
        run_on_wandb(sweep, ROOT, config.wandb_sweep, config.num_trials)
        return
    worker = Worker(config, sweep, ROOT)
    require_writable(config.output_dir)
    try:
        worker.run()
    except Stopped as stopped:
        raise SystemExit(stop_message(stopped)) from stopped
    rows = report(worker.study, sweep, config.trade_off or [], worker.output)
    if rows:
        print((worker.output / MARKDOWN_NAME).read_text(encoding="utf-8"))
    if rows and all(row["error"] for row in rows):
        raise ValueError(f"all {len(rows)} trials failed: {rows[0]['error']}")


def command() -> None:
    """The console command barrier-sweep."""
    run_script(main, SweepConfig)


if __name__ == "__main__":
    command()
