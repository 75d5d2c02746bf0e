"""What the tables' scripts share: words of a command line, rows run at once with their output in log files."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


def words_of(config: Path | str, flags: Mapping[str, Any]) -> list[str]:
    """A configuration file and the settings that differ from it, as words of a command line."""
    words = ["--config", str(config)]
    for name, value in flags.items():
        words += [f"--{name}", "null" if value is None else str(value)]
    return words


@contextlib.contextmanager
def logged(output_dir: Path | str, name: str) -> Iterator[None]:
    """What the block prints goes into a log file of that name."""
    path = Path(output_dir) / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def run_rows(
    run: Callable[[Any, str, int], Any], rows: Mapping[str, Any], output_dir: str, workers: int, failed: list[str]
) -> Iterator[tuple[str, Any]]:
    """(name, result) of `run(row, output_dir, number of threads)` as the rows finish, `workers` of them at once.

    Args:
        run: a function of a module, as it is called in other processes.
        failed: gets a line for each row that failed; the other rows go on.
    """
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run, row, output_dir, threads): name for name, row in rows.items()}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="rows"):
            if job.exception() is not None:
                failed.append(f"{jobs[job]}: {job.exception()}")
            else:
                yield jobs[job], job.result()


def require_all(failed: list[str]) -> None:
    """A ValueError if rows failed."""
    if failed:
        raise ValueError("rows failed, the others are written; " + "; ".join(failed))
