"""An adversary that learns new tokens for the concept while the network trains (docs/method.md section 8).

Shapes: N forget rows, P distinct prompts of them, B batch, T new tokens, D embedding features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from barrier_diffusers.data.captions import swap_concept
from barrier_diffusers.data.encoding import encode_prompts
from barrier_diffusers.data.stored_rows import StoredRows
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.learned_tokens import TOKEN, learned_tokens
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.training.learning import frozen, learn
from barrier_diffusers.training.robust_config import RobustConfig
from barrier_diffusers.training.seeds import seeded

Vectors = dict[str, list[Tensor]]  # concept -> what was learned for it, e.g. (T, D) for each text encoder


@dataclass
class LearningPlan:
    """What one round of the adversary may spend."""

    seed: int
    num_steps: int
    batch_size: int
    learning_rate: float


class Vocabulary(Protocol):
    """What a kind of model can learn new names in: the words of a prompt, or the rows of a label embedding."""

    row_ids: Tensor  # (N,) row of the tables that `conditions` gives, for each forget row

    def learn(self, start: str, plan: LearningPlan) -> Vectors:
        """New names for each concept with which the network as it is now denoises the forget images best."""
        ...

    def conditions(self, vectors: Vectors) -> Condition:
        """The forget rows' conditions with these names in place of the concepts', as tables (P, ...)."""
        ...


class PromptVocabulary:
    """New tokens of a pipeline's text encoders.

    Args:
        moments: VAE posteriors (N, 2 c, h, w) of the forget images.
        captions, concepts: of each forget row (N).
        count: new tokens T that stand for a concept together.

    Raises:
        ValueError: a caption that does not name its concept.
    """

    def __init__(
        self,
        pipeline: Any,
        moments: Tensor | StoredRows,
        *,
        captions: Sequence[str],
        concepts: Sequence[str],
        count: int = 1,
    ):
        self.pipeline, self.moments, self.count = pipeline, moments, count
        pairs = list(zip(captions, concepts, strict=True))
        for caption, concept in pairs:
            try:
                swap_concept(caption, concept, TOKEN)
            except ValueError as error:
                raise ValueError(
                    f"caption {caption!r} does not name the concept {concept!r}, so no token can stand in its place: "
                    "leave robust.token_rounds at 0"
                ) from error
        self._distinct = sorted(set(pairs))
        self.row_ids = torch.tensor([self._distinct.index(pair) for pair in pairs])

    def _captions(self, vectors: Vectors, words: str) -> list[str]:
        return [
            swap_concept(caption, concept, words) if concept in vectors else caption
            for caption, concept in self._distinct
        ]

    def learn(self, start: str, plan: LearningPlan) -> Vectors:
        """See `Vocabulary`; `start` is name, random, or the words at whose mean each token starts."""
        concepts = sorted({concept for _, concept in self._distinct})
        return {concept: self._learn_one(concept, start, plan) for concept in concepts}

    def _learn_one(self, concept: str, start: str, plan: LearningPlan) -> list[Tensor]:
        pipeline, denoiser = self.pipeline, PipelineDenoiser(self.pipeline)
        own = [number for number, pair in enumerate(self._distinct) if pair[1] == concept]
        rows_of_concept = torch.isin(self.row_ids, torch.tensor(own)).nonzero().flatten()
        words = {"name": concept, "random": None}.get(start, start)
        with frozen(pipeline), learned_tokens(pipeline, words, self.count, plan.seed) as new:
            captions = self._captions({concept: []}, new.words)

            def condition(rows: Tensor) -> Condition:
                asked, of_asked = self.row_ids[rows_of_concept[rows]].unique(return_inverse=True)
                encoded = denoiser.architecture.encode(pipeline, [captions[number] for number in asked])
                return {key: value[of_asked] for key, value in encoded.items()}

            learn(
                denoiser,
                self.moments[rows_of_concept],
                condition=condition,
                parameters=new.parameters,
                budget=plan,
                desc=f"a token for {concept}",
            )
            return [parameter.detach().cpu().clone() for parameter in new.parameters]

    def conditions(self, vectors: Vectors) -> Condition:
        """See `Vocabulary`."""
        table: Condition = {}
        for concept, learned in vectors.items():
            with torch.no_grad(), learned_tokens(self.pipeline, concept, self.count) as new:
                for parameter, vector_TD in zip(new.parameters, learned, strict=True):
                    parameter.copy_(vector_TD)
                encoded = encode_prompts(self.pipeline, self._captions({concept: learned}, new.words))
            own = torch.tensor([pair[1] == concept for pair in self._distinct])
            for key, value in encoded.items():
                table.setdefault(key, value.clone())[own] = value[own]
        return table


class TokenAdversary:
    """New names for the concept, one more after every so many steps; forget batches are then asked for by the
    concept's name or by one of them.

    What it draws follows the seed and is the same in all processes, each of which learns the whole of it.

    Args:
        share: (process index, number of processes).
        device: of the batches.
    """

    def __init__(
        self,
        config: RobustConfig,
        vocabulary: Vocabulary,
        *,
        seed: int,
        share: tuple[int, int] = (0, 1),
        device: torch.device | str = "cpu",
    ):
        self.config, self.vocabulary, self.seed = config, vocabulary, seed
        self.share, self.device = share, device
        self.learned: list[Vectors] = []
        self.tables: list[Condition] = []  # of each one that was learned
        self._row_ids = vocabulary.row_ids.to(device)

    def catch_up(self, step: int) -> None:
        """Learn what is due after so many steps."""
        config = self.config
        while len(self.learned) < min(config.token_rounds, step // config.token_interval):
            number = len(self.learned)
            start = config.token_starts[number % len(config.token_starts)]
            seed = int(torch.randint(2**31, (), generator=seeded(self.seed, "token", number)))
            budget = (config.token_num_steps, config.token_batch_size, config.token_learning_rate)
            self._add(self.vocabulary.learn(start, LearningPlan(seed, *budget)))

    def _add(self, vectors: Vectors) -> None:
        table = self.vocabulary.conditions(vectors)
        self.learned.append(vectors)
        self.tables.append({key: value.to(self.device) for key, value in table.items()})

    def exchange(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """This process's rows of the `number`-th batch, some of them asked for by a learned name, each as likely."""
        if not self.tables:
            return batch
        process, processes = self.share
        size, generator = len(batch["index"]), seeded(self.seed, "names", number)
        chosen = torch.rand(processes * size, generator=generator) < self.config.token_share
        which = torch.randint(len(self.tables), (processes * size,), generator=generator)
        own = slice(process * size, (process + 1) * size)
        return self.named(batch, torch.where(chosen, which, -1)[own])

    def named(self, batch: dict[str, Any], which_B: Tensor) -> dict[str, Any]:
        """The batch, on the adversary's device, with the learned name of this number for each row; -1: its own."""
        condition, rows = batch["condition"], self._row_ids[batch["index"].to(self.device)]
        for number, table in enumerate(self.tables):
            mask = (which_B == number).to(self.device)
            condition = {
                key: torch.where(mask.view(-1, *(1 for _ in value.shape[1:])), table[key][rows].to(value), value)
                for key, value in condition.items()
            }
        learned = (which_B >= 0).to(self.device)
        return {**batch, "condition": condition, "named": batch["condition"], "learned": learned}

    def state_dict(self) -> dict[str, Any]:
        """The learned vectors."""
        return {"learned": self.learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.learned, self.tables = [], []
        for vectors in state["learned"]:
            self._add(vectors)
