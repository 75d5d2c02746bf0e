"""How the benchmarks measure and print: medians of interleaved runs, peak memory of a fresh process, tables, JSON."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pages import into_page
from torch.utils._python_dispatch import TorchDispatchMode

from barrier_diffusers.utils.files import write_json


@dataclass(kw_only=True)
class BenchmarkConfig:
    """What all benchmarks are told."""

    model: str = "sd14"  # sd14, sdxl, small or tiny (models.py), with random weights
    device: str = "cpu"  # or cuda
    mixed_precision: Literal["no", "bf16"] | None = None  # of the UNet's passes; None: no on a CPU, bf16 on a GPU
    num_threads: int = 1  # on a CPU; with a GPU torch chooses
    repeats: int = 5  # of every case, in turns; medians are printed
    json: str | None = None  # file that gets the figures
    page: str | None = None  # with `json`: Markdown page that gets the tables between marks of the file's name

    def start(self) -> torch.device:
        """Set the number of threads on a CPU; the device everything runs on."""
        if not self.on_gpu:
            torch.set_num_threads(self.num_threads)
        return torch.device(self.device)

    @property
    def on_gpu(self) -> bool:
        """Whether the benchmark runs on a GPU, where people train in larger batches and in bf16."""
        return torch.device(self.device).type == "cuda"

    @property
    def precision(self) -> str:
        """Of the UNet's passes."""
        return self.mixed_precision or ("bf16" if self.on_gpu else "no")

    def autocast(self) -> torch.autocast:
        """What the UNet's passes run in; the weights are float32."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def in_autocast(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The function with `autocast` around it."""

        def inside(*args: Any) -> Any:
            with self.autocast():
                return run(*args)

        return inside


def synchronise(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    cases: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of every case: all cases once, then all again, so that a busy machine slows them alike.

    On a CPU these are seconds of processor time, which do not count what the machine gives to other programs; with
    one thread and a quiet machine they are the seconds on the clock. On a GPU they are the seconds on the clock.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, run in cases.items():
            gc.collect()
            synchronise(device)
            start = clock()
            run()
            synchronise(device)
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class OperatorCount(TorchDispatchMode):
    """Counts the ATen operators that run meanwhile, by name; views are left out, as they launch nothing.

    A GPU launches about a kernel for each; here they can be counted without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(self.counts.values())


def count_operators(run: Callable[[], Any]) -> int:
    """Number of operators that a function launches."""
    with OperatorCount() as count:
        run()
    return count.total


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: of the process (Linux's VmHWM, which a new program starts at 0), or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def in_fresh_process(script: str, config: BenchmarkConfig, **changes: Any) -> dict[str, Any]:
    """Run one case of a benchmark in a process of its own; the last line it prints is its JSON result."""
    settings = {**asdict(config), "json": None, **changes}
    words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    facts = {"python": platform.python_version(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {**facts, **versions, **gpu, "load_average": os.getloadavg()[0]}


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table."""
    headings = list(rows[0])
    cells = [[_cell(row[heading]) for heading in headings] for row in rows]
    widths = [max(len(line[place]) for line in [headings, *cells]) for place in range(len(headings))]
    lines = (headings, ["-" * width for width in widths], *cells)
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in padded)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(config: BenchmarkConfig, tables: Mapping[str, Sequence[Mapping[str, Any]]], **facts: Any) -> None:
    """Print the tables; with `json`, write them with the settings and the machine; with `page`, put them in there."""
    where = machine()
    text = "\n".join(f"{title}\n\n{as_markdown(rows)}" for title, rows in tables.items())
    print(f"\n{text}\n{where}")
    if config.json:
        path = Path(config.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": asdict(config), "machine": where, "tables": dict(tables), **facts})
        if config.page:
            into_page(Path(config.page), path.stem, f"{text}\n{facts_line(where)}\n")


def facts_line(where: Mapping[str, Any]) -> str:
    """The machine in words."""
    return ", ".join(f"{name.replace('_', ' ')} {_cell(value)}" for name, value in where.items()) + "."
