"""The page: one self-contained HTML file about one run or several.

It opens with the pictures, what came out in a sentence, and the settings; the numbers, attacks, certificate and
manifest follow.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from barrier_diffusers.evaluation.accuracy import difference_interval
from barrier_diffusers.evaluation.certification import CERTIFICATE_NAME
from barrier_diffusers.evaluation.pictures import drift_bars, gap_curves, label_bars, trade_off
from barrier_diffusers.utils.checks import as_list, flat
from barrier_diffusers.utils.files import written_whole
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, numbers

REPORT_NAME = "report.html"
MOST_DRIFTED = 40  # tensors of a network whose drift is shown; metrics.json has all
LOSSES = "Losses per training step"
PICTURES = {  # file of a run -> what it shows
    "before_after.png": "Images before and after, the same prompts and seeds",
    "attacks.png": "Images of the plain prompts and under each attack, the same seeds",
    "loss_curves.png": LOSSES,
}
FIRST_SETTINGS = (  # of all scripts that leave a run
    *("pretrained_model_name_or_path", "model_name_or_path", "images_dir", "lora_weights", "base_model"),
    *("concept", "forget_class", "forget_fraction", "forget_count", "train_data_dir", "dataset_name"),
    *("data.train_data_dir", "data.dataset_name", "protocol"),
    *("objective.name", "objective.anchor", "objective.anchor_prompt", "objective.alpha", "method", "method.name"),
    *("barrier.constraint", "barrier.lambda_interval", "barrier.targets", "barrier.reduced_dim"),
    *("rank", "saliency_mask", "learning_rate", "train_batch_size", "num_train_epochs", "max_train_steps"),
    *("resolution", "seed", "evaluation.classifier", "evaluation.judge", "evaluation.images_per_label"),
    *("evaluation.sampling.num_inference_steps", "evaluation.sampling.guidance_scale", "evaluation.sampling.seed"),
)


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

    @property
    def drop_interval(self) -> tuple[float, float] | None:
        """95 % interval of the drop, in points; None where a count is missing."""
        before = self.details.get("retain_accuracy_before")
        before = before or (self.metrics.get("before") or {}).get("details", {}).get("retain_accuracy")
        return difference_interval(before, self.retained) if before and self.retained else None

    @property
    def verdict(self) -> str:
        """What came out, in a sentence or two."""
        said = []
        if self.erased:
            low, high = self.erased["interval_95"]
            gone = round(self.erased["value"] * self.erased["num_images"] / 100)
            said.append(
                f"{gone} of {self.erased['num_images']} images of {', '.join(self.forgotten) or 'what was forgotten'} "
                f"are not recognised as such: unlearning accuracy {self.erased['value']:.1f} % "
                f"({low:.1f} to {high:.1f})."
            )
        if self.drop is not None and self.retained:
            ends = self.drop_interval
            interval = f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else ""
            said.append(
                f"The accuracy on everything else dropped by {self.drop + 0.0:.1f} points{interval}, to "
                f"{self.retained['value']:.1f} %."
            )
        elif self.retained:
            low, high = self.retained["interval_95"]
            said.append(f"{self.retained['value']:.1f} % of everything else is recognised ({low:.1f} to {high:.1f}).")
        attacks = self.metrics.get("attacks") or []
        if attacks:
            worst = max(attacks, key=lambda attack: attack["post_attack"]["value"])
            said.append(
                f"Attacked in {len({attack['attack'] for attack in attacks})} ways, it shows {worst['concept']} in "
                f"at most {worst['post_attack']['value']:.1f} % of the images ({worst['attack']})."
            )
        gaps = [gap for gap in self.metrics.get("attack_gaps", []) if "strongest" in gap]
        if gaps:
            widest = max(gaps, key=lambda gap: gap["strongest"]["gap"]["value"])
            found = widest["strongest"]["gap"]
            said.append(
                f"Beside the control, which never knew it, under the same attacks the widest gap is "
                f"{found['value']:+.1f} points ({found['interval_95'][0]:.1f} to {found['interval_95'][1]:.1f}, "
                f"{widest['attack']})."
            )
        return " ".join(said) + " All intervals are at 95 %." if said else "Nobody judged the images of this run."

    @property
    def settings(self) -> list[tuple[str, str]]:
        """The settings that a reader asks for first, by dotted name."""
        values = dict(flat(self.manifest.get("settings", {})))
        return [(name, words(values[name])) for name in FIRST_SETTINGS if values.get(name) not in (None, "", [], {})]

    def shares(self, when: str) -> dict[str, Any]:
        """Label -> share, of the attribute that the concepts are values of; `when` is before or after.

        An image classifier's labels are all of one kind.
        """
        judged = (self.metrics.get("before") or {}) if when == "before" else self.metrics
        own = judged.get("details", {}).get("per_label")
        if own:
            return own
        for name, shares in self.details.items():
            if name.startswith("per_") and name.endswith(f"_{when}") and set(self.forgotten) <= set(shares):
                return shares
        return {}

    def forgotten_first(self, labels: Iterable[str]) -> list[str]:
        """The labels, those of the concepts in front."""
        return sorted(labels, key=lambda label: label not in self.forgotten)

    def numbers(self) -> list[tuple[str, str]]:
        """Every other number of the run, by dotted name."""
        hidden = ("details", "attacks", "control_attacks", "attack_gaps")  # which the page shows elsewhere
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


def words(value: Any) -> str:
    """A value of the settings as people write it."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def figures(run: RunRecord) -> dict[str, bytes]:
    """Caption -> PNG, drawn from the numbers; the page shows them after what was made."""
    found: dict[str, bytes] = {}
    after = run.shares("after")
    if after:
        found["Recognised images per label, with 95 % intervals"] = label_bars(
            run.shares("before"), after, forgotten=run.forgotten
        )
    if LOSSES in run.pictures:
        found[LOSSES] = run.pictures[LOSSES]
    for gap in run.metrics.get("attack_gaps", []):
        if len(gap.get("marks", {})) > 1:
            caption = f"Images that show {gap['concept']} under {gap['attack']}, the strongest attacker at each step"
            found[caption] = gap_curves(gap["marks"])
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
        (run.name, run.erased, run.drop, run.drop_interval) for run in runs if run.erased and run.drop is not None
    ]
    shown = [
        {
            "run": run,
            "pictures": {caption: as_data_uri(png) for caption, png in run.pictures.items() if caption != LOSSES},
            "figures": {caption: as_data_uri(png) for caption, png in figures(run).items()},
            "manifest": json.dumps(run.manifest, indent=2, ensure_ascii=False),
        }
        for run in runs
    ]
    picture = as_data_uri(trade_off(points)) if len(points) > 1 else None
    return environment.get_template("report.html").render(shown=shown, trade_off=picture, most_drifted=MOST_DRIFTED)


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
