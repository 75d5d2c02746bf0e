"""Tiny random pipelines of every architecture, from the libraries' own classes; nothing is downloaded."""

import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

FASHION = Path(__file__).resolve().parent.parent / "assets" / "fashion_sd"


def clip_tokenizer():
    """The embedded pipeline's tokenizer: 619 tokens, 24 per prompt."""
    return CLIPTokenizer.from_pretrained(FASHION / "tokenizer")


def t5_tokenizer():
    """A unigram tokenizer of single letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits]
    return T5TokenizerFast(vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)], extra_ids=0)


def clip(kind=CLIPTextModel, width=8):
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def t5(width=20):
    config = T5Config(vocab_size=80, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def vae(channels=4, **changes):
    """Three levels, so 4 pixels a side for each latent position."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(
        block_out_channels=(8, 8, 8), latent_channels=channels, norm_num_groups=4, sample_size=32, **kinds, **changes
    ).eval()


def unet(width, **changes):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
        **changes,
    ).eval()


def sd(prediction_type="epsilon"):
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(8),
        scheduler=DDIMScheduler(
            prediction_type=prediction_type, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_velocity():
    return sd("v_prediction")


def sdxl():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 12),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            20,
            **added,
            projection_class_embeddings_input_dim=12 + 6 * 4,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def sd3(with_t5=True, dual_attention_layers=(0,), qk_norm="rms_norm"):
    """SD3.5's layout; SD3 itself has no second attention and no norm of queries and keys."""
    return StableDiffusion3Pipeline(
        vae=vae(4, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection, 12),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=20,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            pos_embed_max_size=8,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sd3_plain():
    """SD3 medium's layout, without T5."""
    return sd3(with_t5=False, dual_attention_layers=(), qk_norm=None)


def flux(guidance_embeds=True):
    """Flux dev's layout: three double and two single blocks, embedded guidance, dynamic shifting."""
    return FluxPipeline(
        vae=vae(2, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=8,
            num_layers=3,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=20,
            pooled_projection_dim=8,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def flux_schnell():
    pipeline = flux(guidance_embeds=False)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    return pipeline


BUILDERS = {build.__name__: build for build in (sd, sd_velocity, sdxl, sd3, sd3_plain, flux, flux_schnell)}


def build(name):
    """The pipeline called `name`, the same at every call."""
    torch.manual_seed(0)
    return BUILDERS[name]()
