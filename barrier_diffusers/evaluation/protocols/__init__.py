"""Protocols, one file each; see base.py for what they share."""

from __future__ import annotations

from barrier_diffusers.evaluation.judged_model import JudgedModel
from barrier_diffusers.evaluation.protocols.base import Protocol
from barrier_diffusers.evaluation.protocols.coco import CocoProtocol
from barrier_diffusers.evaluation.protocols.concepts import ConceptProtocol
from barrier_diffusers.evaluation.protocols.nudity import NudityProtocol
from barrier_diffusers.evaluation.settings import EvaluateConfig

PROTOCOLS: dict[str, type[Protocol]] = {
    "class": ConceptProtocol,
    "style": ConceptProtocol,
    "nudity": NudityProtocol,
    "coco": CocoProtocol,
}


def make_protocols(config: EvaluateConfig, judged_model: JudgedModel) -> list[Protocol]:
    """What the settings ask for; class and style together are one, with the same prompts and concepts."""
    return [kind(config, judged_model) for kind in dict.fromkeys(PROTOCOLS[name] for name in config.protocols)]
