"""Concept replacement (docs/method.md section 5): rl with one prompt pair.

A pair is "a nude person" -> "a person wearing clothes", for example. The loss is rl's; what differs is that no label
is drawn at random: the anchor must be named.
"""

from barrier_diffusers.objectives.base import register_objective
from barrier_diffusers.objectives.rl import RlSettings, random_label

register_objective("concept", needs=("named_anchor",), settings=RlSettings)(random_label)
