"""Forgotten concepts as attackers see them, with pictures of noise."""

import numpy as np
from datasets import Dataset
from PIL import Image

from barrier_diffusers.evaluation.attacks import Forgotten
from barrier_diffusers.models.generation import SamplingConfig

SAMPLING = SamplingConfig(num_inference_steps=2, resolution=32)


def pictures(captions, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (len(captions), 32, 32, 3), dtype=np.uint8)
    return Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels], "text": captions})


def forgotten(concept="sneaker"):
    colours = ("red", "blue", "green")
    captions = [f"a photo of a {colour} {concept}" for colour in colours]
    others = [f"a photo of a {colour} {kind}" for colour in colours for kind in ("boot", "bag")]
    return Forgotten(concept, captions, pictures(2 * captions, 0), pictures(others, 1), SAMPLING, 32)
