"""How every training run starts: the accelerator, a claimed output folder, the schedule of the learning rate."""

from __future__ import annotations

import os
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from diffusers.optimization import get_scheduler

from barrier_diffusers.utils.run_records import claim_output_dir

# what `accelerate launch` sets for each way to share out weights
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


class RunSettings(Protocol):
    """What is read here of a run's settings; the names are those of the diffusers examples."""

    output_dir: str
    overwrite_output_dir: bool
    resume_from_checkpoint: str | None
    seed: int
    gradient_accumulation_steps: int
    lr_scheduler: str
    lr_warmup_steps: int

    @property
    def mixed_precision(self) -> str: ...

    @property
    def report_to(self) -> str: ...


def refuse_sharding() -> None:
    """A ValueError if `accelerate launch` was told to share out the weights, which the loss reads whole in every step.

    Read from the launcher's environment: building the accelerator would already start the processes' work together.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise ValueError(
                f"{name} is not supported: it shares out the weights, which the protection reads whole. Launch plain "
                "data parallelism (accelerate launch --multi_gpu) and, if memory is short, train a LoRA adapter with "
                "gradient checkpointing"
            )


def open_run(config: RunSettings) -> Accelerator:
    """The accelerator of a run, its output folder claimed.

    Raises:
        ValueError: the folder may not be used, fp16 on a CPU, or the weights are to be shared out between processes.
    """
    refuse_sharding()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
    )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision fp16 needs a GPU: on a CPU accelerate switches on neither autocast nor the scaling of "
            "the loss; use bf16 or no"
        )
    if accelerator.is_main_process:
        claim_output_dir(config.output_dir, config.overwrite_output_dir, config.resume_from_checkpoint is not None)
    accelerator.wait_for_everyone()
    return accelerator


def schedule_of(config: RunSettings, optimizer: Any, num_steps: int, num_processes: int) -> Any:
    """The learning rate over `num_steps` steps of the run; a prepared schedule takes a step for each process."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * num_processes,
        num_training_steps=num_steps * num_processes,
    )
