"""Rows in processes of their own. A module beside `__main__`: what a spawned process is to call, it must be able to
import, and a package's `__main__` it cannot."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from tqdm.auto import tqdm


def in_worker(run: Callable[..., Any], threads: int, arguments: tuple[Any, ...]) -> Any:
    """Call a function with its share of the cores."""
    torch.set_num_threads(threads)
    return run(*arguments)


def run_all(
    run: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], workers: int, failed: list[str]
) -> Iterator[tuple[str, Any]]:
    """(name, result) of a function that is called with each job's arguments, `workers` at once, as they end.

    Args:
        run: can be pickled, as it is called in other processes.
        failed: gets a line for each call that failed; the others go on.
    """
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(in_worker, run, threads, arguments): name for name, arguments in jobs.items()}
        for job in tqdm(as_completed(started), total=len(started), desc="rows", disable=not started):
            if job.exception() is not None:
                failed.append(f"{started[job]}: {job.exception()}")
            else:
                yield started[job], job.result()
