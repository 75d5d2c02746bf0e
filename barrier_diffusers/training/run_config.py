"""The settings that every script that trains has in common; each script's dataclass extends one of these.

Annotations are evaluated at once here: jsonargparse resolves the ones written as text in a subclass's module alone.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from barrier_diffusers.objectives.config import ObjectiveConfig
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.training.robust_config import RobustConfig
from barrier_diffusers.utils.checks import (
    ABOVE_0,
    MODEL,
    OUTPUT,
    SEED,
    Needs,
    OneOf,
    Range,
    Tracker,
    at_least,
    check_settings,
    rules,
)

LR_SCHEDULERS = (  # names of diffusers.optimization, and our own one_cycle
    *("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial", "one_cycle"),
    "piecewise_constant",
)
LEVEL_SCHEDULERS = ("constant", "constant_with_warmup", "piecewise_constant")  # those that ask for no last step


@dataclass(kw_only=True)
class RunConfig:
    """A training run: where its files go, its random numbers, its precision and its checkpoints."""

    output_dir: str  # gets the result
    overwrite_output_dir: bool = False  # an earlier run in output_dir goes when this one has ended well
    seed: int = 0  # of all random numbers
    gradient_accumulation_steps: int = 1  # batches of a step
    max_grad_norm: float | None = 1.0  # longer gradients are cut to this length; None: no clipping
    # of the forward passes; None: what `accelerate launch` or its configuration says
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    report_to: Literal["tensorboard", "wandb", "all", "none"] = "none"  # gets the losses of every step
    checkpointing_steps: int | None = None  # None: a checkpoint only when a signal stops the run
    checkpoints_total_limit: int | None = 2  # so many of the newest are kept; None: all
    resume_from_checkpoint: str | None = None  # a checkpoint's name, or latest

    RULES = rules(
        output_dir=OUTPUT,
        seed=SEED,
        gradient_accumulation_steps=at_least(1),
        max_grad_norm=ABOVE_0,
        report_to=Tracker(),
        checkpointing_steps=at_least(1),
        checkpoints_total_limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(kw_only=True)
class StageConfig:
    """One pass of an optimizer over some data; a run has one, or several with settings of their own."""

    train_batch_size: int = 8  # per process and step
    num_train_epochs: int = 3  # passes over the data
    max_train_steps: int | None = None  # overrides num_train_epochs
    learning_rate: float = 1e-5  # peak of the schedule
    lr_scheduler: str = "constant"  # a name of diffusers.optimization, or one_cycle: up, then down to nothing
    lr_warmup_steps: int = 0  # steps in which the learning rate rises; one_cycle: 0 means a fixed share of all steps

    ONE_CYCLE_WARMUP = 0.2  # that share

    RULES = rules(
        train_batch_size=at_least(1),
        num_train_epochs=at_least(1),
        max_train_steps=at_least(1),
        learning_rate=ABOVE_0,
        lr_scheduler=OneOf(LR_SCHEDULERS),
        lr_warmup_steps=at_least(0),
    )

    def check_warmup(self) -> None:
        """A ValueError for a warm-up that the schedule does not have, or that lasts as long as the run."""
        steps = self.lr_warmup_steps
        if steps and self.lr_scheduler in ("constant", "piecewise_constant"):
            raise ValueError(
                f"lr_warmup_steps is {steps}, but lr_scheduler {self.lr_scheduler} has no warm-up: choose another, "
                "such as constant_with_warmup"
            )
        defaults = {item.name: item.default for item in fields(self)}
        if self.max_train_steps and steps >= self.max_train_steps and steps != defaults["lr_warmup_steps"]:
            raise ValueError(
                f"lr_warmup_steps is {steps}, but must be less than max_train_steps {self.max_train_steps}"
            )


@dataclass(kw_only=True)
class UnlearningConfig(RunConfig, StageConfig):
    """A run that makes a network forget while the barrier protects the rest."""

    pretrained_model_name_or_path: str  # what is to forget
    saliency_mask: float | None = None  # SalUn: only this fraction of the trained entries moves; None: all
    barrier: BarrierConfig = field(default_factory=BarrierConfig)  # lambda_interval 0 switches the protection off

    RULES = rules(pretrained_model_name_or_path=MODEL, saliency_mask=Range(0, 1, without_low=True))

    @property
    def protected(self) -> bool:
        """Whether a protection loss or a projection takes part."""
        return self.barrier.protects

    @property
    def protection(self) -> str:
        """How the rest is protected, in words."""
        return f"BARRIER: {self.barrier.summary}" if self.protected else "nothing protects the rest"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_warmup()
        if self.saliency_mask is not None and self.barrier.has_projection:
            raise ValueError("saliency_mask holds entries that a projection has to move: use one of the two")


@dataclass(kw_only=True)
class DiffusionUnlearningConfig(UnlearningConfig):
    """The same for a diffusion model, which one of the objectives makes forget."""

    # what trains: the maps that barrier.targets names, or every parameter of the network, where the targets are only
    # what is protected
    trained_weights: Literal["targets", "all"] = "targets"
    cache_dir: str | None = None  # what is computed from the base model; default output_dir/cache
    train_batch_size: int = 8  # forget images per process and step; as many retain images when alpha > 0
    num_train_epochs: int = 3  # over the forget images
    learning_rates: dict[str, float] = field(default_factory=dict)  # of targets with one of their own, by name
    adam_weight_decay: float = 0.0  # decay would drift the weights away from the snapshot
    use_8bit_adam: bool = False  # AdamW whose state takes a quarter of the memory; needs the package bitsandbytes
    compile: bool = False  # torch.compile the network while it trains; the first steps take minutes
    compile_backend: str = "inductor"  # what compiles it; inductor needs a C++ compiler
    validation_prompt: list[str] = field(default_factory=list)  # sampled every validation_steps
    validation_steps: int = 100  # steps from one such sampling to the next
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)  # what does the erasing
    robust: RobustConfig = field(default_factory=RobustConfig)  # what keeps attackers from bringing it back

    RULES = rules(
        cache_dir=OUTPUT,
        learning_rates=ABOVE_0,
        adam_weight_decay=at_least(0),
        use_8bit_adam=Needs("bitsandbytes"),
        validation_steps=at_least(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile:
            import torch  # here, as the list is slow to make

            known = sorted(torch.compiler.list_backends(exclude_tags=()))
            if self.compile_backend not in known:
                raise ValueError(f"compile_backend is {self.compile_backend!r}, but must be one of {', '.join(known)}")
            if self.robust.has_adapter:
                raise ValueError(
                    "a relearner's adapter is hooked into the network, which a compiled one does not heed: set "
                    "robust.meta_weights to trained, or compile to false"
                )
        self._check_robust()

    def _check_robust(self) -> None:
        """A ValueError for parts of robust training that cannot work together."""
        robust, parts = self.robust, self.robust.parts
        if self.saliency_mask is not None and parts:
            raise ValueError(f"saliency_mask would hold what robust.{parts[0]} moves as well: use one of the two")
        if robust.fresh_share and (self.objective.retain_target != "base" or self.objective.alpha == 0):
            raise ValueError(
                "robust.fresh_share makes weights anew that the base has to teach: set objective.retain_target to "
                "base and objective.alpha above 0"
            )
        if robust.extra_steps and self.lr_scheduler not in LEVEL_SCHEDULERS:
            raise ValueError(
                f"robust.extra_steps go on at the last step's learning rate, but lr_scheduler {self.lr_scheduler} "
                f"ends there: set it to {' or '.join(LEVEL_SCHEDULERS[:2])}"
            )
        if self.max_train_steps is not None:
            robust.check_rounds(self.max_train_steps)
        if self.objective.anchor_eta_names != "all" and not robust.token_rounds:
            raise ValueError(
                f"objective.anchor_eta_names is {self.objective.anchor_eta_names!r}, but no names are learned: set "
                "robust.token_rounds, or leave objective.anchor_eta_names at all"
            )
        if robust.project_conflicts and self.objective.alpha == 0:
            raise ValueError("robust.project_conflicts needs a retain loss: set objective.alpha above 0")
        if robust.fresh_share and self.protected:
            raise ValueError(
                "robust.fresh_share moves the weights away from the base, where the protection would hold them: set "
                "barrier.lambda_interval to 0 and barrier.constraint to penalty"
            )

    @property
    def reads_forget_images(self) -> bool:
        """Whether forget images are read even where the objective needs none."""
        return self.saliency_mask is not None or self.robust.reads_forget_images

    @property
    def needs_retain(self) -> bool:
        """Whether any retain data is read: for the retain loss, or to fit the protection."""
        return self.objective.alpha > 0 or (self.protected and self.barrier.needs_retain_data)
