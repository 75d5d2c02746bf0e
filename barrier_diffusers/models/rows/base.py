"""What a row of the table of architectures says, and what several rows share.

Shapes: B batch, P prompts, c latent channels, h and w latent side, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from barrier_diffusers.models.noising import DiffusionNoising, MakeNoising
from barrier_diffusers.objectives.base import Condition


@dataclass(frozen=True)
class CallContext:
    """What a denoiser's call needs to know beside latents and prompt."""

    vae_scale_factor: int  # pixels per latent position and side
    guidance: float | None  # fed to a network with a guidance embedding (Flux dev); None: it has none
    config: Mapping[str, Any] = field(default_factory=dict)  # of the denoiser, which may be wrapped when it is called


Encode = Callable[[Any, list[str]], Condition]
Call = Callable[[nn.Module, Tensor, Tensor, Condition, CallContext], Tensor]


def embeddings_alone(network: nn.Module, condition: Condition) -> Tensor:
    """The text encoders' output as it is."""
    return condition["encoder_hidden_states"]


def guidance_scale(scale: float, num_prompts: int) -> dict[str, Any]:
    """Classifier-free guidance, or the embedded one, by the name that most pipelines give it."""
    return {"guidance_scale": scale}


def without_bins(scale: float, num_prompts: int) -> dict[str, Any]:
    """The same, and images of the size that is asked for instead of the nearest standard one."""
    return {"guidance_scale": scale, "use_resolution_binning": False}


def prompts_themselves(pipeline: Any, prompts: Sequence[str]) -> list[str]:
    """Tokenizers are given the prompts and nothing else."""
    return list(prompts)


def supported(pipeline: Any) -> None:
    """Every pipeline of the class can be trained."""


@dataclass(frozen=True)
class Architecture:
    """One row: all that training has to know about a pipeline class. How its VAE encodes: `models/autoencoders.py`."""

    pipeline_class: type[Any]
    denoiser: str  # name of the component that is trained
    targets: Mapping[str, str]  # maps trained by default -> what they read: image, prompt, text stream, both streams
    encode: Encode  # (pipeline, prompts) -> condition, every tensor with one row per prompt (P, ...)
    call: Call  # (denoiser, noisy, timesteps, condition, context) -> prediction (B, c, h, w)
    noising: MakeNoising = DiffusionNoising
    tokenizers: Mapping[str, int | None] = field(  # component -> tokens it is cut to; None: the tokenizer's own length
        default_factory=lambda: {"tokenizer": None}
    )
    adapter_layers: Callable[[nn.Module], dict[str, Tensor]] = get_peft_model_state_dict  # as save_lora_weights takes
    optional: tuple[str, ...] = ()  # components that may be absent, though the pipeline class insists on None then
    packing: int = 1  # side of the square of latent positions that is one token, where no patch_size says so
    prompt_input: Callable[[nn.Module, Condition], Tensor] = embeddings_alone  # (P, L, D): what "prompt" maps read
    aligned_tokens: bool = True  # whether embeddings stand where `tokenizer` puts the prompt's tokens: UCE needs it
    texts: Callable[[Any, Sequence[str]], list[str]] = prompts_themselves  # what tokenizers are given for prompts
    sampling: Callable[[float, int], dict[str, Any]] = guidance_scale  # (scale, prompts) -> arguments of the pipeline
    check: Callable[[Any], None] = supported  # a ValueError for pipelines of the class that cannot be trained
    # the weights as one file of the first release has them, for other programs; None: they read diffusers' own names
    original_layout: Callable[[Any], dict[str, Tensor]] | None = None

    @property
    def name(self) -> str:
        """The pipeline's class name, as `model_index.json` says it."""
        return self.pipeline_class.__name__

    @property
    def has_adapters(self) -> bool:
        """Whether the pipeline saves and loads LoRA adapters."""
        return hasattr(self.pipeline_class, "save_lora_weights")


CROSS_ATTENTION = {"attn2.to_q": "image", "attn2.to_k": "prompt", "attn2.to_v": "prompt"}


JOINT_ATTENTION = {f"attn.add_{letter}_proj": "text stream" for letter in "qkv"}


def both_streams(attention: str) -> dict[str, str]:
    """Queries, keys and values of an attention over one sequence of text and image tokens."""
    return {f"{attention}.to_{letter}": "both streams" for letter in "qkv"}


def pack(latents: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, h/2 * w/2, 4 c): each 2 x 2 square of positions is one token."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of this size."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def padded(sequences: Sequence[Tensor]) -> Condition:
    """Embeddings of prompts of different lengths, (L_i, D) each, as (P, L, D), and where they are real, (P, L)."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    embeddings = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    mask = torch.arange(embeddings.shape[1]) < lengths[:, None]
    return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask.to(embeddings.device)}


def guidance_of(noisy: Tensor, context: CallContext) -> Tensor | None:
    """The embedded guidance of each row (B,), None for a network without one."""
    return None if context.guidance is None else torch.full((len(noisy),), context.guidance, device=noisy.device)


def real_lengths(condition: Condition) -> list[int]:
    """Tokens of each prompt that are no padding; one transfer from the device."""
    return condition["encoder_attention_mask"].sum(1).long().tolist()


def split_prompts(condition: Condition) -> list[Tensor]:
    """The inverse of `padded`."""
    lengths = real_lengths(condition)
    return [tokens[:length] for tokens, length in zip(condition["encoder_hidden_states"], lengths, strict=True)]


def encode_masked(pipeline: Any, prompts: list[str], **settings: Any) -> Condition:
    """Embeddings (P, L, D) and attention mask (P, L) of pipelines whose `encode_prompt` returns both for the prompts
    and then both for the negative ones. An empty prompt is what the pipeline takes for a missing negative one, which
    may go without the words that it puts before prompts."""
    device = pipeline.text_encoder.device
    empty = [not prompt for prompt in prompts]
    found = pipeline.encode_prompt(prompts, do_classifier_free_guidance=any(empty), device=device, **settings)
    embeddings, mask, *negative = found
    if any(empty):
        chosen = torch.tensor(empty, device=device)
        embeddings = torch.where(chosen[:, None, None], negative[0], embeddings)
        mask = torch.where(chosen[:, None], negative[1], mask)
    return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
