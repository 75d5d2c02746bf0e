"""What a script prepares for an objective beyond its batches, and only where the objective needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from barrier_diffusers.data.concepts import ConceptData
from barrier_diffusers.data.encoding import NoisedBatches, encode_prompts
from barrier_diffusers.models.denoiser import Denoiser, PipelineDenoiser
from barrier_diffusers.models.partial_sampler import PartialSampler, SampledBatches
from barrier_diffusers.objectives import DiffusionStep, Objective, ObjectiveConfig, PromptEdit
from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.targets import ProtectedMap, matches
from barrier_diffusers.training.reference import FrozenReference
from barrier_diffusers.training.saliency import SaliencyMask, saliency_scores
from barrier_diffusers.training.steps import StepMaker


class RunSettings(Protocol):
    """What is read here of a run's settings."""

    seed: int
    train_batch_size: int
    barrier: BarrierConfig


class ForgetAndRetain(Protocol):
    """Data sets of rows as `EncodedImages` has them; retain is None where nothing needs it."""

    @property
    def forget(self) -> Any: ...

    @property
    def retain(self) -> Any: ...


def every_row(images: Any, batch_size: int, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """One pass over this process's share of the rows, in order, on the device."""
    rows = range(accelerator.process_index, len(images), accelerator.num_processes)
    for batch in DataLoader(Subset(images, rows), batch_size=batch_size):
        yield send_to_device(batch, accelerator.device)


def batches(images: Any, config: RunSettings, seed: int, num_processes: int) -> DataLoader:
    """Shuffled batches of cached images, in an order that depends on the seed alone."""
    size = min(config.train_batch_size, len(images) // num_processes)
    if size == 0:
        raise ValueError(f"{len(images)} images cannot be shared between {num_processes} processes: use fewer")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(images, batch_size=size, shuffle=True, drop_last=True, generator=generator)


def set_up_protection(
    barrier: Barrier,
    accelerator: Accelerator,
    config: RunSettings,
    denoiser: Denoiser,
    data: ForgetAndRetain,
    sampler: PartialSampler | None,
    retain_inputs: dict[str, list[Tensor]],
) -> None:
    """Record the forget inputs (and the retain inputs, where the options ask for them).

    The x_t are of the kind that the objective trains on: noised images, or with `sampler` the model's own samples.
    """

    def loader(images: Any, seed: int) -> NoisedBatches | SampledBatches:
        if sampler is not None:  # small batches, as each has one timestep
            rows = every_row(images, min(config.train_batch_size, 8), accelerator)
            return SampledBatches(rows, sampler, accelerator.device)
        share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        size = config.train_batch_size * accelerator.num_processes
        return NoisedBatches(images, denoiser, size, seed, accelerator.device, **share)

    forget, retain = data.forget, data.retain if config.barrier.needs_retain_data else None
    if retain is not None and set(retain_inputs) == set(config.barrier.targets or []):
        retain = None
    with accelerator.autocast():
        barrier.setup_protection(
            loader(forget, config.seed) if config.barrier.has_penalty else None,
            denoiser.predict_batch,
            loader(retain, config.seed + 1) if retain is not None else None,
            retain_inputs,
        )


def sampler_and_reference(
    objective: Objective, options: ObjectiveConfig, barrier: Barrier, denoiser: Denoiser, resolution: int
) -> tuple[PartialSampler | None, FrozenReference | None]:
    """The model's own sampling process and the model as it is now, each None if the objective does not need it."""
    sampler = reference = None
    if objective.samples_from_model:
        shape = denoiser.latent_shape(resolution)
        sampler = PartialSampler(denoiser, shape, options.guidance_scale, options.num_inference_steps)
    if "reference" in objective.needs:
        reference = FrozenReference(barrier.model, barrier.trainable_parameters())
    return sampler, reference


def rates_of_maps(maps: Sequence[ProtectedMap], learning_rates: Mapping[str, float]) -> dict[str, float]:
    """Map name -> its own learning rate, of the maps that have one.

    Args:
        learning_rates: target, named as in `BarrierConfig.targets`, -> learning rate.

    Raises:
        ValueError: a target that names no trained map, or two that name the same one.
    """
    rates: dict[str, float] = {}
    for target, rate in learning_rates.items():
        named = [entry.name for entry in maps if matches(entry, target)]
        if not named:
            trained = ", ".join(dict.fromkeys(entry.name.rpartition(".")[2] for entry in maps))
            raise ValueError(f"learning_rates names {target!r}, but no target of that name trains; there is {trained}")
        twice = [name for name in named if name in rates]
        if twice:
            raise ValueError(f"learning_rates gives {twice[0]} two learning rates: name each map once")
        rates |= dict.fromkeys(named, rate)
    return rates


def parameter_groups(
    barrier: Barrier, learning_rate: float, learning_rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The trained parameters by learning rate, in the form a torch optimizer takes; see `rates_of_maps`."""
    rates = rates_of_maps(barrier.maps, learning_rates)
    groups: dict[float, list[Any]] = {}
    for entry in barrier.maps:
        groups.setdefault(rates.get(entry.name, learning_rate), []).extend(barrier.trainable_of(entry))
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]


def maps_of_prompts(config: Any, denoiser: PipelineDenoiser) -> list[str]:
    """The targets whose retain inputs are the text embeddings of the retain prompts; none unless the settings say so.

    Raises:
        ValueError: no target reads the prompt and nothing else.
    """
    if config.retain_statistics != "prompts":
        return []
    reads = denoiser.architecture.targets
    targets = [target for target in config.barrier.targets or [] if reads.get(target) == "prompt"]
    if not targets:
        known = ", ".join(target for target, what in reads.items() if what == "prompt") or "none in this architecture"
        raise ValueError(f"retain_statistics='prompts' is for maps that read the prompt alone ({known})")
    return targets


def prompt_inputs(targets: Sequence[str], pipeline: Any, prompts: Sequence[str]) -> dict[str, list[Tensor]]:
    """What reaches these targets on the prompts, padding included, in the form `Barrier.setup_protection` takes."""
    embeddings = list(encode_prompts(pipeline, prompts)["encoder_hidden_states"].split(64))
    return {target: embeddings for target in targets}


def attach_saliency_mask(
    fraction: float,
    barrier: Barrier,
    optimizer: Any,
    make_step: StepMaker,
    forget: Any,
    batch_size: int,
    accelerator: Accelerator,
    resumed: bool,
) -> SaliencyMask:
    """Let only the top `fraction` of the trained entries move; a resumed run takes the mask from its checkpoint."""
    mask = SaliencyMask(barrier.trainable_parameters())

    def steps() -> Iterator[DiffusionStep]:
        return (make_step(batch) for batch in every_row(forget, batch_size, accelerator))

    if not resumed:
        with accelerator.autocast():
            mask.choose(saliency_scores(barrier.maps, steps, accelerator.reduce), fraction)
    mask.attach(optimizer)
    return mask


def apply_edit(
    objective: Objective, options: ObjectiveConfig, barrier: Barrier, pipeline: Any, concepts: ConceptData, seed: int
) -> None:
    """Run a closed-form objective on the captions of the forget rows, their anchors and the retain captions."""
    assert objective.edit is not None
    forget, retain = (list(rows[concepts.config.caption_column]) for rows in (concepts.forget, concepts.retain))
    anchors = concepts.anchors(options.anchor, options.anchor_prompt, seed) if objective.needs_anchor else forget
    tokenizer = pipeline.tokenizer

    def tokenize(prompt: str) -> list[int]:
        return tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids

    objective.edit(
        PromptEdit(
            maps=barrier.maps,
            pairs=list(zip(forget, anchors, strict=True)),
            preserve=retain,
            tokenize=tokenize,
            embed=lambda prompts: encode_prompts(pipeline, prompts)["encoder_hidden_states"],
            options=options,
        )
    )
