"""The same sweep file on wandb's server: it draws the trials, and whoever starts an agent runs them.

Every trial is a workflow in a process of its own, which logs its numbers to wandb, where the sweep finds its metric.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from barrier_diffusers.utils.installation import shipped
from barrier_diffusers.workflow.sweep_file import PROGRAM, Sweep

TRACKER_FLAG, PROJECT_FLAG = "--track.report_to", "--track.project"
PROJECT = "barrier_diffusers"  # of sweeps whose file names none


def wandb_content(sweep: Sweep, root: Path) -> dict[str, Any]:
    """What wandb is given of a sweep file: its keys, with a command that runs wherever this package is installed and
    logs to wandb.

    Args:
        root: of the clone, or the folder that holds the installed packages.
    """
    project = sweep.content.get("project") or PROJECT
    words = [word for word in sweep.content["command"] if word != "${args}"]
    command = [sys.executable if word == "${interpreter}" else word for word in words]
    for flag, value in ((TRACKER_FLAG, "wandb"), (PROJECT_FLAG, project)):
        if not any(str(word).partition("=")[0] == flag for word in words):
            command.append(f"{flag}={value}")
    program = str(shipped(f"train_scripts/{PROGRAM}", root))
    return {**sweep.content, "program": program, "project": project, "command": [*command, "${args}"]}


def check_wandb(words: Sequence[str]) -> None:
    """Refuse a sweep that wandb would learn nothing of.

    Args:
        words: of the trials' command line.

    Raises:
        ValueError: no wandb, or trials that log elsewhere.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("a sweep on wandb's server needs its package: pip install 'barrier-diffusers[wandb]'")
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, assigned, value = str(word).partition("=")
        value = value if assigned else following
        if name == TRACKER_FLAG and value not in ("wandb", "all"):
            raise ValueError(f"the file's command sets {TRACKER_FLAG} to {value}, so wandb would see no metric")


def run_on_wandb(sweep: Sweep, root: Path, sweep_id: str | None, num_trials: int | None) -> str:
    """Create a sweep on wandb's server, or join one, and run its trials until there is none left; the sweep's id.

    Args:
        root: see `wandb_content`.
        sweep_id: of a sweep that is there, as ID, PROJECT/ID or ENTITY/PROJECT/ID; None: a new one is created.
        num_trials: that this agent runs at most; None: as many as the server hands out.

    Raises:
        wandb.errors.Error: no account, or a server that refuses.
    """
    import wandb

    content = wandb_content(sweep, root)
    project, entity = content["project"], content.get("entity")
    if sweep_id is None:
        sweep_id = wandb.sweep({**content}, project=project, entity=entity)
        print(
            f"on other machines: add --wandb_sweep {'/'.join(filter(None, (entity, project, sweep_id)))}", flush=True
        )
    wandb.agent(sweep_id, project=project, entity=entity, count=num_trials)
    return sweep_id
