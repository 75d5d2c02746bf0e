"""Batches in the form the objectives take, with noise and timesteps drawn for them, and the model before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from barrier_diffusers.models.denoiser import Denoiser
from barrier_diffusers.models.partial_sampler import PartialSampler, Share, own_rows
from barrier_diffusers.objectives import DiffusionStep, ObjectiveConfig
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.protection.sharding import cut_like, is_sharded, own_part, reshard
from barrier_diffusers.protection.targets import is_adapter, switched_off


class _Run(nn.Module):
    """A function that calls `model`, as a module whose parameters `functional_call` can exchange."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs)


class FrozenReference:
    """Runs a model with its trained parameters as they were when this was made, whatever was trained since.

    Where a fresh LoRA adapter trains, which is zero, it is switched off during a call and nothing is copied. Else only
    the parameters that train are copied, and the copies stand in their place: no weight is written, so graphs built
    before, gradient checkpointing, autocast and accelerate's wrappers are untouched. Weights that `fully_shard` has
    shared out are exchanged for their share of the copy, in place: a graph holds whole weights, which are gathered
    anew.

    Args:
        model: the network, on the device it trains on.
        parameters: those that train.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]):
        trained = set(parameters)
        self._model = model
        self._adapters = fresh_adapters(model, trained)
        if self._adapters:
            trained = set()
        self._values = {
            f"model.{name}": parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter in trained
        }

    @property
    def num_copied(self) -> int:
        """Numbers that are held a second time."""
        return sum(value.numel() for value in self._values.values())

    @torch.no_grad()
    def __call__(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`function(*inputs)`, which runs the model in any way, with the reference's parameters and no graph."""
        if self._adapters:
            with switched_off(self._adapters):
                return function(*inputs)
        shared = {f"model.{name}": one for name, one in self._model.named_parameters() if is_sharded(one)}
        if shared:
            with self._exchanged(shared):
                return function(*inputs)
        return functional_call(_Run(self._model, function), self._values, inputs)

    @contextmanager
    def _exchanged(self, shared: dict[str, nn.Parameter]) -> Iterator[None]:
        """The reference's values in the trained parameters, each process its share, for the duration of a block."""
        reshard(self._model)
        self._values = {name: cut_like(value, shared[name]) for name, value in self._values.items()}
        own = [(own_part(shared[name]), own_part(value)) for name, value in self._values.items()]
        now = [parameter.clone() for parameter, _ in own]
        try:
            torch._foreach_copy_([parameter for parameter, _ in own], [value for _, value in own])
            yield
        finally:
            reshard(self._model)
            torch._foreach_copy_([parameter for parameter, _ in own], now)


@contextmanager
def compiled(network: nn.Module, backend: str | None) -> Iterator[None]:
    """The network's calls are compiled within a block; names, weights and hooks stay as they are.

    Args:
        backend: of `torch.compile`; None: nothing is compiled.
    """
    if backend is None:
        yield
        return
    network.compile(backend=backend)
    try:
        yield
    finally:
        network._compiled_call_impl = None


def fresh_adapters(model: nn.Module, trained: set[nn.Parameter]) -> list[Any]:
    """The peft layers whose only active adapter is LoRA that trains and is still zero; none where anything else
    trains, too."""
    found: list[Any] = [module for module in model.modules() if is_adapter(module)]
    fresh: set[nn.Parameter] = set()
    for layer in found:
        up = [layer.lora_B[name].weight for name in layer.active_adapters if name in getattr(layer, "lora_B", ())]
        if len(up) != 1 or len(layer.active_adapters) != 1 or up[0] not in trained or up[0].any():
            return []
        fresh |= {parameter for parameter in layer.parameters() if parameter in trained}
    return found if fresh == trained else []


def freeze_normalisation(module: nn.Module) -> None:
    """Train mode for everything but normalisation layers, whose running statistics must not follow the forget data."""
    module.train()
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    for layer in module.modules():
        if isinstance(layer, kinds):
            layer.eval()


class StepMaker:
    """Puts a batch in the form the objectives take, with noise and timesteps drawn for its cached latents, or with
    `sampler` its x_t sampled by the model itself from the prompts alone.

    Args:
        share: (process index, number of processes): draw for the batches of all processes, and take one's own. If all
            have the same random state (`share_random_state`), they do together what one process would.
    """

    def __init__(
        self,
        model: nn.Module,
        denoiser: Denoiser,
        options: ObjectiveConfig | None = None,
        reference: FrozenReference | None = None,
        sampler: PartialSampler | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        self.model, self.denoiser, self.share = model, denoiser, share
        self.options, self.sampler = options or ObjectiveConfig(), sampler
        self.reference = partial(reference, self.run) if reference else None

    def run(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The network's prediction."""
        return self.denoiser.predict(self.model, noisy, timesteps, condition)

    def __call__(self, batch: dict[str, Any]) -> DiffusionStep:
        if self.sampler is not None:
            index, (process_index, processes) = batch["index"], self.share
            share = Share.of(processes * len(index), process_index, processes)
            noisy, timesteps = self.sampler(batch["condition"], batch["unconditional"], index, share)
            return self._step(batch, noisy, timesteps, None)
        moments, (process_index, processes) = batch["moments"], self.share
        everybodys = moments.repeat(processes, *[1] * (moments.dim() - 1)) if processes > 1 else moments
        drawn, own = self.denoiser.noised(everybodys), Share.of(len(everybodys), process_index, processes).own
        return self._step(batch, drawn.noisy[own], drawn.timesteps[own], drawn.target[own])

    def of_share(self, batch: dict[str, Any], share: Share) -> DiffusionStep:
        """The step of one's own rows of a batch of all processes, with noise and timesteps drawn for all rows."""
        drawn, own = self.denoiser.noised(batch["moments"]), share.own
        return self._step(own_rows(batch, share), drawn.noisy[own], drawn.timesteps[own], drawn.target[own])

    def _step(self, batch: dict[str, Any], noisy: Tensor, timesteps: Tensor, target: Tensor | None) -> DiffusionStep:
        return DiffusionStep(
            self.run,
            noisy,
            timesteps=timesteps,
            target=target,
            condition=batch["condition"],
            named=batch.get("named"),
            learned=batch.get("learned"),
            anchor=batch.get("anchor"),
            unconditional=batch.get("unconditional"),
            reference=self.reference,
            options=self.options,
        )
