"""New rows of the class embedding that the adversary of robust training learns: a label's other names.

Shapes: N forget rows, C channels, S image side, D embedding features, B batch, K rows that were learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.models.learned_tokens import LearnedTokens
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.training.learning import frozen, learn
from barrier_diffusers.training.token_adversary import LearningPlan, Vectors
from ddpm_ext.diffusion import LABELS, LabelDenoiser, LabelRows
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline


class LabelVocabulary:
    """`barrier_diffusers.training.token_adversary.Vocabulary` for labels.

    Numbers from the table's size on mean the learned rows, which hooks give out; the table and its module stay what
    they are. `remove` takes the hooks off.

    Args:
        rows: what is forgotten, with images.
    """

    def __init__(self, pipeline: ClassConditionalDDPMPipeline, rows: LabelRows):
        self.pipeline, self.rows = pipeline, rows
        self.labels = sorted(set(rows.labels.tolist()))
        self.row_ids = torch.tensor([self.labels.index(label) for label in rows.labels.tolist()])
        table: Any = pipeline.unet.class_embedding
        self.table: nn.Embedding = table
        self.learned_KD = table.weight.detach()[:0].float()
        self._asked: Tensor | None = None
        self._hooks = [table.register_forward_pre_hook(self._known), table.register_forward_hook(self._fill)]

    def remove(self) -> None:
        """Learned rows mean nothing any more."""
        while self._hooks:
            self._hooks.pop().remove()

    def _known(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (self._asked,) = inputs
        return (self._asked.clamp(max=self.table.num_embeddings - 1),)

    def _fill(self, _: nn.Module, inputs: tuple[Tensor, ...], output_BD: Tensor) -> Tensor:
        asked_B, self._asked = self._asked, None
        if asked_B is None or not len(self.learned_KD):
            return output_BD
        numbers_B = asked_B - self.table.num_embeddings
        rows_BD = self.learned_KD[numbers_B.clamp(min=0)].to(output_BD)
        return torch.where((numbers_B >= 0).unsqueeze(-1), rows_BD, output_BD)

    def learn(self, start: str, plan: LearningPlan) -> Vectors:
        """New rows; `start` is name, random (the row of a label drawn at random) or a label.

        Raises:
            ValueError: a label that there is not.
        """
        return {self.pipeline.labels[label]: [self._learn_one(label, start, plan)] for label in self.labels}

    def _learn_one(self, label: int, start: str, plan: LearningPlan) -> Tensor:
        names, unet = self.pipeline.labels, self.pipeline.unet
        assert self.rows.images is not None
        first = label
        if start == "random":
            first = int(torch.randint(len(names), (), generator=torch.Generator().manual_seed(plan.seed)))
        elif start != "name":
            first = names.index(start)
        learned = LearnedTokens(self.table, [label], self.table.weight[[first]])

        def condition(rows: Tensor) -> Condition:
            return {LABELS: torch.full_like(rows, label)}

        with frozen(self.pipeline):
            try:
                unet.class_embedding = learned
                learn(
                    LabelDenoiser(self.pipeline),
                    self.rows.images[self.rows.labels == label],
                    condition=condition,
                    parameters=[learned.vectors],
                    budget=plan,
                    desc=f"a row for {names[label]}",
                )
            finally:
                unet.class_embedding = self.table
        return learned.vectors.detach()[0].cpu().clone()

    def conditions(self, vectors: Vectors) -> Condition:
        """The numbers of these rows, one for each forgotten label."""
        first = self.table.num_embeddings + len(self.learned_KD)
        rows_KD = torch.stack([vectors[self.pipeline.labels[label]][0] for label in self.labels])
        self.learned_KD = torch.cat([self.learned_KD, rows_KD.to(self.learned_KD)])
        return {LABELS: torch.arange(first, first + len(self.labels))}
