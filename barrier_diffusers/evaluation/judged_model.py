"""What is judged: a pipeline, and the one it came from, or folders of images that were made earlier."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from barrier_diffusers.data.images import ImageFiles
from barrier_diffusers.data.prompt_files import PromptRow, PromptsConfig, read_prompts
from barrier_diffusers.evaluation.image_folder import generate_folder, read_folder, scheduler_facts
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.loading import ADAPTER_NAME, SINGLE_FILES, load_merged, load_pipeline, module_hashes
from barrier_diffusers.utils.files import file_hash
from barrier_diffusers.utils.run_records import FILES, MANIFEST_NAME

if TYPE_CHECKING:
    from barrier_diffusers.evaluation.settings import EvaluateConfig

IMAGES_NAME, SECONDS_NAME, PICTURE_NAME = "images", "seconds.json", "attacks.png"
BASE_PREFIX, CONTROL_PREFIX = "base_", "control_"  # of the names of their weights' hashes


@dataclass(frozen=True)
class ImagePair:
    """Images of the same prompts and seeds, in the same order."""

    before: ImageFiles | None  # None: nobody knows
    after: ImageFiles

    def items(self) -> list[tuple[str, ImageFiles]]:
        """("before", images) where there are such, and ("after", images)."""
        return ([("before", self.before)] if self.before is not None else []) + [("after", self.after)]


def load_judged(config: EvaluateConfig) -> Any:
    """The pipeline under judgement, its adapter merged into the weights; None where images are judged."""
    if config.pretrained_model_name_or_path is None:
        return None
    return load_merged(*source_of_judged(config))


def source_of_judged(config: EvaluateConfig) -> tuple[str, str | None, str | None]:
    """(pipeline, adapter, pipeline with the configurations) of what is judged: a single file has those of its base."""
    name = config.pretrained_model_name_or_path
    assert name is not None
    single = Path(name).suffix in SINGLE_FILES and Path(config.base_model or "").suffix not in SINGLE_FILES
    return name, config.lora_weights, config.base_model if single else None


NOT_ITSELF = {  # setting -> what is wrong with naming what is judged there, and what to do
    "base_model": "so before and after are the same: name the pipeline before it was unlearned, or set it to null",
    "control": "so no attack could tell them apart: name a model that was trained without the concept",
}


def require_another(
    setting: Literal["base_model", "control"],
    where: str | None,
    *,
    judged: Mapping[str, str],
    named: Mapping[str, str],
) -> None:
    """Refuse a base or a control that is what is judged.

    Args:
        where: value of the setting.
        judged, named: hashes of the weights, by network, of what is judged and of what the setting names.

    Raises:
        ValueError: the weights are the same.
    """
    if judged == named:
        raise ValueError(f"{setting} {where!r} has the weights of what is judged, {NOT_ITSELF[setting]}")


def require_alike(where: str | None, *, judged: nn.Module, control: nn.Module) -> None:
    """Refuse a control that cannot have been trained as what is judged was.

    Args:
        where: value of the setting.
        judged, control: the denoisers.

    Raises:
        ValueError: they are of another class, or have weights of other names or shapes.
    """
    one, other = ({name: value.shape for name, value in network.state_dict().items()} for network in (judged, control))
    if type(judged) is not type(control) or one != other:
        raise ValueError(
            f"control {where!r} has a {type(control).__name__} of another kind or size than the "
            f"{type(judged).__name__} that is judged: name a model that was trained as it was without the concept"
        )


class JudgedModel:
    """Gives every protocol the images of its prompts.

    Args:
        config: names the pipelines or the folders of images.
        output: `output/images/<protocol>/before` and `after` get the images that are made.

    Attributes:
        pipeline: what is judged, or None.
        hashes: of the weights, by network (those of the base start with `base_`, those of the control with
            `control_`), or of the images.
        facts: the scheduler, or how the images were made.
        resolution: side in pixels at which attacks and the certificate read images; 0 where images are judged.

    Raises:
        ValueError, OSError: a pipeline that cannot be had, or one that is its own base.
    """

    def __init__(self, config: EvaluateConfig, output: Path):
        self.config, self.output = config, output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline = load_judged(config)
        self.hashes: dict[str, str] = {}
        self.resolution = 0
        self.facts: dict[str, Any] = {}
        if config.lora_weights:
            self.hashes["adapter"] = file_hash(Path(config.lora_weights) / ADAPTER_NAME)
        if config.images_dir and (Path(config.images_dir) / MANIFEST_NAME).is_file():
            made_from = (Path(config.images_dir) / MANIFEST_NAME).read_text(encoding="utf-8")
            facts = json.loads(made_from)
            self.facts["images_made_from"] = {name: value for name, value in facts.items() if name != FILES}
        own: dict[str, str] = {}
        if self.pipeline is not None:
            self.facts["scheduler"] = scheduler_facts(self.pipeline)
            self.resolution = PipelineDenoiser(self.pipeline).checked_resolution(config.resolution)
            own = module_hashes(self.pipeline)
            self.hashes |= own
        self.control = load_merged(config.control) if config.control else None
        if self.control is not None:
            control = module_hashes(self.control)
            require_another("control", config.control, judged=own, named=control)
            networks = [PipelineDenoiser(pipeline).network for pipeline in (self.pipeline, self.control)]
            require_alike(config.control, judged=networks[0], control=networks[1])
            self.hashes |= {f"{CONTROL_PREFIX}{name}": digest for name, digest in control.items()}
        self.base = load_pipeline(config.base_model) if config.base_model else None
        if self.base is not None:
            base = module_hashes(self.base)
            require_another("base_model", config.base_model, judged=own, named=base)
            self.hashes |= {f"{BASE_PREFIX}{name}": digest for name, digest in base.items()}

    def rows(self, prompts: PromptsConfig, label_column: str = "label") -> list[PromptRow]:
        """The prompts of a file, or of the images that are judged.

        Raises:
            ValueError: a file that cannot be read, or images that do not fit it.
        """
        if self.config.images_dir is not None:
            return self._read(self.config.images_dir, prompts, label_column=label_column)[0]
        assert prompts.file is not None
        return read_prompts(prompts.file, self.config.evaluation.sampling.seed, label_column=label_column)

    def images(self, protocol: str, rows: Sequence[PromptRow], prompts: PromptsConfig) -> ImagePair:
        """The images of the prompts, made now, or read where they were made earlier.

        Raises:
            ValueError: images that do not fit the prompts, or a folder that was made from something else.
        """
        config = self.config
        if config.images_dir is not None:
            before = None
            if config.base_images_dir is not None:
                earlier, before = self._read(config.base_images_dir, prompts, label_column="label")
                if [(row.case, row.prompt) for row in earlier] != [(row.case, row.prompt) for row in rows]:
                    raise ValueError(f"base_images_dir {config.base_images_dir!r} has other prompts than images_dir")
                self.hashes["base_images"] = before.digest()
            after = self._read(config.images_dir, prompts, label_column="label")[1]
            self.hashes["images"] = after.digest()
            if self.hashes["images"] == self.hashes.get("base_images"):
                raise ValueError(f"base_images_dir {config.base_images_dir!r} holds images_dir's own images")
            return ImagePair(before, after)
        own, base = self.hashes_of(""), self.hashes_of(BASE_PREFIX)
        before = (
            self._generate(self.base, protocol, when="before", rows=rows, prompts=prompts, hashes=base)
            if self.base is not None
            else None
        )
        return ImagePair(
            before, self._generate(self.pipeline, protocol, when="after", rows=rows, prompts=prompts, hashes=own)
        )

    def hashes_of(self, prefix: str) -> dict[str, str]:
        """Hashes of one model's weights, by network: of the base ("base_"), of the control, or ("") of what is
        judged."""
        others = [name for name in (BASE_PREFIX, CONTROL_PREFIX) if name != prefix]
        mine = {name: digest for name, digest in self.hashes.items() if not name.startswith(tuple(others))}
        return {name.removeprefix(prefix): digest for name, digest in mine.items() if name.startswith(prefix)}

    def control_images(self, protocol: str, rows: Sequence[PromptRow], prompts: PromptsConfig) -> ImageFiles:
        """Images of the prompts by the control, which there must be."""
        hashes = self.hashes_of(CONTROL_PREFIX)
        return self._generate(self.control, protocol, when="control", rows=rows, prompts=prompts, hashes=hashes)

    @property
    def pipelines(self) -> dict[str, Any]:
        """The pipelines, "before" (if known) and "after"."""
        return ({"before": self.base} if self.base is not None else {}) | {"after": self.pipeline}

    def _read(self, folder: str, prompts: PromptsConfig, label_column: str) -> tuple[list[PromptRow], ImageFiles]:
        return read_folder(
            folder, prompts.file, images_per_prompt=prompts.images_per_prompt, label_column=label_column
        )

    def _generate(
        self,
        pipeline: Any,
        protocol: str,
        when: str,
        rows: Sequence[PromptRow],
        prompts: PromptsConfig,
        hashes: dict[str, str],
    ) -> ImageFiles:
        images = generate_folder(
            pipeline.to(self.device),
            rows,
            sampling=self.config.evaluation.sampling,
            folder=self.output / IMAGES_NAME / protocol / when,
            hashes=hashes,
            images_per_prompt=prompts.images_per_prompt,
            overwrite=self.config.overwrite_output_dir,
        )
        pipeline.to("cpu")  # room for the other one, and for the networks that judge
        return images
