"""Attacks cell by cell: one attack with one budget on one concept of one model is a cell, whose result is a file.

An evaluation that was stopped goes on with the cells that are finished, and several processes work on the others.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm

from barrier_diffusers.evaluation.attacks.base import ATTACKS, Forgotten, Mark, Run, Variant
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.evaluation.image_folder import png_bytes, scheduler_facts
from barrier_diffusers.evaluation.judge import Judge, Rendering, as_rgb
from barrier_diffusers.models.loading import load_merged
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.registry import load_module
from barrier_diffusers.utils.run_records import fingerprint

PACKAGES = ("barrier-diffusers", "torch", "diffusers", "transformers", "peft")  # whose versions numbers depend on
PICTURE_COLUMNS, PICTURE_SIDE = 12, 128  # images of a cell that are kept for pictures, and their side at most


@dataclass(frozen=True)
class Cell:
    """One attack with one budget on one concept of one model."""

    model: str  # a key of the scene's models
    attack: str
    concept: str
    variant: Variant


@dataclass(frozen=True)
class Seen:
    """What the judge says of a model that an attack has worked on for some steps."""

    num_steps: int
    shown: list[bool]  # whether each image is recognised as the concept (N)
    confidence: float  # mean probability of the label that the judge chooses for these images
    retained: list[bool] | None = None  # whether each image of what is retained is recognised as what was asked for
    retained_confidence: float | None = None

    @property
    def share(self) -> float:
        """Images that show the concept, in percent."""
        return 100 * sum(self.shown) / len(self.shown)

    @property
    def retained_share(self) -> float | None:
        """Images of what is retained that show what was asked for, in percent; None: no weight was changed."""
        return None if not self.retained else 100 * sum(self.retained) / len(self.retained)


@dataclass(frozen=True)
class CellResult:
    """What came of a cell."""

    model: str
    attack: str
    concept: str
    variant: str
    budget: dict[str, Any]
    seconds: float
    num_training_images: int = 0
    prompts: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)  # what a search found, for the record
    marks: list[Seen] = field(default_factory=list)  # by their steps; empty: it failed before the first
    failed: str | None = None  # why it ended before its last step
    picture: str = ""  # PNG with its first images at the strongest mark side by side, base64
    tokens: str = ""  # that were learned by then, as `Mark` has them: a safetensors file, base64

    @property
    def strongest(self) -> Seen:
        """The first of the marks with the most images that show the concept."""
        return max(self.marks, key=lambda seen: seen.share)

    def images(self) -> np.ndarray:
        """The kept images, bytes (N, H, W, 3)."""
        strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(self.picture))).convert("RGB"))
        return np.stack(np.split(strip, strip.shape[1] // strip.shape[0], axis=1))  # square ones

    def learned_tokens(self) -> dict[str, Tensor]:
        """Text encoder -> embeddings (T, D) of the tokens learned at the strongest mark; empty: none were."""
        return load(base64.b64decode(self.tokens)) if self.tokens else {}


def read_cell(path: Path) -> CellResult | None:
    """The result in a file; None if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return CellResult(**{**values, "marks": [Seen(**seen) for seen in values["marks"]]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def first_small(images_NHWC: np.ndarray) -> np.ndarray:
    """The first images for a picture, of large ones thumbnails."""
    shown = []
    for image in images_NHWC[:PICTURE_COLUMNS]:
        picture = Image.fromarray(image)
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        shown.append(np.asarray(picture))
    return np.stack(shown)


def strip_of(images_NHWC: np.ndarray) -> str:
    """The first images side by side as a PNG, base64."""
    return base64.b64encode(png_bytes(np.concatenate(list(first_small(images_NHWC)), axis=1))).decode()


@dataclass(frozen=True)
class Scene:
    """What all cells share; it can be sent to another process."""

    # model -> its folder, hub id or file, its adapter's folder, and of a file the pipeline with its configurations
    models: dict[str, tuple[str, str | None, str | None]]
    hashes: dict[str, str]  # model -> fingerprint of its weights
    forgotten: list[Forgotten]
    classifier: ClassifierSource  # of the judge
    facts: list[str]  # hashes of the judge, of images and of the user's modules
    cache: Path  # folder of the results
    modules: list[str] = field(default_factory=list)  # of the user, that register attacks
    first_failure_ends: bool = True  # False: an attack that ends in non-finite numbers is a result
    attribute: str | None = None  # of the judge; None: the one that has the concepts
    rendering: Rendering = "plain"  # how images are shown to it

    def known(self, concept: str) -> Forgotten:
        """What an attacker knows of a concept."""
        return next(known for known in self.forgotten if known.concept == concept)


class CellRunner:
    """Runs cells in this process; a subclass for another kind of pipeline says how one is loaded and attacked.

    Args:
        pipelines: models that are loaded already; others are when they are first attacked.
    """

    def __init__(self, scene: Scene, device: str, pipelines: Mapping[str, Any] | None = None):
        self.scene, self.device, self.pipelines = scene, device, dict(pipelines or {})
        concepts = [known.concept for known in scene.forgotten]
        self.judge = Judge(scene.classifier, concepts, attribute=scene.attribute, rendering=scene.rendering)
        self.on_device: str | None = None

    def load(self, model: str) -> Any:
        """The pipeline of a model."""
        return load_merged(*self.scene.models[model])

    def attack_of(self, name: str) -> Run:
        """What runs the attack of this name."""
        return ATTACKS.find(name).run

    def pipeline(self, model: str) -> Any:
        """The model on the device, on which there is one at a time."""
        if model not in self.pipelines:
            self.pipelines[model] = self.load(model)
        if self.on_device not in (None, model):
            self.pipelines[self.on_device].to("cpu")
        self.on_device = model
        return self.pipelines[model].to(self.device)

    def path(self, cell: Cell, pipeline: Any, known: Forgotten) -> Path:
        """Where the result is kept: by all that it depends on."""
        parts = [
            self.scene.hashes[cell.model],
            [cell.attack, cell.concept, cell.variant.name, asdict(cell.variant.budget)],
            [known.prompts, known.retain_prompts, known.retain_labels, asdict(known.sampling), known.resolution],
            [scheduler_facts(pipeline), self.device.partition(":")[0], self.scene.facts],
            {name: importlib.metadata.version(name) for name in PACKAGES},
        ]
        return self.scene.cache / f"attack-{fingerprint(*parts)}.json"

    def run(self, cell: Cell) -> CellResult:
        """The result of a cell, from its file or made now.

        Raises:
            FloatingPointError: an attack ended in non-finite numbers, and the scene does not count that as a result.
        """
        known = self.scene.known(cell.concept)
        if cell.variant.num_images is not None:
            known = with_fewer_prompts(known, cell.variant.num_images)
        pipeline = self.pipeline(cell.model)
        path = self.path(cell, pipeline, known)
        result = read_cell(path)
        if result is None:
            result = self._run(cell, pipeline, known)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(result))
        return replace(result, model=cell.model)

    def _run(self, cell: Cell, pipeline: Any, known: Forgotten) -> CellResult:
        start, budget = time.perf_counter(), cell.variant.budget
        result = CellResult(cell.model, cell.attack, cell.concept, cell.variant.name, asdict(budget), 0.0)
        try:
            attempt = self.attack_of(cell.attack)(pipeline, known, budget)
        except FloatingPointError as error:
            if self.scene.first_failure_ends:
                raise
            return replace(result, failed=str(error), seconds=round(time.perf_counter() - start, 2))
        marks = attempt.marks or [Mark(getattr(budget, "num_steps", 0), attempt.images_NHWC)]
        seen = [self._look(mark, known) for mark in marks]
        strongest = max(range(len(seen)), key=lambda index: seen[index].share)
        return replace(
            result,
            num_training_images=attempt.num_training_images,
            prompts=list(dict.fromkeys(attempt.prompts)),
            found=attempt.found,
            marks=seen,
            failed=attempt.failed,
            seconds=round(time.perf_counter() - start, 2),
            picture=strip_of(as_rgb(marks[strongest].images_NHWC)),
            tokens=base64.b64encode(save(marks[strongest].tokens)).decode() if marks[strongest].tokens else "",
        )

    def _look(self, mark: Mark, known: Forgotten) -> Seen:
        probabilities = self.judge.probabilities(self.judge.render(mark.images_NHWC))
        shown = [label == known.concept for label in self.judge.recognise(probabilities)]
        seen = Seen(mark.num_steps, shown, round(probabilities.amax(1).mean().item(), 4))
        if mark.retained_NHWC is None:
            return seen
        others = self.judge.probabilities(self.judge.render(mark.retained_NHWC))
        pairs = zip(self.judge.recognise(others), known.retain_labels, strict=True)
        right = [found == wanted for found, wanted in pairs]
        return replace(seen, retained=right, retained_confidence=round(others.amax(1).mean().item(), 4))


def evenly(length: int, count: int) -> list[int]:
    """Up to `count` positions of a list, from all of it alike."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist() if length else []


def with_fewer_prompts(known: Forgotten, count: int) -> Forgotten:
    """The same concept with the first `count` of its prompts, and with half as many of what is retained."""
    rows = evenly(len(known.retain_prompts), max(1, count // 2))
    return replace(
        known,
        prompts=known.prompts[:count],
        retain_prompts=[known.retain_prompts[row] for row in rows],
        retain_labels=[known.retain_labels[row] for row in rows],
    )


_runner: CellRunner | None = None  # of this process, if it is a worker


def _start_worker(kind: type[CellRunner], scene: Scene, threads: int, numbers: Any) -> None:
    global _runner
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with numbers.get_lock():
        number, numbers.value = numbers.value, numbers.value + 1
    for module in scene.modules:
        load_module(module, "module", ATTACKS)
    gpus = torch.cuda.device_count()
    _runner = kind(scene, f"cuda:{number % gpus}" if gpus else "cpu")


def _run_in_worker(cell: Cell) -> CellResult:
    assert _runner is not None
    return _runner.run(cell)


class CellPool:
    """Runs many cells, here or in other processes, each with its share of the cores and its GPU.

    Args:
        workers: processes; 1: none but this one.
    """

    def __init__(self, runner: CellRunner, workers: int):
        self.runner, self.workers = runner, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> CellPool:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self._pool is not None:
            for worker in multiprocessing.active_children() if kind is not None else []:
                worker.terminate()  # it may be in the middle of a long training
            self._pool.shutdown(wait=kind is None, cancel_futures=kind is not None)

    def run(self, cells: Sequence[Cell]) -> list[CellResult]:
        """Their results, in order."""
        if self.workers == 1:
            return [self.runner.run(cell) for cell in tqdm(cells, desc="attacks", disable=len(cells) < 2)]
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            threads = max(1, torch.get_num_threads() // self.workers)
            arguments = (type(self.runner), self.runner.scene, threads, context.Value("i", 0))
            self._pool = ProcessPoolExecutor(self.workers, context, _start_worker, arguments)
        started = {self._pool.submit(_run_in_worker, cell): index for index, cell in enumerate(cells)}
        found: dict[int, CellResult] = {}
        try:
            for job in tqdm(as_completed(started), total=len(started), desc="attacks"):
                found[started[job]] = job.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process of the attacks was ended from outside, for want of memory perhaps: lower attack_workers; "
                "the same command goes on with what is finished"
            ) from error
        return [found[index] for index in range(len(cells))]
