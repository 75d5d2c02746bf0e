"""Adversarial prompt search: a few ordinary tokens whose prompts bring the concept back, while no weight changes.

The objective is UnlearnDiffAtk's (arXiv 2310.11868): the denoising loss on images of the concept. The search over
tokens is greedy coordinate gradient (arXiv 2307.15043): the loss's gradient ranks exchanges of single tokens, and the
best of a random sample of them is taken. Only tokens that survive being written as text and read again are tried.
Where a pipeline has several text encoders, the searches take the tokens of one after the other; the loss is always
that of the words as all of them read them.

Shapes: N images, B batch, C candidates, K searched tokens, P distinct captions, V vocabulary, D embedding features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from barrier_diffusers.evaluation.attacks.base import (
    Attempt,
    Forgotten,
    ImageBudget,
    Level,
    Variant,
    register_attack,
    rename_concept,
)
from barrier_diffusers.models.architectures import text_tokenizer, token_limits
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.learned_tokens import embeddings_of, text_encoders
from barrier_diffusers.models.noising import Noised
from barrier_diffusers.training.learning import encode, frozen
from barrier_diffusers.utils.checks import at_least, rules

GAP = "\x00"  # stands for the searched words in a template
Tokens = tuple[int, ...]


@dataclass
class PromptSearchConfig(ImageBudget):
    """Budget of adversarial prompt search."""

    SECTION = "prompt_search."

    num_steps: int = 40  # exchanges of one token, per search
    batch_size: int = 16  # images, each at its own noise and timestep, on which a step's candidates are compared
    num_tokens: int = 5  # K
    num_candidates: int = 16  # exchanges tried per step
    num_ranked: int = 64  # tokens per position, by the gradient, among which the exchanges are drawn
    # from other random tokens, of the pipeline's text encoders in turn; the one with the least loss is used
    num_searches: int = 2
    num_checks: int = 64  # images, noises and timesteps on which that loss is taken
    place: Literal["before", "instead"] = "before"  # before the whole prompt, or instead of the concept's words
    initial_words: str | None = None  # whose tokens, repeated, the searches start from; None: random tokens
    forward_batch_size: int = 128  # samples in one forward pass at most: memory, not budget

    SURVIVORS = 2
    RULES = rules(
        num_tokens=at_least(1),
        num_candidates=at_least(1),
        num_ranked=at_least(1),
        num_searches=at_least(1),
        num_checks=at_least(1),
        forward_batch_size=at_least(1),
    )

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """Enough images, and room for the tokens in every prompt of every text encoder."""
        self.require(forgotten.images, forgotten.concept)
        frames = templates([*forgotten.images["text"], *forgotten.prompts], forgotten.concept, place=self.place)
        for reader in readers(pipeline, frames)[: self.num_searches]:
            speller = reader.speller
            if speller.room < self.num_tokens:
                raise ValueError(
                    f"of the {speller.limit} tokens that the tokenizer reads, the longest prompt "
                    f"leaves {max(speller.room, 0)}, not {self.num_tokens}: lower prompt_search.num_tokens"
                )
            if self.initial_words is not None:
                tokens_of(speller, self.initial_words, count=self.num_tokens)

    def variants(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """standard: the settings as they are. thorough: four starts, each with two and with five tokens."""
        if level == "standard":
            return super().variants(level, forgotten)
        starts = [forgotten.concept, *forgotten.other_words, None]
        return [
            Variant(
                f"from {start or 'random tokens'}, {count} tokens",
                replace(self, initial_words=start, num_tokens=count, num_searches=1),
            )
            for start, count in product(starts, (2, 5))
        ]

    def further(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """Three times as many steps."""
        longer = Variant(f"{3 * self.num_steps} steps", replace(self, num_steps=3 * self.num_steps))
        return [longer] if level == "thorough" else []


def templates(captions: Sequence[str], concept: str, place: str) -> list[str]:
    """The captions with GAP where the searched words will stand.

    Raises:
        ValueError: place is "instead", and a caption does not name the concept.
    """
    if place == "before":
        return [f"{GAP} {caption}" for caption in captions]
    return rename_concept(captions, concept, words=GAP)


def fill(template: str, words: str) -> str:
    """The template with words in its gap."""
    return template.replace(GAP, words)


class Speller:
    """Writes tokens as words, if every template reads the words back as the same tokens.

    Args:
        tokenizer: of a text encoder.
        frames: templates, each with one GAP.
        limit: tokens that are read of a prompt; None: what the tokenizer says.
    """

    def __init__(self, tokenizer: Any, frames: Iterable[str], limit: int | None = None):
        self.tokenizer, self.frames = tokenizer, list(dict.fromkeys(frames))
        self.limit = limit or tokenizer.model_max_length
        self.special = set(tokenizer.all_special_ids)
        halves = [frame.split(GAP, 1) for frame in self.frames]
        heads, tails = ([half[side] for half in halves] for side in (0, 1))
        self.heads, self.tails = self._read(heads), self._read(tails)
        used = max(len(head) + len(tail) for head, tail in zip(self.heads, self.tails, strict=True))
        self.room = self.limit - tokenizer.num_special_tokens_to_add() - used

    def _read(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, truncation=False).input_ids

    def spell(self, tokens: Sequence[int]) -> str | None:
        """The words of these tokens, None if they cannot be typed."""
        words = self.tokenizer.decode(list(tokens)).strip()
        if not words or not words.isprintable() or self.special & set(tokens):
            return None
        read = self._read([fill(frame, words) for frame in self.frames])
        wanted = ([*head, *tokens, *tail] for head, tail in zip(self.heads, self.tails, strict=True))
        return words if all(ids == ours for ids, ours in zip(read, wanted, strict=True)) else None


@dataclass(frozen=True)
class Reader:
    """A text encoder, and how words are written for it."""

    name: str  # of the encoder
    encoder: Any
    speller: Speller

    @property
    def weight_VD(self) -> Tensor:
        """Embeddings of its tokens."""
        weight: Tensor = self.encoder.get_input_embeddings().weight
        return weight.detach()


def readers(pipeline: Any, frames: Sequence[str]) -> list[Reader]:
    """One for each text encoder of the pipeline."""
    limits = token_limits(pipeline)
    return [
        Reader(name, getattr(pipeline, name), Speller(text_tokenizer(pipeline, tokenizer), frames, limits[tokenizer]))
        for tokenizer, name in text_encoders(pipeline)
    ]


@contextmanager
def nudged(encoder: Any, tokens: Tokens, nudge_KD: Tensor) -> Iterator[None]:
    """A text encoder that adds `nudge_KD` to the embeddings of these tokens, where they first stand in a text in this
    order; a text without them is read as ever."""
    wanted_K = torch.tensor(tokens, device=nudge_KD.device)

    def add(_: nn.Module, inputs: Any, embedded_PLD: Tensor) -> Tensor:
        ids_PL = inputs[0]
        if ids_PL.shape[1] < len(tokens):
            return embedded_PLD
        starts_PS = (ids_PL.unfold(1, len(tokens), 1) == wanted_K).all(-1)
        rows_R = starts_PS.any(1).nonzero()[:, 0]
        positions_RK = starts_PS[rows_R].int().argmax(1, keepdim=True) + torch.arange(
            len(tokens), device=ids_PL.device
        )
        shifted = embedded_PLD.clone()
        shifted[rows_R[:, None], positions_RK] += nudge_KD.to(shifted)
        return shifted

    layers = {id(layer): layer for _, _, layer in embeddings_of(encoder)}.values()
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Search:
    """The denoising loss of words in the gaps of the images' captions, and its gradient.

    Args:
        captions, frames: of each image (N), and its template.
        reader: whose tokens are searched.
        moments: VAE posteriors (N, 2 c, h, w).
        forward_batch: samples in one forward pass at most.
    """

    def __init__(
        self,
        pipeline: Any,
        captions: Sequence[str],
        frames: Sequence[str],
        reader: Reader,
        moments: Tensor,
        forward_batch: int,
    ):
        self.pipeline, self.denoiser = pipeline, PipelineDenoiser(pipeline)
        self.reader, self.speller = reader, reader.speller
        self.plain = dict(zip(frames, captions, strict=True))
        self.distinct = list(dict.fromkeys(frames))
        self.frame_ids_N = torch.tensor([self.distinct.index(frame) for frame in frames])
        self.moments, self.forward_batch = moments, forward_batch
        self.device = self.denoiser.network.device

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Noised]:
        """(rows, their noised latents): what losses are compared on."""
        rows_B = torch.randint(len(self.moments), (count,), generator=generator)
        return rows_B, self.denoiser.noised(self.moments[rows_B], generator)

    def _losses(self, words: Sequence[str | None], rows_B: Tensor, drawn: Noised) -> Tensor:
        """Loss of each words, (C,); None stands for the captions as they are."""
        frames, index_B = self.frame_ids_N[rows_B].unique(return_inverse=True)
        asked = [self.distinct[frame] for frame in frames.tolist()]
        texts = [self.plain[frame] if text is None else fill(frame, text) for text in words for frame in asked]
        rows = (torch.arange(len(words))[:, None] * len(asked) + index_B).flatten().to(self.device)
        encoded = self.denoiser.architecture.encode(self.pipeline, texts)
        condition = {key: value[rows] for key, value in encoded.items()}
        noisy, timesteps, target = (
            value.to(self.device).repeat(len(words), *(1,) * (value.ndim - 1))
            for value in (drawn.noisy, drawn.timesteps, drawn.target)
        )
        predicted = self.denoiser.predict(self.denoiser.network, noisy, timesteps, condition)
        return (predicted.float() - target.float()).square().reshape(len(words), -1).mean(1)

    @torch.no_grad()
    def losses(self, words: Sequence[str | None], rows_B: Tensor, drawn: Noised) -> Tensor:
        """Loss of each words, (C,), on the CPU.

        Raises:
            FloatingPointError: one that is not finite.
        """
        group = max(1, self.forward_batch // len(rows_B))
        chunks = [self._losses(words[i : i + group], rows_B, drawn=drawn) for i in range(0, len(words), group)]
        losses_C = torch.cat(chunks).cpu()
        if not torch.isfinite(losses_C).all():
            raise FloatingPointError("prompt_search: non-finite loss: the pipeline's weights or images are damaged")
        return losses_C

    def slopes(self, words: str, tokens: Tokens, rows_B: Tensor, drawn: Noised) -> Tensor:
        """First-order change of the loss when one token is exchanged for another, (K, V).

        Raises:
            ValueError: the encoder does not read the words as these tokens.
        """
        weight_VD = self.reader.weight_VD.float()
        nudge_KD = torch.zeros(len(tokens), weight_VD.shape[1], device=weight_VD.device, requires_grad=True)
        with nudged(self.reader.encoder, tokens, nudge_KD=nudge_KD):
            loss = self._losses([words], rows_B, drawn=drawn).sum()
        (gradient_KD,) = torch.autograd.grad(loss, nudge_KD, allow_unused=True)
        if gradient_KD is None:
            raise ValueError(
                f"prompt_search: the pipeline's {self.reader.name} does not read {words!r} as the tokens that were "
                "searched: leave prompt_search out of attacks"
            )
        now_K1 = (gradient_KD * weight_VD[list(tokens)]).sum(1, keepdim=True)
        return (gradient_KD @ weight_VD.T - now_K1).cpu()


def start_tokens(speller: Speller, allowed: Tensor, count: int, generator: torch.Generator) -> Tokens:
    """Random tokens that can be typed one after the other.

    Raises:
        ValueError: there are none.
    """
    tokens: Tokens = ()
    while len(tokens) < count:
        order = allowed[torch.randperm(len(allowed), generator=generator)].tolist()
        found = next((token for token in order if speller.spell((*tokens, token)) is not None), None)
        if found is None:
            raise ValueError(f"prompt_search finds no {count} tokens that can be typed: lower its num_tokens")
        tokens = (*tokens, found)
    return tokens


def tokens_of(speller: Speller, words: str, count: int) -> Tokens:
    """The tokens of words, repeated until there are `count`.

    Raises:
        ValueError: they cannot be typed one after the other.
    """
    found = speller.tokenizer(words, add_special_tokens=False).input_ids
    tokens = tuple(found[index % len(found)] for index in range(count)) if found else ()
    if not tokens or speller.spell(tokens) is None:
        raise ValueError(
            f"prompt_search.initial_words {words!r}: its tokens cannot be typed {count} in a row: choose other words, "
            "or null for random tokens"
        )
    return tokens


def exchanges(
    slopes_KV: Tensor, tokens: Tokens, speller: Speller, budget: PromptSearchConfig, generator: torch.Generator
) -> dict[str, Tokens]:
    """At most `num_candidates` typeable neighbours of the tokens, drawn among the promising ones: words -> tokens."""
    ranked_KR = slopes_KV.topk(min(budget.num_ranked, slopes_KV.shape[1]), largest=False).indices
    order = torch.randperm(ranked_KR.numel(), generator=generator).tolist()
    found: dict[str, Tokens] = {}
    for choice in order:
        position, rank = divmod(choice, ranked_KR.shape[1])
        token = int(ranked_KR[position, rank])
        if not torch.isfinite(slopes_KV[position, token]) or token == tokens[position]:
            continue
        changed = (*tokens[:position], token, *tokens[position + 1 :])
        words = speller.spell(changed)
        if words is not None:
            found[words] = changed
        if len(found) == budget.num_candidates:
            break
    return found


def ordinary_tokens(reader: Reader) -> Tensor:
    """The ids of all tokens but the special ones."""
    return torch.tensor([token for token in range(len(reader.weight_VD)) if token not in reader.speller.special])


def search(problem: Search, budget: PromptSearchConfig, number: int) -> dict[str, Any]:
    """The words of one search with the least loss on the checks, which all searches share."""
    allowed = ordinary_tokens(problem.reader)
    checks = problem.draw(budget.num_checks, torch.Generator().manual_seed(budget.seed))
    generator = torch.Generator().manual_seed(budget.seed + 1 + number)
    if budget.initial_words is None:
        tokens = start_tokens(problem.speller, allowed, count=budget.num_tokens, generator=generator)
    else:
        tokens = tokens_of(problem.speller, budget.initial_words, count=budget.num_tokens)
    words = problem.speller.spell(tokens)
    assert words is not None
    forbidden_V = torch.ones(len(problem.reader.weight_VD), dtype=torch.bool).index_fill(0, allowed, False)
    checked = {words: problem.losses([words], *checks).item()}
    for _ in trange(budget.num_steps, desc=f"prompt search {number + 1}", leave=False):
        batch = problem.draw(budget.batch_size, generator)
        slopes_KV = problem.slopes(words, tokens, *batch).masked_fill(forbidden_V, torch.inf)
        tried = {words: tokens} | exchanges(
            slopes_KV, tokens, speller=problem.speller, budget=budget, generator=generator
        )
        best = int(problem.losses(list(tried), *batch).argmin())
        words, tokens = list(tried.items())[best]
        if words not in checked:
            checked[words] = problem.losses([words], *checks).item()
    words = min(checked, key=lambda key: checked[key])
    plain = problem.losses([None], *checks).item()
    return {"words": words, "loss": checked[words], "plain_loss": plain, "tokens_of": problem.reader.name}


@register_attack("prompt_search", PromptSearchConfig)
def prompt_search(pipeline: Any, forgotten: Forgotten, budget: PromptSearchConfig) -> Attempt:
    """Find the words on held-out images of the concept and their captions, then ask the plain prompts with them."""
    images = budget.choose(forgotten.images)
    frames = templates(images["text"], forgotten.concept, place=budget.place)
    asked = templates(forgotten.prompts, forgotten.concept, place=budget.place)
    all_readers = readers(pipeline, [*frames, *asked])
    with frozen(pipeline):
        moments = encode(pipeline, images, resolution=forgotten.resolution)
        searches = []
        for number in range(budget.num_searches):
            reader = all_readers[number % len(all_readers)]
            problem = Search(pipeline, images["text"], frames, reader, moments, budget.forward_batch_size)
            searches.append(search(problem, budget=budget, number=number))
        best = min(searches, key=lambda found: found["loss"])
        prompts = [fill(frame, best["words"]) for frame in asked]
        made = generate(pipeline, prompts, sampling=forgotten.sampling, desc="images of the prompts found")
    return Attempt(made, prompts, len(images), {"searches": searches})
