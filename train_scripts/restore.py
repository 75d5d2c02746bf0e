"""Undo an unlearning run: the pipeline as it was before, from the snapshot of its weights that lies beside the result.

    python train_scripts/restore.py --unlearned_model runs/fashion_class --output_dir runs/fashion_class_restored

The base model itself is not needed. What comes out has the base's weights to the bit, in float32, which is checked
against the hash in manifest.json before anything is written. Further training after the run is undone as well.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barrier_diffusers.models.architectures import get_architecture
from barrier_diffusers.models.loading import ADAPTER_NAME, load_pipeline
from barrier_diffusers.models.publishing import save_pipeline
from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.storage import SNAPSHOT_NAME
from barrier_diffusers.utils.checks import FOLDER, OUTPUT, rules
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import MANIFEST_NAME, module_hash


@dataclass
class RestoreConfig:
    """Which run is undone, and where the pipeline goes."""

    unlearned_model: str  # output folder of unlearn_sd.py
    output_dir: str  # gets the pipeline as it was before that run
    overwrite_output_dir: bool = False  # an earlier result in output_dir goes when this one is there

    RULES = rules(unlearned_model=FOLDER, output_dir=OUTPUT)

    def check_inputs(self) -> None:
        """A ValueError for a folder that is no finished run, or that has nothing to restore from."""
        self.read_manifest()

    @property
    def announcement(self) -> str:
        """What is about to be done, in one line."""
        return f"restoring the pipeline before {self.unlearned_model} in {self.output_dir}"

    def read_manifest(self) -> dict[str, Any]:
        """What the run recorded.

        Raises:
            ValueError: no finished run with a snapshot.
        """
        folder = Path(self.unlearned_model).expanduser()
        if (folder / ADAPTER_NAME).is_file():
            raise ValueError(
                f"unlearned_model {self.unlearned_model!r} holds an adapter beside an untouched base model: load the "
                "base without it"
            )
        try:
            found = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
            found["hashes"]["base_denoiser"]  # noqa: B018
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"unlearned_model {self.unlearned_model!r} is no finished run of unlearn_sd.py: its "
                f"{MANIFEST_NAME} is missing or says nothing of a base model"
            ) from error
        if not (folder / SNAPSHOT_NAME).is_file():
            raise ValueError(
                f"unlearned_model {self.unlearned_model!r} ran without protection and kept no snapshot of the weights "
                f"before: start again from {found['settings'].get('pretrained_model_name_or_path')!r}"
            )
        return found


@in_output_folder()
def main(config: RestoreConfig) -> None:
    """Load -> write the snapshot into the weights -> compare the hash -> save."""
    record = config.read_manifest()
    pipeline = load_pipeline(config.unlearned_model)
    network = getattr(pipeline, get_architecture(type(pipeline).__name__).denoiser)
    trained = record["settings"].get("trained_weights", "targets")
    barrier = Barrier.from_pretrained(Path(config.unlearned_model).expanduser(), network, trained)
    with barrier.snapshot_weights():
        found, wanted = module_hash(network), record["hashes"]["base_denoiser"]
        if found != wanted:
            raise ValueError(
                f"the weights of {config.unlearned_model!r} cannot be restored: with the snapshot their hash is "
                f"{found[:12]}, but the base's was {wanted[:12]}; something beside the protected maps has changed "
                "since, or the base was loaded in another precision"
            )
        save_pipeline(pipeline, Path(config.output_dir))
    print(f"pipeline: {config.output_dir}, the {type(network).__name__} as it was before, to the bit")


def command() -> None:
    """The console command barrier-restore."""
    run_script(main, RestoreConfig)


if __name__ == "__main__":
    command()
