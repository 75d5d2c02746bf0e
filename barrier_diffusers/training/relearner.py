"""A fine-tuning attacker that robust training meets: relearning tried out on the weights as they are, and taken back.

Shapes: B batch, O output features, D input features, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import default_collate

from barrier_diffusers.models.denoiser import Denoiser
from barrier_diffusers.objectives import DiffusionStep
from barrier_diffusers.protection.targets import ProtectedMap, resolve_targets
from barrier_diffusers.training.lives import Attacker, Lives, restored
from barrier_diffusers.training.robust_config import RobustConfig
from barrier_diffusers.training.seeds import one_of, seeded
from barrier_diffusers.training.token_adversary import TokenAdversary

LOSS_SCALE = 2.0**8  # keeps small gradients above half precision's smallest number; divided out again


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient for each parameter, zeros where there is none; .grad is left alone."""
    found = torch.autograd.grad(loss * LOSS_SCALE, parameters, allow_unused=True)
    full = [torch.zeros_like(one) if value is None else value for one, value in zip(parameters, found, strict=True)]
    torch._foreach_div_(full, LOSS_SCALE)
    return full


class Adam:
    """torch's Adam with its defaults, for gradients that are handed over: the parameters' .grad belongs to others.

    Args:
        num_steps, moments: of one that goes on.
    """

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(
        self,
        parameters: Sequence[Tensor],
        learning_rate: float,
        num_steps: int = 0,
        moments: Sequence[Tensor] = (),
    ):
        self.parameters, self.learning_rate, self.num_steps = list(parameters), learning_rate, num_steps
        self.moments = list(moments) or [torch.zeros_like(parameter) for parameter in [*parameters, *parameters]]

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        """Move the parameters, in place."""
        (beta, other), count = self.BETAS, len(self.parameters)
        first, second, self.num_steps = self.moments[:count], self.moments[count:], self.num_steps + 1
        torch._foreach_lerp_(first, gradients, 1 - beta)
        torch._foreach_mul_(second, other)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - other)
        divisors = torch._foreach_sqrt(second)
        torch._foreach_div_(divisors, (1 - other**self.num_steps) ** 0.5)
        torch._foreach_add_(divisors, self.EPS)
        size = self.learning_rate / (1 - beta**self.num_steps)
        torch._foreach_addcdiv_(self.parameters, first, divisors, -size)


class AddedAdapter:
    """LoRA factors added to maps by hooks while it is `on`: no module changes, and no weight is written.

    It starts as peft's does with init_lora_weights="gaussian": B is 0, A normal with standard deviation 1 / rank, and
    the scaling 1.

    Args:
        generator: draws A; on the CPU.
    """

    def __init__(self, maps: Sequence[ProtectedMap], rank: int, generator: torch.Generator):
        self.maps, self.down, self.up = maps, [], []
        for linear_map in maps:
            layer = linear_map.layer
            kernel = layer.weight.shape[2:] if isinstance(layer, nn.Conv2d) else ()
            down = torch.randn(rank, layer.weight.shape[1], *kernel, generator=generator) / rank
            self.down.append(down.to(layer.weight.device).requires_grad_())
            up = torch.zeros(layer.weight.shape[0], rank, *(1 for _ in kernel), device=layer.weight.device)
            self.up.append(up.requires_grad_())
        self._is_on = True

    @property
    def parameters(self) -> list[Tensor]:
        """The factors."""
        return [*self.down, *self.up]

    @contextmanager
    def on(self) -> Iterator[None]:
        """The maps' outputs have the adapter's added, for the duration of a block."""
        hooks = [
            linear_map.module.register_forward_hook(self._hook(linear_map, down, up))
            for linear_map, down, up in zip(self.maps, self.down, self.up, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network as it is without the adapter, within a block of `on`."""
        self._is_on = False
        try:
            yield
        finally:
            self._is_on = True

    def _hook(self, linear_map: ProtectedMap, down: Tensor, up: Tensor) -> Any:
        layer = linear_map.layer

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._is_on:
                return None
            x = inputs[0]
            if isinstance(layer, nn.Conv2d):
                inner = F.conv2d(x, down.to(x.dtype), None, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
                return output + F.conv2d(inner, up.to(x.dtype)).to(output.dtype)
            return output + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)).to(output.dtype)

        return add


def adapted_maps(network: nn.Module, targets: Sequence[str]) -> list[ProtectedMap]:
    """The maps that a relearner's adapter is on.

    Raises:
        ValueError: a target that names nothing, or a grouped convolution or an embedding.
    """
    try:
        maps = resolve_targets(network, targets)
    except ValueError as error:
        raise ValueError(f"robust.meta_adapter_targets: {error}") from error
    for linear_map in maps:
        if linear_map.is_table or getattr(linear_map.layer, "groups", 1) > 1:
            raise ValueError(
                f"robust.meta_adapter_targets names {linear_map.name}, a grouped convolution or an embedding, and no "
                "LoRA goes on it: leave it out"
            )
    return maps


@dataclass
class DenoiserAttacker(Attacker):
    """It fine-tunes a denoiser on a few forget images."""

    batch: dict[str, Any] = field(default_factory=dict)  # the images, with their own captions
    adapter: AddedAdapter | None = None  # that it trains; None: the weights that train here
    name: int = -1  # of the adversary's, in its captions; -1: the concept's own

    KEPT: ClassVar[tuple[str, ...]] = (*Attacker.KEPT, "name")  # drawn from those that were learned at its birth


class Relearner(Lives[RobustConfig, DenoiserAttacker]):
    """Fine-tunes the network on a few forget images with the loss it was trained with, for the time of a block.

    How often, how fast, and what moves is drawn anew each time, from random numbers that all processes share: each of
    them does the whole of it.

    Args:
        network: the bare one, not what wraps it for several processes.
        parameters: those that train.
        images: rows of the forget data, with "moments".
        adversary: whose learned names may stand in the captions.
    """

    def __init__(
        self,
        config: RobustConfig,
        denoiser: Denoiser,
        network: nn.Module,
        *,
        parameters: Sequence[nn.Parameter],
        images: Any,
        seed: int,
        adversary: TokenAdversary | None = None,
    ):
        super().__init__(config, seed)
        self.denoiser, self.network = denoiser, network
        self.parameters, self.images, self.adversary = list(parameters), images, adversary
        self.maps = adapted_maps(network, config.meta_adapter_targets) if config.has_adapter else []
        self._adapter: AddedAdapter | None = None  # that is on

    @property
    def device(self) -> torch.device:
        """See `Lives`."""
        return self.parameters[0].device

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        """The network's prediction, as it is in a block of `relearned`."""
        return self.denoiser.predict(self.network, noisy, timesteps, condition)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """In a block of `relearned`, the network without the adapter that it may have been given."""
        if self._adapter is None:
            yield
        else:
            with self._adapter.off():
                yield

    @contextmanager
    def relearned(self, number: int) -> Iterator[None]:
        """The network after the `number`-th meeting with a relearner, for the duration of a block; then it is as it
        was."""
        attacker, num_steps, generator = self.next(number)
        self._adapter = attacker.adapter
        parameters = self.parameters if self._adapter is None else self._adapter.parameters
        try:
            with restored(parameters) as before, nullcontext() if self._adapter is None else self._adapter.on():
                attacker.go_on(parameters)
                self._train(attacker, parameters, num_steps, generator)
                attacker.note_lead(parameters, before)
                yield
        finally:
            self._adapter = None

    def drawn(self, generator: torch.Generator) -> DenoiserAttacker:
        """See `Lives`."""
        config, adapter = self.config, None
        kinds = ["trained", "adapter"] if config.meta_weights == "either" else [config.meta_weights]
        if one_of(kinds, generator) == "trained":
            rate = one_of(config.meta_learning_rates, generator)
        else:
            rate = one_of(config.meta_adapter_learning_rates, generator)
            adapter = AddedAdapter(self.maps, config.meta_adapter_rank, generator)
        attacker = DenoiserAttacker(rate, batch=self.few_images(generator), adapter=adapter)
        if self.adversary is not None and self.adversary.tables:
            is_named = torch.rand((), generator=generator) < config.meta_token_share
            which = torch.randint(len(self.adversary.tables), (), generator=generator)
            attacker.name = int(which) if is_named else -1
        return attacker

    @contextmanager
    def ascended(self, number: int) -> Iterator[None]:
        """The network one step of length `sharpness` towards the forget images, for the duration of a block."""
        generator = seeded(self.seed, "sharpness", number)
        loss = self.noised(self.few_images(generator), generator).ordinary_loss()
        way = gradients_of(loss, self.parameters)
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(way)))
        torch._foreach_mul_(way, -self.config.sharpness / length.clamp_min(torch.finfo(length.dtype).tiny))
        with restored(self.parameters):
            with torch.no_grad():
                for parameter, move in zip(self.parameters, way, strict=True):
                    parameter.add_(move)
            yield

    def _train(
        self, attacker: DenoiserAttacker, parameters: Sequence[Tensor], num_steps: int, generator: torch.Generator
    ) -> None:
        optimizer = Adam(parameters, attacker.learning_rate, attacker.num_steps, attacker.moments)
        batch = attacker.batch
        if self.adversary is not None and attacker.name >= 0:
            batch = self.adversary.named(batch, torch.full((len(batch["index"]),), attacker.name))
        for _ in range(num_steps):
            optimizer.step(gradients_of(self.noised(batch, generator).ordinary_loss(), parameters))
        attacker.note(optimizer.num_steps, optimizer.moments)

    def few_images(self, generator: torch.Generator) -> dict[str, Any]:
        """A batch of forget images, drawn without replacement; "moments" stay on the CPU, the rest does not."""
        rows = torch.randperm(len(self.images), generator=generator)[: self.config.meta_num_images]
        batch = default_collate([self.images[int(row)] for row in rows])
        return {**send_to_device(batch, self.device), "moments": batch["moments"]}

    def noised(self, batch: dict[str, Any], generator: torch.Generator) -> DiffusionStep:
        """The batch at a new draw of noise and timesteps, on the network's device."""
        drawn, device = self.denoiser.noised(batch["moments"], generator), self.device
        noisy, timesteps, target = (value.to(device) for value in (drawn.noisy, drawn.timesteps, drawn.target))
        return DiffusionStep(self.predict, noisy, timesteps=timesteps, target=target, condition=batch["condition"])
