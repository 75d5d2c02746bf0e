"""One self-contained HTML page about one run or several: numbers, pictures, attacks, certificate, manifest."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from barrier_diffusers.evaluation.certification import CERTIFICATE_NAME
from barrier_diffusers.evaluation.pictures import drift_bars, label_bars, trade_off
from barrier_diffusers.utils.checks import as_list
from barrier_diffusers.utils.files import written_whole
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, numbers

REPORT_NAME = "report.html"
PICTURES = {  # file of a run -> what it shows
    "before_after.png": "Images before and after, the same prompts and seeds",
    "attacks.png": "Images of the plain prompts and under each attack, the same seeds",
    "loss_curves.png": "Losses per training step",
}


@dataclass
class RunRecord:
    """What a folder says of its run; every part may be missing but the numbers."""

    name: str
    metrics: dict[str, Any]
    manifest: dict[str, Any]
    certificate: dict[str, Any] | None
    pictures: dict[str, bytes] = field(default_factory=dict)  # caption -> PNG

    @property
    def classes(self) -> dict[str, Any]:
        """The numbers on plain prompts: of unlearn_sd.py, or of evaluate_sd.py's protocol."""
        return self.metrics.get("classes", self.metrics)

    @property
    def details(self) -> dict[str, Any]:
        """Shares with counts and intervals."""
        return self.classes.get("details", {})

    @property
    def erased(self) -> dict[str, Any] | None:
        """Unlearning accuracy with its interval."""
        return self.details.get("unlearning_accuracy")

    @property
    def retained(self) -> dict[str, Any] | None:
        """Retain accuracy with its interval; an image classifier's own."""
        return self.details.get("retain_accuracy_after", self.details.get("retain_accuracy"))

    @property
    def drop(self) -> float | None:
        """Points of retain accuracy lost; None where the base is unknown."""
        before = self.metrics.get("before")
        if before:
            return before["retain_accuracy"] - self.metrics["retain_accuracy"]
        return self.classes.get("retain_accuracy_drop")

    @property
    def forgotten(self) -> list[str]:
        """The concepts, as the settings name them."""
        settings = self.manifest.get("settings", {})
        named = settings.get("concept") or settings.get("forget_class")
        return as_list(named)

    def shares(self, when: str) -> dict[str, Any]:
        """Label -> share, of the attribute that the concepts are values of; `when` is before or after."""
        for name, shares in self.details.items():
            if name.startswith("per_") and name.endswith(f"_{when}") and set(self.forgotten) <= set(shares):
                return shares
        return {}

    def numbers(self) -> list[tuple[str, str]]:
        """Every other number of the run, by dotted name."""
        hidden = ("details", "attacks")  # which the page shows elsewhere
        return [
            (name, f"{value:,.6g}")
            for name, value in numbers(self.metrics)
            if not any(part in hidden or part.startswith("per_") for part in name.split("."))
        ]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no record of a run")
    return content


def read_run(folder: str | Path) -> RunRecord:
    """The record in a folder that an unlearning or evaluation script wrote.

    Raises:
        ValueError: there is no such folder, no metrics.json in it, or a file that is damaged.
    """
    path = Path(folder)
    metrics = _read_json(path / METRICS_NAME)
    if metrics is None:
        raise ValueError(f"{str(folder)!r} holds no {METRICS_NAME}: name a folder that unlearning or evaluation wrote")
    manifest = _read_json(path / MANIFEST_NAME)
    if manifest is None:  # evaluate_sd.py writes one file with everything
        manifest = {name: metrics[name] for name in ("settings", "hashes", "versions", "machine") if name in metrics}
    pictures = {caption: (path / name).read_bytes() for name, caption in PICTURES.items() if (path / name).is_file()}
    return RunRecord(str(folder), metrics, manifest, _read_json(path / CERTIFICATE_NAME), pictures)


def as_data_uri(png: bytes) -> str:
    """An image that needs no file beside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def drop_interval(run: RunRecord) -> tuple[float, float] | None:
    """The 95 % interval of the drop, with the accuracy before taken as it is."""
    before, after = (run.details.get(f"retain_accuracy_{when}") for when in ("before", "after"))
    if before is None or after is None:
        return None
    low, high = after["interval_95"]
    return before["value"] - high, before["value"] - low


def figures(run: RunRecord) -> dict[str, bytes]:
    """Caption -> PNG, drawn from the numbers."""
    found: dict[str, bytes] = {}
    after = run.shares("after")
    if after:
        found["Recognised images per label, with 95 % intervals"] = label_bars(
            run.shares("before"), after, forgotten=run.forgotten
        )
    if run.certificate:
        found["Drift of every protected map on held-out images, and its bound"] = drift_bars(run.certificate["maps"])
    return found


def render(runs: Sequence[RunRecord]) -> str:
    """The page; text from settings and data is escaped."""
    environment = Environment(
        loader=PackageLoader("barrier_diffusers.evaluation"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    points = [
        (run.name, run.erased, run.drop, drop_interval(run)) for run in runs if run.erased and run.drop is not None
    ]
    shown = [
        {
            "run": run,
            "pictures": {caption: as_data_uri(png) for caption, png in {**figures(run), **run.pictures}.items()},
            "manifest": json.dumps(run.manifest, indent=2, ensure_ascii=False),
        }
        for run in runs
    ]
    picture = as_data_uri(trade_off(points)) if points else None
    return environment.get_template("report.html").render(shown=shown, trade_off=picture)


def write_report(folders: Sequence[str | Path], path: Path) -> Path:
    """Write one page about these runs.

    Raises:
        ValueError: a folder without a run; see `read_run`.
    """
    page = render([read_run(folder) for folder in folders])
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
