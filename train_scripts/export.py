"""Files for other programs (A1111, ComfyUI) of an unlearning run that is there, of a Stable Diffusion 1.x, 2.x or
SDXL.

    python train_scripts/export.py --unlearned_model runs/fashion_class --output_dir runs/fashion_class_exported

A pipeline folder becomes one checkpoint in the layout of its first release, an adapter a file in kohya's names.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

import json
from dataclasses import dataclass
from pathlib import Path

from barrier_diffusers.models.architectures import Architecture
from barrier_diffusers.models.exporting import export_kohya, export_single_file, exported_path, require_layout, row_of
from barrier_diffusers.models.loading import ADAPTER_NAME, load_pipeline
from barrier_diffusers.utils.checks import FOLDER, OUTPUT, rules
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import MANIFEST_NAME


@dataclass
class ExportConfig:
    """What is exported, and where the file goes."""

    unlearned_model: str  # folder of a pipeline (any saved by diffusers), or of an adapter that unlearn_sd.py left
    output_dir: str  # gets exported/NAME.safetensors, or exported/NAME_lora.safetensors
    overwrite_output_dir: bool = False  # an earlier result in output_dir goes when this one is there

    RULES = rules(unlearned_model=FOLDER, output_dir=OUTPUT)

    def check_inputs(self) -> None:
        """A ValueError for a folder that holds neither, or of a class that others read as diffusers saves it."""
        require_layout(self.row(), f"unlearned_model {self.unlearned_model!r}")

    @property
    def folder(self) -> Path:
        """Of what is exported."""
        return Path(self.unlearned_model).expanduser()

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter instead of a pipeline."""
        return (self.folder / ADAPTER_NAME).is_file()

    @property
    def target(self) -> Path:
        """The file that is written."""
        return exported_path(Path(self.output_dir), self.folder, "kohya" if self.is_adapter else "single_file")

    @property
    def announcement(self) -> str:
        """What is about to be done, in one line."""
        kind = "the adapter" if self.is_adapter else "the pipeline"
        return f"exporting {kind} in {self.unlearned_model} to {self.target}"

    def row(self) -> Architecture:
        """The row of the pipeline, or of the one that the adapter was trained on.

        Raises:
            ValueError: the folder holds neither, or does not say what the adapter is for.
        """
        if not self.is_adapter:
            if not (self.folder / "model_index.json").is_file():
                raise ValueError(
                    f"unlearned_model {self.unlearned_model!r} holds neither model_index.json nor {ADAPTER_NAME}"
                )
            return row_of(str(self.folder))
        try:
            settings = json.loads((self.folder / MANIFEST_NAME).read_text(encoding="utf-8"))["settings"]
            base = settings.get("pipeline_config") or settings["pretrained_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"unlearned_model {self.unlearned_model!r} holds an adapter, but its {MANIFEST_NAME} does not say "
                "of which pipeline"
            ) from error
        return row_of(base, settings.get("revision"))


@in_output_folder()
def main(config: ExportConfig) -> None:
    """Load -> rename -> save."""
    if config.is_adapter:
        path = export_kohya(config.row(), config.folder, config.target)
    else:
        path = export_single_file(load_pipeline(config.unlearned_model), config.target)
    print(f"exported: {path}")


def command() -> None:
    """The console command barrier-export."""
    run_script(main, ExportConfig)


if __name__ == "__main__":
    command()
