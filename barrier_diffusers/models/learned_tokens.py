"""New tokens of a pipeline whose embeddings are learned while no weight changes (arXiv 2208.01618).

Shapes: B prompts, L tokens of a prompt, D embedding features, T new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.models.architectures import get_architecture

TOKEN = "<forgotten>"  # the first new token; the next ones are <forgotten-2>, <forgotten-3>, ...


class LearnedTokens(nn.Module):
    """An embedding layer that knows some tokens more than the layer it stands for, or some of its tokens anew.

    Args:
        layer: the embedding layer it stands for, which keeps its weights.
        token_ids: T ids, of new tokens or of rows of the layer.
        vectors_TD: the tokens' embeddings at the start. They are learned in float32, whatever the layer's type.
    """

    def __init__(self, layer: nn.Module, token_ids: Sequence[int], vectors_TD: Tensor):
        super().__init__()
        self.layer, self.token_ids = layer, list(token_ids)
        self.vectors = nn.Parameter(vectors_TD.detach().float().clone())

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Token ids (B, L) -> embeddings (B, L, D)."""
        places_BL = [ids_BL == token_id for token_id in self.token_ids]
        embedded_BLD = self.layer(ids_BL.masked_fill(torch.stack(places_BL).any(0), 0))
        for is_new_BL, vector_D in zip(places_BL, self.vectors.to(embedded_BLD.dtype), strict=True):
            embedded_BLD = torch.where(is_new_BL.unsqueeze(-1), vector_D, embedded_BLD)
        return embedded_BLD


@dataclass(frozen=True)
class NewWords:
    """New tokens that stand in a pipeline's vocabulary for as long as `learned_tokens` is open."""

    words: str  # what stands for them in a prompt: all tokens, with spaces between
    layers: list[LearnedTokens]  # one for each text encoder
    encoders: list[str]  # names of these

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The embeddings (T, D), one tensor for each text encoder."""
        return [layer.vectors for layer in self.layers]

    def vectors(self) -> dict[str, Tensor]:
        """Text encoder -> its embeddings (T, D) as they are now, on the CPU."""
        return {
            name: layer.vectors.detach().cpu().clone() for name, layer in zip(self.encoders, self.layers, strict=True)
        }


def text_encoders(pipeline: Any) -> list[tuple[str, str]]:
    """Component names (tokenizer, text encoder) of all text encoders that the pipeline has."""
    tokenizers = get_architecture(type(pipeline).__name__).tokenizers
    pairs = [(name, name.replace("tokenizer", "text_encoder")) for name in tokenizers]
    return [pair for pair in pairs if all(getattr(pipeline, name, None) is not None for name in pair)]


def embeddings_of(encoder: Any) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) wherever the encoder holds its token embeddings; T5 holds two modules of one weight."""
    weight = encoder.get_input_embeddings().weight
    found = [(parent, name, child) for parent in encoder.modules() for name, child in parent.named_children()]
    return [held for held in found if isinstance(held[2], nn.Embedding) and held[2].weight is weight]


def start_vectors(tokenizer: Any, layer: nn.Module, words: str | None, count: int, seed: int = 0) -> Tensor:
    """Embeddings (T, D) at which new tokens start: the mean of the words', or without words those of random tokens."""
    weight_VD: Any = layer.weight
    if words is not None:
        ids = tokenizer(words, add_special_tokens=False).input_ids
        return weight_VD[ids].mean(0).expand(count, -1)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(min(len(tokenizer), len(weight_VD))) if token not in special])
    drawn = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed))[:count]
    return weight_VD[ordinary[drawn].to(weight_VD.device)]


@contextmanager
def learned_tokens(pipeline: Any, initial_words: str | None, count: int = 1, seed: int = 0) -> Iterator[NewWords]:
    """The pipeline with new tokens in the vocabulary of each of its text encoders; at the end its own tokenizers and
    layers stand there again.

    Args:
        initial_words: each token starts as the mean of these words' embeddings; None: as random tokens of the
            vocabulary, drawn by `seed`.
        count: number of new tokens T.

    Raises:
        ValueError: a tokenizer knows one of the tokens already.
    """
    tokens = [TOKEN, *(f"{TOKEN[:-1]}-{number}>" for number in range(2, count + 1))]
    with ExitStack() as stack:
        layers = []
        for tokenizer_name, encoder_name in text_encoders(pipeline):
            encoder = getattr(pipeline, encoder_name)
            tokenizer, layer = getattr(pipeline, tokenizer_name), encoder.get_input_embeddings()
            extended = copy.deepcopy(tokenizer)
            if extended.add_tokens(tokens) < count:
                raise ValueError(f"the {tokenizer_name} has a token {tokens[0]} already, which is to be learned")
            ids = extended.convert_tokens_to_ids(tokens)
            start_TD = start_vectors(tokenizer, layer, initial_words, count=count, seed=seed)
            layers.append(LearnedTokens(layer, ids, start_TD))
            stack.callback(setattr, pipeline, tokenizer_name, tokenizer)
            setattr(pipeline, tokenizer_name, extended)
            for parent, name, embedding in embeddings_of(encoder):
                stack.callback(setattr, parent, name, embedding)
                setattr(parent, name, layers[-1])
        yield NewWords(" ".join(tokens), layers, [encoder for _, encoder in text_encoders(pipeline)])
