"""Unlearning a diffusion model, from its data to trained weights; the scripts do what lies around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from barrier_diffusers.data.concepts import ConceptData
from barrier_diffusers.data.encoding import NoisedBatches, encode_prompts
from barrier_diffusers.models.architectures import get_architecture
from barrier_diffusers.models.denoiser import Denoiser, PipelineDenoiser
from barrier_diffusers.models.partial_sampler import PartialSampler, SampledBatches, Share
from barrier_diffusers.objectives import DiffusionStep, Objective, ObjectiveConfig, PromptEdit
from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.targets import ProtectedMap, matches
from barrier_diffusers.training.relearner import Relearner
from barrier_diffusers.training.robust import RobustTerms, mix_in_fresh
from barrier_diffusers.training.run_config import DiffusionUnlearningConfig
from barrier_diffusers.training.saliency import SaliencyMask, saliency_scores
from barrier_diffusers.training.settled import ErasureGauge
from barrier_diffusers.training.steps import FrozenReference, StepMaker, compiled, freeze_normalisation
from barrier_diffusers.training.token_adversary import TokenAdversary, Vocabulary
from barrier_diffusers.training.trainer import Trainer, share_random_state

MakeStep = Callable[[dict[str, Any]], DiffusionStep]


class ForgetAndRetain(Protocol):
    """Data sets of rows as `EncodedImages` has them; retain is None where nothing needs it."""

    @property
    def forget(self) -> Any: ...

    @property
    def retain(self) -> Any: ...


def every_row(images: Any, batch_size: int, accelerator: Accelerator) -> Iterator[tuple[dict[str, Any], Share]]:
    """One pass over all rows, in order, on the device, each batch with this process's share of it.

    Args:
        batch_size: rows of all processes together.
    """
    for batch in DataLoader(images, batch_size=batch_size):
        share = Share.of(len(batch["index"]), accelerator.process_index, accelerator.num_processes)
        yield send_to_device(batch, accelerator.device), share


def shuffled_batches(images: Any, batch_size: int, seed: int, num_processes: int) -> DataLoader:
    """Batches of cached images, in an order that depends on the seed alone."""
    size = min(batch_size, len(images) // num_processes)
    if size == 0:
        raise ValueError(f"{len(images)} images cannot be shared between {num_processes} processes: use fewer")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(images, batch_size=size, shuffle=True, drop_last=True, generator=generator)


def rates_of_maps(maps: Sequence[ProtectedMap], learning_rates: Mapping[str, float]) -> dict[str, float]:
    """Map name -> its own learning rate, of the maps that have one.

    Args:
        learning_rates: target, named as in `BarrierConfig.targets`, -> learning rate.

    Raises:
        ValueError: a target that names no trained map, or two that name the same one.
    """
    rates: dict[str, float] = {}
    for target, rate in learning_rates.items():
        named = [linear_map.name for linear_map in maps if matches(linear_map, target)]
        if not named:
            trained = ", ".join(dict.fromkeys(linear_map.name.rpartition(".")[2] for linear_map in maps))
            raise ValueError(f"learning_rates names {target!r}, but no target of that name trains; there is {trained}")
        twice = [name for name in named if name in rates]
        if twice:
            raise ValueError(f"learning_rates gives {twice[0]} two learning rates: name each map once")
        rates |= dict.fromkeys(named, rate)
    return rates


def adamw(use_8bit: bool) -> Any:
    """torch's AdamW, or bitsandbytes' with a state of 8 bits for each number of a larger tensor."""
    if not use_8bit:
        return torch.optim.AdamW
    import bitsandbytes  # an extra

    return bitsandbytes.optim.AdamW8bit


def parameter_groups(
    barrier: Barrier, learning_rate: float, learning_rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The trained parameters by learning rate, in the form a torch optimizer takes; see `rates_of_maps`."""
    rates = rates_of_maps(barrier.maps, learning_rates)
    groups: dict[float, list[Any]] = {}
    for linear_map in barrier.maps:
        rate = rates.get(linear_map.name, learning_rate)
        groups.setdefault(rate, []).extend(barrier.trainable_of(linear_map))
    groups.setdefault(learning_rate, []).extend(barrier.rest().values())
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


@torch.no_grad()
def text_inputs(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """What the maps that read the prompt alone get for each prompt (P, L, D), padding included, on the CPU."""
    row = get_architecture(type(pipeline).__name__)
    network = getattr(pipeline, row.denoiser)
    condition = encode_prompts(pipeline, prompts)
    device, half = network.device, network.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(device.type, network.dtype if half else torch.bfloat16, enabled=half):
        read = row.prompt_input(network, {name: value.to(device) for name, value in condition.items()})
    return read.float().cpu()


def prompt_inputs(targets: Sequence[str], pipeline: Any, prompts: Sequence[str]) -> dict[str, list[Tensor]]:
    """What reaches these targets on the prompts, in the form `Barrier.setup_protection` takes."""
    embeddings = list(text_inputs(pipeline, prompts).split(64))
    return {target: embeddings for target in targets}


def apply_edit(
    objective: Objective, options: ObjectiveConfig, barrier: Barrier, pipeline: Any, concepts: ConceptData, seed: int
) -> None:
    """Run a closed-form objective on the captions of the forget rows, their anchors and the retain captions."""
    assert objective.edit is not None
    forget, retain = (list(rows[concepts.config.caption_column]) for rows in (concepts.forget, concepts.retain))
    anchors = concepts.anchors(options.anchor, options.anchor_prompt, seed) if objective.needs_anchor else forget
    tokenizer = pipeline.tokenizer

    def tokenize(prompt: str) -> list[int]:
        if hasattr(pipeline, "maybe_convert_prompt"):  # a textual inversion of several vectors is several tokens
            prompt = pipeline.maybe_convert_prompt(prompt, tokenizer)
        return tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids

    objective.edit(
        PromptEdit(
            maps=barrier.maps,
            pairs=list(zip(forget, anchors, strict=True)),
            preserve=retain,
            tokenize=tokenize,
            embed=lambda prompts: text_inputs(pipeline, prompts),
            options=options,
        )
    )


@dataclass
class UnlearningTerms:
    """Where the parts of the loss come from; `retain` and `barrier` are None where they play no part.

    The protection loss depends on no batch: it is computed in the last micro-step of a step, as many times as heavy.
    """

    objective: Objective
    make_step: MakeStep
    forget: Iterator[dict[str, Any]]  # batches for ever
    robust: RobustTerms | None = None
    alpha: float = 0.0  # weight of the retain loss
    distilled: bool = False  # the retain loss compares with the frozen model
    make_retain_step: MakeStep | None = None
    retain: Iterator[dict[str, Any]] | None = None
    barrier: Barrier | None = None
    micro_steps: int = 1  # of a step
    _calls: int = field(default=0, init=False)

    @property
    def names(self) -> list[str]:
        """Of the parts."""
        return ["objective", "retain", "protection", *(self.robust.names if self.robust else [])]

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The parts for the next batches, with gradient.

        Args:
            step: number of steps done; only the robust parts heed it.
        """
        if self.robust is None:
            terms = {"objective": self.objective.loss_of(self.make_step(next(self.forget)))}
        else:
            number = step * self.micro_steps + self._calls % self.micro_steps
            made = self.make_step(self.robust.named(next(self.forget), step, number))
            terms = self.robust(made, step, number)
        if self.retain is not None and self.make_retain_step is not None:
            kept = self.make_retain_step(next(self.retain))
            terms["retain"] = self.alpha * (kept.distilled_loss() if self.distilled else kept.ordinary_loss())
            terms = self.robust.reconciled(terms) if self.robust is not None else terms
        self._calls += 1
        if self.barrier is not None and self._calls % self.micro_steps == 0:
            terms["protection"] = self.micro_steps * self.barrier.compute_protection_loss()
        return terms


class Unlearner:
    """Protects a diffusion model, then makes it forget: `protect`, then `train`.

    Args:
        trainer: of the run, with settings for unlearning; a checkpoint that it found is gone on from.
        barrier: of the denoiser's network, with nothing fitted yet.
        resolution: side of the images in pixels.
        vocabulary: what robust.token_rounds learns new names in; needed with them alone.

    Attributes:
        barrier: the fitted one; in a resumed run another than was given.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        objective: Objective,
        barrier: Barrier,
        denoiser: Denoiser,
        resolution: int,
        vocabulary: Vocabulary | None = None,
    ):
        self.trainer, self.accelerator = trainer, trainer.accelerator
        self.config = cast(DiffusionUnlearningConfig, trainer.config)
        self.objective, self.barrier, self.denoiser = objective, barrier, denoiser
        self.vocabulary = vocabulary
        self.sampler: PartialSampler | None = None  # of the model's own x_t, for an objective that trains on them
        self.reference: FrozenReference | None = None  # the model as it is now, for an objective that reads it
        options = self.config.objective
        if objective.samples_from_model:
            shape = denoiser.latent_shape(resolution)
            self.sampler = PartialSampler(denoiser, shape, options.guidance_scale, options.num_inference_steps)
        if objective.reads_reference(options) or options.retain_target == "base":
            self.reference = FrozenReference(barrier.model, barrier.trainable_parameters())
        self.seconds_setup = 0.0

    def protect(self, data: ForgetAndRetain, retain_inputs: Mapping[str, list[Tensor]] | None = None) -> None:
        """Fit the barrier on the forget inputs (and the retain inputs, where the options ask for them), or load the
        checkpoint's; nothing to do where nothing is protected.

        The x_t are of the kind that the objective trains on: noised images, or the model's own samples.

        Args:
            retain_inputs: as `Barrier.setup_protection` takes them.
        """
        start = time.perf_counter()
        if self.config.protected and self.trainer.checkpoint:
            self.barrier.remove()
            folder, trained = self.trainer.checkpoint / "barrier", self.config.trained_weights
            self.barrier = Barrier.from_pretrained(folder, self.barrier.model, trained)
        elif self.config.protected:
            self._fit_barrier(data, dict(retain_inputs or {}))
        self.seconds_setup = time.perf_counter() - start

    def _fit_barrier(self, data: ForgetAndRetain, retain_inputs: dict[str, list[Tensor]]) -> None:
        config = self.config
        retain = data.retain if config.barrier.needs_retain_data else None
        if retain is not None and set(retain_inputs) == set(config.barrier.targets or []):
            retain = None
        with self.accelerator.autocast():
            self.barrier.setup_protection(
                self._recorded(data.forget, config.seed) if config.barrier.has_penalty else None,
                self.denoiser.predict_batch,
                retain_loader=self._recorded(retain, config.seed + 1) if retain is not None else None,
                retain_inputs=retain_inputs,
            )

    def _recorded(self, images: Any, seed: int) -> NoisedBatches | SampledBatches:
        """Re-iterable batches of x_t of this process's share of the rows."""
        accelerator, batch_size = self.accelerator, self.config.train_batch_size
        if self.sampler is not None:  # small batches, as each has one timestep
            rows = every_row(images, min(batch_size * accelerator.num_processes, 8), accelerator)
            share_random_state(accelerator)
            return SampledBatches(rows, self.sampler, accelerator.device)
        return NoisedBatches(
            images,
            self.denoiser,
            batch_size=batch_size * accelerator.num_processes,
            seed=seed,
            device=accelerator.device,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    def train(self, data: ForgetAndRetain, validate: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Train to the end: `history`, `num_steps`, `seconds_training` and `seconds_setup`.

        Args:
            validate: draws the validation prompts after so many steps; called in every process.

        Raises:
            FloatingPointError: a loss or the weights became non-finite.
            SystemExit: a signal came; a whole checkpoint was written.
        """
        config, trainer, accelerator, barrier = self.config, self.trainer, self.accelerator, self.barrier
        network, options = barrier.model, config.objective
        robust, gauge = self._robust_terms(data.forget), self._gauge(data.forget)
        if config.robust.fresh_share and trainer.checkpoint is None:
            mix_in_fresh(network, barrier.trainable_parameters(), config.robust.fresh_share, config.seed)
        groups = parameter_groups(barrier, config.learning_rate, config.learning_rates)
        optimizer: Any = adamw(config.use_8bit_adam)(groups, weight_decay=config.adam_weight_decay)
        mask = self._attach_mask(optimizer, data.forget) if config.saliency_mask is not None else None
        loaders = [shuffled_batches(data.forget, config.train_batch_size, config.seed, accelerator.num_processes)]
        if options.alpha > 0 and data.retain:
            size, seed = config.train_batch_size, config.seed + 1
            loaders.append(shuffled_batches(data.retain, size, seed, accelerator.num_processes))
        share_random_state(accelerator)
        forget, *retain = trainer.prepare(
            models=[network],
            parameters=barrier.trainable_parameters(),
            optimizer=optimizer,
            loaders=loaders,
            extra_steps=config.robust.extra_steps,
        )
        model, share, own_steps = trainer.models[0], self._share, trainer.max_steps - config.robust.extra_steps
        config.robust.check_rounds(own_steps)
        terms = UnlearningTerms(
            self.objective,
            StepMaker(
                model,
                self.denoiser,
                options=options,
                reference=self.reference,
                sampler=self.sampler,
                share=share,
            ),
            forget=forget,
            alpha=options.alpha,
            robust=robust,
            distilled=options.retain_target == "base",
            make_retain_step=StepMaker(model, self.denoiser, reference=self.reference, share=share),
            retain=retain[0] if retain else None,
            barrier=barrier if config.protected else None,
            micro_steps=config.gradient_accumulation_steps,
        )

        def after_step(step: int) -> None:
            due = config.validation_prompt and step % config.validation_steps == 0
            if validate is not None and due:
                network.eval()
                validate(step)
                freeze_normalisation(model)

        adversary = robust.adversary if robust is not None else None

        def is_done(step: int) -> bool:
            """Whether everything is erased after the run's own steps, looked at every so many."""
            if gauge is None or step < own_steps or (step - own_steps) % config.robust.token_interval:
                return False
            with accelerator.autocast():
                erased = torch.tensor(float(gauge.is_erased(adversary)), device=accelerator.device)
            return bool(accelerator.reduce(erased, "mean") == 1)

        freeze_normalisation(model)
        with compiled(network, config.compile_backend if config.compile else None):
            seconds = trainer.fit(
                terms,
                barrier=terms.barrier,
                after_step=after_step,
                names=terms.names,
                is_done=is_done if config.robust.extra_steps else None,
            )
        if mask is not None:
            mask.detach()
        erased: dict[str, Any] = {}
        if gauge is not None:
            with accelerator.autocast():
                erased["erased"] = gauge.result(adversary, warn=accelerator.is_main_process)
        return {
            **erased,
            "history": trainer.history.values,
            "num_steps": trainer.max_steps,
            "seconds_training": seconds,
            "seconds_setup": round(self.seconds_setup, 2),
        }

    @property
    def _share(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def _robust_terms(self, forget: Any) -> RobustTerms | None:
        """What the settings ask for beyond the objective; None if that is nothing. Its state travels along."""
        config, robust, network = self.config, self.config.robust, self.barrier.model
        if not robust.parts:
            return None
        adversary = relearner = None
        if robust.token_rounds:
            assert self.vocabulary is not None
            adversary = TokenAdversary(
                robust, self.vocabulary, seed=config.seed, share=self._share, device=self.accelerator.device
            )
            self.trainer.checkpoints.states["token_adversary"] = adversary
        parameters = self.barrier.trainable_parameters()
        if robust.learns_images:
            relearner = Relearner(
                robust,
                self.denoiser,
                network,
                parameters=parameters,
                images=forget,
                seed=config.seed,
                adversary=adversary,
            )
            if robust.has_lives:
                self.trainer.checkpoints.states["relearner"] = relearner
        several = self.accelerator.num_processes > 1
        return RobustTerms(
            robust,
            self.objective,
            predict=partial(self.denoiser.predict, network),
            parameters=parameters,
            relearner=relearner,
            adversary=adversary,
            mean=partial(self.accelerator.reduce, reduction="mean") if several else None,
        )

    def _gauge(self, forget: Any) -> ErasureGauge | None:
        """What tells whether training has erased, with the loss before it; None without any part that asks for it."""
        config = self.config
        if not config.robust.parts and not config.robust.extra_steps:
            return None
        maker = StepMaker(
            self.barrier.model, self.denoiser, options=config.objective, reference=self.reference, sampler=self.sampler
        )
        gauge = ErasureGauge(self.objective, maker, forget, device=self.accelerator.device, seed=config.seed)
        if self.trainer.checkpoint is None:
            with self.accelerator.autocast():
                gauge.measure_before()
        self.trainer.checkpoints.states["erasure_gauge"] = gauge
        return gauge

    def _attach_mask(self, optimizer: Any, forget: Any) -> SaliencyMask:
        """Let only the share `saliency_mask` of the trained entries move; a checkpoint has the mask itself."""
        accelerator, barrier, fraction = self.accelerator, self.barrier, self.config.saliency_mask
        assert fraction is not None
        mask = SaliencyMask(barrier.trainable_parameters())
        make_step, num_processes = StepMaker(barrier.model, self.denoiser), accelerator.num_processes

        def steps() -> Iterator[DiffusionStep]:
            for batch, share in every_row(forget, self.config.train_batch_size * num_processes, accelerator):
                step = make_step.of_share(batch, share)
                if not share.is_empty:
                    yield step

        if self.trainer.checkpoint is None:
            share_random_state(accelerator)
            with accelerator.autocast():
                scores = saliency_scores(barrier.maps, barrier.trainable_parameters(), steps, accelerator.reduce)
            mask.choose(scores, fraction)
        mask.attach(optimizer)
        self.trainer.checkpoints.states["saliency_mask"] = mask
        return mask
