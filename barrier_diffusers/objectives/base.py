"""What every base objective gets and declares, and the registry that maps a name to it.

Shapes: B batch, c latent channels, h and w latent side, L tokens, D embedding features, N prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.protection.targets import ProtectedMap
from barrier_diffusers.utils.registry import Registry

# What one prompt per sample tells the network: tensors with the batch first. Which ones, only the pipeline's row in
# architectures.py knows, which encodes and reads them: everybody else passes a condition to `predict` as it is.
Condition = dict[str, Tensor]
Predict = Callable[[Tensor, Tensor, Condition], Tensor]  # (noisy, timesteps, condition) -> prediction (B, c, h, w)


@dataclass(frozen=True)
class DiffusionStep:
    """One mini-batch at one draw of noise and timesteps; both sides of any comparison share them."""

    predict: Predict  # the network that trains
    noisy: Tensor  # x_t (B, c, h, w)
    timesteps: Tensor  # (B,)
    target: Tensor | None  # noise, velocity or flow (B, c, h, w); None for x_t that the model sampled itself
    condition: Condition  # of the samples' own prompts
    anchor: Condition | None = None  # of the anchor prompts c'; None if the objective needs none
    unconditional: Condition | None = None  # of the empty prompt, for every sample; None if the objective needs none
    reference: Predict | None = None  # the network before training, no graph; None if the objective needs none
    options: Any = None  # the objective's own settings, an instance of its `settings` class
    named: Condition | None = None  # by the concept's own name, where `condition` asks by a learned or moved one
    learned: Tensor | None = None  # (B,), whether a sample asks by a learned name; None: none does

    def __len__(self) -> int:
        return len(self.noisy)

    def prediction(self) -> Tensor:
        """The network's prediction for the sample's own prompt, with gradient."""
        return self.predict(self.noisy, self.timesteps, self.condition)

    @torch.no_grad()
    def fixed_prediction(self, condition: Condition | None) -> Tensor:
        """The training network's prediction for any prompt, as a constant: no graph is built.

        Raises:
            ValueError: there is no such condition, as the objective did not ask for it or the data has no anchors.
        """
        return self.predict(self.noisy, self.timesteps, _given(condition))

    @torch.no_grad()
    def reference_prediction(self, condition: Condition | None) -> Tensor:
        """The prediction of the network as it was before training, as a constant.

        Raises:
            ValueError: the objective did not register with needs=("reference", ...), or there is no such condition.
        """
        if self.reference is None:
            raise ValueError('the objective reads the frozen model: register it with needs=("reference",)')
        return self.reference(self.noisy, self.timesteps, _given(condition))

    def knew(self) -> Tensor:
        """What the network before training answers to the concept's own name, as a constant."""
        return self.reference_prediction(self.condition if self.named is None else self.named)

    def beyond(self, start: Tensor, eta: float) -> Tensor:
        """start + eta (start - eps_0(x_t, c)): away from what the network before training answers to the concept."""
        return start + eta * (start - self.knew().float())

    def ordinary_loss(self) -> Tensor:
        """MSE(eps(x_t, c), target): the loss the network was trained with, and the retain loss.

        Raises:
            ValueError: there is no target, as x_t is the model's own sample.
        """
        if self.target is None:
            raise ValueError("x_t is the model's own sample, so there is no noise to predict and no ordinary loss")
        return F.mse_loss(self.prediction().float(), self.target.float())

    def distilled_loss(self) -> Tensor:
        """MSE(eps(x_t, c), eps_0(x_t, c)), eps_0 the network before training: what it knew, without the noise that it
        never could predict."""
        return F.mse_loss(self.prediction().float(), self.reference_prediction(self.condition).float())


def _given(condition: Condition | None) -> Condition:
    if condition is None:
        raise ValueError(
            "the step has no such prompt: register the objective with needs=('anchor',) or ('unconditional',), "
            "and give the images anchors"
        )
    return condition


@dataclass(frozen=True)
class PromptEdit:
    """What a closed-form edit gets: it changes the maps' weights and no training step runs."""

    maps: list[ProtectedMap]
    pairs: list[tuple[str, str]]  # (forget prompt, anchor prompt; without needs=("anchor",) the prompt itself)
    preserve: list[str]  # retain prompts
    tokenize: Callable[[str], list[int]]  # a prompt's token ids, start and end included, no padding
    embed: Callable[[Sequence[str]], Tensor]  # prompts -> what cross-attention reads (N, L, D)
    options: Any = None  # the objective's own settings, an instance of its `settings` class


NEEDS = {
    "anchor": "step.anchor: another label at random, or what the anchor settings say",
    "named_anchor": "the same, but one of the anchor settings must be given, and be no random one",
    "unconditional": "step.unconditional",
    "reference": "step.reference",
    "samples_from_model": "x_t sampled by the model itself from prompts alone, instead of noised images",
}
READ_BY_NEED = {  # fields of ObjectiveConfig
    "anchor": ("anchor", "anchor_prompt", "anchor_choice"),
    "named_anchor": ("anchor", "anchor_prompt", "anchor_choice"),
    "samples_from_model": ("guidance_scale", "num_inference_steps"),
}


@dataclass(frozen=True)
class Objective:
    """A base objective: its loss on a forget batch, or its closed-form edit, what it needs, and its own settings.

    Raises:
        ValueError: neither or both of loss and edit, or an unknown need.
    """

    name: str
    loss: Callable[[DiffusionStep], Tensor] | None = None
    edit: Callable[[PromptEdit], None] | None = None
    check_maps: Callable[[Sequence[ProtectedMap]], None] | None = None  # ValueError for maps an edit cannot change
    needs: tuple[str, ...] = ()  # keys of NEEDS; nothing else is prepared
    # dataclass, every field with a default: flags --objective.FIELD; a property `reads_reference` of it may say that
    # the loss reads the frozen model with these values
    settings: type[Any] | None = None

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.edit is None):
            raise ValueError(f"objective {self.name!r} needs a loss or an edit, and not both")
        unknown = [need for need in self.needs if need not in NEEDS]
        if unknown:
            raise ValueError(f"objective {self.name!r} asks for {', '.join(unknown)}; needs are {', '.join(NEEDS)}")
        if self.settings is not None:
            try:
                fields(self.settings)
                self.settings()
            except TypeError as error:
                raise ValueError(
                    f"the settings of objective {self.name!r} must be a dataclass whose fields have defaults: {error}"
                ) from error

    @property
    def needs_anchor(self) -> bool:
        """Whether each forget sample needs an anchor prompt."""
        return "anchor" in self.needs or "named_anchor" in self.needs

    @property
    def samples_from_model(self) -> bool:
        """Whether x_t is sampled by the model itself, so that the loss needs no forget image."""
        return "samples_from_model" in self.needs

    @property
    def needs_unconditional(self) -> bool:
        """Whether the empty prompt's embedding is read, by the loss or for guidance."""
        return "unconditional" in self.needs or self.samples_from_model

    def reads_reference(self, options: Any) -> bool:
        """Whether the loss reads the frozen model, always or with these settings."""
        return "reference" in self.needs or bool(getattr(self.own_settings(options), "reads_reference", False))

    @property
    def own_fields(self) -> tuple[str, ...]:
        """Names of the objective's own settings."""
        return tuple(item.name for item in fields(self.settings)) if self.settings is not None else ()

    def own_settings(self, options: Any) -> Any:
        """`options` if they hold the objective's own settings, else its `settings` with whatever of them is given."""
        if self.settings is None or isinstance(options, self.settings):
            return options
        return self.settings(**{name: getattr(options, name) for name in self.own_fields if hasattr(options, name)})

    def loss_of(self, step: DiffusionStep) -> Tensor:
        """The loss on a step; a step without the objective's settings is given their defaults.

        Raises:
            ValueError: the function returned anything but a scalar tensor with gradient.
        """
        assert self.loss is not None
        options = self.own_settings(step.options)
        value = self.loss(step if options is step.options else replace(step, options=options))
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
            found = f"{tuple(value.shape)} without gradient" if isinstance(value, Tensor) else type(value).__name__
            if isinstance(value, Tensor) and value.dim() != 0:
                found = f"a tensor of shape {tuple(value.shape)}"
            raise ValueError(f"objective {self.name!r} must return a scalar tensor with gradient, not {found}")
        return value

    def check(self, options: Any) -> None:
        """Refuse a setting that this objective never reads, and a missing anchor.

        Args:
            options: an `ObjectiveConfig`.

        Raises:
            ValueError: says which setting, and what to do.
        """
        by_need = {name for need in self.needs for name in READ_BY_NEED.get(need, ())}
        read = {"name", "module", *self.own_fields, *by_need} | (
            {"alpha", "retain_target"} if self.loss is not None else set()
        )
        for item in fields(options):
            if item.name not in read and getattr(options, item.name) != item.default:
                raise ValueError(
                    f"objective {self.name!r} does not read objective.{item.name}: leave it at {item.default}"
                )
        is_drawn = options.anchor is None and options.anchor_prompt is None and options.anchor_choice == "random"
        if "named_anchor" in self.needs and is_drawn:
            raise ValueError(
                f"objective {self.name!r} steers the concept to one anchor: set objective.anchor_prompt "
                "(a whole prompt), objective.anchor (words that replace the concept's in each caption) or "
                "objective.anchor_choice to nearest"
            )


OBJECTIVES: Registry[Objective] = Registry("objective")


def register_objective(
    name: str, needs: Sequence[str] = (), settings: type[Any] | None = None
) -> Callable[[Callable[[DiffusionStep], Tensor]], Callable[[DiffusionStep], Tensor]]:
    """Decorator: register a loss function (DiffusionStep -> scalar) under `name`.

    Args:
        needs: keys of NEEDS; what is not named is not prepared and is None in the step.
        settings: a dataclass with the objective's own settings, which the loss reads from `step.options`; its fields
            are the flags --objective.FIELD.

    Raises:
        ValueError: a name that is taken, an unknown need, or settings without defaults.
    """

    def decorate(loss: Callable[[DiffusionStep], Tensor]) -> Callable[[DiffusionStep], Tensor]:
        OBJECTIVES.register(Objective(name, loss, needs=tuple(needs), settings=settings))
        return loss

    return decorate


def get_objective(name: str) -> Objective:
    """The objective called `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    return OBJECTIVES.find(name)
