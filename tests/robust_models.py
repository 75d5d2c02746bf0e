"""A tiny pipeline with forget rows, and what robust training does to it computed in the plainest way."""

import copy

import pipelines
import torch
from torch.utils.data import default_collate

from barrier_diffusers.data.encoding import EncodedImages, encode_prompts
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.objectives import ObjectiveConfig
from barrier_diffusers.training.steps import FrozenReference, StepMaker
from barrier_diffusers.training.token_adversary import PromptVocabulary

PROMPTS = ["a photo of a boot", "a photo of a red boot", "a photo of a sneaker"]


class Toy:
    """Pipeline, denoiser and twelve encoded forget rows; every parameter of the network trains."""

    def __init__(self, **options):
        self.pipeline = pipelines.build("sd")
        self.denoiser = PipelineDenoiser(self.pipeline)
        self.network = self.denoiser.network.train()
        self.parameters = list(self.network.parameters())
        generator = torch.Generator().manual_seed(1)
        moments = torch.randn(12, 8, 8, 8, generator=generator)
        captions = torch.tensor([0, 1] * 6)
        self.captions = [PROMPTS[number] for number in captions]
        anchors = torch.full((12,), 2)
        self.rows = EncodedImages(moments, captions, anchors, encode_prompts(self.pipeline, PROMPTS))
        self.options = ObjectiveConfig(**options)
        self.reference = FrozenReference(self.network, self.parameters)

    def step(self, rows=range(4), seed=2):
        """A step on some rows, at a draw of noise of its own."""
        torch.manual_seed(seed)
        maker = StepMaker(self.network, self.denoiser, self.options, self.reference)
        return maker(self.batch(rows))

    def predict(self, noisy, timesteps, condition):
        """The network's prediction."""
        return self.denoiser.predict(self.network, noisy, timesteps, condition)

    def batch(self, rows=range(4)):
        """Some rows."""
        return default_collate([self.rows[row] for row in rows])

    def vocabulary(self, count=1):
        """What new names for the boot are learned in."""
        return PromptVocabulary(
            self.pipeline, self.rows.moments, captions=self.captions, concepts=["boot"] * 12, count=count
        )

    def copy(self):
        """The network as it is now, apart."""
        return copy.deepcopy(self.network)
