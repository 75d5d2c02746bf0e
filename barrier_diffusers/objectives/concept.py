"""Concept replacement (METHOD: concept): rl with one prompt pair, e.g. "a nude person" -> "a person wearing clothes".

The loss is rl's; what differs is that no label is drawn at random: the anchor must be named.
"""

from barrier_diffusers.objectives.base import register
from barrier_diffusers.objectives.rl import random_label

register("concept", needs=("named_anchor",))(random_label)
