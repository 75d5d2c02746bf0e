"""What every protocol is given and gives back, and the registry that maps a name to it.

A protocol is built (which refuses, before any long work, whatever it cannot do) and then run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from barrier_diffusers.data.images import ImageFiles, ImageSet
from barrier_diffusers.evaluation.clip_score import clip_score, load_clip
from barrier_diffusers.evaluation.extractors import get_extractor
from barrier_diffusers.evaluation.fidelity import fidelity_by
from barrier_diffusers.evaluation.judged_model import ImagePair, JudgedModel
from barrier_diffusers.utils.registry import Registry

if TYPE_CHECKING:  # settings.py makes a section of every protocol's settings
    from barrier_diffusers.evaluation.settings import EvaluateConfig


class Protocol(ABC):
    """One way to judge a pipeline or its images: which prompts are asked, and what is said of the images."""

    judges_concepts = False  # whether it asks for forgotten concepts, which attacks can then bring back

    @classmethod  # noqa: B027  there may be nothing to refuse
    def check(cls, config: EvaluateConfig) -> None:
        """Refuse settings that the protocol cannot work with, before anything is loaded.

        Raises:
            ValueError: says what is missing and what to do.
        """

    @abstractmethod
    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel): ...

    @abstractmethod
    def images(self) -> ImagePair:
        """The images of its prompts, made or read."""

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Make or read the images, judge them, print a table; the part of metrics.json."""


ProtocolClass = TypeVar("ProtocolClass", bound=type[Protocol])


@dataclass(frozen=True)
class RegisteredProtocol:
    """A protocol by its name, with the dataclass of its settings, if it has any of its own."""

    name: str
    protocol: type[Protocol]
    settings: type[Any] | None = None


PROTOCOLS: Registry[RegisteredProtocol] = Registry("protocol")


def register_protocol(name: str, settings: type[Any] | None = None) -> Callable[[ProtocolClass], ProtocolClass]:
    """Decorator: register a Protocol class under `name`, which its settings' section is called, too.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(protocol: ProtocolClass) -> ProtocolClass:
        PROTOCOLS.register(RegisteredProtocol(name, protocol, settings))
        return protocol

    return decorate


def make_protocols(config: EvaluateConfig, judged_model: JudgedModel) -> list[Protocol]:
    """What the settings ask for; class and style together are one, with the same prompts and concepts."""
    chosen = dict.fromkeys(PROTOCOLS.find(name).protocol for name in config.protocols)
    return [protocol(config, judged_model) for protocol in chosen]


class Likeness:
    """FID and KID against a reference set, and CLIP score, as far as the settings ask for them."""

    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel, reference: ImageSet | None):
        options = config.fidelity
        self.options, self.device = options, judged_model.device
        self.extractors = [get_extractor(spec, self.device) for spec in options.extractors]
        self.reference = ImageFiles(options.reference_dir) if options.reference_dir else reference
        if self.extractors and self.reference is None:
            raise ValueError("FID and KID compare with real images: set fidelity.reference_dir")
        self.clip = load_clip(config.clip) if config.clip else None
        self.cache = Path(options.cache_dir) if options.cache_dir else judged_model.output / "cache"

    def distances(self, images: ImageSet) -> dict[str, Any]:
        """FID and KID by every extractor."""
        assert self.reference is not None
        return fidelity_by(self.extractors, self.reference, images=images, options=self.options, cache=self.cache)

    def clip_score(self, images: ImageSet, prompts: Sequence[str]) -> dict[str, Any]:
        """CLIP score of images and their prompts."""
        assert self.clip is not None
        return clip_score(images, prompts, clip=self.clip, device=self.device)
