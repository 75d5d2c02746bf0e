"""ObjectiveConfig: which base objective runs, with the settings that every objective shares and those of each."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, Literal

from barrier_diffusers.objectives.base import OBJECTIVES
from barrier_diffusers.objectives.esd import EsdSettings
from barrier_diffusers.objectives.kl import KlSettings
from barrier_diffusers.objectives.plugin import load_module
from barrier_diffusers.objectives.rl import RlSettings
from barrier_diffusers.objectives.uce import UceSettings
from barrier_diffusers.utils.checks import MODULE, Rule, at_least, check_settings, rules, rules_of
from barrier_diffusers.utils.words import mentions


@dataclass
class SharedSettings:
    """Settings that the trainer reads, whatever the objective."""

    name: str = "rl"  # see barrier_diffusers/objectives, or your own
    module: str | None = None  # .py file or importable module that registers an objective of yours: it is run
    alpha: float = 0.0  # weight of the loss on a retain batch; 0: no retain batch is loaded or run
    # what the retain batch is to be answered with. noise: what was added, as in ordinary training; base: the frozen
    # model's own prediction (distillation), so that what it never could predict is not learned
    retain_target: Literal["noise", "base"] = "noise"
    # words that replace the concept's in each caption, or a list, one per concept; None: another label (anchor_choice)
    anchor: str | list[str] | None = None
    # which label where no anchor is named. random: one for each image; nearest: for each concept the one whose prompts
    # the model answers most alike on the concept's images
    anchor_choice: Literal["random", "nearest"] = "random"
    anchor_prompt: str | None = None  # or one whole prompt for every forget image
    guidance_scale: float = 3.0  # esd: classifier-free guidance while the model samples its own x_t
    num_inference_steps: int = 50  # >= 1; esd: steps of that sampling, of which a random number is run

    SECTION = "objective."
    RULES = rules(
        module=MODULE,
        alpha=at_least(0),
        guidance_scale=at_least(0),
        num_inference_steps=at_least(1),
    )

    def __post_init__(self) -> None:
        if self.anchor is not None and self.anchor_prompt is not None:
            raise ValueError("set objective.anchor (words) or objective.anchor_prompt (a whole prompt), not both")
        if self.anchor_choice != "random" and (self.anchor is not None or self.anchor_prompt is not None):
            raise ValueError(
                f"objective.anchor_choice is {self.anchor_choice!r}, but an anchor is named: leave one of the two out"
            )
        if self.retain_target != "noise" and self.alpha == 0:
            raise ValueError(f"objective.retain_target is {self.retain_target!r}, but objective.alpha is 0: set it")
        check_settings(self)


@dataclass
class ObjectiveConfig(UceSettings, EsdSettings, KlSettings, RlSettings, SharedSettings):
    """The base objective that does the erasing. One that the chosen objective does not read must keep its default.

    Raises:
        ValueError: a value out of range, or both kinds of anchor.
    """

    def __post_init__(self) -> None:
        chosen = OBJECTIVES.get(self.name)
        for part in type(self).__mro__:  # each objective checks its own; what the chosen one does not read, it refuses
            if not is_dataclass(part) or issubclass(part, ObjectiveConfig):
                continue
            if chosen is None or part is SharedSettings or issubclass(chosen.settings or object, part):
                part(**{item.name: getattr(self, item.name) for item in fields(part)})
        check_settings(self)

    def anchors_of(
        self, concepts: Sequence[str], synonyms: Sequence[str] = (), labels: bool = False
    ) -> list[str | None]:
        """`anchor` for each of these concepts.

        Args:
            synonyms: other names of the concepts, which no anchor may have.
            labels: the concepts are labels of a model that reads no words, so that only an equal label is the same.

        Raises:
            ValueError: a list of the wrong length, or an anchor or anchor_prompt that names one of the concepts.
        """
        words = self.anchor if isinstance(self.anchor, list) else [self.anchor] * len(concepts)
        if len(words) != len(concepts):
            raise ValueError(f"objective.anchor lists {len(words)} words for {len(concepts)} concepts")
        for setting, texts in {"anchor": words, "anchor_prompt": [self.anchor_prompt]}.items():
            for text in texts:
                if text is None:
                    continue
                known = [*concepts, *synonyms]
                named = next((word for word in known if text == word or not labels and mentions(text, word)), None)
                if named is not None:
                    raise ValueError(
                        f"objective.{setting} {text!r} is to be forgotten itself, as it names {named!r}: choose "
                        "something that is retained"
                    )
                if not text.strip():
                    raise ValueError(f"objective.{setting} {text!r} is empty: choose something that is retained")
        return list(words)

    @classmethod
    def class_for(cls, values: Mapping[str, Any]) -> type[ObjectiveConfig]:
        """The class that also has the own settings of the objective that `values` names, of the user's module if they
        name one; `cls` itself for an objective that has none or is built in.

        Raises:
            ValueError: a module that does not load, or an own setting that is called like a shared one.
        """
        if values.get("module"):
            load_module(str(values["module"]))
        objective = OBJECTIVES.get(str(values.get("name")))
        settings: Any = objective.settings if objective is not None else None
        if settings is None or issubclass(cls, settings):
            return cls
        shared = {item.name for item in fields(SharedSettings)} & {item.name for item in fields(settings)}
        if shared:
            raise ValueError(f"objective {values['name']!r} declares {', '.join(shared)}, which all objectives share")
        base: Any = cls
        return _with_settings(base, settings)


@functools.cache
def _with_settings(config_class: Any, settings: Any) -> type[ObjectiveConfig]:
    kinds = typing.get_type_hints(settings)
    own = []
    for item in fields(settings):
        default: Any = {"default": item.default}
        if item.default_factory is not MISSING:
            default = {"default_factory": item.default_factory}
        own.append((item.name, kinds[item.name], field(**default)))
    own_rules = rules_of(settings)  # not those of a setting of another objective that is called alike
    members = {
        "__post_init__": config_class.__post_init__,
        "RULES": {name: own_rules.get(name, Rule()) for name, _, _ in own},
    }
    return make_dataclass(config_class.__name__, own, bases=(settings, config_class), namespace=members)
