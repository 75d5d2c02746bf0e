"""Weights shared out over the processes by accelerate's engine for torch's `fully_shard` (FSDP 2)."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from barrier_diffusers.protection.sharding import reshard, whole
from barrier_diffusers.training.run_config import DiffusionUnlearningConfig, RunConfig

# what `accelerate launch` sets for each way to share out weights, and why some of them cannot work
FSDP = "ACCELERATE_USE_FSDP"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed is not supported: its ZeRO stage 3 leaves empty tensors where the protection reads weights, and "
        "its engine takes backward pass and optimizer out of the run's hands"
    ),
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported: it knows no diffusion network",
}
INSTEAD = (
    "Use FSDP 2 (fsdp_version: 2, see docs/sharding.md), or plain data parallelism (accelerate launch --multi_gpu) "
    "and, if memory is short, a LoRA adapter with gradient checkpointing"
)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def sharding_plugin(config: RunConfig) -> FullyShardedDataParallelPlugin | None:
    """What accelerate is to know of FSDP 2 where `accelerate launch` asks for it; None for whole weights.

    Read from the launcher's environment: building the accelerator would already start the processes' work together.

    Raises:
        ValueError: another engine, or an option or a setting that cannot work with shares of the weights.
    """
    for variable, reason in REFUSED.items():
        if _is_set(variable):
            raise ValueError(f"{reason}. {INSTEAD}")
    if not _is_set(FSDP):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "FSDP is not supported in its version 1: it makes one flat vector of a block's weights, in which a run's "
            "checkpoints and references cannot tell a map's rows (in a loop of one's own, loss_inside computes "
            f"the protection loss with it). {INSTEAD}"
        )
    for option, instead in {
        "FSDP_OFFLOAD_PARAMS": "leave it out: the protection is computed where the weights are, on the host",
        "FSDP_ACTIVATION_CHECKPOINTING": "pass --gradient_checkpointing true instead",
    }.items():
        if _is_set(option):
            raise ValueError(f"{option.lower()} is not supported: {instead}")
    if not isinstance(config, DiffusionUnlearningConfig):
        raise ValueError("FSDP is not supported in this script: it is for unlearning a diffusion model")
    for setting, why in {
        "saliency_mask": "it ranks the entries of all weights together",
        "compile": "compiled calls of shares were not tried",
        "use_8bit_adam": "bitsandbytes knows no shared weights",
        "validation_prompt": "one process cannot draw alone with a share of the weights",
    }.items():
        if getattr(config, setting):
            raise ValueError(f"{setting} is not supported with FSDP: {why}. Leave it out, or launch --multi_gpu")
    for part in [*(["trained_weights"] if config.trained_weights != "targets" else []), *config.robust.parts]:
        name = part if part == "trained_weights" else f"robust.{part}"
        raise ValueError(
            f"{name} is not supported with FSDP: it reads and moves whole weights. Leave it out, or launch --multi_gpu"
        )
    # every process has loaded the weights by the time they are shared out; with this transformers would leave the text
    # encoders of all but the first one empty. A whole file, as the parts of the other kind are read by pickle
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT"
    )


def use_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Share out weights on a CPU too, where accelerate would ignore the plugin and train whole copies, silently."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        for state in (PartialState(), accelerator.state):  # the second is made anew from the first in places
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


ENGINES = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "training"}  # attributes that engines change


class WholeNetwork:
    """Gives a network back what sharing out changes: classes, hooks, children, and weights in one piece.

    Made before; `restore` after. It holds no weight.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self._kept: list[tuple[nn.Module, type, dict[str, Any]]] = []
        for module in network.modules():
            own = {name: value for name, value in vars(module).items() if name in ENGINES}
            copies = {name: value.copy() if hasattr(value, "copy") else value for name, value in own.items()}
            self._kept.append((module, type(module), copies))

    @torch.no_grad()
    def restore(self) -> None:
        """All processes have to call it; each gets the whole network."""
        reshard(self.network)
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in made:
                        made[parameter] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = made[parameter]
        for module, kind, own in self._kept:
            module.__class__ = kind
            vars(module).update(own)
