"""Sample labels of a class-conditional DDPM into a folder of PNG files.

    python -m ddpm_ext.sample --pretrained_model_name_or_path assets/fashion_ddpm --labels '[sneaker, bag]' \\
        --output_dir runs/samples
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image

from barrier_diffusers.models.generation import generate
from barrier_diffusers.utils.checks import FOLDER, OUTPUT, Checked, at_least, rules
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import file_names, written_whole
from barrier_diffusers.utils.output_folder import in_output_folder
from ddpm_ext.loading import load_pipeline
from ddpm_ext.settings import LabelSamplingConfig

SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


@dataclass(kw_only=True)
class SampleConfig(Checked):
    """What is sampled, and how."""

    pretrained_model_name_or_path: str  # folder of a ClassConditionalDDPMPipeline
    output_dir: str  # gets LABEL_I.png, image I of each label
    labels: list[str] = field(default_factory=list)  # none: all
    images_per_label: int = 8  # made for each label
    scheduler: Literal["own", "ddim", "ddpm"] = "own"  # own: the pipeline's; the noise schedule is its own in any case
    overwrite_output_dir: bool = False  # earlier images in output_dir are deleted first
    sampling: LabelSamplingConfig = field(default_factory=LabelSamplingConfig)

    RULES = rules(pretrained_model_name_or_path=FOLDER, output_dir=OUTPUT, images_per_label=at_least(1))


@in_output_folder(also_written=["*_[0-9]*.png"])
def main(config: SampleConfig) -> None:
    """Load -> sample -> write."""
    pipeline = load_pipeline(config.pretrained_model_name_or_path)
    labels = [label for label in config.labels or pipeline.labels for _ in range(config.images_per_label)]
    pipeline.label_ids(labels)  # a wrong one ends here
    if config.scheduler != "own":
        pipeline.scheduler = SCHEDULERS[config.scheduler].from_config(pipeline.scheduler.config)
    output = Path(config.output_dir)
    images = generate(pipeline, labels, config.sampling)
    names = file_names(labels)  # labels are text of the pipeline's maker
    for index, (label, image) in enumerate(zip(labels, images, strict=True)):
        with written_whole(output / f"{names[label]}_{index % config.images_per_label}.png") as temporary:
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, "PNG")
    print(f"{len(images)} images in {output}")


if __name__ == "__main__":
    run_script(main, SampleConfig)
