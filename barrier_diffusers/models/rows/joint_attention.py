"""Rows of transformers on unpacked latents with joint attention: AuraFlow, HunyuanImage 2.1, HiDream-I1."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import AuraFlowPipeline, HiDreamImagePipeline, HunyuanImagePipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from barrier_diffusers.models.noising import FlowNoising
from barrier_diffusers.models.rows.base import JOINT_ATTENTION, Architecture, CallContext, guidance_of
from barrier_diffusers.models.rows.flux import texts_of_qwen
from barrier_diffusers.objectives.base import Condition


def encode_auraflow(pipeline: Any, prompts: list[str]) -> Condition:
    """UMT5's states (P, L, D), 0 where the prompt is padded."""
    device = pipeline.text_encoder.device
    embeddings, *_ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings}


def call_auraflow(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """The time in [0, 1]."""
    return transformer(noisy, timestep=timesteps / 1000, **condition).sample


HUNYUAN_CONDITION = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
)


def encode_hunyuan_image(pipeline: Any, prompts: list[str]) -> Condition:
    """States and masks of Qwen2.5-VL (P, 1000, D), and of ByT5 (P, 128, D) for what the prompt puts in quotes."""
    found = pipeline.encode_prompt(prompts, device=pipeline.text_encoder.device, batch_size=len(prompts))
    return dict(zip(HUNYUAN_CONDITION, found, strict=True))


def call_hunyuan_image(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """Any embedded guidance is told in thousandths."""
    masks = {name: value.long() for name, value in condition.items() if "mask" in name}
    guidance = guidance_of(noisy, context)
    return transformer(
        noisy, timestep=timesteps, guidance=None if guidance is None else guidance * 1000, **condition | masks
    ).sample


def check_hunyuan_image(pipeline: Any) -> None:
    """Refuse networks that are told where each sampling step ends.

    Raises:
        ValueError: a distilled network (mean flow).
    """
    if pipeline.transformer.config.use_meanflow:
        raise ValueError(
            "this HunyuanImagePipeline is the distilled one, whose network predicts the mean velocity between two "
            "timesteps: no loss here trains that; use hunyuanvideo-community/HunyuanImage-2.1-Diffusers"
        )


def distilled_guidance(scale: float, num_prompts: int) -> dict[str, Any]:
    """The embedded guidance; classifier-free guidance is what the pipeline's own guider says."""
    return {"distilled_guidance_scale": scale}


def encode_hidream(pipeline: Any, prompts: list[str]) -> Condition:
    """T5's states (P, L, D), those of all of Llama's layers (P, layers, L, D), and two CLIP encoders' pooled ones."""
    device = pipeline.text_encoder.device
    t5, _, llama, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {
        "encoder_hidden_states_t5": t5,
        "encoder_hidden_states_llama3": llama.transpose(0, 1),
        "pooled_embeds": pooled,
    }


def call_hidream(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """The velocity that comes out runs from noise to image."""
    return -transformer(
        hidden_states=noisy,
        timesteps=timesteps,
        encoder_hidden_states_t5=condition["encoder_hidden_states_t5"],
        encoder_hidden_states_llama3=condition["encoder_hidden_states_llama3"].transpose(0, 1),
        pooled_embeds=condition["pooled_embeds"],
    ).sample


def shift_of_largest(config: Any, latent_shape: tuple[int, int, int], tokens_side: int) -> float:
    """mu of HiDream, that of its largest image whatever the image's size."""
    return calculate_shift(4096)


ROWS = (
    Architecture(
        pipeline_class=AuraFlowPipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_auraflow,
        call=call_auraflow,
        noising=FlowNoising,
        tokenizers={"tokenizer": 256},
    ),
    Architecture(
        pipeline_class=HunyuanImagePipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_hunyuan_image,
        call=call_hunyuan_image,
        noising=FlowNoising,
        tokenizers={"tokenizer": 1000 + 34},
        texts=texts_of_qwen,
        sampling=distilled_guidance,
        check=check_hunyuan_image,
    ),
    Architecture(
        pipeline_class=HiDreamImagePipeline,
        denoiser="transformer",
        targets={f"attn1.to_{letter}_t": "text stream" for letter in "qkv"},
        encode=encode_hidream,
        call=call_hidream,
        noising=partial(FlowNoising, shift=shift_of_largest),
        tokenizers={"tokenizer": 128, "tokenizer_2": 128, "tokenizer_3": 128, "tokenizer_4": 128},
    ),
)
